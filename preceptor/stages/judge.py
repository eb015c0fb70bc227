"""A model judges answers by a rubric, criterion by criterion, or which of two models' answers is better.

How far the judge can be trusted stands beside what it says: how many of its verdicts are valid, how far it agrees
with itself when asked again, and how far with people.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Failure, Language, Prediction, Reply, Request, Sampling, Task
from preceptor.data.rows import BadRow, rows
from preceptor.report import judged
from preceptor.stages.base import (
    Context,
    How,
    Need,
    Stage,
    StageConfig,
    nearest,
    read_records,
    write_records,
)
from preceptor.stages.teacher import TeacherConfig, converse, teacher
from preceptor.tasks import judging, prompts
from preceptor.tasks.judging import HumanVerdict, Rubric
from preceptor.tasks.prompts import Prompt

SCORES = "scores.jsonl"
_COUNTED = {
    "outcomes": "cases by outcome for the first",
    "unanswered": "answers that were none before they came to the judge",
    "unscored": "answers without a score",
    "flaws": "verdicts that do not count",
    "human": "people's verdicts",
}

_T = TypeVar("_T")
_Key = tuple[str, str, int]
"""Model, case and sample of an answer."""


class Config(StageConfig):
    """Who judges whom, and by what."""

    teacher: TeacherConfig
    """The judge. One that taught the student, or that is judged itself, may flatter its own."""
    language: Language = "en"
    """Of the questions to the judge, and of the package's rubrics."""
    task: Task = "diagnosis"
    rubric: str = ""
    """One of the package's (`diagnosis`, `consult`; by default the task's), or the path of a YAML file."""
    models: tuple[str, ...] = ()
    """Whose answers are judged; by default all that were given."""
    pairs: tuple[str, ...] = ()
    """Two models whose answers are compared, each pair in both orders, in place of verdicts by criterion."""
    human: str | None = None
    """A file with people's verdicts: case_id, criterion, met, and model where several are judged."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    repeats: int = Field(default=1, gt=0)
    """How often the same is asked. The mean counts, and a verdict that is invalid once may be valid the next time."""
    max_tokens: int = Field(default=2048, gt=0)
    seed: int = 0
    """Of the resampling."""
    concurrency: Annotated[int, How()] = Field(default=16, gt=0)
    """Requests to the endpoint at once."""

    @field_validator("pairs")
    @classmethod
    def _two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and (len(value), len(set(value))) != (2, 2):
            raise ValueError("name two models, such as [base, student]")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "Config":
        if self.pairs and (self.models or self.human):
            raise ValueError("pairs: verdicts by criterion, `models` and `human` belong to another section")
        return self

    def needs(self) -> tuple[Need, ...]:
        """The cases, what models answered, and the user's own files."""
        own = {"rubric": self.rubric if judging.is_path(self.rubric) else None, "human": self.human}
        return (
            Need("cases", files=("test.jsonl", "target.jsonl")),
            Need("predictions", files=("predictions.jsonl",), stages=("predict", "label")),
            Need("target", files=("target.jsonl",), required=False),
            *(Need(name, paths=(path,)) for name, path in own.items() if path),
        )


@dataclass(frozen=True)
class _Bench:
    """What all questions to the judge share."""

    config: Config
    context: Context
    rubric: Rubric
    prompt: Prompt
    cases: Mapping[str, Case]
    answers: Mapping[_Key, Prediction]

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.config.temperature, max_tokens=self.config.max_tokens)

    def text(self, key: _Key) -> str | None:
        """An answer as the judge reads it; None where there is none."""
        output = self.answers[key].output if key in self.answers else None
        return None if output is None else judging.shown(output, self.config.language)

    def ask(self, questions: Sequence[Callable[[], Generator[Request, Reply, _T]]]) -> list[tuple[_T | Failure, ...]]:
        """What comes of each question, asked as often as `repeats` says."""
        config, context = self.config, self.context
        asked = {(n, repeat): ask() for n, ask in enumerate(questions) for repeat in range(config.repeats)}
        found: dict[tuple[int, int], _T | Failure] = {}
        failures: list[Failure] = []
        with (
            teacher(config.teacher, context) as completer,
            context.progress(context.section, len(asked)) as tick,
        ):

            def keep(place: tuple[int, int], result: _T | Failure) -> None:
                found[place] = result
                failures.extend([result] if isinstance(result, Failure) else ())
                tick(1, f"{len(failures)} failed" if failures else "")

            converse(asked.items(), completer, context, config.concurrency, keep, sample=lambda place: place[1])
        if failures and len(failures) == len(asked):
            why = f"the last one: {failures[-1].kind.value}: {failures[-1].detail}; mend that and run it again"
            raise WorkError(f"{context.section}: {completer.name} gave none of {len(asked)} judgements, {why}")
        return [tuple(found[n, repeat] for repeat in range(config.repeats)) for n in range(len(questions))]


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes scores.jsonl; returns who judged, by what, and by model the figures with their intervals."""
    rubric = judging.load(config.rubric or config.task, config.language)
    prompt = prompts.load("judge", "compare" if config.pairs else "score", config.language)
    bench = _Bench(config, context, rubric, prompt, *_given(config, context))
    figures = _compared(bench) if config.pairs else _judged(bench)
    judge: dict[str, Any] = {
        "model": config.teacher.model,
        "endpoint": config.teacher.endpoint[0].name,
        "temperature": config.temperature,
        "repeats": config.repeats,
        "rubric": rubric.name,
        "rubric_sha256": rubric.sha256,
        "prompt_sha256": prompts.prompt_sha(prompt.turns),
    }
    who = "judged by {model} at {endpoint}, temperature {temperature:g}, repeats {repeats}, rubric {rubric}".format(
        **judge
    )
    context.say(f"{context.section}: {who} ({rubric.sha256[:12]}), prompt {judge['prompt_sha256'][:12]}")
    context.say(judged.table(figures, () if config.pairs else rubric.criteria, config.language))
    for model, row in figures.items():
        for what, told in _COUNTED.items():
            if counts := ", ".join(f"{n} {reason}" for reason, n in row.get(what, {}).items()):
                context.say(f"{context.section}: {model}: {told}: {counts}")
    scored = sum((row.get("score") or row.get("win_rate") or {"n": 0})["n"] for row in figures.values())
    answers = sum(row["answers"] for row in figures.values())
    return {"judge": judge, "answers": answers, "scored": scored, "models": figures}


def _given(config: Config, context: Context) -> tuple[dict[str, Case], dict[_Key, Prediction]]:
    """The cases by id, and what the chosen models answered to them."""
    every = list(chain.from_iterable(read_records(path, Prediction) for path in context.inputs["predictions"]))
    there = {prediction.model for prediction in every}
    chosen = config.pairs or config.models or there
    for model in chosen:
        if model not in there:
            raise UserError(f"{context.section}: no predictions of {model!r}{nearest(model, there)}")
    asked = {prediction.case_id for prediction in every if prediction.model in chosen}
    paths = dict.fromkeys((*context.inputs["cases"], *context.inputs.get("target", ())))
    known = {case.id: case for path in paths for case in read_records(path, Case) if case.id in asked}
    cases = dict(islice(known.items(), config.limit))
    if not cases:
        raise UserError(f"{context.section}: no prediction is about any of the cases; name their file in `from:`")
    if strangers := len(asked - known.keys()):
        context.say(f"{context.section}: {strangers} cases with predictions are in none of the files: left out")
    answers: dict[_Key, Prediction] = {}
    for p in (p for p in every if p.model in chosen and p.case_id in cases):
        key = (p.model, p.case_id, p.sample)
        if key in answers:
            twice = f"{p.model!r} answers case {p.case_id!r} twice"
            raise UserError(f"{context.section}: {twice}; in `from:` name one section that predicts with it")
        answers[key] = p
    return cases, answers


def _judged(bench: _Bench) -> dict[str, dict[str, Any]]:
    """Asks for a verdict on every criterion of every answer; the figures by model."""
    config, rubric = bench.config, bench.rubric
    models = list(dict.fromkeys(key[0] for key in bench.answers))
    people = list(_people(Path(config.human), bench, models)) if config.human else []
    texts = {key: text for key in bench.answers if (text := bench.text(key)) is not None}
    questions = [
        partial(judging.judge, bench.cases[key[1]], text, rubric, bench.prompt, bench.sampling)
        for key, text in texts.items()
    ]
    said = dict(zip(texts, bench.ask(questions), strict=True))
    scores = {key: judging.score(p, said.get(key, ()), rubric) for key, p in bench.answers.items()}
    write_records(bench.context.folder / SCORES, scores.values())
    return {
        model: judged.of_rubric([score for key, score in scores.items() if key[0] == model], rubric, config.seed)
        | judged.against([verdict for verdict in people if verdict.model == model], scores, config.seed)
        for model in models
    }


def _compared(bench: _Bench) -> dict[str, dict[str, Any]]:
    """Asks which of two models' answers is better, in both orders; the figures of the pair."""
    config = bench.config
    one, other = config.pairs
    places = list(dict.fromkeys(key[1:] for key in bench.answers))
    texts = {place: (bench.text((one, *place)), bench.text((other, *place))) for place in places}
    pairs = {place: (a, b) for place, (a, b) in texts.items() if a is not None and b is not None}
    questions = [
        partial(judging.compare, bench.cases[place[0]], order, bench.rubric, bench.prompt, bench.sampling)
        for place, pair in pairs.items()
        for order in (pair, pair[::-1])
    ]
    found = bench.ask(questions)
    said = {place: tuple(zip(*found[2 * n : 2 * n + 2], strict=True)) for n, place in enumerate(pairs)}
    scores = [judging.contest((one, other), place, said.get(place, ())) for place in places]
    write_records(bench.context.folder / SCORES, scores)
    return {f"{one} vs {other}": judged.of_pairs(scores, config.seed)}


def _people(path: Path, bench: _Bench, models: Sequence[str]) -> Iterator[HumanVerdict]:
    """People's verdicts on the answers that are judged.

    Raises:
        UserError: a row is no such verdict, by file and line, or none is about these answers.
    """
    if not path.is_file():
        raise UserError(f"{bench.context.section}.human: no such file {path}; name one with case_id, criterion and met")
    known = [criterion.id for criterion in bench.rubric.criteria]
    counts = Counter[str]()
    for line, row in rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{path}:{line}: {row}; mend the line, or take it out")
        try:
            verdict = HumanVerdict.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            how = "a row has case_id, criterion and met (true or false)"
            raise UserError(f"{path}:{line}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {how}") from error
        if verdict.criterion not in known:
            raise UserError(f"{path}:{line}: no criterion {verdict.criterion!r}{nearest(verdict.criterion, known)}")
        if not verdict.model and len(models) > 1:
            raise UserError(f"{path}:{line}: of {', '.join(models)}, which one is meant? add a column `model`")
        verdict = verdict.model_copy(update={"model": verdict.model or models[0]})
        here = (verdict.model, verdict.case_id, 0) in bench.answers
        counts["compared" if here and verdict.met is not None else "empty" if here else "about other answers"] += 1
        if here and verdict.met is not None:
            yield verdict
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    if not counts["compared"]:
        raise UserError(f"{path}: no verdict in it is about these answers ({told or 'it is empty'}); check its case_id")
    bench.context.say(f"{bench.context.section}: people's verdicts: {told}")


STAGE = Stage("judge", Config, run, leaves=(SCORES,))
