"""Which examples are trained on together, and as what tensors.

Either way a step sees about `batch_size` rows, so that packing changes speed and not the schedule. Rows of
like length are padded at the right, which needs no mask: no token looks at what comes after it. Packed rows
carry positions that start anew at each document and no mask either: that alone keeps documents apart.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader

from preceptor.model.tokens import IGNORED, Example
from preceptor.train.config import Mix
from preceptor.train.store import Store

Floats = NDArray[np.float32]
Adjust = Callable[[Floats, Floats], tuple[Floats, Floats]]
"""Makes log-probabilities (n, k), and the mass beyond them (n,), other ones."""

_POOL = 50
"""Batches' worth of rows that are sorted by length together: little padding, and still a shuffle."""

_PACK = 512
"""Tokens of a packed row at least. Attention under a block mask costs their square, so not more."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One or several examples in a row."""

    ids: list[int]
    labels: list[int]
    weights: list[float]
    """How much each label counts."""
    places: list[int]
    """Of each label in a store of a teacher's beliefs; -1 where nothing is believed of it."""
    lengths: list[int]


def rows(examples: Sequence[Example]) -> list[Packed]:
    """Each example as a row of its own."""
    return [Packed(e.ids, e.labels, _weights(e), _places(e), [len(e.ids)]) for e in examples]


def pack(examples: Sequence[Example]) -> list[Packed]:
    """Examples put together to rows of like length; none is cut, since the longest one fits."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    columns = {
        "ids": [e.ids for e in examples],
        "labels": [e.labels for e in examples],
        "weights": [_weights(e) for e in examples],
        "places": [_places(e) for e in examples],
    }
    length = max(_PACK, *(len(example.ids) for example in examples), 1)
    packed = pack_dataset(datasets.Dataset.from_dict(columns), length, "bfd")
    return [Packed(row["ids"], row["labels"], row["weights"], row["places"], row["seq_lengths"]) for row in packed]


class Rows(Sequence[Packed]):
    """The rows by number. Row ~n is row n as if nothing in it were to learn: it fills a batch that others have."""

    def __init__(self, rows: Sequence[Packed]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        row = self._rows[at if at >= 0 else ~at]
        mute = {"labels": [IGNORED] * len(row.ids), "weights": [0.0] * len(row.ids), "places": [-1] * len(row.ids)}
        return row if at >= 0 else replace(row, **mute)


class Batches(BatchSampler):
    """Row numbers of each batch, a pure function of seed and epoch, so that a resumed run sees the same.

    Of several devices each takes every n-th batch, so that together they see what one alone would. Where the last
    batches don't go round, the others get a row with nothing to learn.
    """

    def __init__(self, rows: Sequence[Packed], batch_size: int, seed: int, rank: int = 0, devices: int = 1) -> None:
        """`batch_size` counts examples; packed rows hold several each."""
        examples = sum(len(row.lengths) for row in rows)
        self.batch_size = max(1, round(batch_size * len(rows) / examples))
        self.drop_last = False
        self.epoch = 0
        self._lengths = [len(row.ids) for row in rows]
        self._seed, self._rank, self._devices = seed, rank, devices

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self._lengths) / self.batch_size) / self._devices)

    def __iter__(self) -> Iterator[list[int]]:
        dice = random.Random(f"{self._seed} {self.epoch}")
        order = list(range(len(self._lengths)))
        dice.shuffle(order)
        pool = _POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=self._lengths.__getitem__)
            batches += [near[at : at + self.batch_size] for at in range(0, len(near), self.batch_size)]
        dice.shuffle(batches)
        batches += [[~batches[0][0]]] * (-len(batches) % self._devices)
        yield from batches[self._rank :: self._devices]


class Loader(DataLoader[Packed]):
    """The batches as tensors, with what a teacher believes where there is one; the trainer tells it the epoch."""

    def __init__(self, rows: Sequence[Packed], batches: Batches, teaching: "Teaching | None" = None) -> None:
        made = partial(collate, teaching=teaching)
        super().__init__(Rows(rows), batch_sampler=batches, collate_fn=made)  # type: ignore[arg-type]  # a Dataset by duck

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        cast(Batches, self.batch_sampler).set_epoch(epoch)


@dataclass(frozen=True)
class Teaching:
    """What a teacher believed of the tokens that are learned, and how it counts."""

    store: Store
    mix: Mix = Mix()
    adjust: Sequence[Adjust] = ()
    """In turn: what the teacher should have believed, and how softly it is learned."""

    def soft(self, places: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """Of a batch's tokens what `Soft` holds; the library takes plain tuples to a device."""
        at = np.array(places)
        known = at >= 0
        found = self.store.at(at[known])
        logprobs, rest = found.logprobs, found.rest
        for adjust in self.adjust:
            logprobs, rest = adjust(logprobs, rest)
        all_ids = np.zeros((*at.shape, self.store.header.k), np.int64)
        all_logprobs, all_rest = np.full(all_ids.shape, -np.inf, np.float32), np.zeros(at.shape, np.float32)
        all_ids[known], all_logprobs[known], all_rest[known] = found.ids, logprobs, rest
        return tuple(map(torch.from_numpy, (all_ids, all_logprobs, all_rest)))


def collate(rows: Sequence[Packed], teaching: Teaching | None = None) -> dict[str, Any]:
    """Tensors of a batch, and the tokens in it that are not padding."""
    width = max(len(row.ids) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows]),
        "labels": torch.tensor([row.labels + [IGNORED] * (width - len(row.ids)) for row in rows]),
        "weights": torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows]),
        "tokens": sum(len(row.ids) for row in rows if any(row.weights)),
    }
    if teaching:
        batch["soft"] = teaching.soft([row.places + [-1] * (width - len(row.ids)) for row in rows])
    if any(len(row.lengths) > 1 for row in rows):
        batch["position_ids"] = torch.tensor([_positions(row.lengths, width) for row in rows])
    return batch


def _weights(example: Example) -> list[float]:
    return example.weights or [1.0] * len(example.ids)


def _places(example: Example) -> list[int]:
    return example.places or [-1] * len(example.ids)


def _positions(lengths: Sequence[int], width: int) -> list[int]:
    """From 0 in each document; padding goes on as part of the last, which never looks ahead."""
    *others, last = lengths
    positions = [at for length in others for at in range(length)]
    return positions + list(range(max(last, width - len(positions))))
