"""Models answer the held-out cases: the student before and after it learned, the teacher, any other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from preceptor.core.errors import UserError
from preceptor.core.records import Case
from preceptor.stages.asking import PREDICTIONS, TEACHER, Answers, AskingConfig, cases_of
from preceptor.stages.base import Context, How, Need, Stage, folder, needs_torch, read_records
from preceptor.stages.fences import TARGET
from preceptor.stages.teacher import TeacherConfig, teacher

BASE, STUDENT = "base", "student"
_MODEL = ("adapter", "model")


class Config(AskingConfig):
    """Who is asked, and how."""

    models: tuple[str, ...] = (BASE, STUDENT)
    """`base` (the student before training), `student` (after the last training section), `teacher`, a
    section that leaves a model, a folder, or a name on the hub with its owner."""
    student: str | None = None
    teacher: TeacherConfig | None = None
    batch: Annotated[int, How()] = Field(default=32, gt=0)
    """Cases that a model on this machine answers at once."""

    @model_validator(mode="after")
    def _known(self) -> "Config":
        if BASE in self.models and self.student is None:
            raise ValueError("models: base is the student before training; name it as `student`")
        if TEACHER in self.models and self.teacher is None:
            raise ValueError("models: teacher; say who it is in `teacher`")
        if len(set(self.models)) < len(self.models) or not self.models:
            raise ValueError("models: name at least one, and each once")
        return self

    def needs(self) -> tuple[Need, ...]:
        """The cases, and the models that sections left."""
        needs = [
            Need("cases", files=("test.jsonl",), required=False),
            Need(TARGET, files=("target.jsonl",), required=False),
            *self.own_files(),
        ]
        for model in self.models:
            if model == BASE:
                paths = folder(self.student or "")
                needs.append(Need(BASE, files=_MODEL, section=self.student, paths=paths, required=False))
            elif model == STUDENT:
                needs.append(Need(STUDENT, files=_MODEL, stages=("sft",)))
            elif paths := folder(model):
                needs.append(Need(model, paths=paths))
            elif model != TEACHER and not _is_elsewhere(model):
                needs.append(Need(model, files=_MODEL, section=model))
        return tuple(needs)


def _is_elsewhere(model: str) -> bool:
    """Whether a name is one of the package's or the hub's."""
    return model in {"mini", "smollm2"} or "/" in model


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each model and case.

    What base and teacher say of target cases would be measured by nobody and may cost money: they aren't asked.
    """
    paths = (*context.inputs.get("cases", ()), *context.inputs.get(TARGET, ()))
    if not paths:
        raise UserError(f"{context.section}: no test.jsonl and no target.jsonl; name in `from:` what leaves one")
    answers = Answers.begun(config, context, cases_of(paths, config.limit))
    held_out = {case.id for path in context.inputs.get("cases", ()) for case in read_records(path, Case)}
    measured = replace(answers, cases=[case for case in answers.cases if case.id in held_out])
    for model in config.models:
        asked = measured if model in (BASE, TEACHER) else answers
        if not asked.owed(model):
            continue
        if model == TEACHER:
            assert config.teacher is not None
            with teacher(config.teacher, context) as completer:
                asked.ask(model, completer, confidence=False, concurrency=config.concurrency)
        else:
            _ask_here(model, config, context, asked)
    account = answers.finish(config.models)
    for model, counts in account.items():
        told = "{answered} of {cases} answered, {abstained} abstained, {failed} failed".format(**counts)
        context.say(f"{context.section}: {model}: {told}")
    return account


def _ask_here(model: str, config: Config, context: Context, answers: Answers) -> None:
    """Ask a model on this machine."""
    with context.progress(f"{context.section}: loading {model}", None):
        needs_torch(context.section)
        from preceptor.llm.local import Local  # torch takes seconds to load
        from preceptor.model.load import load
        from preceptor.model.resolve import digest

        name = config.student if model == BASE else model
        assert name is not None
        loaded = load(context.optional(model) or name)
        completer = Local(loaded, digest(loaded.folder), config.batch)
    answers.ask(model, completer, confidence=True, concurrency=2 * config.batch)


STAGE = Stage("predict", Config, run, leaves=(PREDICTIONS,))
