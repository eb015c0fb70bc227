"""How sure a teacher is of its tokens, mended: three ways, learned from places where right and wrong part.

All work on what a teacher tells of a position: the log-probabilities of k tokens, and the rest, which is the mass of
all others. Nearly every position has one continuation, which no way makes doubtful where it is the only one known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from preceptor.core.confidence import LEAST
from preceptor.core.records import Record
from preceptor.core.statistics import Bin, ece, ece_floor, reliability

Floats = NDArray[np.float64]
Method = Literal["temperature", "resoftmax", "smoothing"]
METHODS: tuple[Method, ...] = get_args(Method)

FOLDS = 5
_TEMPERATURES = (0.05, 20.0)
"""Beyond these nothing changes; a few decisions that are all right would ask for 0."""
_STEP, _FINE = 0.1, 0.02
"""Of FIRST's grid over (0, 1], and of the one around its best point."""


class Recalibration(Record):
    """One way with its constant.

    - `temperature`: every probability to the power of 1 / T, and all brought to mass 1. Above 1 the teacher was too
      sure. The rest counts as one outcome beside the k tokens, whatever it is made of: below 1 it keeps more than its
      parts would, so k should leave little to it.
    - `resoftmax`: the softmax of the k probabilities over c, as FIRST has it (arXiv 2408.12168); the rest is left out.
      A token that is the only one known stays certain, but a certain one beside k - 1 others that hardly count leaves
      each of these exp(-1 / c) times its own probability: at c = .3 and k = 5 it keeps .875.
    - `smoothing`: (1 - e) of every probability and of the rest, and e spread evenly over the tokens that are known. One
      that is the only one known stays certain; beside others it gives up e (k - 1) / k.
    """

    method: Method
    value: float = Field(ge=0, allow_inf_nan=False)
    """T, c or e."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.method == "smoothing" and self.value > 1:
            raise ValueError("smoothing: no more than all can be spread")
        if self.method != "smoothing" and not self.value:
            raise ValueError(f"{self.method}: by 0 nothing can be divided")
        return self

    def apply(self, logprobs: NDArray[Any], rest: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Log-probabilities of shape (n, k), -inf where there is no token, and the rest of shape (n,), of mass 1.

        A position of which no token is known stays as it is.
        """
        logs, others = logprobs.astype(np.float64), np.maximum(rest.astype(np.float64), 0)
        token = np.isfinite(logs)
        count = token.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):  # of positions without tokens
            found = np.column_stack((logs, np.log(others)))
            if self.method == "temperature":
                found = found / self.value
            elif self.method == "resoftmax":
                found[:, :-1] = np.where(token, np.exp(logs) / self.value, -np.inf)
                found[:, -1] = -np.inf
            found = _normalised(found)
            if self.method == "smoothing":
                spread = np.where(token, np.log(self.value) - np.log(count), -np.inf)
                found += np.log1p(-self.value)
                found[:, :-1] = np.logaddexp(found[:, :-1], spread)
        tokens = np.where(count, found[:, :-1], logs)
        return tokens.astype(logprobs.dtype), np.where(count[:, 0], np.exp(found[:, -1]), rest).astype(rest.dtype)


@dataclass(frozen=True)
class Observation:
    """A position at which right and wrong part."""

    group: str
    """The case: its positions are drawn together."""
    logprobs: tuple[float, ...]
    """Of the tokens that are known."""
    ways: tuple[int, ...]
    """What each of them says, as numbers from 0 on: tokens of one number say the same."""
    right: int | None
    """The way that was right; None: it was among the rest."""
    rest: float


class Figures(Record):
    """How far what is most believed at a position is from how often it is right."""

    ece: float
    ece_floor: float
    """What perfect beliefs would show on as many positions."""
    nll: float
    """Mean of -log of the belief in what was right."""
    reliability: tuple[Bin, ...]


class Fitted(Record):
    """A way with its constant from all positions, and figures of constants that each knew four fifths of the cases."""

    value: float
    after: Figures


class Recalibrated(Record):
    """What became of a teacher's beliefs."""

    teacher: str
    k: int
    """Tokens that were known of a position; of more or fewer the constant is another."""
    chosen: Recalibration
    """The way that is to be applied."""
    n: int
    """Positions that were learned from."""
    cases: int
    before: Figures
    methods: dict[Method, Fitted]


def recalibrated(seen: Sequence[Observation], chosen: Method, teacher: str, k: int, seed: int = 0) -> Recalibrated:
    """All three ways, each cross-validated by case, and the one that was chosen."""
    groups = list(dict.fromkeys(one.group for one in seen))
    fold = dict(zip(groups, (np.random.default_rng(seed).permutation(len(groups)) % FOLDS).tolist(), strict=True))
    whole = _Table.of(seen)
    at = np.array([fold[one.group] for one in seen])
    methods: dict[Method, Fitted] = {}
    for method in METHODS:
        believed = whole.believed(None)
        for number in np.unique(at):
            how = fit([one for one in seen if fold[one.group] != number], method)
            believed[at == number] = whole.believed(how)[at == number]
        methods[method] = Fitted(value=fit(seen, method).value, after=whole.figures(believed))
    return Recalibrated(
        teacher=teacher,
        k=k,
        chosen=Recalibration(method=chosen, value=methods[chosen].value),
        n=len(seen),
        cases=len(groups),
        before=whole.figures(whole.believed(None)),
        methods=methods,
    )


def fit(seen: Sequence[Observation], method: Method) -> Recalibration:
    """The way with the constant that suits some positions best.

    That of temperature and smoothing is the likeliest; that of re-softmax has the least calibration error, on a grid of
    .1 and then of .02 around its best point, as in FIRST.
    """
    table = _Table.of(seen)
    if method == "resoftmax":
        best = min(_grid(_STEP, 1.0, _STEP), key=table.ece)
        return Recalibration(method=method, value=min(_grid(best - _STEP, best + _STEP, _FINE), key=table.ece))
    from scipy.optimize import minimize_scalar  # half a second to load

    if method == "temperature":
        low, high = np.log(_TEMPERATURES)
        found = minimize_scalar(lambda t: table.nll(method, float(np.exp(t))), bounds=(low, high), method="bounded")
        return Recalibration(method=method, value=float(np.exp(found.x)))
    found = minimize_scalar(lambda e: table.nll(method, float(e)), bounds=(0, 1), method="bounded")
    return Recalibration(method=method, value=min(0.0, float(found.x), key=lambda e: table.nll(method, e)))


@dataclass(frozen=True)
class _Table:
    """Positions, filled up with tokens that there are not."""

    logprobs: Floats
    rest: Floats
    ways: NDArray[np.int64]
    right: NDArray[np.int64]
    """-1 is the rest."""

    @classmethod
    def of(cls, seen: Sequence[Observation]) -> Self:
        size = len(seen), max(len(one.logprobs) for one in seen)
        logprobs, ways = np.full(size, -np.inf), np.zeros(size, np.int64)
        for place, one in enumerate(seen):
            logprobs[place, : len(one.logprobs)] = one.logprobs
            ways[place, : len(one.ways)] = one.ways
        right = [-1 if one.right is None else one.right for one in seen]
        return cls(logprobs, np.array([one.rest for one in seen]), ways, np.array(right))

    def believed(self, how: Recalibration | None) -> Floats:
        """The mass of each way, and last that of the rest."""
        logprobs, rest = how.apply(self.logprobs, self.rest) if how else (self.logprobs, self.rest)
        found = np.zeros((len(rest), logprobs.shape[1] + 1))
        np.add.at(found, (np.arange(len(rest))[:, None], self.ways), np.exp(logprobs))
        found[:, -1] = rest
        return np.minimum(found, 1)  # sums of rounded shares may lie above

    def figures(self, believed: Floats) -> Figures:
        """Of what is believed most among the ways; the rest is none."""
        confidence, correct = self._sure(believed)
        return Figures(
            ece=ece(confidence, correct),
            ece_floor=ece_floor(confidence),
            nll=self._nll(believed),
            reliability=tuple(reliability(confidence, correct)),
        )

    def ece(self, c: float) -> float:
        """Of re-softmax."""
        return ece(*self._sure(self.believed(Recalibration(method="resoftmax", value=c))))

    def nll(self, method: Method, value: float) -> float:
        """Of a way with some constant."""
        return self._nll(self.believed(Recalibration(method=method, value=value)))

    def _sure(self, believed: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        return believed[:, :-1].max(axis=1), believed[:, :-1].argmax(axis=1) == self.right

    def _nll(self, believed: Floats) -> float:
        return float(-np.log(np.maximum(believed[np.arange(len(believed)), self.right], LEAST)).mean())


def _normalised(logs: Floats) -> Floats:
    top = logs.max(axis=1, keepdims=True)
    found: Floats = logs - top - np.log(np.exp(logs - top).sum(axis=1, keepdims=True))
    return found


def _grid(low: float, high: float, step: float) -> list[float]:
    """The points from low to high that re-softmax can take."""
    points = np.round(np.arange(low, high + step / 2, step), 2)
    return [point for point in points.tolist() if 0 < point <= 1]
