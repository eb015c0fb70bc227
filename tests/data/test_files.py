import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Case, Issue
from preceptor.data.files import LONGEST, group_of, read, split_of
from preceptor.data.healthai import import_row, language_of

RECORD = "性别: 男\n年龄: 48\n主诉: 咳嗽3天\n现病史: 无发热。"


def found(tmp_path, content, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return list(read([path], import_row))


def line(**row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def test_a_row_becomes_a_case(tmp_path):
    (case,) = found(tmp_path, line(id=7, feature_content=RECORD, diseases="感冒"))
    assert isinstance(case, Case)
    assert (case.id, case.text, case.language, case.source) == ("7", RECORD, "zh", "healthai")
    assert case.meta == {"diseases": "感冒"}
    assert case.gold is None


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    rows = b"\xef\xbb\xbf" + line(id=1, feature_content="a\r\nb") + b"\r\n\n" + line(id="2", feature_content="c")
    cases = found(tmp_path, rows.replace(b"}\n", b"}\r\n"))
    assert [(case.id, case.text) for case in cases] == [("1", "a\nb"), ("2", "c")]


@pytest.mark.parametrize(
    ("content", "field", "reason"),
    [
        (b'{"id": 1, "feature_content": "\xff"}', "", "not UTF-8 (byte 30)"),
        (b'{"id": 1, "feature_content": "x"', "", "not JSON"),
        (b"[1]", "", "a row must be an object, not list"),
        (b"[" * 100_000, "", "not JSON"),
        (b"1" * 10_000, "", "not JSON"),
        (line(feature_content="x"), "id", "missing"),
        (line(id=None, feature_content="x"), "id", "missing"),
        (line(id=True, feature_content="x"), "id", "neither"),
        (line(id=1.5, feature_content="x"), "id", "neither"),
        (line(id=" ", feature_content="x"), "id", "missing"),
        (line(id=1), "feature_content", "missing"),
        (line(id=1, feature_content=["x"]), "feature_content", "not a text"),
        (line(id=1, feature_content=" \n"), "feature_content", "empty"),
        (line(id=1, feature_content="x" * (LONGEST + 1)), "text", f"{LONGEST + 1} characters"),
        (b'{"id": 1, "feature_content": "\\ud800"}', "", "half of a surrogate pair"),
        (line(id=1, feature_content="x", deep=json.loads("[" * 400 + "]" * 400)), "", "can't be kept as JSON"),
        (line(id="good", feature_content="x"), "id", "'good' was met before, at"),
    ],
)
def test_a_bad_row_stops_nothing_and_is_never_silent(tmp_path, content, field, reason):
    good, other = line(id="good", feature_content="x"), line(id="other", feature_content="y")
    first, issue, last = found(tmp_path, good + content.rstrip(b"\n") + b"\n" + other)
    assert (first.id, last.id) == ("good", "other")
    assert isinstance(issue, Issue)
    assert (issue.line, issue.field, issue.action) == (2, field, "dropped")
    assert issue.file.endswith("a.jsonl")
    assert reason in issue.reason


def test_an_importer_that_fails_makes_an_issue(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(n=1))
    (issue,) = read([path], lambda row: row["nothing"])
    assert issue.reason == "the importer failed (KeyError: 'nothing')"


def test_an_importer_that_gives_nonsense_makes_an_issue(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(n=1))
    (issue,) = read([path], lambda row: None)
    assert issue.problem == "the importer gave NoneType, not a Case"
    case = Case(id="1", text="x", language="en", source="s", group="g", meta={"x": object()})
    (issue,) = read([path], lambda row: case)
    assert "can't be kept as JSON" in issue.reason


@pytest.mark.parametrize(
    ("text", "language"),
    [(RECORD, "zh"), ("cough 3 days", "en"), ("ALT/AST 109/95，HBVDNA 3.06E+4，肝功能", "zh")],
)
def test_language(text, language):
    assert language_of(text) == language


SHARES = {"train": 8, "validation": 1, "test": 1}


@given(st.text(), st.text(alphabet=" \n\t"))
def test_texts_that_differ_in_space_alone_share_a_group(text, space):
    assert group_of(space + text + space) == group_of(text)
    assert group_of("ＡＢＣ") == group_of("abc")


def test_splits_follow_their_shares_and_stay_where_they_are():
    groups = [group_of(str(number)) for number in range(5000)]
    places = [split_of(group, SHARES) for group in groups]
    assert abs(places.count("train") / 5000 - 0.8) < 0.03
    assert abs(places.count("test") / 5000 - 0.1) < 0.02
    assert [split_of(group, SHARES) for group in reversed(groups)] == places[::-1]
    assert {split_of(group, {"train": 0, "validation": 0, "test": 5}) for group in groups} == {"test"}
