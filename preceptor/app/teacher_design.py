"""The instruction that the textbook teacher designs from solved examples: it says of them what is true of them."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from statistics import median_low
from typing import Any

import yaml

from preceptor.clinical.safety import urgent
from preceptor.core.errors import UserError
from preceptor.core.records import Consultation, Diagnosis, Language, Message, Task

_OPENING = re.compile(r"\{(?=\s*\"diseases\")")
_ADVICE = re.compile(r"<think>(.*?)</think>(.*?)(?=<|\Z)", re.DOTALL)
_HAN = re.compile(r"[\u4e00-\u9fff]")


def designs(messages: Sequence[Message], task: Task) -> tuple[str, ...]:
    """The instructions, in several wordings, that examples of a task suggest; in the examples' language.

    Raises:
        UserError: the messages show no solved example.
    """
    text = "\n".join(message.content for message in messages)
    instructions = _consult(list(_advice(text))) if task == "consult" else _diagnosis(list(_diagnoses(text)))
    if not instructions:
        raise UserError(f"the textbook teacher designs from solved examples of {task}, and the messages show none")
    return instructions


def _diagnosis(examples: Sequence[Diagnosis]) -> tuple[str, ...]:
    if not examples:
        return ()
    language = _language("".join(word for e in examples for word in (*e.diseases, *e.reason)))
    counts = [len(e.reason) for e in examples if not e.abstained] or [0]
    filled = {
        "diseases": max(1, *(len(e.diseases) for e in examples)),
        "most": max(counts),
        "usual": median_low(counts),
        "longest": max((len(reason) for e in examples for reason in e.reason), default=0),
        "abstain": _words()["abstain"][language] if any(e.abstained for e in examples) else "",
    }
    return tuple(wording.format(**filled) for wording in _words()["diagnosis"][language])


def _consult(examples: Sequence[Consultation]) -> tuple[str, ...]:
    if not examples:
        return ()
    language = _language(examples[0].answer)
    filled = {
        "think": median_low(len(e.think) for e in examples),
        "answer": median_low(len(e.answer) for e in examples),
        "urgent": _words()["urgent"][language] if any(urgent(e.answer) for e in examples) else "",
    }
    return tuple(wording.format(**filled) for wording in _words()["consult"][language])


def _diagnoses(text: str) -> Iterator[Diagnosis]:
    """The answers in a text, without those that only show the form."""
    for opening in _OPENING.finditer(text):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, opening.start())
            answer = Diagnosis(diseases=tuple(found["diseases"]), reason=tuple(found.get("reason", ())))
        except (ValueError, TypeError, KeyError):
            continue
        if all(map(_says, (*answer.diseases, *answer.reason))):
            yield answer


def _advice(text: str) -> Iterator[Consultation]:
    for found in _ADVICE.finditer(text):
        if _says(found[1]) and _says(found[2]):
            yield Consultation(think=found[1].strip(), answer=found[2].strip())


def _says(text: str) -> bool:
    return re.search(r"\w", text) is not None


def _language(text: str) -> Language:
    return "zh" if _HAN.search(text) else "en"


@cache
def _words() -> dict[str, Any]:
    words: dict[str, Any] = yaml.safe_load(files("preceptor.app").joinpath("teacher_design.yaml").read_text("utf-8"))
    return words
