"""How far two raters agree on yes or no, and one rater with itself.

The statistics are functions of the means of four counts (see `tally`), one row a case: a case holds several verdicts
that stand or fall together, so it is cases that `statistics.estimate` resamples.
"""

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np

from preceptor.core.statistics import Floats

_NONE = 1e-12
"""What rounding may leave of a denominator that is zero."""


def tally(verdicts: Iterable[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    """How many of the verdicts of two raters are yes by both, by the first alone, by the second alone, by neither."""
    n = Counter(verdicts)
    return n[True, True], n[True, False], n[False, True], n[False, False]


def kappa(means: Floats) -> Floats:
    """Cohen's kappa: agreement beyond chance, as a share of what chance leaves.

    Where both raters know only one and the same word it is undefined, and 0 here: no agreement beyond chance is shown.
    """
    both, first, second, neither = (means / means.sum(axis=1, keepdims=True)).T
    chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    return _share(both + neither - chance, 1 - chance)


def balanced_f1(means: Floats) -> Floats:
    """Mean of the F1 of yes and the F1 of no, which is the same for either rater; a word that nobody used counts 0."""
    both, first, second, neither = means.T
    apart = first + second
    return (_share(2 * both, 2 * both + apart) + _share(2 * neither, 2 * neither + apart)) / 2


def bias(means: Floats) -> Floats:
    """How much more often the first rater says yes than the second: a difference of rates, in [-1, 1]."""
    return _share(means[:, 1] - means[:, 2], means.sum(axis=1))


def agreeing(repeats: Iterable[Hashable]) -> tuple[int, int]:
    """Of all pairs of one rater's repeated verdicts on one thing: how many agree, and how many there are."""
    n = Counter(repeats)
    return sum(k * (k - 1) // 2 for k in n.values()), n.total() * (n.total() - 1) // 2


def share(means: Floats) -> Floats:
    """The first column as a share of the second."""
    return _share(means[:, 0], means[:, 1])


def _share(part: Floats, whole: Floats) -> Floats:
    shares: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > _NONE)
    return shares
