"""How good each model's answers are: grades go in one at a time, estimates with intervals come out.

Cases are resampled, not predictions, and for every metric and model in the same draws: models are compared case
by case, and the draws, which cost the most, are made once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from preceptor.clinical.names import Namer
from preceptor.core import confidence
from preceptor.core.records import Case, Consultation, Diagnosis, FailureKind, Prediction, Score, Task
from preceptor.core.statistics import Bin, Estimate, reliability
from preceptor.report.baseline import BAG_OF_WORDS, COMMONEST, EXACT, YARDSTICKS
from preceptor.report.grades import BINS, RESAMPLES, Failures, Floats, Grades, Tally, estimate, ratio
from preceptor.report.groups import groups
from preceptor.tasks import consult
from preceptor.tasks.diagnosis import grade, textbook_namer
from preceptor.tasks.measures import Names, assurance, measures, names

TEACHER = "teacher"
CHUNK = 2_000
"""Cases whose weights are in memory at once."""
_FREE = ("parsed", "evidence_grounded", "hallucinated", "supported", "unmapped")
"""Parts of a grade that need no gold."""
_COMPARISONS: tuple[tuple[str, str, Callable[[Floats, Floats], Floats]], ...] = (
    (COMMONEST, "top1_minus_commonest", np.subtract),
    (BAG_OF_WORDS, "top1_minus_bag_of_words", np.subtract),
    (EXACT, "top1_of_exact", ratio),
)


class ModelScore(Score):
    """The grade of one model's answer."""

    model: str


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    metrics: dict[str, dict[str, Estimate]]
    """By model and metric; one that can't be known is absent."""
    reliability: dict[str, list[Bin]]
    uncalibrated: dict[str, list[Bin]]
    """The same answers by the confidence that they had before it was calibrated."""
    risk: dict[str, list[tuple[float, float]]]
    """By model, the share of the surest answers that is kept, and the error among them."""
    failures: dict[str, dict[FailureKind, Failures]]
    ranking: dict[str, list[str]]
    """By model, the ids of the cases that it answered: the worst answers first, of equals the surest."""
    groups: dict[tuple[str, str], int]
    """By axis and group, such as age and 65+, how many cases belong to it."""
    confusions: dict[str, list[tuple[str, str, int]]]
    """By model, what was true, what was named in its place, and how often; the most frequent first."""
    task: Task
    """What was asked."""
    strangers: int
    """Predictions about cases that are not among those evaluated."""


class Evaluator:
    """Grades predictions against cases."""

    def __init__(
        self,
        cases: Iterable[Case],
        teacher: Mapping[str, Diagnosis] | None = None,
        namer: Namer | None = None,
        *,
        task: Task = "diagnosis",
    ) -> None:
        """`teacher` has its answers by case id: they stand in for gold where there is none.

        `namer` knows diseases by their names, by default the textbook's. `task` is what was asked.
        """
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
        self._namer, self._task = namer or textbook_namer(), task
        self._tallies: dict[str, Tally] = {}
        self._confused: dict[str, Counter[tuple[str, str]]] = {}
        self._strangers = 0

    def add(self, prediction: Prediction) -> ModelScore | None:
        """Grades a prediction; None if its case is not one of ours."""
        case = self.cases.get(prediction.case_id)
        if case is None:
            self._strangers += 1
            return None
        score, named = (
            self._consulted(prediction, case) if self._task == "consult" else self._diagnosed(prediction, case)
        )
        graded = ModelScore(
            case_id=case.id, sample=prediction.sample, value=score.value, parts=score.parts, model=prediction.model
        )
        self._tallies.setdefault(prediction.model, Tally()).add(self._number[case.id], prediction, graded, named)
        return graded

    def _consulted(self, prediction: Prediction, case: Case) -> tuple[Score, Names]:
        output = prediction.output if isinstance(prediction.output, Consultation) else None
        return consult.grade(output, case), {}

    def _diagnosed(self, prediction: Prediction, case: Case) -> tuple[Score, Names]:
        """The grade with what else is told of the answer, and the names by which F1 is counted."""
        output = prediction.output if isinstance(prediction.output, Diagnosis) else None
        gold = case.gold if isinstance(case.gold, Diagnosis) else None
        score = grade(output, case, self._namer)
        named: Names = {}
        parts = dict(score.parts)
        if case.id in self.borrowed:
            free = {name: parts.pop(name) for name in _FREE}
            parts = {} if prediction.model == TEACHER else {f"agreement_{name}": parts[name] for name in parts}
            parts |= free
        elif gold:
            parts |= {**measures(output, case, self._namer), **assurance(prediction, case, self._namer)}
            if output and not output.abstained:
                parts["answered_wrong"] = 1 - (parts["top1"] or 0.0)
            if not (prediction.abstained and parts["exact_set"]):  # who rightly abstains has missed no name
                named = names(output, gold, self._namer)
        if score.parts["top1"] == 0 and output and gold:
            self._confuse(prediction.model, output, gold)
        return score.model_copy(update={"parts": parts}), named

    def _confuse(self, model: str, output: Diagnosis, gold: Diagnosis) -> None:
        """Notes what was named first in place of what was true; an abstention is no name."""
        found = {i for i, _ in self._namer.match(gold.diseases, output.diseases)}
        missed = next((name for i, name in enumerate(gold.diseases) if i not in found), "")
        self._confused.setdefault(model, Counter())[missed, next(iter(output.diseases), "")] += 1

    def evaluation(self, seed: int = 0) -> Evaluation:
        """Estimates with 95 % intervals."""
        belong = groups(self.cases)
        members = {group: np.zeros(len(self.cases), dtype=np.bool_) for group in belong}
        for group, ids in belong.items():
            members[group][[self._number[identity] for identity in ids]] = True
        grades = {model: Grades(tally, members) for model, tally in self._tallies.items()}
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
                theirs = draws.get(other, {}).get("top1")
                if theirs is not None and np.isfinite(found := compared(mine, theirs))[0]:
                    row[name] = estimate(found, row["top1"].n)
        names_of = list(self.cases)
        return Evaluation(
            metrics=metrics,
            reliability=_bins(grades, "ece"),
            uncalibrated=_bins(grades, "ece_uncalibrated"),
            risk={
                model: confidence.curve(part.confidence[part.sure], part.correct[part.sure])
                for model, part in grades.items()
                if part.sure.any()
            },
            failures={model: tally.failures for model, tally in self._tallies.items()},
            ranking={model: [names_of[i] for i in part.worst_first()] for model, part in grades.items()},
            groups={group: len(ids) for group, ids in belong.items()},
            confusions={
                model: [(*pair, n) for pair, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
                for model, counts in self._confused.items()
            },
            task=self._task,
            strangers=self._strangers,
        )


def _bins(grades: Mapping[str, Grades], metric: str) -> dict[str, list[Bin]]:
    """By model the bins from which a calibration error comes."""
    said = {
        model: (*part.said.get(metric, (part.confidence, part.sure & False)), part) for model, part in grades.items()
    }
    return {
        model: reliability(confidence[known], part.correct[known], BINS)
        for model, (confidence, known, part) in said.items()
        if known.any()
    }


def _resampled(grades: Mapping[str, Grades], cases: int, seed: int) -> dict[str, dict[str, Floats]]:
    """By model and metric the figure from all cases, and after it those from the draws.

    A draw weighs each case by a Poisson number of mean 1: that needs only some of the cases at a time.
    """
    rng = np.random.default_rng(seed)
    sums: dict[str, dict[str, Floats]] = {model: {} for model in grades}
    for first in range(0, cases, CHUNK):
        last = min(first + CHUNK, cases)
        weights = np.vstack([np.ones((1, last - first)), rng.poisson(1.0, (RESAMPLES, last - first))])
        for model, part in grades.items():
            for name, table in part.sums(first, last).items():
                sums[model][name] = sums[model].get(name, 0.0) + (table.T @ weights.T).T
    return {model: part.figures(sums[model]) for model, part in grades.items()}
