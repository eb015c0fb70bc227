"""One model's grades as numbers, and the estimates that they make.

Nearly every figure is a sum over cases divided by another: a share, micro-F1, the same for a group of cases. So
resampling is one matrix product, and only a few numbers are kept of a prediction.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import rankdata

from preceptor.core import confidence
from preceptor.core.records import Diagnosis, FailureKind, Prediction, Score
from preceptor.core.statistics import Estimate, ece_floor
from preceptor.tasks.measures import LEVELS, Names

BINS, RESAMPLES = 15, 1_000
BLOCK = 2_000_000
"""Answers' weights that are in memory at once, of all draws together."""
Z = 1.96
"""Standard deviations to the edge of a 95 % interval."""
GRADES = ("top1", "disease_f1", "evidence_grounded")
SETS = ("precision", "recall", "category_f1", "exact_set")
DIFFERENTIAL = ("ddr", "ddp", "ddf1", "gtpa_1", "gtpa_3", "gtpa_5")
ASSURANCE = ("answered_wrong", "withheld", "set_coverage", "set_other", "set_single")
"""What a calibration promises, and what it costs."""
TEXT = ("hallucinated", "supported", "unmapped", "rouge_l")
CONSULT = ("think_tag", "think_substantive", "urgent_recall", "over_triage", "risky_prescription", "severe_miss")
"""What is told of advice in place of the grades of a diagnosis."""
STATES = ("parsed", "repaired", "abstained", "failed", *(f"failed_{kind}" for kind in FailureKind))
AGREEMENT = ("agreement_top1", "agreement_disease_f1")
"""What grades are called that stand on the teacher's answer for want of gold: never accuracy."""
SHARES = (*GRADES, *AGREEMENT, *SETS, *DIFFERENTIAL, *ASSURANCE, *TEXT, *CONSULT, *STATES)
SIZES = ("characters", "diseases", "reasons")
"""Of an answer: of its reasons together, and how many it names."""
MEANS = (*SIZES, "set_size")
GROUPED = ("top1", "disease_f1", "agreement_top1", "agreement_disease_f1", "set_coverage")
"""What is told of every group of cases."""
_F1 = {"concept": "f1", "category": "category_f1"}
_EXACT = ("value", "confidence", "uncalibrated")
"""Kept in double precision: ranks and bins depend on their last digits."""
_GAPS = ("ece_mass", "trust")
Floats = NDArray[np.float64]


@dataclass
class Failures:
    """How often a model failed in one way, and the first time it did."""

    example: Prediction
    count: int = 0


@dataclass
class Tally:
    """One model's grades, a row a prediction; what is unknown is NaN."""

    case: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(
        default_factory=lambda: {name: array("d" if name in _EXACT else "f") for name in (*SHARES, *MEANS, *_EXACT)}
    )
    names: dict[str, "_Names"] = field(default_factory=lambda: {level: _Names() for level in LEVELS})
    failures: dict[FailureKind, Failures] = field(default_factory=dict)

    def add(self, case: int, prediction: Prediction, score: Score, names: Names) -> None:
        """One more row. `names` is empty where no gold is known."""
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
        if isinstance(output, Diagnosis):
            row |= {"characters": sum(map(len, output.reason)), "reasons": len(output.reason)}
            row["diseases"] = len(output.diseases)
            if output.diseases:
                row["confidence"] = prediction.confidence.get(output.diseases[0])
                row["uncalibrated"] = prediction.uncalibrated.get(output.diseases[0])
        for level, (said, true) in names.items():
            self.names[level].add(len(self.case), said, true)
        self.case.append(case)
        for name, column in self.columns.items():
            entry = row.get(name)
            column.append(np.nan if entry is None else entry)
        if failure is not None:
            self.failures.setdefault(failure.kind, Failures(prediction)).count += 1


@dataclass
class _Names:
    """The diseases of one level, numbered as they are met: who says and who is what, a row each."""

    number: dict[str, int] = field(default_factory=dict)
    row: "array[int]" = field(default_factory=lambda: array("q"))
    disease: "array[int]" = field(default_factory=lambda: array("q"))
    kind: "array[int]" = field(default_factory=lambda: array("q"))
    """0 said and true, 1 said alone, 2 true alone."""

    def add(self, row: int, said: Sequence[str], true: Sequence[str]) -> None:
        left = list(true)
        for name in said:
            self._append(row, name, 0 if name in left else 1)
            if name in left:
                left.remove(name)
        for name in left:
            self._append(row, name, 2)

    def _append(self, row: int, name: str, kind: int) -> None:
        self.row.append(row)
        self.disease.append(self.number.setdefault(name, len(self.number)))
        self.kind.append(kind)

    def table(self, place: NDArray[np.int64]) -> list[csr_array]:
        """A table of rows and diseases for each kind; `place` tells which row of the tables is which of ours."""
        row, disease, kind = (np.asarray(part, dtype=np.int64) for part in (self.row, self.disease, self.kind))
        shape = len(place), len(self.number)
        return [
            csr_array((np.ones(int((kind == k).sum())), (place[row[kind == k]], disease[kind == k])), shape=shape)
            for k in range(3)
        ]


class Grades:
    """A tally as arrays, in the order of cases."""

    def __init__(self, tally: Tally, members: Mapping[tuple[str, str], NDArray[np.bool_]]) -> None:
        """`members` has for each axis and group of cases who belongs to it, by the number of the case."""
        case = np.asarray(tally.case, dtype=np.int64)
        order = np.argsort(case, kind="stable")
        self.case, self.members = case[order], members
        columns = {name: np.asarray(column)[order] for name, column in tally.columns.items()}
        self.columns = {name: column for name, column in columns.items() if not np.isnan(column).all()}
        unknown = np.full(len(case), np.nan)
        self.confidence, self.correct = (self.columns.get(name, unknown) for name in ("confidence", "top1"))
        self.sure = ~np.isnan(self.confidence) & ~np.isnan(self.correct)
        before = self.columns.get("uncalibrated", unknown)
        self.said = {"ece": (self.confidence, self.sure)}
        """By metric the confidence that it is about, and where that is known."""
        if (known := self.sure & ~np.isnan(before)).any():
            self.said["ece_uncalibrated"] = before, known
        self.counts = {level: names.table(np.argsort(order)) for level, names in tally.names.items() if names.row}
        self.graded = ~np.isnan(self.columns.get("disease_f1", unknown)) & ~np.isnan(
            self.columns.get("diseases", unknown)
        )
        """Answers, not failures, that have a grade of their diseases."""
        self.ranks = self._ranks()
        self.ratios = list(self._ratios(slice(None)))

    def _ratios(self, rows: slice) -> dict[str, tuple[Floats, Floats]]:
        """By metric what is added up above and below the line, a number for each answer among `rows`."""
        found = {}
        for name in (*SHARES, *MEANS):
            if name in self.columns:
                column = self.columns[name][rows]
                found[name if name in SHARES else f"mean_{name}"] = np.nan_to_num(column), ~np.isnan(column) + 0.0
        for level, counts in self.counts.items():
            both, said, true = (np.asarray(part[rows].sum(axis=1)) for part in counts)
            found[f"micro_{_F1[level]}"] = 2 * both, 2 * both + said + true
            if level == "concept":
                found |= {"micro_precision": (both, both + said), "micro_recall": (both, both + true)}
        for name in GROUPED:
            for (axis, group), inside in self.members.items() if name in found else ():
                if inside[self.case].any():
                    above, below = (part * inside[self.case[rows]] for part in found[name])
                    found[f"{name}[{axis}={group}]"] = above, below
        return found

    def _ranks(self) -> dict[str, tuple[Floats, Floats]]:
        """By size of an answer its ranks and those of the grade, about 0; both are 0 where there is no grade."""
        found: dict[str, tuple[Floats, Floats]] = {}
        known = self.graded
        for name in SIZES if known.any() else ():
            both = self.columns[name][known], self.columns["value"][known]
            if all(len(np.unique(part)) > 1 for part in both):
                found[name] = np.zeros(len(known)), np.zeros(len(known))
                for whole, part in zip(found[name], both, strict=True):
                    whole[known] = rankdata(part) - (len(part) + 1) / 2
        return found

    def sums(self, first: int, last: int) -> dict[str, Any]:
        """What the figures are made of, a row for each case from `first` to before `last`."""
        rows, size = slice(*np.searchsorted(self.case, [first, last]).tolist()), last - first
        case, number = self.case[rows] - first, rows.stop - rows.start
        into = csr_array((np.ones(number), (case, np.arange(number))), shape=(size, number))
        parts = [part for ratio in self._ratios(rows).values() for part in ratio]
        for x, y in ((x[rows], y[rows]) for x, y in self.ranks.values()):
            parts += [x * y, x, y, x * x, y * y, self.graded[rows] + 0.0]
        found = {"parts": into @ np.column_stack(parts)}
        for name, (said, known) in self.said.items():
            sure = known[rows]
            p, y = said[rows][sure], self.correct[rows][sure]
            place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], p)
            found[name] = np.bincount(case[sure] * BINS + place, y - p, size * BINS).reshape(size, BINS)
            found[f"{name} n"] = np.bincount(case[sure], minlength=size)[:, None]
        for level, counts in self.counts.items():
            found |= {f"{level} {i}": into @ part[rows] for i, part in enumerate(counts)}
        return found

    def figures(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """Every metric that is known, of each row of sums."""
        table = sums["parts"]
        found = {name: ratio(table[:, 2 * i], table[:, 2 * i + 1]) for i, name in enumerate(self.ratios)}
        for i, name in enumerate(self.ranks):
            start = 2 * len(self.ratios) + 6 * i
            found[f"spearman_{name}"] = _correlation(table[:, start : start + 6])
        for level in self.counts:
            both, said, true = (sums[f"{level} {i}"] for i in range(3))
            f1 = np.divide(2 * both, 2 * both + said + true, out=np.zeros_like(both), where=both > 0)
            asked = both + true > 0
            found[f"macro_{_F1[level]}"] = ratio((f1 * asked).sum(axis=1), asked.sum(axis=1) + 0.0)
        for name, (_, known) in self.said.items():
            if known.any():
                found[name] = ratio(np.abs(sums[name]).sum(axis=1), sums[f"{name} n"][:, 0])
        return found

    def estimates(self, draws: Mapping[str, Floats], seed: int) -> dict[str, Estimate]:
        """Every metric that is known, with its interval; `n` counts cases."""
        found = {
            name: estimate(draws[name], self._cases(below > 0), share=name.partition("[")[0] in SHARES)
            for name, (_, below) in self._ratios(slice(None)).items()
        }
        for name in draws:
            if name not in found and name not in self.said and np.isfinite(draws[name][0]):
                found[name] = estimate(draws[name], self._cases(~np.isnan(self.columns["disease_f1"])))
        shrunk = {}
        for name, (_, known) in self.said.items():
            if name in draws:
                # A mean of absolute gaps grows by resampling alone: that growth is taken off the draws again.
                values = draws[name]
                shrunk[name] = np.append(values[0], values[1:] - np.nanmedian(values[1:]) + values[0])
                found[name] = estimate(np.maximum(0, shrunk[name]), self._cases(known))
        if "ece" in shrunk:
            floor = ece_floor(self.confidence[self.sure], BINS, seed)
            found["ece_floor"] = Estimate(value=floor, low=floor, high=floor, n=found["ece"].n)
        if "ece_uncalibrated" in shrunk:
            found["ece_gain"] = estimate(shrunk["ece_uncalibrated"] - shrunk["ece"], found["ece"].n)
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
            found[name] = estimate(np.append(value, np.maximum(0, draws) if name == "ece_mass" else draws), n)
        floor = confidence.mass_floor(sure, seed)
        return found | {"ece_mass_floor": Estimate(value=floor, low=floor, high=floor, n=n)}

    def worst_first(self) -> list[int]:
        """Numbers of answered cases by what the answers are worth; of equals, the surest answer first."""
        unknown = np.full(len(self.case), np.nan)  # without gold, and with nothing said that a teacher said too
        worth = np.nan_to_num(self.columns.get("value", unknown), nan=np.inf)
        sure = np.nan_to_num(self.confidence)
        order = np.lexsort((-sure, worth))
        return list(dict.fromkeys(self.case[order[self.columns["failed"][order] == 0]].tolist()))

    def _cases(self, known: NDArray[np.bool_]) -> int:
        return len(np.unique(self.case[known]))


def estimate(draws: Floats, n: int, *, share: bool = False) -> Estimate:
    """The first figure with the interval of the others. `share`: it is of cases, all to none."""
    value = float(draws[0])
    if share and value in (0, 1):
        # Resampling can't tell all from nearly all: Wilson's bounds can.
        doubt = Z**2 / (n + Z**2)
        return Estimate(value=value, low=max(0.0, value - doubt), high=min(1.0, value + doubt), n=n)
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n)


def _correlation(sums: Floats) -> Floats:
    """Pearson's, from sums of products, of both, of their squares and of ones."""
    product, x, y, xx, yy, n = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (product - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
    return found


def ratio(above: Floats, below: Floats) -> Floats:
    """NaN where nothing is below the line."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)
