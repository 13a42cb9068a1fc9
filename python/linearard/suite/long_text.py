"""Perplexity by position: how well a model predicts the first tokens of a long document, and how well the last."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearard.capture import decoder_of
from linearard.data import BUNDLED, HELD_OUT_CORPUS, make_blocks, read_texts
from linearard.errors import UserError
from linearard.suite.figures import NLL, Figure

TASK = "perplexity"
_POSITIONS_AT_ONCE = 512  # of the head: 512 x 128K entries of vocabulary are 256 MiB in float32
_PROBE = 8  # tokens on which the chunked head is compared with the model's own


def read_documents(files: Sequence[str]) -> list[str]:
    """The documents of `files`; raises UserError for files that cannot be used."""
    texts = list(read_texts([HELD_OUT_CORPUS if file == BUNDLED else file for file in files]))
    if files and not texts:
        raise UserError(f"the long files have no documents: {', '.join(files)}")
    return texts


def document_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, windows: int
) -> list[Tensor]:
    """The first windows [`windows`, length] of ids of each document that has so many, begun as the tokenizer does."""
    blocks = [make_blocks([text], tokenizer, length, blocks_per_text=windows) for text in texts]
    enough = [block for block in blocks if len(block) == windows]
    if not enough:
        raise UserError(
            f"the long documents are too short: none of {len(texts)} has {windows} windows of {length:,} tokens"
        )
    return enough


@torch.inference_mode()
def position_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of tokens 1 to N - 1 of `input_ids` [1, N], as [N - 1] in float32 on the CPU.

    One pass of the decoder without a cache; the head sees few positions at a time, so that logits of [N, vocabulary]
    never exist. Raises UserError for models whose logits are more than head and soft cap.
    """
    _check_head(model, input_ids[:, :_PROBE])
    hidden = decoder_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0, :-1]
    targets = input_ids[0, 1:].to(hidden.device)
    losses = [
        cross_entropy(_logits(model, some), target, reduction="none").cpu()
        for some, target in zip(hidden.split(_POSITIONS_AT_ONCE), targets.split(_POSITIONS_AT_ONCE), strict=True)
    ]
    return torch.cat(losses)


def perplexity_figures(
    model: PreTrainedModel, documents: Sequence[Tensor], bucket: int, advance: Callable[[int], None] = lambda done: None
) -> list[Figure]:
    """Mean negative log-likelihood of all positions, and of each bucket of positions; one value per document.

    documents: [windows, length] each, as from `document_windows`. Position p is that of the predicted token, so that
    the first bucket has one prediction less than the others. advance: called with 1 after each document.
    """
    length = documents[0].shape[1]
    whole: list[float] = []
    buckets: list[list[float]] = [[] for _ in range(0, length, bucket)]
    for document in documents:
        losses = torch.stack([position_losses(model, window.to(model.device)) for window in document.split(1)]).double()
        whole.append(float(losses.mean()))
        for index, values in enumerate(buckets):
            # Column p - 1 is position p.
            values.append(float(losses[:, max(index * bucket - 1, 0) : (index + 1) * bucket - 1].mean()))
        advance(1)
    figures = [Figure(TASK, NLL, tuple(whole), length)]
    if len(buckets) > 1:
        figures += [
            Figure(TASK, NLL, tuple(values), length, positions=(index * bucket, min((index + 1) * bucket, length)))
            for index, values in enumerate(buckets)
        ]
    return figures


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [positions, vocabulary] in float32 of last hidden states [positions, hidden]."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    logits: Tensor = head(hidden).float()
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _check_head(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Compare the chunked head with the model's own logits on a few tokens: a model may do more to them."""
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden = decoder_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    largest = float(expected.abs().max())
    if not torch.allclose(_logits(model, hidden), expected, rtol=0, atol=tolerance * max(largest, 1.0)):
        raise UserError(
            f"{type(model).__name__} changes its logits after the head in a way that perplexity by position does not "
            "know"
        )
