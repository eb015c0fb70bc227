"""How good each model's answers are: grades go in one at a time, estimates with intervals come out.

Only a few numbers are kept of a prediction, so a million of them fit in memory. Cases are resampled, not
predictions, and for every metric and model in the same draws: models are compared case by case, and the
draws, which cost the most, are made once.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from preceptor.core import confidence
from preceptor.core.records import Case, Diagnosis, FailureKind, Prediction, Score
from preceptor.core.statistics import Bin, Estimate, ece_floor, reliability
from preceptor.report.baseline import BAG_OF_WORDS, COMMONEST, EXACT, YARDSTICKS
from preceptor.tasks.diagnosis import grade

TEACHER = "teacher"
BINS, RESAMPLES = 15, 1_000
CHUNK = 2_000
"""Cases whose weights are in memory at once."""
BLOCK = 2_000_000
"""Answers' weights that are in memory at once, of all draws together."""
Z = 1.96
"""Standard deviations to the edge of a 95 % interval."""
GRADES = ("top1", "disease_f1", "evidence_grounded")
STATES = ("parsed", "repaired", "abstained", "failed", *(f"failed_{kind}" for kind in FailureKind))
AGREEMENT = ("agreement_top1", "agreement_disease_f1")
"""What grades are called that stand on the teacher's answer for want of gold: never accuracy."""
SHARES = (*GRADES, *AGREEMENT, *STATES)
_GAPS = ("ece_mass", "trust")
Floats = NDArray[np.float64]


class ModelScore(Score):
    """The grade of one model's answer."""

    model: str


@dataclass
class Failures:
    """How often a model failed in one way, and the first time it did."""

    example: Prediction
    count: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    metrics: dict[str, dict[str, Estimate]]
    """By model and metric; one that can't be known is absent."""
    reliability: dict[str, list[Bin]]
    risk: dict[str, list[tuple[float, float]]]
    """By model, the share of the surest answers that is kept, and the error among them."""
    failures: dict[str, dict[FailureKind, Failures]]
    ranking: dict[str, list[str]]
    """By model, the ids of the cases that it answered: the worst answers first, of equals the surest."""
    strangers: int
    """Predictions about cases that are not among those evaluated."""


class Evaluator:
    """Grades predictions against cases."""

    def __init__(self, cases: Iterable[Case], teacher: Mapping[str, Diagnosis] | None = None) -> None:
        """`teacher` has its answers by case id: they stand in for gold where there is none."""
        self.cases: dict[str, Case] = {}
        self.borrowed: set[str] = set()
        for case in cases:
            self.cases[case.id] = case
            answer = (teacher or {}).get(case.id)
            if not isinstance(case.gold, Diagnosis) and answer is not None:
                self.borrowed.add(case.id)
                gold = Diagnosis(diseases=answer.diseases)  # its reasons prove nothing: the record does
                update = {"gold": gold, "expects_abstention": answer.abstained}
                self.cases[case.id] = case.model_copy(update=update)
        self._number = {name: i for i, name in enumerate(self.cases)}
        self._tallies: dict[str, _Tally] = {}
        self._strangers = 0

    def add(self, prediction: Prediction) -> ModelScore | None:
        """Grades a prediction; None if its case is not one of ours."""
        case = self.cases.get(prediction.case_id)
        if case is None:
            self._strangers += 1
            return None
        output = prediction.output if isinstance(prediction.output, Diagnosis) else None
        score = grade(output, case)
        parts = dict(score.parts)
        if case.id in self.borrowed:
            free = {name: parts.pop(name) for name in ("parsed", "evidence_grounded")}
            parts = {} if prediction.model == TEACHER else {f"agreement_{name}": parts[name] for name in parts}
            parts |= free
        graded = ModelScore(
            case_id=case.id, sample=prediction.sample, value=score.value, parts=parts, model=prediction.model
        )
        self._tallies.setdefault(prediction.model, _Tally()).add(self._number[case.id], prediction, graded)
        return graded

    def evaluation(self, seed: int = 0) -> Evaluation:
        """Estimates with 95 % intervals."""
        grades = {model: _Grades(tally) for model, tally in self._tallies.items()}
        draws = _resampled(grades, len(self.cases), seed)
        metrics = {
            model: part.estimates(draws[model], seed) | part.of_confidence(len(self.cases), seed)
            for model, part in grades.items()
        }
        for model, row in metrics.items():
            mine = draws[model].get("top1")
            if mine is None or model in YARDSTICKS:
                continue
            for other, name, compared in _COMPARISONS:
                if (theirs := draws.get(other, {}).get("top1")) is not None:
                    row[name] = _estimate(compared(mine, theirs), row["top1"].n)
        names = list(self.cases)
        return Evaluation(
            metrics=metrics,
            reliability={
                model: reliability(part.confidence[part.sure], part.correct[part.sure], BINS)
                for model, part in grades.items()
                if part.sure.any()
            },
            risk={
                model: confidence.curve(part.confidence[part.sure], part.correct[part.sure])
                for model, part in grades.items()
                if part.sure.any()
            },
            failures={model: tally.failures for model, tally in self._tallies.items()},
            ranking={model: [names[i] for i in part.worst_first()] for model, part in grades.items()},
            strangers=self._strangers,
        )


@dataclass
class _Tally:
    """One model's grades, a row a prediction; what is unknown is NaN."""

    case: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(
        default_factory=lambda: {name: array("d") for name in (*SHARES, "value", "confidence")}
    )
    failures: dict[FailureKind, Failures] = field(default_factory=dict)

    def add(self, case: int, prediction: Prediction, score: Score) -> None:
        """One more row."""
        output, failure = prediction.output, prediction.failure
        row = {
            **score.parts,
            "value": score.value,
            "parsed": output is not None,
            "repaired": prediction.repaired,
            "abstained": prediction.abstained,
            "failed": failure is not None,
            **{f"failed_{kind}": failure is not None and failure.kind is kind for kind in FailureKind},
        }
        if isinstance(output, Diagnosis) and output.diseases:
            row["confidence"] = prediction.confidence.get(output.diseases[0])
        self.case.append(case)
        for name, column in self.columns.items():
            entry = row.get(name)
            column.append(np.nan if entry is None else entry)
        if failure is not None:
            self.failures.setdefault(failure.kind, Failures(prediction)).count += 1


class _Grades:
    """A tally as arrays, in the order of cases."""

    def __init__(self, tally: _Tally) -> None:
        case = np.asarray(tally.case, dtype=np.int64)
        order = np.argsort(case, kind="stable")
        self.case = case[order]
        self.columns: dict[str, Floats] = {name: np.asarray(c)[order] for name, c in tally.columns.items()}
        self.shares = [name for name in SHARES if not np.isnan(self.columns[name]).all()]
        self.confidence, self.correct = self.columns["confidence"], self.columns["top1"]
        self.sure = ~np.isnan(self.confidence) & ~np.isnan(self.correct)

    def sums(self, first: int, last: int) -> Floats:
        """What all figures are made of, a row for each case from `first` to before `last`.

        For each share what is known of it, added up, and of how many answers; then how many answers have a
        confidence, and by bin their gaps between being right and being sure.
        """
        rows, size = slice(*np.searchsorted(self.case, [first, last])), last - first
        case, parts = self.case[rows] - first, []
        for name in self.shares:
            column = self.columns[name][rows]
            known = ~np.isnan(column)
            parts += [np.bincount(case[known], column[known], size), np.bincount(case[known], minlength=size)]
        sure = self.sure[rows]
        confidence, correct, case = self.confidence[rows][sure], self.correct[rows][sure], case[sure]
        place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
        gaps = np.bincount(case * BINS + place, correct - confidence, size * BINS).reshape(size, BINS)
        return np.column_stack([*parts, np.bincount(case, minlength=size), gaps])

    def figures(self, sums: Floats) -> dict[str, Floats]:
        """Every metric that is known, of each row of sums."""
        found = {name: _ratio(sums[:, 2 * i], sums[:, 2 * i + 1]) for i, name in enumerate(self.shares)}
        if self.sure.any():
            found["ece"] = _ratio(np.abs(sums[:, -BINS:]).sum(axis=1), sums[:, -BINS - 1])
        return found

    def estimates(self, draws: Mapping[str, Floats], seed: int) -> dict[str, Estimate]:
        """Every metric that is known, with its interval; `n` counts cases."""
        found = {}
        for name in self.shares:
            found[name] = _estimate(draws[name], self._cases(~np.isnan(self.columns[name])), share=True)
        if "ece" in draws:
            n, values = self._cases(self.sure), draws["ece"]
            # A mean of absolute gaps grows by resampling alone: that growth is taken off the draws again.
            growth = np.nanmedian(values[1:]) - values[0]
            found["ece"] = _estimate(np.append(values[0], np.maximum(0, values[1:] - growth)), n)
            floor = ece_floor(self.confidence[self.sure], BINS, seed)
            found["ece_floor"] = Estimate(value=floor, low=floor, high=floor, n=n)
        return found

    def of_confidence(self, cases: int, seed: int) -> dict[str, Estimate]:
        """Whether the confidence is worth anything, with intervals; empty where there is none. `cases`: of all."""
        if not self.sure.any():
            return {}
        sure, correct, case = self.confidence[self.sure], self.correct[self.sure], self.case[self.sure]
        rng, n, block = np.random.default_rng(seed), self._cases(self.sure), max(1, BLOCK // len(sure))
        values = confidence.figures(sure, correct)
        drawn = [
            confidence.figures(sure, correct, rng.poisson(1.0, (min(block, RESAMPLES - done), cases))[:, case])
            for done in range(0, RESAMPLES, block)
        ]
        found = {}
        for name, value in values.items():
            draws = np.concatenate([figures[name] for figures in drawn])
            if np.isnan(value).any() or np.isnan(draws).all():
                continue
            if name in _GAPS:  # as with ECE, resampling alone makes gaps grow
                draws = draws - (np.nanmedian(draws) - value)
            found[name] = _estimate(np.append(value, np.maximum(0, draws) if name == "ece_mass" else draws), n)
        floor = confidence.mass_floor(sure, seed)
        return found | {"ece_mass_floor": Estimate(value=floor, low=floor, high=floor, n=n)}

    def worst_first(self) -> list[int]:
        """Numbers of answered cases by what the answers are worth; of equals, the surest answer first."""
        worth, sure = np.nan_to_num(self.columns["value"], nan=np.inf), np.nan_to_num(self.confidence)
        order = np.lexsort((-sure, worth))
        return list(dict.fromkeys(self.case[order[self.columns["failed"][order] == 0]].tolist()))

    def _cases(self, known: NDArray[np.bool_]) -> int:
        return len(np.unique(self.case[known]))


def _resampled(grades: Mapping[str, _Grades], cases: int, seed: int) -> dict[str, dict[str, Floats]]:
    """By model and metric the figure from all cases, and after it those from the draws.

    A draw weighs each case by a Poisson number of mean 1: that needs only some of the cases at a time.
    """
    rng = np.random.default_rng(seed)
    sums: dict[str, Floats] = {}
    for first in range(0, cases, CHUNK):
        last = min(first + CHUNK, cases)
        weights = np.vstack([np.ones((1, last - first)), rng.poisson(1.0, (RESAMPLES, last - first))])
        for model, part in grades.items():
            sums[model] = sums.get(model, 0.0) + weights @ part.sums(first, last)
    return {model: part.figures(sums[model]) for model, part in grades.items()}


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


_COMPARISONS: tuple[tuple[str, str, Callable[[Floats, Floats], Floats]], ...] = (
    (COMMONEST, "top1_minus_commonest", np.subtract),
    (BAG_OF_WORDS, "top1_minus_bag_of_words", np.subtract),
    (EXACT, "top1_of_exact", _ratio),
)


def _estimate(draws: Floats, n: int, *, share: bool = False) -> Estimate:
    """The first figure with the interval of the others. `share`: it is of cases, all to none."""
    value = float(draws[0])
    if share and value in (0, 1):
        # Resampling can't tell all from nearly all: Wilson's bounds can.
        doubt = Z**2 / (n + Z**2)
        return Estimate(value=value, low=max(0.0, value - doubt), high=min(1.0, value + doubt), n=n)
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n)
