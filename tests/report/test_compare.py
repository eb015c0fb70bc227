"""Runs beside one another: the same cases, the paired difference, what changed."""

from pathlib import Path

import pytest

from preceptor.core.errors import UserError
from preceptor.report.compare import Side, changes, side, table, told
from preceptor.report.metrics import ModelScore
from preceptor.stages.base import write_records


def made(name: str, right: str, grounded: float | None = 1.0) -> Side:
    """A side with a case for each letter, right where it is a 1."""
    parts = {"parsed": 1.0, **({} if grounded is None else {"evidence_grounded": grounded})}
    return Side(name, {str(n): {"top1": float(one), **parts} for n, one in enumerate(right)})


def cells(sides: list[Side]) -> dict[str, list[str]]:
    shown = table(sides)
    columns = [[str(cell).split("\n")[0] for cell in column.cells] for column in shown.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def test_values_and_differences() -> None:
    found = cells([made("a", "1100"), made("b", "1110"), made("c", "0000", None)])
    assert found["top1"] == ["4", "50%", "75%", "0%", "+25.0", "-50.0"]
    assert found["parsed"] == ["4", "100%", "100%", "100%", "+0.0", "+0.0"]
    assert found["evidence_grounded"] == ["4", "100%", "100%", "—", "+0.0", "—"]
    assert "disease_f1" not in found


def test_only_shared_cases_count() -> None:
    other = made("b", "11")
    assert cells([made("a", "1100"), other])["top1"] == ["2", "100%", "100%", "+0.0"]
    with pytest.raises(UserError, match="a, c: no case was measured on all of them"):
        table([made("a", "1"), Side("c", {"x": {"top1": 1.0}})])


def test_the_difference_is_paired() -> None:
    """The same ups and downs on both sides leave an exact difference, however wide each interval is."""
    right = "10" * 50
    (line,) = [
        row
        for row in zip(*(column.cells for column in table([made("a", right), made("b", right)]).columns), strict=True)
        if row[0] == "top1"
    ]
    assert str(line[-1]) == "+0.0\n+0 … +0"
    assert str(line[2]) != str(line[-1])


def test_what_changed() -> None:
    sides = [made("a", "1100"), made("b", "0111")]
    assert changes(*sides) == {"0": (True, False), "2": (False, True), "3": (False, True)}
    assert told(sides, shown=1).splitlines() == [
        "A = a",
        "B = b",
        "B right, A wrong: 2 cases (2 and 1 more)",
        "A right, B wrong: 1 case (0)",
    ]


def written(folder: Path, models: str) -> None:
    folder.mkdir(parents=True)
    scores = [
        ModelScore(case_id="1", sample=n, value=v, parts={"top1": v, "parsed": 1.0, "evidence_grounded": None}, model=m)
        for m in models.split()
        for n, v in enumerate((1.0, 0.0))
    ]
    write_records(folder / "scores.jsonl", scores)


def test_sides_are_runs_and_their_models(tmp_path: Path) -> None:
    written(tmp_path / "one" / "evaluate", "base student exact")
    assert side("one", tmp_path) == Side("one:student", {"1": {"top1": 0.5, "parsed": 1.0}})
    assert side(f"{tmp_path / 'one'}:base", Path("nowhere")).scores == {"1": {"top1": 0.5, "parsed": 1.0}}
    with pytest.raises(UserError, match="no model 'studnt'; did you mean 'student'"):
        side("one:studnt", tmp_path)
    with pytest.raises(UserError, match=r"oen: no such run in .*did you mean 'one'"):
        side("oen", tmp_path)
    written(tmp_path / "one" / "evaluate_more", "student")
    with pytest.raises(UserError, match=r"name one of its evaluations: .*evaluate, .*evaluate_more"):
        side("one", tmp_path)
    assert side("one/evaluate_more", tmp_path).scores
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it has no evaluation yet"):
        side("empty", tmp_path)
