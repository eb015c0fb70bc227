"""Writes lessons in the textbook's language and an untrained model to learn them: where `mini` comes from."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, Literal

from pydantic import Field

from preceptor.clinical.textbook.book import Textbook, load, spoken
from preceptor.core.records import Row
from preceptor.stages.base import Context, Stage, StageConfig, write_records
from preceptor.tasks import prompts
from preceptor.tasks.lessons import KINDS, LANGUAGES, lessons

SPOKEN = 8000
"""Lessons that the tokenizer learns from."""
OFTEN = 500
"""How often it meets each phrase, name and prompt."""


class Config(StageConfig):
    """How many lessons, and how large a model."""

    seed: int
    rows: int = Field(gt=0)
    shares: dict[Literal[KINDS], float]  # type: ignore[valid-type]  # a tuple's words
    """Of the kinds of lessons, as these numbers are to one another."""
    vocabulary: int = Field(default=8192, ge=512)
    hidden: int = Field(default=128, ge=32, multiple_of=32)
    """Width of the model."""
    layers: int = Field(default=4, ge=1)


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Leaves `rows.jsonl` and `model/`, untrained."""
    from preceptor.model.fresh import fresh

    number = min(config.rows, config.limit or config.rows)
    with context.progress("lessons", number) as tick:

        def counted() -> Iterator[Row]:
            for row in lessons(load(), config.shares, number, config.seed):
                yield row
                tick()

        write_records(context.folder / "rows.jsonl", counted())
    context.say(f"{number:,} lessons; learning a tokenizer from them")
    fresh(
        _texts(load(), config.shares, lessons(load(), config.shares, SPOKEN, config.seed)),
        context.folder / "model",
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        seed=config.seed,
    )
    return {"rows": number}


def _texts(book: Textbook, shares: Iterable[str], rows: Iterable[Row]) -> Iterator[str]:
    """All that the tokenizer should know: lessons, and over and over phrases, names and prompts."""
    for row in rows:
        yield row.messages[-1].content
        yield row.answer
    for language in LANGUAGES:
        asked = [prompts.load("diagnosis", "zero_shot", language)]
        asked += [prompts.load("lessons", kind, language) for kind in shares]
        known = [phrase for _, phrase, _ in spoken(book, language)]
        known += [finding.words(language).name for finding in book.findings.values()]
        known += [disease.name(language) for disease in book.diseases.values()]
        known += [turn.content for prompt in asked for turn in prompt.turns]
        for text in known:
            yield from repeat(text, OFTEN)


STAGE = Stage("lessons", Config, run, leaves=("rows.jsonl", "model"))
