"""A teacher answers the training cases. What it fails to answer stays a named failure, never a label."""

from collections.abc import Mapping
from typing import Any

from preceptor.stages.asking import PREDICTIONS, TEACHER, Answers, AskingConfig, cases_of
from preceptor.stages.base import Context, Need, Stage
from preceptor.stages.fences import TARGET
from preceptor.stages.teacher import TeacherConfig, teacher


class Config(AskingConfig):
    """Who labels, and how it is asked."""

    teacher: TeacherConfig
    include_target: bool = False
    """Label the target cases too, so that they can be learned."""

    def needs(self) -> tuple[Need, ...]:
        """The training cases, and the target's where they are to be learned."""
        target = (Need(TARGET, files=("target.jsonl",), required=False),) if self.include_target else ()
        return (Need("train.jsonl"), *target, *self.own_files())


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each case."""
    paths = (context.input("train.jsonl"), *context.inputs.get(TARGET, ()))
    answers = Answers.begun(config, context, cases_of(paths, config.limit))
    if answers.owed(TEACHER):
        with teacher(config.teacher, context) as completer:
            answers.ask(TEACHER, completer, confidence=False, concurrency=config.concurrency)
    account: Mapping[str, Any] = answers.finish([TEACHER])[TEACHER]
    context.say(
        "{section}: {answered} of {cases} answered, {abstained} abstained, {failed} failed".format(
            section=context.section, **account
        )
    )
    return account


STAGE = Stage("label", Config, run, leaves=(PREDICTIONS,))
