"""What `torchrun -m tests.train.devices BASE OUT NAME...` trains, in each of its processes."""

import sys
from pathlib import Path

import torch

from preceptor.train.config import SftConfig
from preceptor.train.sft import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(13)]
"""Shared by two in batches of two, one is alone at the end."""
VALIDATION = [tiny.row(number) for number in range(20, 23)]
_FULL = SftConfig(method="full", batch_size=2, accumulation=2, epochs=2, lr=5e-3, checkpoint_steps=3)
CONFIGS = {
    "full": _FULL.model_copy(update={"embedding_lr": 1e-2}),
    "packed": _FULL.model_copy(update={"packing": True, "batch_size": 3}),
    "lora": _FULL.model_copy(update={"method": "lora", "rank": 2, "dropout": 0.0}),
}


def grade(row, reply) -> float:
    """What tells checkpoints apart before anything is learnt: how many kinds of characters an answer has."""
    return len(set(reply.text)) / 400


def learn(base: Path, out: Path, name: str) -> dict[str, float]:
    """Train as this configuration says, graded at each checkpoint."""
    return train(base, ROWS, out / name, CONFIGS[name], (VALIDATION, grade))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, made, *names = sys.argv[1:]
    for each in names:
        learn(Path(folder), Path(made), each)
