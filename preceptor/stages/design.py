"""A teacher writes prompts from solved cases; each is tried on validation cases, and the best is kept.

The zero-shot prompt competes too. Other sections use the winner by this section's name: `label: {prompt: design}`.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import (
    Case,
    Consultation,
    Diagnosis,
    Failure,
    Language,
    Prediction,
    Record,
    Sampling,
    Task,
)
from preceptor.stages import solved
from preceptor.stages.base import Context, How, Need, Stage, StageConfig, read_records, replacing, write_records
from preceptor.stages.teacher import TeacherConfig, converse, teacher
from preceptor.tasks import consult, diagnosis, prompts
from preceptor.tasks.designing import design
from preceptor.tasks.strategies import Asking, Conversation, zero_shot

PROMPT, CANDIDATES = "prompt.txt", "candidates.jsonl"
ZERO_SHOT = "zero_shot"


class Config(StageConfig):
    """Who writes, from what, and how it is tried. `limit` is of the validation cases."""

    teacher: TeacherConfig
    task: Task = "diagnosis"
    language: Language = "en"
    candidates: int = Field(default=4, gt=0)
    """Prompts that the teacher writes, each from other cases."""
    shots: int = Field(default=5, gt=0)
    """Solved cases that it is shown."""
    examples_from: str = ""
    """A file of solved cases, or a section (`label`: its answers are taken as right); by default the training cases
    that have gold."""
    temperature: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    """Of the writing; the prompts are tried at 0."""
    max_tokens: int = Field(default=1024, gt=0)
    seed: int = 0
    """Of the lots by which cases are drawn."""
    concurrency: Annotated[int, How()] = Field(default=16, gt=0)
    """Requests to the endpoint at once."""

    def needs(self) -> tuple[Need, ...]:
        """The cases on which prompts are tried, and the solved ones."""
        return (Need("validation.jsonl"), *solved.needs(self.examples_from))


class Candidate(Record):
    """A prompt, and how it did."""

    name: str
    measure: Literal["grade", "agreement"]
    """`grade` against the cases' gold; where there is none, against the answers to the other prompts, their mean."""
    score: float | None
    """Mean over the cases; None where the prompt was never tried, or never answered."""
    cases: int = 0
    """That are in the score."""
    answered: int = 0
    abstained: int = 0
    failures: dict[str, int] = Field(default_factory=dict)
    refused: str = ""
    """Why the prompt was not tried."""
    kept: bool = False
    text: str = ""


@dataclass(frozen=True)
class _Trial:
    """What the models said under each prompt, by its name and case."""

    cases: Mapping[str, Case]
    said: Mapping[tuple[str, str], Prediction | Failure]
    graded: bool

    def candidate(self, name: str, text: str, rivals: Sequence[str]) -> Candidate:
        """How a prompt did. A request that brought no reply is no answer to it, and not in the score."""
        own = [result for identity in self.cases if isinstance(result := self.said[name, identity], Prediction)]
        lost = [result for identity in self.cases if isinstance(result := self.said[name, identity], Failure)]
        values = [value for prediction in own if (value := self._value(prediction, rivals)) is not None]
        return Candidate(
            name=name,
            measure="grade" if self.graded else "agreement",
            score=sum(values) / len(values) if values else None,
            cases=len(values),
            answered=sum(prediction.output is not None for prediction in own),
            abstained=sum(prediction.abstained for prediction in own),
            failures=Counter(f.kind.value for f in (*lost, *(p.failure for p in own if p.failure))),
            text=text,
        )

    def _value(self, prediction: Prediction, rivals: Sequence[str]) -> float | None:
        case = self.cases[prediction.case_id]
        if self.graded:
            return _grade(prediction, case)
        others = [self.said[rival, case.id] for rival in rivals]
        golds = [other.output for other in others if isinstance(other, Prediction) and other.output]
        found = [_grade(prediction, _solved_by(case, gold)) for gold in golds]
        values = [value for value in found if value is not None]
        return sum(values) / len(values) if values else None


def _grade(prediction: Prediction, case: Case) -> float | None:
    output = prediction.output
    if isinstance(case.gold, Consultation):
        return consult.grade(output if isinstance(output, Consultation) else None, case).value
    return diagnosis.grade(output if isinstance(output, Diagnosis) else None, case).value


def _solved_by(case: Case, gold: Diagnosis | Consultation) -> Case:
    abstained = isinstance(gold, Diagnosis) and gold.abstained
    return case.model_copy(update={"gold": gold, "expects_abstention": abstained})


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes prompt.txt and candidates.jsonl."""
    cases = _validation(config, context)
    kind = Consultation if config.task == "consult" else Diagnosis
    with_gold = {case.id: case for case in cases if isinstance(case.gold, kind)}
    texts = {ZERO_SHOT: prompts.words(config.task, ZERO_SHOT, config.language) + "\n"}
    refused: dict[str, str] = {}
    for name, written in _written(config, context).items():
        if isinstance(written, Failure):
            refused[name] = f"{written.kind.value}: {written.detail}"
        elif same := next((other for other, text in texts.items() if text == written), None):
            refused[name] = f"it is {same} again"
        else:
            texts[name] = written
    tried = with_gold or {case.id: case for case in cases}
    trial = _Trial(tried, _tried(config, context, texts, tried), graded=bool(with_gold))
    found = [trial.candidate(name, text, [n for n in texts if n != name]) for name, text in texts.items()]
    best = max(found, key=lambda one: -1.0 if one.score is None else one.score)  # of equals the first
    measure = best.measure
    found = [one.model_copy(update={"kept": one is best}) for one in found]
    found += [Candidate(name=name, measure=measure, score=None, refused=why) for name, why in refused.items()]
    write_records(context.folder / CANDIDATES, found)
    with replacing(context.folder / PROMPT) as beside:
        beside.write_text(best.text, "utf-8")
    by = "the grader" if with_gold else "agreement with the answers to the other prompts, as no case has gold,"
    context.say(table([one for one in found if not one.refused]))
    for name, why in refused.items():
        context.say(f"{context.section}: {name} was not tried: {why}")
    context.say(f"{context.section}: {best.name} is kept, by {by} on {len(tried)} cases ({context.folder / PROMPT})")
    scores = {one.name: one.score for one in found}
    return {"kept": best.name, "measure": measure, "cases": len(tried), "scores": scores, "refused": len(refused)}


def _validation(config: Config, context: Context) -> list[Case]:
    path = context.input("validation.jsonl")
    cases = list(islice(read_records(path, Case), config.limit))
    if not cases:
        raise UserError(f"{path}: no cases to try prompts on; give prepare.validation a number")
    return cases


def _written(config: Config, context: Context) -> dict[str, str | Failure]:
    """What the teacher wrote, by name."""
    pool = solved.solved(config, context)
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    written: dict[str, str | Failure] = {}
    conversations = (
        (f"design_{number}", design(shown, config.task, config.language, sampling))
        for number in range(1, config.candidates + 1)
        for shown in [random.Random(f"{config.seed}:{number}").sample(pool, min(config.shots, len(pool)))]
    )
    with (
        teacher(config.teacher, context) as answerer,
        context.progress(f"{context.section}: writing", config.candidates) as tick,
    ):

        def keep(name: str, result: str | Failure) -> None:
            written[name] = result
            tick()

        converse(conversations, answerer, context, config.concurrency, keep)
    _refuse_if_none(context, "no prompt was written", written.values())
    return dict(sorted(written.items(), key=lambda item: int(item[0].rpartition("_")[2])))


def _tried(
    config: Config, context: Context, texts: Mapping[str, str], cases: Mapping[str, Case]
) -> dict[tuple[str, str], Prediction | Failure]:
    """The answers to the cases under each prompt."""
    correction = prompts.words(config.task, "correction", config.language)
    sampling = Sampling(max_tokens=config.max_tokens)
    base = Asking(prompts.parse(texts[ZERO_SHOT], ZERO_SHOT), "", sampling, task=config.task, correction=correction)
    said: dict[tuple[str, str], Prediction | Failure] = {}

    def conversations() -> Iterator[tuple[tuple[str, str], Conversation]]:
        for name, text in texts.items():
            asking = replace(base, prompt=prompts.parse(text, name), model=name)
            for case in cases.values():
                yield (name, case.id), zero_shot(case, asking)

    with (
        teacher(config.teacher, context) as answerer,
        context.progress(f"{context.section}: trying {len(texts)} prompts", len(texts) * len(cases)) as tick,
    ):

        def keep(key: tuple[str, str], result: Prediction | Failure) -> None:
            said[key] = result
            tick()

        converse(conversations(), answerer, context, config.concurrency, keep)
    _refuse_if_none(context, "no case was answered", said.values())
    return said


def _refuse_if_none(context: Context, what: str, results: Collection[object]) -> None:
    failures = [result for result in results if isinstance(result, Failure)]
    if len(failures) == len(results):
        raise WorkError(f"{context.section}: {what}, the last time: {failures[-1].detail}; mend that and run it again")


def table(candidates: Sequence[Candidate]) -> Table:
    """The prompts with their scores, for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("prompt", candidates[0].measure, "cases", "answered", "abstained", "failed"):
        shown.add_column(column, justify="left" if column == "prompt" else "right")
    for one in candidates:
        score = "" if one.score is None else f"{one.score:.3f}"
        counts = (one.cases, one.answered, one.abstained, sum(one.failures.values()))
        shown.add_row(one.name, score, *map(str, counts), style="bold" if one.kept else "")
    return shown


STAGE = Stage("design", Config, run, leaves=(PROMPT, CANDIDATES))
