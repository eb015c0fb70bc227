import contextlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Issue
from preceptor.data.files import LONGEST, Ids, head, importer_of, read, sniff
from preceptor.data.layouts import LAYOUTS
from tests.data.kinds import KINDS, RECORD, jsonl, made

REAL = Path(__file__).parents[3] / "shared" / "data"
HEALTHAI = LAYOUTS["healthai"]


def unwrapped(row):
    """The case, or the issue."""
    return row if isinstance(row, Issue) else row.case


def found(tmp_path, content, name="a.jsonl", importer=HEALTHAI):
    path = tmp_path / name
    path.write_bytes(content)
    return [unwrapped(row) for row in read(path, importer)]


def line(**row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def test_a_row_becomes_a_case(tmp_path):
    (case,) = found(tmp_path, line(id=7, feature_content=RECORD, hospital="甲"))
    assert (case.id, case.text, case.language, case.source) == ("7", RECORD, "zh", "healthai")
    assert (case.meta, case.gold) == ({"hospital": "甲"}, None)


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    rows = b"\xef\xbb\xbf" + line(id=1, feature_content="a\r\nb") + b"\r\n\n" + line(id="2", feature_content="c\rd")
    cases = found(tmp_path, rows.replace(b"}\n", b"}\r\n"))
    assert [(case.id, case.text) for case in cases] == [("1", "a\nb"), ("2", "c\nd")]


@pytest.mark.parametrize(
    ("content", "field", "reason"),
    [
        (b'{"id": 1, "feature_content": "\xff"}', "", "not in the file's encoding (character 31)"),
        (b'{"id": 1, "feature_content": "x"', "", "not JSON"),
        (b"[1]", "", "a row must be an object, not list"),
        (b"[" * 100_000, "", "not JSON"),
        (b"1" * 10_000, "", "not JSON"),
        (line(feature_content="x"), "id", "missing"),
        (line(id=1), "feature_content", "missing"),
        (line(id=1, feature_content=["x"]), "feature_content", "not a text"),
        (line(id=1, feature_content=" \n"), "feature_content", "empty"),
        (line(id=1, feature_content="x" * (LONGEST + 1)), "text", f"{LONGEST + 1} characters"),
        (b'{"id": 1, "feature_content": "\\ud800"}', "", "half of a surrogate pair"),
        (line(id=1, feature_content="x", deep=json.loads("[" * 400 + "]" * 400)), "", "can't be kept as JSON"),
        (line(id="good", feature_content="x"), "id", "'good' was met before, with the same text, at"),
    ],
)
def test_a_bad_row_stops_nothing_and_is_never_silent(tmp_path, content, field, reason):
    good, other = line(id="good", feature_content="x"), line(id="other", feature_content="y")
    first, issue, last = found(tmp_path, good + content.rstrip(b"\n") + b"\n" + other)
    assert (first.id, last.id) == ("good", "other")
    assert (issue.line, issue.field, issue.action) == (2, field, "dropped")
    assert issue.file.endswith("a.jsonl")
    assert reason in issue.reason


@pytest.mark.parametrize(
    ("importer", "reason"),
    [
        (lambda row: row["nothing"], "the importer failed (KeyError: 'nothing')"),
        (lambda row: None, "the importer gave NoneType, not a Case"),
        (lambda row: Case(id="", text="x", language="en", source="s", group="g", meta={"x": object()}), "kept as JSON"),
        (lambda row: Case(id="1", text=" ", language="en", source="s", group="g"), "text: it is empty"),
    ],
)
def test_an_importer_that_fails_makes_an_issue(tmp_path, importer, reason):
    (issue,) = found(tmp_path, line(n=1), importer=importer)
    assert reason in issue.problem


def test_what_the_user_can_mend_is_no_row(tmp_path):
    def importer(row):
        raise UserError("mend me")

    with pytest.raises(UserError, match="mend me"):
        found(tmp_path, line(n=1), importer=importer)


def test_an_id_is_met_once_in_all_files_that_are_read_together(tmp_path):
    met = Ids()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(made(3)))
    first = [unwrapped(row) for row in read(tmp_path / "a.jsonl", HEALTHAI, met)]
    again = [unwrapped(row) for row in read(tmp_path / "b.jsonl", HEALTHAI, met)]
    assert [type(one) for one in (*first, *again)] == [Case] * 3 + [Issue] * 3
    assert again[2].reason == f"'n2' was met before, with the same text, at {tmp_path / 'a.jsonl'}:3"


def test_another_text_of_an_id_is_another_case(tmp_path):
    rows = [line(id=name, feature_content=text) for name, text in (("a", "x"), ("a-2", "y"), ("a", "z"), ("a", "x"))]
    first, second, issue, third, same = found(tmp_path, b"".join(rows))
    assert [(case.id, case.text) for case in (first, second, third)] == [("a", "x"), ("a-2", "y"), ("a-3", "z")]
    assert (issue.line, issue.action, same.action) == (3, "changed", "dropped")
    assert "here it is 'a-3'" in issue.reason


def test_rows_without_id_keep_theirs_wherever_they_stand(tmp_path):
    rows = [{"prompt": said, "completion": "y"} for said in ("a", "b", "a", "c", "a")]
    orders = [rows, rows[::-1]]
    ids = [[case.id for case in found(tmp_path, jsonl(o), importer=LAYOUTS["prompt_completion"])] for o in orders]
    assert Counter(ids[0]) == Counter(ids[1]) == dict.fromkeys(ids[0], 1)
    assert sorted(name[len(ids[0][0]) :] for name in ids[0] if name.startswith(ids[0][0])) == ["", "-2", "-3"]
    again = [{"id": name, "prompt": "a", "completion": "y"} for name in (ids[0][0], ids[0][0])]
    assert isinstance(found(tmp_path, jsonl(again), importer=LAYOUTS["prompt_completion"])[1], Issue)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_cases(tmp_path, name):
    rows = made()
    path = tmp_path / name
    path.write_bytes(KINDS[name](rows))
    assert sniff(path) == "healthai"
    cases = [unwrapped(row) for row in read(path, importer_of("healthai", path))]
    assert [(case.id, case.text) for case in cases] == [(row["id"], row["feature_content"]) for row in rows]


def test_a_layout_that_is_unknown_names_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match=r"a\.csv: no known layout: its rows have x, y\. Map its columns"):
        sniff(path)
    assert head(path) == [{"x": "1", "y": "2"}]


def damaged(content, place, bits):
    whole = bytearray(content)
    whole[place % len(whole)] ^= bits
    return bytes(whole)


PLACES = st.integers(0, 10_000)
BITS = st.integers(1, 255)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(sorted(KINDS)), PLACES, BITS)
def test_a_byte_that_flips_gives_no_traceback_and_no_silent_loss(tmp_path, name, place, bits):
    rows = made()
    try:
        result = found(tmp_path, damaged(KINDS[name](rows), place, bits), name)
    except UserError:
        return
    whole = {(row["id"], row["feature_content"]) for row in rows}
    same = {(one.id, one.text) for one in result if isinstance(one, Case)} & whole
    assert len(same) == len(rows) or len(result) > len(same)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(["plain.jsonl", "gb.jsonl", "windows.jsonl"]), st.lists(st.tuples(PLACES, BITS), max_size=5))
@example("plain.jsonl", [(0, 1)])
@example("plain.jsonl", [(1947, 1)])  # an id becomes another row's
def test_lines_in_are_cases_and_reported_rows(tmp_path, name, flips):
    content = KINDS[name](made())
    for place, bits in flips:
        content = damaged(content, place, bits)
    if content.count(b"\r") > content.count(b"\n") * 1.5:
        return
    rows = [part for part in content.split(b"\n") if part.strip(b"\t\n\v\f\r \x1c\x1d\x1e\x1f")]
    result = found(tmp_path, content, name)
    changed = [one for one in result if isinstance(one, Issue) and one.action == "changed"]
    assert len(result) - len(changed) == len(rows)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["jsonl", "json", "csv", "parquet", "xlsx", "gz", "zst", "txt"]))
def test_anything_at_all_gives_no_traceback(tmp_path, content, kind):
    with contextlib.suppress(UserError):
        assert all(isinstance(one, Case | Issue) for one in found(tmp_path, content, f"a.{kind}"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real examples aren't here")
@pytest.mark.parametrize(
    ("name", "layout", "cases", "issues"),
    [
        ("healthai_cases", "healthai", 300, 0),
        ("healthai_example_output", "healthai_labelled", 3, 0),
        ("healthai_submission_example", "healthai_submission", 3, 2),  # three rows of one id
        ("consult_qa", "instruction", 150, 0),
    ],
)
def test_real_files(tmp_path, name, layout, cases, issues):
    path = REAL / f"{name}.jsonl"
    assert sniff(path) == layout
    result = [unwrapped(row) for row in read(path, importer_of(layout, path))]
    assert Counter(map(type, result)) == Counter({Case: cases, Issue: issues})
    assert layout == "healthai" or all(one.gold is not None for one in result if isinstance(one, Case))
    content, draws = path.read_bytes(), random.Random(0)
    for _ in range(8):
        broken = damaged(content, draws.randrange(len(content)), draws.randrange(1, 256))
        rows = sum(1 for part in broken.split(b"\n") if part.strip())
        told = found(tmp_path, broken, importer=importer_of(layout, path))
        assert sum(isinstance(one, Case) or one.action == "dropped" for one in told) == rows
