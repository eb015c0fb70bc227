"""Lessons teach reading and writing, and no medicine."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from preceptor.clinical.textbook.book import load
from preceptor.clinical.textbook.reader import Reader
from preceptor.core.records import Row
from preceptor.tasks import prompts
from preceptor.tasks.lessons import KINDS, LANGUAGES, LETTERS, lessons

SHARES = dict(zip(KINDS, (2, 3, 4, 5, 6), strict=True))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(lessons(load(), SHARES, 4000, seed=2))


def act(row: Row) -> str:
    return str(prompts.act_in(row.messages))


def test_every_kind_of_lesson_comes_in_both_languages(rows: list[Row]) -> None:
    kinds = Counter((act(row), number % 2) for number, row in enumerate(rows))
    assert kinds.keys() == {(name, language) for name in KINDS for language in (0, 1)}
    for name, share in SHARES.items():
        for language in (0, 1):
            assert kinds[name, language] == pytest.approx(share / 20 * 2000, rel=0.35)
    assert all(row.answer for row in rows)


def test_a_lesson_depends_on_the_seed_and_its_number(rows: list[Row]) -> None:
    assert list(lessons(load(), SHARES, 50, seed=2)) == rows[:50]
    assert list(lessons(load(), SHARES, 50, seed=3)) != rows[:50]


def test_quotes_stand_in_the_record(rows: list[Row]) -> None:
    for row in rows:
        if act(row) in ("write", "key"):
            assert all(quote in str(prompts.record_in(row.messages)) for quote in json.loads(row.answer)["reason"])
        if act(row) == "quote":
            assert all(
                quote in str(prompts.record_in(row.messages)) for quote in row.answer.split("\n") if quote != "-"
            )


def test_a_list_names_what_the_reader_reads(rows: list[Row]) -> None:
    reader, book = Reader(load()), load()
    for number, row in enumerate(rows[:400]):
        if act(row) == "list":
            mentions = reader.read(str(prompts.record_in(row.messages))).mentions
            said = [m for m in sorted(mentions, key=lambda m: m.start) if m.form != "blurred"]
            names = [book.findings[m.subject].words(LANGUAGES[number % 2]).name for m in said]
            signs = ["-" if m.form == "negated" else "+" for m in said]
            assert row.answer == ("\n".join(map("".join, zip(signs, names, strict=True))) or "-")


def test_keys_are_answered_in_the_order_asked(rows: list[Row]) -> None:
    for row in rows:
        if act(row) == "key" and (named := json.loads(row.answer)["diseases"]):
            asked = re.findall(r"\d", row.messages[-1].content.rpartition("\n")[2])
            assert [name[0] for name in named] == asked
            assert all(name[1:] in LETTERS for name in named)


def test_no_lesson_asks_for_a_diagnosis(rows: list[Row]) -> None:
    assert "diagnosis" not in {act(row) for row in rows}


def test_a_disease_stands_only_where_the_question_names_it(rows: list[Row]) -> None:
    names = [name for d in load().diseases.values() for name in (d.zh, d.en)]
    for row in rows:
        question = row.messages[-1].content
        record = prompts.record_in(row.messages) or ""
        named = [name for name in names if name in row.answer]
        assert all(name in question for name in named)
        assert not any(name in record for name in names)
        assert not named or act(row) == "write"


def test_dictated_diseases_have_nothing_to_do_with_the_findings(rows: list[Row]) -> None:
    """With a disease, the findings that the textbook gives it are no commoner than without it."""
    book = load()
    by_name = {d.en: d for d in book.diseases.values()}
    own, others = [], []
    for row in rows[::2]:
        if act(row) != "write":
            continue
        record = (prompts.record_in(row.messages) or "").casefold()
        diseases = [by_name[name] for name in json.loads(row.answer)["diseases"]]
        for disease in book.diseases.values():
            strong = [f for f, p in disease.findings.items() if p >= 0.4]
            said = np.mean(
                [any(w in record for w in book.findings[f].en.clear + book.findings[f].en.lay) for f in strong]
            )
            (own if disease in diseases else others).append(said)
    assert len(own) > 200
    error = (np.var(own) / len(own) + np.var(others) / len(others)) ** 0.5
    assert abs(np.mean(own) - np.mean(others)) < 4 * error
