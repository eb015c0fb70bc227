"""Keys and values of a batch: begun from what prompts share, written in place, joined with another batch's.

All rows end in the same column, so what a model sees of one is as if it were padded on the left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_BLOCK = 64
"""Columns by which memory grows: the library's layer copies all at each token."""
_WORTH = 512
"""Tokens that a prefix must save to be computed on its own."""
_LEAST = 16
"""Tokens below which what is alike is not worth a copy."""
_ROWS, _LONG = 4, 256
"""Rows, and tokens that they begin with, from which on one copy serves them best: two attentions for one cost too."""
_KEPT = 4
"""Prefixes that outlive the batch which they were computed for."""


class Layer(DynamicLayer):  # type: ignore[misc]  # its types aren't read
    """Keys and values of one layer, in memory that is taken in blocks."""

    def __init__(self, buffers: tuple[Tensor, Tensor] | None = None, width: int = 0) -> None:
        super().__init__()
        if buffers is not None:
            self._show(buffers, width)

    def _show(self, buffers: tuple[Tensor, Tensor], width: int) -> None:
        self.is_initialized = True
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self._buffers = buffers
        self.keys, self.values = (buffer[:, :, :width] for buffer in buffers)

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new ones behind the old."""
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if not start or end > self._buffers[0].shape[2]:
            grown = _like(keys, len(keys), end), _like(values, len(values), end)
            if start:
                grown[0][:, :, :start], grown[1][:, :, :start] = self.keys, self.values
            self._buffers = grown
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start:end] = new
        self._show(self._buffers, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, each in its place or in that of one that goes."""
        places = torch.arange(len(indices), device=indices.device)
        moved = places[indices != places]
        for shown in (self.keys, self.values):
            shown[moved] = shown[indices[moved]]
        first, second = self._buffers
        self._show((first[: len(indices)], second[: len(indices)]), self.keys.shape[2])


def _like(tensor: Tensor, rows: int, width: int) -> Tensor:
    return tensor.new_empty((rows, tensor.shape[1], width + _BLOCK, tensor.shape[3]))


@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, with its keys and values by layer, in the shape of one row."""

    ids: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with all of it, and has a last token of its own."""
        return len(self.ids) < len(prompt) and prompt[: len(self.ids)] == self.ids


def plain(model: PreTrainedModel) -> bool:
    """Whether all that a model keeps of a text are keys and values of each token."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def fresh(model: PreTrainedModel) -> DynamicCache:
    """An empty cache; layers that slide or are of another kind stay the library's."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def begun(
    model: PreTrainedModel, prefixes: Sequence[Prefix | None], pads: Sequence[int], start: int, skip: int = 0
) -> DynamicCache:
    """A cache whose first `start` columns are each row's padding and then its prefix, as far as it reaches.

    The first `skip` tokens of the prefixes are left out.
    """
    cache = fresh(model)
    if not start:
        return cache
    shift = torch.tensor(pads, device=model.device)[:, None]
    columns = (torch.arange(start, device=model.device) - shift).clamp(min=0) + skip
    by_prefix = {id(prefix): (prefix, [n for n, one in enumerate(prefixes) if one is prefix]) for prefix in prefixes}
    some = next(prefix for prefix in prefixes if prefix)
    for at, shapes in enumerate(some.layers):
        buffers = []
        for which, shape in enumerate(shapes):
            buffer = _like(shape, len(prefixes), start)
            for prefix, rows in by_prefix.values():
                # Padding is masked, but memory as it comes may hold NaN: there, too, goes something that can be read.
                known = prefix.layers[at][which][0][:, columns[rows]].transpose(0, 1) if prefix else 0
                buffer[rows, :, :start] = known
            buffers.append(buffer)
        cache.layers[at] = Layer((buffers[0], buffers[1]), start)
    return cache


def joined(one: DynamicCache, other: DynamicCache, width: int) -> DynamicCache:
    """The rows of both, over their last `width` columns; both are spent."""
    for at, pair in enumerate(zip(one.layers, other.layers, strict=True)):
        buffers = []
        for which in ("keys", "values"):
            parts = [getattr(layer, which) for layer in pair]
            buffer, row = _like(parts[0], sum(map(len, parts)), width), 0
            for part in parts:
                shown = part[:, :, -width:]
                buffer[row : row + len(part), :, : width - shown.shape[2]] = 0
                buffer[row : row + len(part), :, width - shown.shape[2] : width] = shown
                row += len(part)
            buffers.append(buffer)
        one.layers[at] = Layer((buffers[0], buffers[1]), width)
        other.layers[at] = None  # layer by layer, so that memory isn't taken twice
    return one


def spelt(past: DynamicCache, prefix: Prefix, pads: Sequence[int]) -> None:
    """Copy what all rows share into each, between its padding and its own."""
    count = len(prefix.ids)
    for at, layer in enumerate(past.layers):
        buffers = []
        for own, shape in zip((layer.keys, layer.values), prefix.layers[at], strict=True):
            width = count + own.shape[2]
            buffer = _like(own, len(own), width)
            buffer[:, :, :count], buffer[:, :, count:width] = 0, own
            for row, pad in enumerate(pads):
                buffer[row, :, pad : pad + count] = shape[0]
            buffers.append(buffer)
        past.layers[at] = Layer((buffers[0], buffers[1]), width)


def cut(past: DynamicCache, count: int) -> None:
    """Let go of so many columns, as many as what all rows begin with: their padding then hides what was behind it."""
    for at, layer in enumerate(past.layers):
        width = layer.keys.shape[2] - count
        # Copied, or the memory before them would stay taken.
        buffers = [_like(kept, len(kept), width) for kept in (layer.keys, layer.values)]
        for buffer, kept in zip(buffers, (layer.keys, layer.values), strict=True):
            buffer[:, :, :width] = kept[:, :, count:]
        past.layers[at] = Layer((buffers[0], buffers[1]), width)


class Prefixes:
    """What prompts begin with, the latest few: computed once, and served to all that begin alike."""

    def __init__(self) -> None:
        self._kept: list[Prefix] = []

    def longest(self, prompt: Sequence[int]) -> tuple[Prefix | None, int]:
        """The prefix that shares most tokens with a prompt, and how many. The last token is the prompt's own."""
        found = max(self._kept, key=lambda prefix: _shared(prefix.ids, prompt[:-1]), default=None)
        known = _shared(found.ids, prompt[:-1]) if found else 0
        if found is None or known < _LEAST:
            return None, 0
        self._kept.remove(found)  # it was used last
        self._kept.append(found)
        return found, known

    def common(self, prompts: Sequence[list[int]]) -> Prefix | None:
        """What all of these prompts begin with, as far as it is known, if it is worth sharing."""
        if len(prompts) < _ROWS:
            return None
        first, last = min(prompts), max(prompts)
        found, known = self.longest(first[: _shared(first, last[:-1]) + 1])
        if found is None or known < _LONG:
            return None
        return Prefix(found.ids[:known], [(k[:, :, :known], v[:, :, :known]) for k, v in found.layers])

    def wanted(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Beginnings that are worth computing for these prompts, shorter ones first; `add` each before the next."""
        return self._within(sorted(prompts), 0)

    def _within(self, prompts: list[list[int]], base: int) -> Iterator[list[int]]:
        if not prompts[1:]:
            return
        depth = _shared(prompts[0], prompts[-1][:-1])  # of all, since they are sorted
        known = max(base, self.longest(prompts[0][: depth + 1])[1])
        if (depth - known) * (len(prompts) - 1) >= _WORTH:
            yield prompts[0][:depth]
            known = depth
        start = 0
        for at in range(1, len(prompts) + 1):
            if at == len(prompts) or prompts[at][depth : depth + 1] != prompts[start][depth : depth + 1]:
                if at - start < len(prompts):
                    yield from self._within(prompts[start:at], known)
                start = at

    def add(self, prefix: Prefix) -> None:
        """Keep one, until `trim`."""
        self._kept.append(prefix)

    def trim(self) -> None:
        """Let go of all but the latest few."""
        del self._kept[:-_KEPT]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        mid = (low + high + 1) // 2
        low, high = (mid, high) if one[low:mid] == other[low:mid] else (low, mid - 1)
    return low
