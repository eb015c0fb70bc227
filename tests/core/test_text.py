"""Offsets are those of the text as given, and lists come apart in every usual form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core import text as texts


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("ＷＢＣ　１２．３", "wbc 12.3"),
        ("体温３８．６℃，", "体温38.6°c,"),
        ("  A\n b ", "a b"),
        ("Ⅱ型", "ii型"),
        ("“发热”", '"发热"'),
    ],
)
def test_normalise(given_text: str, expected: str) -> None:
    """Width, case, punctuation and spaces."""
    assert texts.normalise(given_text) == expected


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("无发热、咳嗽，头痛2天。", ["无发热", "咳嗽", "头痛2天"]),
        ("No fever, WBC 1,000. Pain 3.5 cm; cough", ["No fever", "WBC 1,000", "Pain 3.5 cm", "cough"]),
        ("体温38,咳嗽", ["体温38", "咳嗽"]),
        ("。，\n", []),
        ("", []),
    ],
)
def test_clauses(given_text: str, expected: list[str]) -> None:
    """Numbers stay whole."""
    assert [given_text[a:b] for a, b in texts.clauses(given_text)] == expected


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("1. 发热；\n2. 体温38.5℃；3. 咳嗽", ["发热", "体温38.5℃", "咳嗽"]),
        ("1.发热2.咳嗽", ["发热", "咳嗽"]),
        ("1、发热 2、咳嗽", ["发热", "咳嗽"]),
        ("1) fever 2) cough", ["fever", "cough"]),
        ("(1) fever (2) cough", ["fever", "cough"]),
        ("①发热②咳嗽", ["发热", "咳嗽"]),
        ("一、发热；二、咳嗽", ["发热", "咳嗽"]),
        ("１．发热；２．咳嗽", ["发热", "咳嗽"]),
        ("1. 血压150/90；2. WBC 12. 3. 咳嗽", ["血压150/90", "WBC 12.", "咳嗽"]),
        ("1. 维生素B12、叶酸低；2. 胸12、腰1骨折", ["维生素B12、叶酸低", "胸12、腰1骨折"]),
        ("- fever\n- cough", ["fever", "cough"]),
        ("• 发热\n• 咳嗽", ["发热", "咳嗽"]),
        ("发热；咳嗽；", ["发热", "咳嗽"]),
        ("fever; cough", ["fever", "cough"]),
        ("发热3天。咳嗽。", ["发热3天", "咳嗽"]),
        ("体温38.5℃，咳嗽", ["体温38.5℃，咳嗽"]),
        ("2. 咳嗽", ["咳嗽"]),
        ("", []),
    ],
)
def test_items(given_text: str, expected: list[str]) -> None:
    """Numbers, bullets, lines, semicolons."""
    assert texts.items(given_text) == expected


def test_clean_drops_what_cannot_be_written() -> None:
    """Lone surrogates and invisible characters."""
    assert texts.clean(" a\ud800b\x00\u200bc\n") == "abc"


@given(st.text(max_size=60))
def test_offsets_lie_in_the_text(given_text: str) -> None:
    """For any text."""
    folded = texts.fold(given_text)
    if folded.text:
        start, end = folded.original(0, len(folded.text))
        assert texts.fold(given_text[start:end]).text == folded.text
    for start, end in texts.clauses(given_text):
        assert given_text[start:end].strip() == given_text[start:end] != ""
