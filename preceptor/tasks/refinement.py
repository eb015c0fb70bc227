"""What a teacher says of the kind of a case: its risk, specialty, complexity and style of language."""

import json
import re
from collections.abc import Collection, Generator, Mapping
from typing import Any

from preceptor.core.records import Case, Failure, FailureKind, Reply, Request, Sampling
from preceptor.tasks.prompts import Prompt

ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "risk_level": ("low", "medium", "high", "critical"),
    "complexity": (1, 2, 3),
    "lang_style": ("colloquial", "standard", "professional"),
}
"""What each field may be; a specialty is one of those that rules know."""
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.IGNORECASE | re.DOTALL)
_OBJECT = re.compile(r"\{[^{}]*\}")

Refining = Generator[Request, Reply, dict[str, Any] | Failure]


def refine(case: Case, prompt: Prompt, sampling: Sampling, specialties: Collection[str]) -> Refining:
    """One question: the fields that the reply gives an allowed value; a failure if it gives none."""
    reply = yield Request(messages=prompt.render(case.text), sampling=sampling)
    if reply.finish == "refusal":
        return Failure(kind=FailureKind.REFUSED, detail="the endpoint says that the model refused")
    if fields := read(reply.text, specialties):
        return fields
    if not reply.text.strip():
        return Failure(kind=FailureKind.EMPTY, detail="the reply is empty")
    kind = FailureKind.TRUNCATED if reply.finish == "length" else FailureKind.UNPARSED
    return Failure(kind=kind, detail="the reply has no JSON object with a field that is allowed")


def read(text: str, specialties: Collection[str]) -> dict[str, Any]:
    """The allowed values of the last JSON object in a reply that has any."""
    allowed = {**ALLOWED, "specialty": tuple(specialties)}
    for found in reversed(_OBJECT.findall(_THINKING.sub("", text))):
        try:
            given = json.loads(found)
        except ValueError:
            continue
        told = {name: str(given.get(name)).strip().lower().removesuffix(".0") for name in allowed}
        if fields := {name: value for name in allowed for value in allowed[name] if str(value) == told[name]}:
            return fields
    return {}
