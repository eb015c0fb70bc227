"""Whether a model knows when it is right: scores of its confidence, and of leaving the doubtful cases to people.

All take the confidence in each answer and whether it was right, and work on many weightings of the answers at
once, so that resampling them costs one pass. Answers of equal confidence count as in random order: the figures
never depend on the order of a file.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preceptor.core.statistics import binned, paired

Floats = NDArray[np.float64]

LEAST = 1e-12
"""Confidence in what then happens is taken to be at least this, or one answer would make the likelihood infinite."""
BINS = 15
COVERAGE = 0.8
"""Share of the answers that is kept for `risk_at_80`."""


def figures(confidence: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None) -> Mapping[str, Floats]:
    """Scores by name, each with an entry for every row of `weights` of shape (rows, answers); by default all ones.

    A figure that is unknown, such as `auroc` where all answers are right, is NaN.

    - `brier`: mean of (p - y)²; `nll`: mean of -log of the confidence in what was so.
    - `auroc`: chance that a right answer is surer than a wrong one.
    - `aurc`: mean error among the surest k answers, over all k (Geifman & El-Yaniv 2017).
    - `augrc`: mean share of answers that are kept and wrong, over all k (Traub et al. 2024).
    - `risk_at_80`: error among the surest 80 %.
    - `ece_mass`: expected calibration error in 15 bins of as many answers each, by their rank.
    - `trust`: accuracy less ECE in 15 bins of equal width (FIRST, arXiv 2408.12168).
    """
    p, y = paired(confidence, correct)
    w = np.ones((1, len(p))) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(-p, kind="stable")
    p, y, w = p[order], y[order], w[:, order]
    even = _tied(p, y)
    said = np.clip(p, LEAST, 1 - LEAST)
    total = w.sum(axis=1)
    right = w @ y
    width, _ = binned(p, BINS)
    mass = np.arange(len(p)) * BINS // len(p)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "brier": w @ (p - y) ** 2 / total,
            "nll": -(w @ (y * np.log(said) + (1 - y) * np.log1p(-said))) / total,
            "ece_mass": _gap(w, even - p, mass) / total,
            "trust": (right - _gap(w, y - p, width)) / total,
        }
        return found | _ranked(w, even, total)


def mass_floor(confidence: ArrayLike, seed: int = 0, draws: int = 200) -> float:
    """Mean `ece_mass` that a perfectly calibrated model would show on as many answers: never zero on a sample."""
    p, _ = paired(confidence, confidence)
    p = -np.sort(-p)
    mass = np.arange(len(p)) * BINS // len(p)
    rng = np.random.default_rng(seed)
    ones = np.ones((1, len(p)))
    return float(np.mean([_gap(ones, (rng.random(len(p)) < p) - p, mass) for _ in range(draws)]) / len(p))


def curve(confidence: ArrayLike, correct: ArrayLike, points: int = 101) -> list[tuple[float, float]]:
    """Coverage and the error among as many of the surest answers, at evenly spread coverages above 0."""
    p, y = paired(confidence, correct)
    order = np.argsort(-p, kind="stable")
    wrong = np.cumsum(1 - _tied(p[order], y[order]))
    kept = np.unique(np.ceil(np.linspace(0, 1, points)[1:] * len(p) - 1e-9).astype(int))
    return [(k / len(p), float(wrong[k - 1] / k)) for k in kept.tolist()]


def _tied(p: Floats, y: Floats) -> Floats:
    """Correctness, shared evenly among answers of equal confidence; `p` is in order."""
    _, group = np.unique(-p, return_inverse=True)
    return np.asarray((np.bincount(group, y) / np.bincount(group))[group])


def _gap(weights: Floats, gaps: Floats, bins: NDArray[np.int64]) -> Floats:
    """The bins' gaps, added up without their signs."""
    table = np.zeros((len(gaps), BINS))
    table[np.arange(len(gaps)), bins] = gaps
    total: Floats = np.abs(weights @ table).sum(axis=1)
    return total


def _ranked(w: Floats, y: Floats, total: Floats) -> dict[str, Floats]:
    """What only the order of the confidences decides. An answer of weight w counts as w answers of the same rank."""
    kept = np.cumsum(w, axis=1)
    wrong = np.cumsum(w * (1 - y), axis=1)
    above = (w * (1 - y) * (np.cumsum(w * y, axis=1) - 0.5 * w * y)).sum(axis=1)
    risk = np.divide(wrong, kept, out=np.zeros_like(wrong), where=kept > 0)
    at = np.argmax(kept >= COVERAGE * total[:, None] - 1e-9, axis=1)
    return {
        "auroc": above / (wrong[:, -1] * (total - wrong[:, -1])),
        "aurc": (w * risk).sum(axis=1) / total,
        "augrc": (w * (wrong - (w - 1) / 2 * (1 - y))).sum(axis=1) / total**2,
        "risk_at_80": risk[np.arange(len(w)), at],
    }
