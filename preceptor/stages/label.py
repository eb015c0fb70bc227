"""A teacher answers the training cases. What it fails to answer stays a named failure, never a label."""

from collections.abc import Mapping
from typing import Any

from preceptor.stages.asking import PREDICTIONS, TEACHER, Answers, AskingConfig, cases_of, teacher
from preceptor.stages.base import Context, Need, Stage, TeacherConfig


class Config(AskingConfig):
    """Who labels, and how it is asked."""

    teacher: TeacherConfig

    def needs(self) -> tuple[Need, ...]:
        """The training cases."""
        return (Need("train.jsonl"), *self.own_files())


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each case."""
    answers = Answers.begun(config, context, cases_of(context.input("train.jsonl"), config.limit))
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
