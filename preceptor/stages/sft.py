"""A student learns the labels: an adapter, or all its weights."""

from collections.abc import Mapping
from typing import Any

from preceptor.stages.base import Context, Stage
from preceptor.stages.training import LEAVES, TrainingConfig, Validation, learn, rows_of
from preceptor.train.config import SftConfig


class Config(TrainingConfig):
    """Who learns, and how."""


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes adapter/ or model/, metrics.jsonl, and checkpoints/ on the way."""
    rows, transductive = rows_of(config, context)
    how = SftConfig.model_validate(config.model_dump(include=set(SftConfig.model_fields)))

    def train(validation: Validation | None, on: Any) -> dict[str, float]:
        from preceptor.train import sft

        student = context.optional("student") or config.student
        return sft.train(student, rows, context.folder, how, validation, on)

    return learn(config, how, context, transductive, train)


STAGE = Stage("sft", Config, run, leaves=LEAVES, grows=False)
