"""Runs beside one another: the same cases, the paired difference, what changed."""

import pytest

from preceptor.core.errors import UserError
from preceptor.report.compare import Side, are_few, changes, lines, table, told


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


def test_lines_hold_each_side_against_the_first_of_its_test_set() -> None:
    """Bold is what differs beyond chance; sides of another test set are another story."""
    better = made("b", "1" * 60)
    elsewhere = Side("c", {f"zh{n}": {"risky_prescription": 0.0} for n in range(3)})
    sides = [made("a", "10" * 30), better, elsewhere]
    assert not are_few(sides)
    assert are_few(sides[:2])
    assert not are_few(sides[:1] * 5)
    shown = lines(sides, "en", 120)
    columns = {str(column.header): list(column.cells) for column in shown.columns}
    assert [str(cell) for cell in columns[""]] == ["a", "b", "c"]
    assert columns["cases"] == ["60", "60", "3"]
    top1 = columns["Top-1"]
    assert [str(cell).split("\n")[0] for cell in top1] == ["50%", "100%", "—"]
    assert [any(span.style == "bold" for span in cell.spans) for cell in top1] == [False, True, False]
    assert [str(cell).split("\n")[0] for cell in columns["Risky drugs"]] == ["—", "—", "0%"]
    assert [row.end_section for row in shown.rows] == [False, True, True]
    narrow = [str(column.header) for column in lines(sides, "en", 44).columns]
    assert narrow == ["", "cases", "Top-1", "Evidence grounded"]
