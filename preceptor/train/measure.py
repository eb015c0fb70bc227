"""How long a training step takes on this machine: one and two layers are timed, the others are as many times more."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PretrainedConfig

from preceptor.model import load
from preceptor.train.blank import furnish, student, with_layers
from preceptor.train.config import SftConfig
from preceptor.train.memory import GIB, Batch, step

_WORK = 1e11
"""Operations of a layer that are timed at most, and """
_TOKENS = 2048
"""tokens, on a processor: seconds. Longer batches go by their tokens."""


@dataclass(frozen=True)
class Card:
    """Where training is to run."""

    name: str
    size: int
    """Bytes."""
    gpu: bool

    @classmethod
    def of(cls, wanted: float | None) -> Self:
        """A GPU of so many GiB; by default this machine's, or its memory where it has none."""
        if wanted is not None:
            return cls(f"a card of {wanted:g} GiB", round(wanted * GIB), gpu=True)
        if torch.cuda.is_available():
            known = torch.cuda.get_device_properties(0)
            return cls(known.name, known.total_memory, gpu=True)
        return cls("this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), gpu=False)


def precision(folder: Path | None, *, gpu: bool) -> torch.dtype:
    """What training computes in: on a GPU half precision, on a CPU what is the faster for the model of a folder."""
    if gpu:
        return torch.bfloat16
    return load.torch_dtype(folder) if folder else torch.float32


@dataclass(frozen=True)
class Seconds:
    """What a batch takes, forward and backward, and what the optimizer takes."""

    batch: float
    update: float
    tokens: int
    """That were timed; a batch of more is as many times longer."""


def seconds(config: PretrainedConfig, how: SftConfig, batch: Batch, compute: torch.dtype) -> Seconds:
    """Time a step of the real loss, at the model's width and vocabulary, with contents that don't matter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed = batch if device.type == "cuda" else _smaller(config, batch)
    one, two = (_timed(with_layers(config, layers), how, timed, compute, device) for layers in (1, 2))
    more = int(config.num_hidden_layers) - 1
    scale = batch.rows * batch.length / (timed.rows * timed.length)
    passes, updates = (first + max(second - first, 0.0) * more for first, second in zip(one, two, strict=True))
    return Seconds(passes * scale, updates, timed.rows * timed.length)


def _smaller(config: PretrainedConfig, batch: Batch) -> Batch:
    width = int(config.hidden_size)
    layer = 4 * width * width + 3 * width * int(getattr(config, "intermediate_size", 4 * width))
    tokens = min(max(int(_WORK / (6 * layer)), 32), _TOKENS)
    length = min(batch.length, tokens)
    rows = max(min(batch.rows, tokens // length), 1)
    answers = max(batch.answers * rows * length // (batch.rows * batch.length), 1)
    return Batch(rows, length, answers, batch.packed)


def _timed(
    config: PretrainedConfig, how: SftConfig, batch: Batch, compute: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Seconds of the passes and of the optimizer, the lesser of two; a first time, which is slower, doesn't count."""
    model = student(config, how, compute)
    furnish(model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
    passes, updates = [], []
    for _ in range(3):
        passes.append(_clock(lambda: step(model, batch, compute), device))
        updates.append(_clock(optimizer.step, device))
        optimizer.zero_grad()
    return min(passes[1:]), min(updates[1:])


def _clock(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
