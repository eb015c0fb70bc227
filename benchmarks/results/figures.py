"""From finished runs to figures: what is read of a run, and means over runs with intervals."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import nan, sqrt
from pathlib import Path
from statistics import fmean

from scipy.stats import t

from preceptor.clinical.textbook.exact import Confidence, exact
from preceptor.core.records import Case, Diagnosis, Prediction
from preceptor.core.statistics import Estimate, estimate
from preceptor.report.baseline import EXACT
from preceptor.report.metrics import TEACHER
from preceptor.stages.base import read_records
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.measures import LIKELY, measures

DIFFERENTIAL = "differential_f1"
METRICS = ("parsed", "top1", DIFFERENTIAL, "ece", "ece_floor", "brier", "augrc")
Figures = Mapping[str, Mapping[str, Estimate]]
"""By model and metric, with intervals over the cases."""


@dataclass(frozen=True)
class Run:
    """One seed of one teacher."""

    teacher: Confidence
    seed: int
    seconds: float
    """Of all its sections."""
    cases: int
    """That were tested on."""
    figures: Figures


@dataclass(frozen=True)
class Mean:
    """Over seeds, with half the width of a 95 % interval: not a number where one seed can't tell."""

    value: float
    half: float


def read(folder: Path, teacher: Confidence, seed: int) -> Run:
    """What a finished run found."""
    told = json.loads((folder / "evaluate" / "metrics.json").read_text("utf-8"))
    cases = list(read_records(folder / "prepare" / "test.jsonl", Case))
    figures = {model: {m: Estimate(**row[m]) for m in METRICS if m in row} for model, row in told.items()}
    said = chain.from_iterable(read_records(path, Prediction) for path in folder.glob("predict*/predictions.jsonl"))
    for model, found in differentials(cases, said, teacher).items():
        figures[model][DIFFERENTIAL] = found
    seconds = sum(json.loads(path.read_text("utf-8"))["seconds"] for path in folder.glob("*/done.json"))
    return Run(teacher, seed, seconds, len(cases), figures)


def differentials(cases: Sequence[Case], said: Iterable[Prediction], teacher: Confidence) -> dict[str, Estimate]:
    """By model how well the diseases that it holds for likely are those that are: DDXPlus's F1, a mean over cases.

    A student's probability of a disease is that of its being named: in any place, where the answer names it, else in
    the first. The teacher's is its posterior. Cases in which the right answer is none are left out, for a teacher then
    tells no differential, and a failed answer counts as 0.
    """
    known = {case.id: case for case in cases if not case.expects_abstention}
    scores: dict[str, list[float]] = {EXACT: [_f1(case, case.differential or {}) for case in known.values()]}
    reader = exact(teacher)
    names = {key: disease.en for key, disease in reader.book.diseases.items()}
    beliefs = (reader.posterior(case.text).marginals for case in known.values())
    believed = ({names[key]: share for key, share in marginals.items()} for marginals in beliefs)
    scores[TEACHER] = [_f1(case, shares) for case, shares in zip(known.values(), believed, strict=True)]
    for one in said:
        if one.case_id in known and one.model != TEACHER:
            shares = {**one.distribution, **one.confidence}
            scores.setdefault(one.model, []).append(_f1(known[one.case_id], shares))
    return {model: estimate(values) for model, values in scores.items()}


def _f1(case: Case, shares: Mapping[str, float]) -> float:
    likely = tuple(name for name, share in shares.items() if name and share > LIKELY)
    return measures(Diagnosis(diseases=likely), case, textbook_namer())["ddf1"] or 0.0


def means(runs: Sequence[Run], against: str = "") -> dict[Confidence, dict[str, dict[str, Mean]]]:
    """By teacher, model and metric the mean over its seeds, of the differences to another model if one is named.

    The interval is Student's t. Seeds scatter as much with one teacher as with another, it is assumed: the variance
    about each teacher's mean is pooled. No two runs share a case.
    """
    found: dict[Confidence, dict[str, dict[str, Mean]]] = {run.teacher: {} for run in runs}
    for model, metric in _told(runs):
        values: dict[Confidence, list[float]] = {}
        for run in runs:
            if (value := _value(run, model, metric, against)) is not None:
                values.setdefault(run.teacher, []).append(value)
        for teacher, mean in _pooled(values).items():
            found[teacher].setdefault(model, {})[metric] = mean
    return found


def overall(runs: Sequence[Run], against: str) -> dict[str, dict[str, Mean]]:
    """By model and metric the mean difference to another model with all teachers, each counted alike."""
    found: dict[str, dict[str, Mean]] = {}
    parts = means(runs, against)
    for model, metric in _told(runs):
        rows = [row[model][metric] for row in parts.values() if metric in row.get(model, {})]
        if rows:
            half = sqrt(sum(row.half**2 for row in rows)) / len(rows)
            found.setdefault(model, {})[metric] = Mean(fmean(row.value for row in rows), half)
    return found


def _told(runs: Iterable[Run]) -> Iterator[tuple[str, str]]:
    models = dict.fromkeys(model for run in runs for model in run.figures)
    return ((model, metric) for model in models for metric in METRICS)


def _value(run: Run, model: str, metric: str, against: str) -> float | None:
    mine = run.figures.get(model, {}).get(metric)
    if mine is None or not against:
        return mine.value if mine else None
    theirs = run.figures.get(against, {}).get(metric)
    return mine.value - theirs.value if theirs else None


def _pooled(values: Mapping[Confidence, Sequence[float]]) -> dict[Confidence, Mean]:
    centres = {teacher: fmean(row) for teacher, row in values.items()}
    free = sum(len(row) - 1 for row in values.values())
    squares = sum((value - centres[teacher]) ** 2 for teacher, row in values.items() for value in row)
    width = float(t.ppf(0.975, free)) * sqrt(squares / free) if free else nan
    return {teacher: Mean(centres[teacher], width / sqrt(len(row))) for teacher, row in values.items()}
