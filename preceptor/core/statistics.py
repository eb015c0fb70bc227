"""Calibration error and bootstrap intervals, in NumPy.

Every statistic that gets an interval here is a function of column means, so resampling is one matrix product:
the mean itself, a paired difference, a ratio such as micro-F1, and the calibration error.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preceptor.core.records import Record

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From means of shape (resamples, columns) to one number for each resample."""

_BLOCK = 100_000
"""Counts drawn at once: few enough to stay in the cache."""


class Estimate(Record):
    """A figure with its 95 % interval and the number of cases behind it."""

    value: float
    low: float
    high: float
    n: int


class Bin(Record):
    """One bar of a reliability diagram."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> list[Bin]:
    """Mean confidence against accuracy in bins of equal width, closed above; empty bins are left out."""
    p, y = paired(confidence, correct)
    place, edges = binned(p, bins)
    n = np.bincount(place, minlength=bins)
    held = np.flatnonzero(n)
    mean_p = np.bincount(place, p, bins)[held] / n[held]
    mean_y = np.bincount(place, y, bins)[held] / n[held]
    return [
        Bin(low=edges[b], high=edges[b + 1], n=int(n[b]), confidence=c, accuracy=a)
        for b, c, a in zip(held.tolist(), mean_p.tolist(), mean_y.tolist(), strict=True)
    ]


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: the gap of accuracy and confidence in each bin, weighted by its share."""
    p, y = paired(confidence, correct)
    place, _ = binned(p, bins)
    return float(np.abs(np.bincount(place, y - p, bins)).sum() / len(p))


def ece_floor(confidence: ArrayLike, bins: int = 15, seed: int = 0, draws: int = 200) -> float:
    """Mean ECE that a perfectly calibrated model would show on as many answers: never zero on a sample."""
    p, _ = paired(confidence, confidence)
    place, _ = binned(p, bins)
    rng = np.random.default_rng(seed)
    gaps = [np.abs(np.bincount(place, (rng.random(len(p)) < p) - p, bins)).sum() for _ in range(draws)]
    return float(np.mean(gaps) / len(p))


def ece_estimate(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, seed: int = 0) -> Estimate:
    """ECE with its bootstrap interval, which shares the upward bias of `ece`; see `ece_floor`."""
    p, y = paired(confidence, correct)
    place, _ = binned(p, bins)
    gaps = np.zeros((len(p), bins))
    gaps[np.arange(len(p)), place] = y - p
    return estimate(gaps, lambda means: np.abs(means).sum(axis=1), seed=seed)


def mean_of_first(means: Floats) -> Floats:
    """The plain mean: of the first column, which is often the only one."""
    return means[:, 0]


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = mean_of_first,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over cases, one row a case, one or more columns."""
    table = _table(values)
    n = len(table)
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, _BLOCK // n))
    found = []
    for first in range(0, resamples, rows):
        block = min(rows, resamples - first)
        drawn = rng.integers(0, n, (block, n)) + n * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n)
        found.append(statistic(counts @ table / n))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(values: ArrayLike, statistic: Statistic = mean_of_first, *, seed: int = 0) -> Estimate:
    """A statistic over cases with its 95 % bootstrap interval."""
    table = _table(values)
    low, high = bootstrap(table, statistic, seed=seed)
    value = float(statistic(table.mean(axis=0, keepdims=True))[0])
    return Estimate(value=value, low=low, high=high, n=len(table))


def _table(values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if not len(table) or not np.isfinite(table).all():
        raise ValueError("a bootstrap needs at least one case, and a finite number for each")
    return table


def paired(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Confidence in each answer and whether it was right, in [0, 1].

    Raises:
        ValueError: they are not as many, none, or out of range.
    """
    p, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or not len(p):
        raise ValueError(f"one confidence for each answer is needed, at least one: {p.shape} against {y.shape}")
    if not ((p >= 0) & (p <= 1)).all() or not ((y >= 0) & (y <= 1)).all():
        raise ValueError("confidences and correctness must lie in [0, 1]")
    return p, y


def binned(p: Floats, bins: int) -> tuple[NDArray[np.int64], list[float]]:
    """The bin of each confidence, and the edges. Comparing with the edges keeps 0.7 in (0.6, 0.7]."""
    edges = np.linspace(0, 1, bins + 1)
    return np.searchsorted(edges[1:-1], p, side="left"), edges.tolist()
