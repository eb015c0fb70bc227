"""The red-team set: prompts with the behaviour expected, for measuring alone. No training row may hold one."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from preceptor.core.records import Case, Language
from preceptor.core.text import normalise

SOURCE = "redteam"
Behaviour = Literal[
    "urge_emergency",
    "refer",
    "refuse_dose",
    "warn_interaction",
    "crisis_support",
    "ask_for_information",
    "correct_premise",
    "ignore_order",
    "flag_unit",
]
_HEAD = 10
"""Letters that every prompt has."""
_LANGUAGES: tuple[Language, ...] = ("zh", "en")
_NOT_LETTERS = re.compile(r"[\W_]+")
_MARK = re.compile(r"(?<![a-z])red[ _-]?team|红队", re.IGNORECASE)
_MARKED = ("source", "category", "tag", "tags", "type", "dataset", "subset")
"""Fields by which a file may mark its rows."""


class _Scenario(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    expected: Behaviour
    task: Literal["consult", "diagnosis"] = "consult"
    good: dict[Language, str]
    """What a good answer does."""
    zh: Annotated[tuple[str, ...], Field(min_length=3)]
    en: Annotated[tuple[str, ...], Field(min_length=3)]


def items() -> list[Case]:
    """Every prompt as a case, in the order of the file.

    `meta` says `family`, `expected` (a `Behaviour`), `good` (what a good answer does, in the prompt's
    language), `task` and `paraphrase` (its number). The wordings of a scenario share a `group` in both languages.
    """
    return list(_items())


def is_redteam(case: Case) -> bool:
    """Whether a case is of this set, is marked as such by its file, or holds one of its prompts."""
    marks: list[Any] = [case.source]
    for said in map(case.meta.get, _MARKED):
        marks += said if isinstance(said, list) else [said]
    marked = any(isinstance(mark, str) and _MARK.search(mark) for mark in marks)
    return marked or next(present([case.text]), None) is not None


def present(texts: Iterable[str], more: Iterable[Case] = ()) -> Iterator[tuple[int, str]]:
    """The place of each text that holds a prompt, of this set or of `more`, and the prompt's id.

    A text holds a prompt that it equals or contains. Letters and digits are compared alone: case, width, spaces
    and punctuation may differ.
    """
    prompts = {**_prompts()}
    for start, known in _table(more).items():
        prompts[start] = {**prompts.get(start, {}), **known}
    for place, text in enumerate(texts):
        letters = _letters(text)
        if found := next(_held(letters, prompts), None):
            yield place, found


def _held(letters: str, prompts: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The ids of the prompts within: only where a prompt's first letters stand are all of them compared."""
    for start in range(len(letters) - _HEAD + 1):
        if known := prompts.get(letters[start : start + _HEAD]):
            yield from (identity for prompt, identity in known.items() if letters.startswith(prompt, start))


@cache
def _items() -> tuple[Case, ...]:
    table = yaml.safe_load(files("preceptor.clinical").joinpath("redteam.yaml").read_text("utf-8"))
    families: Mapping[str, list[_Scenario]] = TypeAdapter(dict[str, list[_Scenario]]).validate_python(table)
    return tuple(
        _case(family, scenario, language, number)
        for family, scenarios in families.items()
        for scenario in scenarios
        for language in _LANGUAGES
        for number in range(len(getattr(scenario, language)))
    )


def _case(family: str, scenario: _Scenario, language: Language, number: int) -> Case:
    return Case(
        id=f"{SOURCE}-{scenario.id}-{language}-{number + 1}",
        text=getattr(scenario, language)[number],
        language=language,
        source=SOURCE,
        group=f"{SOURCE}-{scenario.id}",
        meta={
            "family": family,
            "expected": scenario.expected,
            "good": scenario.good[language],
            "task": scenario.task,
            "paraphrase": number + 1,
        },
    )


@cache
def _prompts() -> Mapping[str, Mapping[str, str]]:
    return _table(_items())


def _table(cases: Iterable[Case]) -> Mapping[str, Mapping[str, str]]:
    """Ids by a prompt's letters, by the first of them; not of prompts that are too short to be told from others."""
    table: dict[str, dict[str, str]] = {}
    for case in cases:
        if len(letters := _letters(case.text)) >= _HEAD:
            table.setdefault(letters[:_HEAD], {})[letters] = case.id
    return table


def _letters(text: str) -> str:
    return _NOT_LETTERS.sub("", normalise(text))
