"""What all training stages share: counting tokens, atomic checkpoints, mixed precision, watching for divergence."""

import contextlib
import inspect
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from linearard.capture import masks_can_be_left_out, transformers_model, without_masks
from linearard.errors import UserError
from linearard.liger import liger_kernels
from linearard.models import make_saveable
from linearard.precision import frozen_weights_in, inputs_cast_once
from linearard.rope import frequencies_are_fixed
from linearard.step_graphs import StepGraphs
from linearard.training_config import StageConfig

# In a checkpoint: the seconds of training up to it.
SECONDS_FILE = "seconds.json"
# On long sequences attention is most of a step, and cuDNN's is the fastest where it can run.
LONG_TEXT_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class StageTrainer(Trainer):
    """transformers' Trainer as every stage uses it.

    Losses are sums over items (tokens) divided by the items of all micro-batches and processes of an optimizer step, so
    that accumulation changes nothing. Checkpoints appear under their names only when complete, and never hold weights
    that are not finite; a loss that is not finite stops the run with a UserError.

    With an `eval_dataset`, `evaluate()` gives the loss as eval_loss, the mean over the rows of the mean loss of their
    batch; there are no labels, so `compute_metrics` is not called.

    A stage overrides `compute_loss` and, where its items are not the real tokens of a batch, `item_count`.
    """

    args: StageConfig
    attention: Sequence[SDPBackend] = ()  # torch's, the first that can run is taken; none: in torch's own order

    def __init__(self, model: nn.Module, args: StageConfig, **kwargs: Any) -> None:
        if args.save_strategy != SaveStrategy.NO:
            make_saveable(transformers_model(model))
        config = transformers_model(model).config
        use_cache = config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        config.use_cache = use_cache  # Trainer switches it off for training, and it would be saved that way
        # The losses are divided by the items of all micro-batches already; Trainer must not divide them again.
        self.model_accepts_loss_kwargs = True
        self.watch = DivergenceWatch()
        self.add_callback(self.watch)
        self._forward_arguments = set(inspect.signature(transformers_model(model).forward).parameters)
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0
        self._graphs: StepGraphs | None = None
        self._staging: Path | None = None
        self._begin = time.perf_counter()
        self.seconds_before = 0.0  # of training, up to the checkpoint that was resumed

    # --- one optimizer step --------------------------------------------------------------------------------------

    def item_count(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of items of a micro-batch that its loss sums over, as a tensor on the batch's device."""
        mask = batch.get("attention_mask")
        return torch.tensor(batch["input_ids"].numel()) if mask is None else (mask != 0).sum()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step and the number of their items on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        count = torch.stack([self.item_count(batch).cpu() for batch in samples]).sum().to(device)
        return samples, self.accelerator.gather(count.reshape(1)).sum()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast for all of the loss: accelerate covers only the forward pass of the student."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model's forward takes, without labels: the losses are computed outside of it."""
        return {name: value for name, value in inputs.items() if name in self._forward_arguments and name != "labels"}

    def masks_of(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Runs models on `inputs` without looking for padding or packed sequences, where they name neither."""
        named = inputs.keys() & {"attention_mask", "position_ids"}
        return contextlib.nullcontext() if named else without_masks(*self.frozen_modules())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch as in Trainer; replayed from a CUDA graph where that is possible."""
        # Batches with padding or packed sequences ask the GPU for their structure.
        if self._graphs is None or set(inputs) - {"input_ids", "labels"}:
            return super().training_step(model, inputs, num_items_in_batch)
        tensors: dict[str, Any] = dict(self._prepare_inputs(inputs))
        if num_items_in_batch is not None:
            tensors["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        results = self._graphs.run(self.current_gradient_accumulation_steps, tensors, partial(self._step, model))
        loss = results.pop("loss")
        self.remember(results)
        return loss

    def _step(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a micro-batch, after its backward pass, and the parts that it would have remembered."""
        batch = dict(tensors)
        num_items = batch.pop("num_items_in_batch", None)
        kept, self._parts = self._parts, {}
        since = self._parts_since
        try:
            loss = super().training_step(model, batch, num_items)
            return {"loss": loss, **self._parts}
        finally:
            self._parts, self._parts_since = kept, since

    @contextlib.contextmanager
    def graphed(self) -> Iterator[None]:
        """Replay steps from CUDA graphs while the body runs, where `cuda_graphs` asks for it and nothing forbids it."""
        wanted = self.args.cuda_graphs and self.args.device.type == "cuda" and self.args.world_size == 1
        # Checkpointing saves the state of random numbers, which a capture does not allow.
        wanted = wanted and not (self.args.gradient_checkpointing or self.args.torch_compile)
        models = self.frozen_modules()
        if wanted and all(masks_can_be_left_out(model) and frequencies_are_fixed(model) for model in models):
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._graphs = StepGraphs(trained, alone=self.args.gradient_accumulation_steps == 1)
        try:
            yield
        finally:
            self._graphs = None

    def stop_graphs(self) -> None:
        """Run the steps that are left without CUDA graphs: a profiler sees no operators in a replay."""
        self._graphs = None

    # --- evaluation ----------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, for which Trainer's own would want labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # --- training ------------------------------------------------------------------------------------------------

    def frozen_modules(self) -> list[nn.Module]:
        """The models of a step. A mixed-precision run holds their frozen linear weights in its dtype."""
        return [self.model]

    def attention_modules(self) -> list[nn.Module]:
        """Attention modules whose hidden states are cast once for all projections."""
        return []

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As in Trainer, by fused kernels. Under mixed precision, casts that steps would repeat are made once."""
        self._begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.args.liger_kernels and self.args.device.type == "cuda" and not self.args.torch_compile:
                stack.enter_context(liger_kernels(self.frozen_modules()))
            if self.args.bf16:
                for module in self.frozen_modules():
                    stack.enter_context(frozen_weights_in(module, torch.bfloat16))
                stack.enter_context(inputs_cast_once(self.attention_modules()))
            if self.attention:
                stack.enter_context(sdpa_kernel(list(self.attention), set_priority=True))
            stack.enter_context(self.graphed())
            result = super().train(*arguments, **keywords)
        self._check_weights()
        return result

    # --- logging -------------------------------------------------------------------------------------------------

    def remember(self, parts: Mapping[str, Tensor]) -> None:
        """Add detached parts of the loss to those that the next log shows."""
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, part in parts.items():
            self._parts[name] = self._parts[name] + part if name in self._parts else part

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the mean of each part of the loss since the last one beside the loss."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._parts_since)
            names = sorted(self._parts)
            values = self.accelerator.reduce(torch.stack([self._parts[name] for name in names]), "sum")
            logs |= {name: value / steps for name, value in zip(names, values.tolist(), strict=True)}
            self._parts = {}
        super().log(logs, start_time)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                self._stop_not_finite(f"{name} is {logs[name]}")

    def _check_weights(self) -> None:
        trained = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        if not torch.stack([norm.float() for norm in torch._foreach_norm(trained)]).isfinite().all():
            self._stop_not_finite("a trained weight is not finite")

    def _stop_not_finite(self, what: str) -> None:
        kept = checkpoints(super()._get_output_dir(None))
        last = f"the last good checkpoint is {str(kept[-1])!r}" if kept else "there is no checkpoint to go back to"
        raise UserError(
            f"training diverged at step {self.state.global_step}: {what}; {last}; lower learning_rate or max_grad_norm"
        )

    # --- checkpoints ---------------------------------------------------------------------------------------------
    # Trainer writes a checkpoint file by file. Here it does so in a directory beside the others, which gets its name
    # when it is complete: a process killed at any time leaves whole checkpoints only.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The loss may be logged less often than checkpoints are written, and one bad step follows its loss.
        self._check_weights()
        run_directory = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_directory / ".incomplete-checkpoint"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run_directory / name)  # and not in the directory beside the others
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            seconds = self.seconds_before + time.perf_counter() - self._begin
            (staging / name / SECONDS_FILE).write_text(json.dumps(seconds), encoding="utf-8")
            shutil.rmtree(run_directory / name, ignore_errors=True)
            os.replace(staging / name, run_directory / name)
            shutil.rmtree(staging, ignore_errors=True)
            self._delete_old_checkpoints(run_directory)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / SECONDS_FILE
        self.seconds_before = float(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0.0

    def _delete_old_checkpoints(self, run_directory: Path) -> None:
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            for checkpoint in checkpoints(run_directory)[:-limit]:
                if str(checkpoint) != self.state.best_model_checkpoint:
                    shutil.rmtree(checkpoint, ignore_errors=True)


class DivergenceWatch(TrainerCallback):
    """Warns once when the smoothed loss has risen to `RISE` times its lowest value: long before it overflows."""

    RISE = 1.5
    SMOOTHING = 0.8

    def __init__(self, warn: Callable[[str], None] = warnings.warn) -> None:
        self.warn = warn
        self._smoothed: float | None = None
        self._lowest = math.inf
        self._warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Take the newest loss into account."""
        if not logs or "loss" not in logs:
            return
        before = logs["loss"] if self._smoothed is None else self._smoothed
        self._smoothed = self.SMOOTHING * before + (1 - self.SMOOTHING) * logs["loss"]
        self._lowest = min(self._lowest, self._smoothed)
        if self._smoothed > self.RISE * self._lowest and not self._warned:
            self._warned = True
            self.warn(
                f"the loss rises: {self._smoothed:.4g} around step {state.global_step}, it had been {self._lowest:.4g};"
                " the learning rate may be too high"
            )


def checkpoints(run_directory: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path for path in Path(run_directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))
