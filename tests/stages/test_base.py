import pytest

from preceptor.core.errors import UserError
from preceptor.core.records import Row
from preceptor.stages.base import (
    Lines,
    read_records,
    replacing,
    resolve_callable,
    result_fields,
    write_records,
)
from preceptor.stages.teacher import TeacherConfig

ROWS = [Row(id=str(number), messages=(), answer="发热", case_id="c") for number in range(3)]


def test_records_come_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert write_records(path, ROWS) == 3
    assert list(read_records(path, Row)) == ROWS
    assert list(read_records(path, Row, limit=2)) == ROWS[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": 3}', r"rows\.jsonl:2: id: Input should be a valid string; each line must be a Row"),
        ("{", r"rows\.jsonl:2: Invalid JSON"),
        ('{"id":"1","messages":[],"answer":"a","case_id":"c","x":1}', r"rows\.jsonl:2: x: Extra inputs"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, line, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS[0].model_dump_json() + "\n" + line + "\n")
    with pytest.raises(UserError, match=expected):
        list(read_records(path, Row))


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_records(path, ROWS)

    def broken():
        yield ROWS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert list(read_records(path, Row)) == ROWS
    with pytest.raises(UnicodeEncodeError), replacing(path) as beside:
        beside.write_text("half \ud800", "utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("torn", [b"", b'{"id": "9"', b"\xe5\x8f", b"{"])
def test_lines_go_on_after_a_torn_one(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    with Lines(path) as lines:
        lines.write(ROWS[0])
    with path.open("ab") as file:
        file.write(torn)
    with Lines(path) as lines:
        lines.write(ROWS[1])
        assert list(read_records(path, Row)) == ROWS[:2]  # at once, for whoever looks


def test_callables_of_ours_and_of_the_users(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def ask(x):\n    return x + 1\n\nnumber = 3\n")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    assert resolve_callable("abs", {"abs": abs}, "strategy") is abs
    assert resolve_callable(f"{mine}:ask", {}, "strategy")(1) == 2
    table = {
        "ab": "no strategy 'ab'; did you mean 'abs'?",
        f"{tmp_path}/none.py:ask": "no Python file",
        f"{tmp_path}:ask": "no Python file",
        f"{mine}:aks": "has no function 'aks'; did you mean 'ask'?",
        f"{mine}:number": "has no function 'number'",
        f"{tmp_path}/broken.py:ask": "can't be loaded: ModuleNotFoundError",
    }
    for name, expected in table.items():
        with pytest.raises(UserError) as error:
            resolve_callable(name, {"abs": abs}, "strategy")
        assert expected in str(error.value)


def test_only_the_name_of_an_endpoint_decides_its_replies():
    def fields(**endpoint):
        return result_fields(TeacherConfig.model_validate({"model": "m", "endpoint": endpoint}))

    one = fields(url="http://127.0.0.1:8000/v1", name="big", timeout=3)
    assert one == {"model": "m", "endpoint": {"name": "big", "extra": {}, "json_mode": "none"}}
    assert one == fields(url="http://127.0.0.1:9000/v1", name="big", key_env="KEY")
    assert one != fields(url="http://127.0.0.1:8000/v1")
