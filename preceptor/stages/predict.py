"""Models answer the held-out cases: the student before and after it learned, the teacher, any other."""

import gc
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from preceptor.core.errors import UserError
from preceptor.stages.asking import PREDICTIONS, TEACHER, TWO_STAGE, Answers, AskingConfig, Cases, asking_of, put_back
from preceptor.stages.base import Context, How, Need, Stage, folder, needs_torch
from preceptor.stages.fences import TARGET
from preceptor.stages.portions import check_parts
from preceptor.stages.teacher import Answerer, TeacherConfig, teacher

BASE, STUDENT = "base", "student"
_MODEL = ("adapter", "model")


class Config(AskingConfig):
    """Who is asked, and how."""

    models: tuple[str, ...] = (BASE, STUDENT)
    """`base` (the student before training), `student` (after the last training section), `teacher`, a
    section that leaves a model, a folder, or a name on the hub with its owner. `A+B` are two of them on this machine:
    A names the diseases, and B, given them, the evidence; so they are asked by the strategy two_stage."""
    called: str = Field(default="", pattern=r"^[\w.-]*$")
    """The name under which the one model's answers are told, where it is asked in several ways; by default its own."""
    student: str | None = None
    teacher: TeacherConfig | None = None
    batch: Annotated[int, How()] = Field(default=32, gt=0)
    """Cases that a model on this machine answers at once."""

    @model_validator(mode="after")
    def _known(self) -> "Config":
        linked = {link for model in self.models for link in links(model)}
        if BASE in linked and self.student is None:
            raise ValueError("models: base is the student before training; name it as `student`")
        if TEACHER in self.models and self.teacher is None:
            raise ValueError("models: teacher; say who it is in `teacher`")
        for model in self.models:
            if len(chain := links(model)) == 1:
                continue
            if chain[2:] or not all(chain):
                raise ValueError(f"models: {model}: write A+B: A names the diseases, and B the evidence for them")
            if TEACHER in chain:
                raise ValueError(f"models: {model}: the teacher answers elsewhere; chain two models of this machine")
            if self.strategy != TWO_STAGE:
                raise ValueError(f"models: {model}: two models answer in turn; ask them with strategy: {TWO_STAGE}")
        if len(set(self.models)) < len(self.models) or not self.models:
            raise ValueError("models: name at least one, and each once")
        if self.called and len(self.models) > 1:
            raise ValueError("called: it is one model's name; give each of `models` a section of its own")
        return self

    def name(self, model: str) -> str:
        """Which name the predictions of one of the models carry."""
        return self.called or model

    def needs(self) -> tuple[Need, ...]:
        """The cases, and the models that sections left."""
        needs = [
            Need("cases", files=("test.jsonl",), required=False),
            Need(TARGET, files=("target.jsonl",), required=False),
            *self.own_files(),
        ]
        for link in dict.fromkeys(link for model in self.models for link in links(model)):
            if link == BASE:
                paths = folder(self.student or "")
                needs.append(Need(BASE, files=_MODEL, section=self.student, paths=paths, required=False))
            elif link == STUDENT:
                needs.append(Need(STUDENT, files=_MODEL, stages=("sft",)))
            elif paths := folder(link):
                needs.append(Need(link, paths=paths))
            elif link != TEACHER and not _is_elsewhere(link):
                needs.append(Need(link, files=_MODEL, section=link))
        return tuple(needs)


def links(model: str) -> tuple[str, ...]:
    """The models that answer in turn under one name: of `A+B` two, of any other one, and of a folder's the folder."""
    return folder(model) or tuple(model.split("+"))


def _is_elsewhere(model: str) -> bool:
    """Whether a name is one of the package's or the hub's."""
    return model in {"mini", "smollm2"} or "/" in model


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each model and case.

    What base and teacher say of target cases would be measured by nobody and may cost money: they aren't asked.
    """
    held_out = context.inputs.get("cases", ())
    paths = (*held_out, *context.inputs.get(TARGET, ()))
    if not paths:
        raise UserError(f"{context.section}: no test.jsonl and no target.jsonl; name in `from:` what leaves one")
    answers = Answers.begun(config, context, Cases(paths, config.limit))
    for model in config.models:
        name = config.name(model)
        asked = answers.about(held_out) if model in (BASE, TEACHER) else answers
        if next(asked.owed(name), None) is None:
            continue
        if model == TEACHER:
            assert config.teacher is not None
            asking = asking_of(config, context, name, None, corrects=True)
            with teacher(config.teacher, context) as answerer:
                asked.ask(answerer, config.concurrency, asking)
        else:
            _ask_here(model, config, context, asked)
            gc.collect()  # ended tasks refer to themselves and so keep the weights, whose memory the next model needs
    accounts = answers.finish(map(config.name, config.models))
    for name, account in accounts.items():
        for line in account.lines():
            context.say(f"{context.section}: {name}: {line}")
    return {name: account.figures() for name, account in accounts.items()}


def _ask_here(model: str, config: Config, context: Context, answers: Answers) -> None:
    """Ask a model on this machine, or two in turn. They answer once, as they have learned to."""
    asking = asking_of(config, context, config.name(model), 0, corrects=False)
    chain = links(model)
    if len(chain) > 1:
        check_parts(asking.prompt, f"{context.section}.models: {model}")
    with context.progress(f"{context.section}: loading {model}", None):
        needs_torch(context.section)
        from preceptor.llm.local import Chain, Local  # torch takes seconds to load
        from preceptor.model.load import load
        from preceptor.model.resolve import digest

        loaded = [load(context.optional(link) or (config.student or "" if link == BASE else link)) for link in chain]
        completers = [Local(one, digest(one.folder), config.batch) for one in loaded]
        answerer = Answerer(completers if len(chain) == 1 else (Chain(*completers),))
    answers.ask(answerer, 2 * config.batch, asking)


STAGE = Stage("predict", Config, run, leaves=(PREDICTIONS,), retry=put_back)
