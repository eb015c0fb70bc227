"""A teacher answers the training cases. What it fails to answer stays a named failure, never a label."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from preceptor.llm.ray import RayConfig
from preceptor.stages.asking import PREDICTIONS, TEACHER, Answers, AskingConfig, Cases, asking_of, put_back
from preceptor.stages.base import Context, How, Need, Stage
from preceptor.stages.fences import TARGET
from preceptor.stages.teacher import TeacherConfig, check_ray, teacher


class Config(AskingConfig):
    """Who labels, and how it is asked."""

    teacher: TeacherConfig
    ray: Annotated[RayConfig | None, How()] = None
    """Workers of Ray that ask the teacher, in place of this process."""
    include_target: bool = False
    """Label the target cases too, so that they can be learned."""
    samples: int = Field(default=1, gt=0)
    """Answers to each case, each in a conversation of its own."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Alternatives a token that the ledger keeps with the log-probabilities of a reply; by default none of all that."""

    @model_validator(mode="after")
    def _drawn(self) -> "Config":
        check_ray(self.ray, self.teacher.endpoint)
        if self.samples > 1 and not self.temperature:
            raise ValueError("temperature: at 0 all samples are the same; give one above 0, such as 0.7")
        return self

    def needs(self) -> tuple[Need, ...]:
        """The training cases, and the target's where they are to be learned."""
        target = (Need(TARGET, files=("target.jsonl",), required=False),) if self.include_target else ()
        return (Need("train.jsonl"), *target, *self.own_files())


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes predictions.jsonl, one for each case and sample."""
    paths = (context.input("train.jsonl"), *context.inputs.get(TARGET, ()))
    answers = Answers.begun(config, context, Cases(paths, config.limit), config.samples)
    if next(answers.owed(TEACHER), None):
        asking = asking_of(config, context, TEACHER, config.logprobs, corrects=True)
        with teacher(config.teacher, context, config.ray) as answerer:
            answers.ask(answerer, config.concurrency, asking)
    account = answers.finish([TEACHER])[TEACHER]
    for line in account.lines():
        context.say(f"{context.section}: {line}")
    return account.figures()


STAGE = Stage("label", Config, run, leaves=(PREDICTIONS,), retry=put_back)
