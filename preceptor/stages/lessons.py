"""Writes lessons in the textbook's language and an untrained model to learn them: where `mini` comes from."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field

from preceptor.clinical.textbook.book import load
from preceptor.core.records import Row
from preceptor.stages.base import Context, Stage, StageConfig, write_records
from preceptor.tasks import prompts
from preceptor.tasks.lessons import LANGUAGES, lessons

SPOKEN = 20_000
"""Lessons that the tokenizer learns from: by then every phrase has been met many times."""


class Config(StageConfig):
    """How many lessons, and how large a model."""

    seed: int
    rows: int = Field(gt=0)
    vocabulary: int = Field(default=4096, ge=512)
    hidden: int = Field(default=128, ge=32, multiple_of=32)
    """Width of the model."""
    layers: int = Field(default=4, ge=1)


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Leaves `rows.jsonl` and `model/`, untrained."""
    from preceptor.model.fresh import fresh

    number = min(config.rows, config.limit or config.rows)
    with context.progress("lessons", number) as tick:

        def counted() -> Iterator[Row]:
            for row in lessons(load(), number, config.seed):
                yield row
                tick()

        write_records(context.folder / "rows.jsonl", counted())
    context.say(f"{number:,} lessons; learning a tokenizer from them")
    fresh(
        _texts(lessons(load(), min(number, SPOKEN), config.seed)),
        context.folder / "model",
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        seed=config.seed,
    )
    return {"rows": number}


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    """All that the tokenizer should know: lessons, the diagnosis prompts, and the diseases' names."""
    for row in rows:
        yield from (message.content for message in row.messages)
        yield row.answer
    for language in LANGUAGES:
        prompt = prompts.load("diagnosis", "zero_shot", language)
        yield from (turn.content for turn in prompt.turns for _ in range(100))
    for disease in load().diseases.values():
        for name in (disease.zh, disease.en, *disease.aliases.zh, *disease.aliases.en):
            yield from [name] * 20


STAGE = Stage("lessons", Config, run, leaves=("rows.jsonl", "model"))
