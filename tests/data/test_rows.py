import gzip
import json
import subprocess
import sys
from datetime import UTC, date, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook

from preceptor.core.errors import UserError
from preceptor.data import decode, objects
from preceptor.data.rows import BadRow, json_object, json_value, rows
from tests.data.kinds import KINDS, delimited, jsonl, made, parquet, xlsx


def found(tmp_path, content, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return list(rows(path))


def told(result):
    return [(line, str(row) if isinstance(row, BadRow) else row) for line, row in result]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("chunk", "feed"), [(400, 7), (1 << 20, 2048)])
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, monkeypatch, name, chunk, feed):
    monkeypatch.setattr(decode, "_CHUNK", chunk)
    monkeypatch.setattr(decode, "_FEED", feed)
    assert [row for _, row in found(tmp_path, KINDS[name](made()), name)] == made()


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", b'\xef\xbb\xbf\n{"a": 1}\n \n\n{"a": 2}', [2, 5]),
        ("a.json", b'[\n {"a": [\n1]},\n\n {"a": 2}]', [2, 5]),
        ("a.json", b'[\r {"a": 1},\r {"a": 2}]', [2, 3]),
        ("a.csv", b'a,b\n1,"x\ny\n\nz"\n\n2,w\n', [2, 7]),
        ("a.csv", b'a,b\r1,"x\ry"\r2,w', [2, 4]),
        ("a.csv", b'a,b\r\n1,"x\ry\nz"\r\n2,w', [2, 4]),
        ("a.parquet", parquet([{"a": 1}, {"a": 2}]), [1, 2]),
        ("a.xlsx", xlsx([{"a": 1}, {"a": 2}]), [2, 3]),
    ],
)
def test_a_row_is_named_by_the_line_on_which_it_starts(tmp_path, name, content, lines):
    assert [line for line, _ in found(tmp_path, content, name)] == lines


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", []),
        ("a.jsonl", b"\n\n", []),
        ("a.json", b"[]", []),
        ("a.json", b'{"data": []}', []),
        ("a.csv", b"a,b\n", []),
        ("a.jsonl", b'{"a": NaN}\n', [(1, {"a": None})]),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', [(1, {"messages": [{"role": "user"}]})]),
        ("a.json", b'{\n"a": 1\n}', [(1, {"a": 1})]),
        ("a.jsonl", b'[1]\n{"a": 1}', [(1, "a row must be an object, not list"), (2, {"a": 1})]),
        ("a.jsonl", b'{"a": 1, "a": 2}', [(1, "a: it stands twice in one object")]),
        ("a.jsonl", b'{"a": "\\ud800"}', [(1, "it holds half of a surrogate pair, which is no character")]),
        ("a.jsonl", b'{"a": "\\ud83d\\ude00"}', [(1, {"a": "😀"})]),
        ("a.json", b'[1, {"a": 1}]', [(1, "a row must be an object, not int"), (1, {"a": 1})]),
        ("a.json", b'[{"a": 1},\n{"a": 2}', [
            (1, {"a": 1}), (2, {"a": 2}), (2, "the list of rows doesn't end: the file may be cut off"),
        ]),
        ("a.csv", b"a,,a\n1,2,3", [(2, {"a": "1", "column 2": "2", "a (3)": "3"})]),
        ("a.csv", b"a,b,\n1,2\n1,2,,\n", [
            (2, "2 fields where the header has 3"), (3, {"a": "1", "b": "2", "column 3": ""}),
        ]),
        ("a.csv", b"a,b\n1,2,3", [(2, "3 fields where the header has 2")]),
        ("a.csv", b'a,b\n1,5" tall\n', [(2, {"a": "1", "b": '5" tall'})]),
        ("a.csv", b"a,b\n1,\x00x\n", [(2, {"a": "1", "b": "\x00x"})]),
        ("a.jsonl", '{"a": "发热"}\n"\n{"a": "头痛"}'.encode().replace(b'"\n{', '{"a": "咳嗽"}\n{'.encode("gb18030")), [
            (1, {"a": "发热"}), (2, "not in the file's encoding (character 8)"), (3, {"a": "头痛"}),
        ]),
        ("a.jsonl", '{"a": "发热"}\n'.encode() + '{"a": "发热"}\n{"a": "咳嗽"}'.encode("gb18030"), [
            (1, {"a": "鍙戠儹"}), (2, {"a": "发热"}), (3, {"a": "咳嗽"}),
        ]),
        ("a.csv", "a,b\n发热,头\nx,疼,\n".encode() + b"x,\xff\n", [
            (2, {"a": "发热", "b": "头"}), (3, {"a": "x", "b": "疼"}), (4, "b: not in the file's encoding"),
        ]),
    ],
)  # fmt: skip
def test_what_is_odd_is_read_or_named(tmp_path, name, content, expected):
    assert told(found(tmp_path, content, name)) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'a,b\n1,x\n2,"y\n3,z\n4,"w"\n5,v\n'),
        ("a.csv", b'a,b\n1,x\n2,"y"y\n3,z\n4,"w"\n5,v\n'),
        ("a.csv", b'a,b\n1,x\n2,"y\n3,z\n4,w\n5,v\n'),
        ("a.json", b'[{"a":"1","b":"x"},{"a":"2","b":"y},{"a":"3","b":"z"},{"a":"4","b":"w"},{"a":"5","b":"v"}]'),
        ("a.json", b'[{"a":"1","b":"x"},{"a":"2","b":["y"},{"a":"3","b":"z"},{"a":"4","b":"w"},{"a":"5","b":"v"}]'),
        ("a.json", b'[{"a":"1","b":"x"},{"a":"2","b":"y",\n{"a":"3","b":"z"},{"a":"4","b":"w"},{"a":"5","b":"v"}]'),
        ("a.json", b'[{"a":"1","b":"x"},x"a":"2","b":"y"},{"a":"3","b":"z"},{"a":"4","b":"w"},{"a":"5","b":"v"}]'),
        ("a.json", b'{"data":[{"a":"1","b":"x"},]"a":"2"},{"a":"3","b":"z"},{"a":"4","b":"w"},{"a":"5","b":"v"}]}'),
        (
            "a.json",
            b'[\n{"a":"1","b":"x"},\n{"a":"2","b":"y},\n{"a":"3","b":"z"},\n{"a":"4","b":"w"},{"a":"5","b":"v"}]',
        ),
    ],
)
def test_a_broken_row_costs_itself_alone(tmp_path, name, content):
    result = [row for _, row in found(tmp_path, content, name)]
    assert [None if isinstance(row, BadRow) else row["a"] for row in result] == ["1", None, "3", "4", "5"]


def test_a_line_within_a_broken_text_is_no_row(tmp_path):
    content = b'a,b\n1,"x\ny"\n2,"x"x\nno, row\nat all"\n3,z\n4,"never\nended, as\nthe file is'
    assert told(found(tmp_path, content, "a.csv")) == [
        (2, {"a": "1", "b": "x\ny"}),
        (4, "not CSV (',' expected after '\"'): a quote within a quoted field must be doubled"),
        (5, "lines 5 to 6 belong to no row that can be told"),
        (7, {"a": "3", "b": "z"}),
        (8, "not CSV (unexpected end of data): a quote within a quoted field must be doubled"),
        (9, "lines 9 to 10 belong to no row that can be told"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_row_that_is_too_long_is_not_held(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(decode, "LONGEST", 2 << 20)
    monkeypatch.setattr(objects, "LONGEST", 2 << 20)
    huge = "x" * (5 << 20)
    lines = {
        "jsonl": f'{{"a":"1"}}\n{{"a":"{huge}"}}\n{{"a":"3"}}',
        "json": f'[{{"a":"1"}},{{"a":"{huge}"}},{{"a":"3"}}]',
        "csv": f"a,b\n1,\n{huge},\n3,\n",
    }
    first, bad, last = [row for _, row in found(tmp_path, lines[kind].encode(), f"a.{kind}")]
    assert (first["a"], isinstance(bad, BadRow), last["a"]) == ("1", True, "3")


@pytest.mark.parametrize("name", ["packed.jsonl.gz", "packed.jsonl.zst", "table.csv.gz"])
def test_of_a_file_that_was_cut_off_what_can_be_read_is_read(tmp_path, name):
    content = KINDS[name](made(3000))
    result = [row for _, row in found(tmp_path, content[: len(content) // 2], name)]
    good = [row for row in result if not isinstance(row, BadRow)]
    assert good == made(3000)[: len(good)]
    assert len(good) > 500
    assert "damaged or cut off" in str(result[-1])
    assert len(result) - len(good) <= 3


@pytest.mark.slow
def test_flat_memory(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(40):
            file.write(jsonl(made(2500)))
    code = (
        "import resource, sys; from pathlib import Path; from preceptor.data.rows import rows\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "each = rows(Path(sys.argv[1])); [next(each) for _ in range(20000)]; before = peak()\n"
        "print(sum(1 for _ in each), peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    count, grown = map(int, out.split())
    assert count == 80_000
    assert grown < 8_000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "save it as XLSX"),
        ("a.jsonl.bz2", b"BZh91AY", "unpack it first"),
        ("a.parquet.gz", gzip.compress(parquet([{"a": 1}])), "unpack it first"),
    ],
)
def test_other_kinds_are_refused(tmp_path, name, content, reason):
    with pytest.raises(UserError, match=reason):
        found(tmp_path, content, name)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    content = xlsx([{"a": 1}])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"XLSX files need openpyxl: pip install 'preceptor\[tables\]'"):
        found(tmp_path, content, "a.xlsx")


def test_other_sheets_are_not_lost_silently(tmp_path):
    (_, row), (_, issue) = found(tmp_path, xlsx([{"a": 1}], "second"), "a.xlsx")
    assert row == {"a": 1}
    assert "the sheet 'second' has other columns: save it by itself" in str(issue)


def test_sheets_of_the_same_columns_are_one_table(tmp_path):
    book = Workbook()
    for month, sheet in enumerate((book.active, book.create_sheet(), book.create_sheet())):
        sheet.append(["id", "text"] if month < 2 else ["remark", "text"])
        sheet.append([month, "x"])
    book.save(tmp_path / "a.xlsx")
    first, second, *other = rows(tmp_path / "a.xlsx")
    assert [first, second] == [(2, {"id": 0, "text": "x"}), (4, {"id": 1, "text": "x"})]
    assert [number for number, row in other if isinstance(row, BadRow)] == [5, 6], "each lost row counts"


def test_what_is_merged_downwards_stands_in_each_row(tmp_path):
    book = Workbook()
    for values in (
        ["id", "patient", "text"],
        [1, "p1", "a"],
        [2, None, "b"],
        [3, "p2", "c"],
        [4, None, "d"],
        [5, None, "e"],
    ):
        book.active.append(values)
    book.active.merge_cells("B2:B3")
    book.active.merge_cells("B4:B5")
    book.save(tmp_path / "a.xlsx")
    assert [row["patient"] for _, row in rows(tmp_path / "a.xlsx")] == ["p1", "p1", "p2", "p2", None]


def test_cells_become_json():
    cells = {"a": datetime(2024, 1, 31), "b": date(2024, 2, 1), "c": float("nan"), "d": (b"x", 1, None)}  # noqa: DTZ001
    assert json_value(cells) == {"a": "2024-01-31", "b": "2024-02-01", "c": None, "d": ["x", 1, None]}
    assert json_value(datetime(2024, 1, 31, 8, 5, tzinfo=UTC)) == "2024-01-31T08:05:00+00:00"


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(exclude_categories=["Cs"]))
OBJECTS = st.dictionaries(st.text('ab{["\\发', max_size=3), SCALARS | st.lists(SCALARS, max_size=2), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OBJECTS, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_list_of_objects_is_read_back(tmp_path, objects, indent, ascii_only):
    content = json.dumps(objects, indent=indent, ensure_ascii=ascii_only).encode()
    assert [row for _, row in found(tmp_path, content, "a.json")] == objects
    lines = b"".join(json.dumps(one, ensure_ascii=ascii_only).encode() + b"\n" for one in objects)
    assert [row for _, row in found(tmp_path, lines)] == objects


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]), st.sampled_from(",;\t")
)
def test_any_table_is_read_back(tmp_path, values, newline, delimiter):
    table = [{"one": one, "two": two} for one, two in values]
    content = delimited(table, lineterminator=newline, delimiter=delimiter, quoting=1).encode()
    assert [row for _, row in found(tmp_path, content, "a.csv")] == table


@pytest.mark.parametrize("line", [b"{}", "{}", b"\xef\xbb\xbf{}"])
def test_an_object(line):
    assert json_object(line) == {}


def test_a_line_that_is_not_utf8():
    with pytest.raises(BadRow, match="byte 6"):
        json_object(b'{"a":"\xff"}')
