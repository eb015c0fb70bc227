"""Models answer the held-out cases: the student before and after it learned, the teacher, any other."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from preceptor.core.errors import UserError
from preceptor.stages.answering import BASE, STUDENT, EngineConfig, answering, asking_for, folders, links
from preceptor.stages.asking import PREDICTIONS, TEACHER, TWO_STAGE, Answers, Cases, put_back
from preceptor.stages.base import CALIBRATION, Context, Need, Stage
from preceptor.stages.calibrations import Settle, settling
from preceptor.stages.fences import TARGET
from preceptor.stages.teacher import check_ray


class Config(EngineConfig):
    """Who is asked, and how."""

    models: tuple[str, ...] = (BASE, STUDENT)
    """`base` (the student before training), `student` (after the last training section), `teacher`, a
    section that leaves a model, a folder, or a name on the hub with its owner. `A+B` are two of them on this machine:
    A names the diseases, and B, given them, the evidence; so they are asked by the strategy two_stage."""
    called: str = Field(default="", pattern=r"^[\w.-]*$")
    """The name under which the one model's answers are told, where it is asked in several ways; by default its own."""

    @model_validator(mode="after")
    def _known(self) -> "Config":
        linked = {link for model in self.models for link in links(model)}
        if BASE in linked and self.student is None:
            raise ValueError("models: base is the student before training; name it as `student`")
        if TEACHER in self.models and self.teacher is None:
            raise ValueError("models: teacher; say who it is in `teacher`")
        if len(set(self.models)) < len(self.models) or not self.models:
            raise ValueError("models: name at least one, and each once")
        if self.called and len(self.models) > 1:
            raise ValueError("called: it is one model's name; give each of `models` a section of its own")
        if len(linked - {TEACHER}) > 1 and any(one.url and one.model for one in self.endpoint):
            raise ValueError("endpoint.model: it is one model's name; give each of `models` a section of its own")
        if TEACHER in self.models and self.teacher:
            check_ray(self.ray, self.teacher.endpoint)
        return self

    @model_validator(mode="after")
    def _in_turn(self) -> "Config":
        for model in self.models:
            if len(chain := links(model)) == 1:
                continue
            if chain[2:] or not all(chain):
                raise ValueError(f"models: {model}: write A+B: A names the diseases, and B the evidence for them")
            if TEACHER in chain:
                raise ValueError(f"models: {model}: the teacher answers elsewhere; chain two models of this machine")
            if self.strategy != TWO_STAGE:
                raise ValueError(f"models: {model}: two models answer in turn; ask them with strategy: {TWO_STAGE}")
        return self

    def name(self, model: str) -> str:
        """Which name the predictions of one of the models carry."""
        return self.called or model

    def needs(self) -> tuple[Need, ...]:
        """The cases, the models that sections left, and what is known of their confidence."""
        return (
            Need("cases", files=("test.jsonl",), required=False),
            Need(TARGET, files=("target.jsonl",), required=False),
            Need(CALIBRATION, stages=("calibrate",), required=False),
            *self.own_files(),
            *self.model_needs(self.models),
        )


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each model and case.

    What base and teacher say of target cases would be measured by nobody and may cost money: they aren't asked.
    """
    held_out = context.inputs.get("cases", ())
    paths = (*held_out, *context.inputs.get(TARGET, ()))
    if not paths:
        raise UserError(f"{context.section}: no test.jsonl and no target.jsonl; name in `from:` what leaves one")
    answers = Answers.begun(config, context, Cases(paths, config.limit))
    settles: dict[str, Settle] = {}
    for model in config.models:
        name = config.name(model)
        asked = answers.about(held_out) if model in (BASE, TEACHER) else answers
        asking = asking_for(config, context, model, name)
        if next(asked.owed(name), None) is not None:
            with answering(config, context, model) as engine:
                asked.ask(engine.answerer, engine.concurrency, asking)
        settles[name] = settling(config, context, folders(config, context, model), asking)
    accounts = answers.finish(map(config.name, config.models), settles)
    for name, account in accounts.items():
        for line in account.lines():
            context.say(f"{context.section}: {name}: {line}")
    return {name: account.figures() for name, account in accounts.items()}


STAGE = Stage("predict", Config, run, leaves=(PREDICTIONS,), retry=put_back)
