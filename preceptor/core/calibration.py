"""What a confidence is worth: as a probability, as a reason to give no answer, and as a set that holds the truth.

All of it is learned from answers whose truth is known, and holds for new ones of the same kind: those that could as
well have been among the known ones (exchangeable). Other hospitals, other prompts or other weights are another kind.
"""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from math import ceil, log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from preceptor.core.records import Record
from preceptor.core.statistics import paired

Floats = NDArray[np.float64]
SetScore = Literal["lac", "aps"]

SINGLE = 1e-7
"""What a probability in single precision may lack to 1 unseen."""
LEVEL = 0.9
"""How surely the error among the answers that are given is at most the risk."""
_TEMPERATURES = (0.02, 50.0)
"""Beyond these nothing changes; a few answers that are all right would ask for 0."""
_STEPS, _FIRST = 20, 4
"""Into how many parts the answers are cut, the surest first, and at which the first threshold is tried: a few of the
surest that chance made wrong would end it at once, and a model that answers still fewer is of little use."""
_ROUNDING = 1e-9


def temperature(p: ArrayLike, y: ArrayLike, least: float = SINGLE) -> float:
    """The temperature T of maximum likelihood, by which logit(p) / T are log-odds of y (Guo et al. 2017).

    Above 1 the confidences were too high, or below one half too low. `least` is as in `tempered`.
    """
    from scipy.optimize import minimize_scalar  # half a second to load

    known, true = paired(p, y)
    odds = _logit(known, least) * np.where(true > 0.5, 1.0, -1.0)  # noqa: PLR2004  yes or no
    low, high = np.log(_TEMPERATURES)
    loss = minimize_scalar(lambda t: np.logaddexp(0, -odds / np.exp(t)).mean(), bounds=(low, high), method="bounded")
    return float(np.exp(loss.x))


def tempered(p: ArrayLike, temperature: float, least: float = SINGLE) -> Floats:
    """sigmoid(logit(p) / temperature); p is first brought into [least, 1 - least], where its logit is known."""
    scaled: Floats = 1 / (1 + np.exp(-_logit(np.asarray(p, dtype=np.float64), least) / temperature))
    return scaled


def isotonic(p: ArrayLike, y: ArrayLike) -> list[tuple[float, float]]:
    """The rising steps of least squares from p to the share of y, as points to draw straight lines between.

    Of n answers none says more than (n + 1) / (n + 2) or less than 1 / (n + 2) (rule of succession), however pure the
    outermost step.
    """
    from sklearn.isotonic import IsotonicRegression  # a second to load

    known, true = paired(p, y)
    least = 1 / (len(known) + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least).fit(known, true)
    return list(zip(fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist(), strict=True))


def interpolated(p: ArrayLike, points: Sequence[tuple[float, float]]) -> Floats:
    """The height over each p of the lines between the points; beyond the outermost ones, theirs."""
    places, heights = zip(*points, strict=True)
    found: Floats = np.interp(np.asarray(p, dtype=np.float64), places, heights)
    return found


class Selection(Record):
    """Which answers are sure enough to be given."""

    threshold: float | None = Field(ge=0, le=1)
    """The least confidence that is; None where none keeps the risk."""
    n: int
    """Answers that were known."""
    kept: int = 0
    wrong: int = 0
    """Among those kept."""
    reachable: float
    """The lowest risk at which there would be a threshold; 1 where there is none at all."""


def select(confidence: ArrayLike, correct: ArrayLike, risk: float, level: float = LEVEL) -> Selection:
    """The laxest threshold at which the error among the answers that reach it is at most `risk`, with chance `level`.

    Selection with guaranteed risk (Geifman & El-Yaniv 2017) by fixed-sequence testing (Learn then Test, Angelopoulos
    et al. 2021): the surest 20 %, 25 %, ... of the answers are tried in turn, from the first that are enough to show
    the risk if all were right; as long as the Clopper-Pearson bound of their error is at most `risk` the next are
    tried, and the first that fail end it. How many are tried at once is settled beforehand, so the errors among them
    are binomial, and the first threshold that is truly too lax passes with a chance of at most 1 - `level`: no
    correction for many tests is needed. It takes for granted that less sure answers are not right more often beyond
    it. A rising function of the confidence changes nothing, even one fitted on these same answers, unless it makes
    unequal ones equal, as isotonic steps do: the guarantee is then approximate.
    """
    p, y = paired(confidence, correct)
    order = np.argsort(-p, kind="stable")
    p, wrong = p[order], np.cumsum(1 - y[order])
    steps = [ceil(len(p) * step / _STEPS - _ROUNDING) for step in range(_FIRST, _STEPS + 1)]
    kept = np.unique(np.searchsorted(-p, -p[np.array(steps) - 1], side="right"))  # equal ones stay together
    bounds = _upper(wrong[kept - 1], kept, level)
    passed = _passed(kept, bounds, risk, level)
    reachable = min((b for b in bounds.tolist() if _passed(kept, bounds, b, level)), default=1.0)
    if not passed:
        return Selection(threshold=None, n=len(p), reachable=reachable)
    last = int(kept[passed[-1]])
    return Selection(
        threshold=float(p[last - 1]), n=len(p), kept=last, wrong=round(float(wrong[last - 1])), reachable=reachable
    )


def _passed(kept: NDArray[np.int64], bounds: Floats, risk: float, level: float) -> list[int]:
    """The tests that are passed, one after another, from the first that can be."""
    if risk >= 1:
        return list(range(len(kept)))
    enough = log(1 - level) / log(1 - risk) - _ROUNDING if risk > 0 else float("inf")
    passed = []
    for at in np.flatnonzero(kept >= enough).tolist():
        if bounds[at] > risk + _ROUNDING:
            break
        passed.append(at)
    return passed


def _upper(wrong: Floats, of: NDArray[np.int64], level: float) -> Floats:
    """Clopper-Pearson: the highest error rate at which so few wrong ones still have a chance of 1 - `level`."""
    from scipy.stats import beta  # a second to load

    bound: Floats = np.where(wrong < of, beta.ppf(level, wrong + 1, np.maximum(of - wrong, _ROUNDING)), 1.0)
    return bound


def strangeness(score: SetScore, p: ArrayLike, u: float) -> Floats:
    """How little each class of one distribution suits it: the classes below a quantile are its conformal set.

    - `lac`: 1 - p, so that sets are smallest on average (Sadinle et al. 2019).
    - `aps`: what is likelier, and the share `u` of the class's own p, so that doubtful cases get larger sets and
      coverage is evener (Romano et al. 2020).
    """
    known = np.asarray(p, dtype=np.float64)
    if score == "lac":
        return 1 - known
    order = np.argsort(-known, kind="stable")
    found = np.empty_like(known)
    found[order] = np.minimum(np.cumsum(known[order]), 1.0) - (1 - u) * known[order]
    return found


def lot(identity: str) -> float:
    """A number in [0, 1) that only a case's id decides, evenly spread over ids: what randomised sets draw."""
    return int.from_bytes(sha256(identity.encode(errors="replace")).digest()[:6], "big") / 2**48


class Quantile(Record):
    """Up to which strangeness classes belong to a set, and from how many cases it was learned."""

    value: float
    n: int


def quantile(strange: Sequence[float], coverage: float) -> Quantile:
    """The ⌈(n + 1) · coverage⌉-th of the truths' strangeness: a new truth is no stranger with that chance at least.

    Where n is too small for that it is infinite, told as 1: then every class belongs to the set.
    """
    rank = ceil((len(strange) + 1) * coverage - _ROUNDING)
    return Quantile(value=sorted(strange)[rank - 1] if rank <= len(strange) else 1.0, n=len(strange))


def quantiles(strange: Sequence[float], groups: Sequence[str], coverage: float) -> dict[str, Quantile]:
    """A quantile for each group, so that coverage holds in each (Mondrian, Vovk 2012), and that of all under "".

    Groups that are too small for one of their own share one, and where they are too small together that of all. It is
    also for cases whose group is not known.
    """
    members = defaultdict(list)
    for one, group in zip(strange, groups, strict=True):
        members[group].append(one)
    small = [one for known in members.values() if not enough(len(known), coverage) for one in known]
    whole = quantile(strange, coverage)
    shared = quantile(small, coverage) if enough(len(small), coverage) else whole
    own = {
        group: quantile(known, coverage) if enough(len(known), coverage) else shared
        for group, known in sorted(members.items())
        if group
    }
    return {"": whole} | own


def enough(n: int, coverage: float) -> bool:
    """Whether n cases are enough for a quantile."""
    return (n + 1) * coverage - _ROUNDING <= n


def _logit(p: Floats, least: float) -> Floats:
    inside = np.clip(p, least, 1 - least)
    odds: Floats = np.log(inside) - np.log1p(-inside)
    return odds
