"""How many replies fit into memory at once, by what is free now and by what one takes."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

CHUNK = 4096
"""Tokens of prompts, padding included, that go through the model at once: what they take doesn't grow with a batch."""
_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of what is free. On a CPU to take more than there is ends in a kill, which nobody can catch, and others run there."""
_SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Limit, use, and where it is told what of it is given back on demand, in both versions."""


def ran_out(error: Exception) -> bool:
    """Whether an error is that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free(device: torch.device, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may still be taken: of a GPU, or of this machine within the limits of its container."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    left = [int(psutil.virtual_memory().available)]
    for limit, used, stat, given_back in _CGROUPS:
        try:
            most, now = ((root / name).read_text().strip() for name in (limit, used))
            told = dict(line.split() for line in (root / stat).read_text().splitlines())
            left.append(int(most) - int(now) + int(told.get(given_back, 0)))
        except (OSError, ValueError):  # another version's, no container's, or "max"
            continue
    return max(min(left), 0)


class Room:
    """What a model's batches take. It learns where memory ran out all the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        size = model.dtype.itemsize
        self._device = model.device
        with torch.inference_mode():  # of two tokens: what a model keeps is known best by itself
            ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
            cache = model(input_ids=ids, use_cache=True).past_key_values
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        self._column = sum(tensor.nbytes for tensor in kept) // 2
        self._widened = 2 * config.hidden_size * size
        """Keys and values of a layer are spelt out for every head for as long as it takes."""
        self._row = 16 * config.vocab_size
        """Logits, and in float32 and float64 what is made of them."""
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self._chunk = CHUNK * size * (8 * config.hidden_size + 3 * inner)
        self._most: int | None = None

    def rows(self, columns: Sequence[int], held: int = 0) -> int:
        """How many rows fit, of those whose columns (tokens of prompt, padding and reply) are given; at least one.

        All rows of a batch are as wide as its widest. `held` are columns, of all rows together, that are now taken
        and will be let go.
        """
        share = _SHARE.get(self._device.type, _SHARE["cpu"])
        left = share * (free(self._device) + held * self._column) - self._chunk
        widest = 0
        for count, width in enumerate(columns):
            widest = max(widest, width)
            cells = (count + 1) * widest
            # The mask of a chunk, which is made of booleans first, is as wide as the batch.
            needed = cells * (self._column + self._widened) + (count + 1) * self._row + 8 * CHUNK * widest
            if count and (needed > left or (self._most is not None and cells > self._most)):
                return count
        return len(columns)

    def shrink(self, rows: int, width: int) -> None:
        """Memory ran out over so many rows of so many columns: from now on, at most half of that."""
        self._most = rows * width // 2
