"""A model's confidence is held against gold: probabilities, answers to withhold, sets that hold the truth.

Of a teacher it is its tokens' probabilities, from which a student is to learn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from preceptor.core.calibration import LEVEL, SetScore, enough
from preceptor.core.recalibration import Method as Recalibrate
from preceptor.core.recalibration import recalibrated
from preceptor.core.records import Case, Diagnosis, Prediction
from preceptor.core.statistics import ece, ece_floor, reliability
from preceptor.stages import recalibrating
from preceptor.stages.answering import BASE, STUDENT, EngineConfig, answering, asking_for, links
from preceptor.stages.asking import (
    PREDICTIONS,
    TEACHER,
    TWO_STAGE,
    VOTE,
    Answers,
    Cases,
    asking_of,
    put_back,
)
from preceptor.stages.base import (
    CALIBRATION,
    RECALIBRATION,
    Context,
    Need,
    Stage,
    read_records,
    write_records,
)
from preceptor.stages.calibrations import beside, way_of, write
from preceptor.stages.teacher import check_ray
from preceptor.tasks import calibrated
from preceptor.tasks.calibrated import LEAST, Answered, Calibration, Calibrations, Method, Wanted
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.strategies import Asking

CASES = "cases.jsonl"
_FOLDS = 5
_MANY = 1_000
"""Answers from which on the figures of a calibration are quiet."""
_OF_A_TEACHER = ("recalibrate", "logprobs")
_OF_A_STUDENT = (
    *("method", "risk", "coverage", "sets", "by", "confidence", "candidates", "votes"),
    *("endpoint", "constrained", "batch"),
)
"""Fields that mean nothing to the other one."""


class Config(EngineConfig):
    """Which model, how it is asked, and what is made of its confidence."""

    model: str = STUDENT
    """`student` (after the last training section), a section that leaves a model, or a folder; or `teacher`."""
    method: Method = "temperature"
    """`temperature` has one number and serves few cases; `isotonic` follows any rising curve and wants 1,000."""
    risk: float | None = Field(default=None, gt=0, lt=1)
    """Most errors among the answers that are given: below a threshold they are withheld. None gives them all."""
    coverage: float | None = Field(default=0.9, gt=0, lt=1)
    """How often the set of diseases beside an answer is to hold a true one; null makes no sets."""
    sets: SetScore = "lac"
    """`lac` makes the smallest sets on average, `aps` larger ones for doubtful cases."""
    by: Literal["specialty"] | None = "specialty"
    """What coverage is to hold in each group of; null for all cases together."""
    recalibrate: Recalibrate = "temperature"
    """What is left of a teacher for distillation, of three ways that are all measured: a temperature, FIRST's
    `resoftmax`, or label `smoothing`."""
    logprobs: int = Field(default=5, ge=1, le=20)
    """Of a teacher: alternatives a token that are asked for."""

    @model_validator(mode="before")
    @classmethod
    def _nobody(cls, given: Any) -> Any:
        """The recipe's teacher is not asked about a student: whoever it is, this is the same request."""
        others = isinstance(given, dict) and given.get("model") != TEACHER
        return {**given, "teacher": None} if others else given

    @model_validator(mode="after")
    def _one(self) -> "Config":
        if self.task != "diagnosis":
            raise ValueError("task: advice names no diseases whose probability could be told; leave the section out")
        of_others, whose = (_OF_A_STUDENT, "student's") if self.model == TEACHER else (_OF_A_TEACHER, "teacher's")
        if strange := next((name for name in of_others if name in self.model_fields_set), None):
            raise ValueError(f"{strange}: it is for a {whose} calibration, and model is {self.model}; leave it out")
        if self.model == TEACHER:
            return self._of_a_teacher()
        if len(links(self.model)) > 1:
            raise ValueError(f"model: {self.model}: of two models in turn neither's confidence is the pair's; name one")
        if self.model == BASE or not self.model_needs((self.model,)):
            raise ValueError(f"model: {self.model}: nothing can be left beside its weights; name a section or a folder")
        return self

    def _of_a_teacher(self) -> "Config":
        if self.teacher is None:
            raise ValueError("teacher: nobody is named; add it to the section, or to the top of the recipe")
        if self.strategy in (TWO_STAGE, VOTE):
            raise ValueError(f"strategy: the last reply of {self.strategy} decides nothing by itself; leave it out")
        check_ray(self.ray, self.teacher.endpoint)
        return self

    def needs(self) -> tuple[Need, ...]:
        """Cases with gold that nobody learned from, and the model."""
        return (Need("cases", files=("validation.jsonl",)), *self.model_needs((self.model,)), *self.own_files())


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes calibration.json here and beside the weights, and the answers that it was learned from.

    Of a teacher it is recalibration.json, here alone. Gold alone is learned from: held against a teacher's labels, a
    calibration would tell how often the two agree.
    """
    held_out = [case for path in context.inputs["cases"] for case in read_records(path, Case)]
    known = [case for case in held_out if isinstance(case.gold, Diagnosis)]
    if not known:
        return _skip(context, f"none of {len(held_out)} validation cases has gold; give cases with gold to prepare")
    write_records(context.folder / CASES, known)
    answers = Answers.begun(config, context, Cases((context.folder / CASES,), config.limit))
    asking = _asking(config, context)
    if next(answers.owed(config.model), None) is not None:
        with answering(config, context, config.model) as engine:
            answers.ask(engine.answerer, engine.concurrency, asking)
    accounts = answers.finish([config.model])
    for line in accounts[config.model].lines():
        context.say(f"{context.section}: {config.model}: {line}")
    cases = {case.id: case for case in known}
    said = [(cases[p.case_id], p) for p in read_records(context.folder / PREDICTIONS, Prediction)]
    made = _of_a_teacher if config.model == TEACHER else _of_a_student
    return {"asked": len(said), **made(config, context, asking, said), **accounts[config.model].figures()}


def _asking(config: Config, context: Context) -> Asking:
    """How the model is asked: a teacher as it labels."""
    if config.model == TEACHER:
        return asking_of(config, context, TEACHER, config.logprobs, corrects=True)
    return asking_for(config, context, config.model, config.model)


def _of_a_student(config: Config, context: Context, asking: Asking, said: Sequence[Answered]) -> Mapping[str, Any]:
    """Learns what a student's confidence in diseases is worth; returns figures."""
    from preceptor.model.resolve import digest

    weights, way = digest(context.input(config.model)), way_of(config, context, asking)
    learned = [(case, prediction) for case, prediction in said if calibrated.answered(case, prediction)]
    if len(learned) < LEAST:
        few = f"{len(learned)} of {len(said)} answers name a disease with a confidence, of {LEAST} due"
        return _skip(context, f"{few}; raise `limit`, give more cases with gold, or mend what failed")
    wanted = Wanted.model_validate(
        config.model_dump(include={"method", "risk", "coverage", "sets", "by"}) | {"least": calibrated.least(way)}
    )
    found = calibrated.fit(learned, wanted, way, weights)
    _leave(found, context, context.input(config.model))
    figures = _cross_validated(learned, found, config.seed)
    sizes = Counter(calibrated.group(case, wanted) for case, _ in learned)
    small = [name for name, n in sorted(sizes.items()) if name and not enough(n, config.coverage or 0)]
    for line in _told(found, figures, len(said), small):
        context.say(f"{context.section}: {line}")
    return {"n": found.n, **figures}


def _of_a_teacher(config: Config, context: Context, _: Asking, said: Sequence[Answered]) -> Mapping[str, Any]:
    """Learns what the probabilities of a teacher's tokens are worth; returns figures."""
    assert config.teacher is not None
    seen = list(recalibrating.observed(said, context))
    decided = len({one.group for one in seen})
    if decided < recalibrating.DECIDED:
        few = f"{decided} of {len(said)} answers tell how sure the teacher was, of {recalibrating.DECIDED} due"
        return _skip(context, f"{few}; raise `limit`, give more cases with gold, or mend what failed")
    teacher = f"{config.teacher.model} at {config.teacher.endpoint[0].name}"
    found = recalibrated(seen, config.recalibrate, teacher, config.logprobs, config.seed)
    recalibrating.write(context.folder / RECALIBRATION, found)
    for line in recalibrating.told(found, len(said)):
        context.say(f"{context.section}: {line}")
    return recalibrating.figures(found)


def _skip(context: Context, why: str) -> Mapping[str, Any]:
    """Nothing is learned: it is told, and the section is done."""
    for left in STAGE.leaves:
        (context.folder / left).unlink(missing_ok=True)
    context.say(f"{context.section}: skipped, as {why}")
    return {"skipped": why}


def _leave(found: Calibration, context: Context, model: Path) -> None:
    """Write a calibration here, and beside the weights along with those for other ways of asking."""
    write(context.folder / CALIBRATION, Calibrations().with_(found))
    write(model / CALIBRATION, beside(model).with_(found))


def _cross_validated(learned: Sequence[Answered], found: Calibration, seed: int) -> dict[str, Any]:
    """Figures of calibrations that were learned from four fifths of the answers, on the rest, for each fifth.

    What a calibration shows on the very answers that taught it says nothing.
    """
    fold = np.random.default_rng(seed).permutation(len(learned)) % _FOLDS
    namer = textbook_namer()
    before, after, right, withheld, covered, sizes = (list[Any]() for _ in range(6))
    for number in range(_FOLDS):
        rest = [one for one, at in zip(learned, fold, strict=True) if at != number]
        part = calibrated.fit(rest, found.wanted, found.way, found.weights, namer)
        for case, prediction in (one for one, at in zip(learned, fold, strict=True) if at == number):
            settled = calibrated.apply(part, prediction, case)
            (name, true), *_ = calibrated.outcomes(case, prediction, namer)
            before.append(prediction.confidence[name])
            after.append(settled.confidence[name])
            right.append(true)
            withheld.append(settled.withheld is not None)
            if settled.prediction_set is not None:
                covered.append(calibrated.covers(case, settled, namer))
                sizes.append(len(settled.prediction_set))
    given = [true for true, no in zip(right, withheld, strict=True) if not no]
    figures: dict[str, Any] = {
        "top1": float(np.mean(right)),
        "ece_uncalibrated": ece(before, right),
        "ece": ece(after, right),
        "ece_floor": ece_floor(after),
        "reliability_uncalibrated": [one.model_dump() for one in reliability(before, right)],
        "reliability": [one.model_dump() for one in reliability(after, right)],
    }
    if found.selection:
        figures["selection"] = found.selection.model_dump()
        figures |= {"withheld": float(np.mean(withheld)), "risk": 1 - float(np.mean(given)) if given else None}
    if sizes:
        figures |= {"set_coverage": float(np.mean(covered)), "set_size": float(np.mean(sizes))}
    return figures


def _told(found: Calibration, figures: Mapping[str, Any], asked: int, small: Sequence[str]) -> list[str]:
    """What came out, for the user; `small` are the groups without a quantile of their own."""
    curve = f"T {found.first.temperature:.2f}" if found.first.temperature else f"{len(found.first.points)} points"
    change = f"ECE {figures['ece_uncalibrated']:.3f} -> {figures['ece']:.3f} (perfect: {figures['ece_floor']:.3f})"
    few = found.n < _MANY and found.wanted.method == "isotonic"
    more = f"; isotonic wants {_MANY:,}, temperature serves fewer" if few else ""
    worse = figures["ece"] >= figures["ece_uncalibrated"]
    more += "; no better than uncalibrated: it wants more cases" if worse else ""
    lines = [f"{change} by {_FOLDS}-fold cross-validation on {found.n} of {asked} answers, {curve}{more}"]
    selection, risk = found.selection, found.wanted.risk or 0
    if selection and selection.threshold is not None:
        lines.append(
            f"answers below {selection.threshold:.2f} are withheld: {selection.kept} of {asked} are given, "
            f"{selection.wrong} of them wrong, so at most {100 * risk:g}% are with {LEVEL:.0%} certainty"
        )
    elif selection:
        lines.append(
            f"no answer is withheld: no threshold keeps the risk of {100 * risk:g}% with {LEVEL:.0%} certainty on "
            f"{selection.n} answers; the lowest risk in reach is {_percent(selection.reachable)}"
        )
    if "set_size" in figures:
        target = 100 * (found.wanted.coverage or 0)
        lines.append(
            f"sets hold a true disease for {figures['set_coverage']:.1%} (target {target:g}%) and have "
            f"{figures['set_size']:.1f} members, by cross-validation"
            + (f"; too few cases for a quantile of their own, so they share one: {', '.join(small)}" if small else "")
        )
    return lines


def _percent(risk: float) -> str:
    """A risk to a tenth of a percent, rounded up, so that what is told can be set."""
    return f"{ceil(risk * 1000 - 1e-9) / 10:g}%"


STAGE = Stage("calibrate", Config, run, leaves=(CALIBRATION, RECALIBRATION), retry=put_back)
