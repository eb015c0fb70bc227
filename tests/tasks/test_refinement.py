"""What a teacher says of the kind of a case: only allowed values count."""

import pytest

from preceptor.core.records import Case, Failure, FailureKind, Language, Reply, Sampling
from preceptor.data.metadata import specialties
from preceptor.tasks import prompts
from preceptor.tasks.refinement import ALLOWED, read, refine

WHOLE = {"risk_level": "high", "specialty": "cardiology", "complexity": 2, "lang_style": "standard"}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"risk_level": "high", "specialty": "cardiology", "complexity": 2, "lang_style": "standard"}', WHOLE),
        ('```json\n{"risk_level": " High ", "complexity": "2"}\n```', {"risk_level": "high", "complexity": 2}),
        ('<think>{"risk_level": "low"}</think>{"complexity": 3.0}', {"complexity": 3}),
        ('<think>{"risk_level": "low"} or', {}),
        ('{"risk_level": "low"} or rather {"risk_level": "medium"}', {"risk_level": "medium"}),
        ('{"risk_level": "dire", "specialty": "cardiology"}', {"specialty": "cardiology"}),
        ('{"specialty": "magic", "complexity": true, "lang_style": ["standard"]}', {}),
        ('{"complexity": 2.5, "risk_level": null}', {}),
        ('{"complexity": 1e999}', {}),
        ("high", {}),
        ('{"risk_level": "high"', {}),
        ("", {}),
    ],
)
def test_read(text, fields):
    assert read(text, specialties()) == fields


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(text=""), FailureKind.EMPTY),
        (Reply(text="fine"), FailureKind.UNPARSED),
        (Reply(text='{"risk_level": "hi', finish="length"), FailureKind.TRUNCATED),
        (Reply(text="", finish="refusal"), FailureKind.REFUSED),
    ],
)
def test_a_reply_that_says_nothing_is_a_named_failure(reply, kind):
    case = Case(id="1", text="cough", language="en", source="s", group="1")
    conversation = refine(case, prompts.load("metadata", "refine", "en"), Sampling(), specialties())
    assert "cough" in next(conversation).messages[-1].content
    with pytest.raises(StopIteration) as end:
        conversation.send(reply)
    assert isinstance(end.value.value, Failure)
    assert end.value.value.kind is kind


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_prompt_names_all_that_is_allowed(language: Language):
    told = prompts.load("metadata", "refine", language).turns[0].content
    for value in (*specialties(), *(value for values in ALLOWED.values() for value in values), *ALLOWED):
        assert str(value) in told
