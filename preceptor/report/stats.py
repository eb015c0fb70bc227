"""What is in files of cases and answers: counts, lengths, reasons, diseases; whatever layout they have."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.core.errors import UserError
from preceptor.core.records import Diagnosis
from preceptor.data.files import BadRow, json_object
from preceptor.tasks.diagnosis import parse

_NONE = "–"


@dataclass
class _Tally:
    """What was counted in one file."""

    rows: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    case_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    diseases: list[int] = field(default_factory=list)
    abstained: int = 0
    failed: int = 0


def table(files: Iterable[Path]) -> Table:
    """One column a file.

    Raises:
        UserError: a file is missing.
    """
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    tallies = []
    for path in files:
        shown.add_column(path.name, justify="right", overflow="fold")
        tallies.append(_tally(path))
    rows: dict[str, Callable[[_Tally], str]] = {
        "rows": lambda t: f"{t.rows:,}",
        "of the kind": lambda t: ", ".join(t.kinds) or _NONE,
        "not understood": lambda t: f"{t.bad:,}",
        "cases": lambda t: f"{len(t.case_lengths):,}",
        "characters: median, 95 %, most": lambda t: _spread(t.case_lengths),
        "answers": lambda t: f"{len(t.answer_lengths):,}",
        "their characters: median, 95 %, most": lambda t: _spread(t.answer_lengths),
        "reasons an answer": lambda t: _mean(t.reasons),
        "diseases an answer": lambda t: _mean(t.diseases),
        "abstained": lambda t: f"{t.abstained:,}",
        "failed or unread": lambda t: f"{t.failed:,}",
    }
    for name, cell in rows.items():
        shown.add_row(name, *(cell(tally) for tally in tallies))
    return shown


def _tally(path: Path) -> _Tally:
    if not path.is_file():
        raise UserError(f"{path}: no such file; name JSONL files of cases or answers")
    tally = _Tally()
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            tally.rows += 1
            try:
                row = json_object(line)
                kind, read = next((k, read) for k, (keys, read) in _LAYOUTS.items() if keys <= row.keys())
                read(row, tally)
            except (BadRow, StopIteration, ValueError, TypeError, KeyError, AttributeError):
                tally.bad += 1
            else:
                tally.kinds[kind] += 1
    return tally


def _case(row: Mapping[str, Any], tally: _Tally) -> None:
    tally.case_lengths.append(len(row["text"]))
    if row.get("gold"):
        _diagnosis(Diagnosis.model_validate(row["gold"]) if "diseases" in row["gold"] else None, row["gold"], tally)


def _prediction(row: Mapping[str, Any], tally: _Tally) -> None:
    _diagnosis(Diagnosis.model_validate(row["output"]) if row.get("output") else None, row["text"], tally)


def _row(row: Mapping[str, Any], tally: _Tally) -> None:
    tally.case_lengths.append(sum(len(message["content"]) for message in row["messages"]))
    _diagnosis(parse(row["answer"]).output, row["answer"], tally)


def _healthai(row: Mapping[str, Any], tally: _Tally) -> None:
    tally.case_lengths.append(len(row["feature_content"]))
    answer = row.get("bingli_json") or {key: row[key] for key in ("diseases", "reason") if key in row}
    if answer:
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        _diagnosis(parse(text).output, text, tally)


def _instruction(row: Mapping[str, Any], tally: _Tally) -> None:
    tally.case_lengths.append(len(row["input"]) or len(row["instruction"]))
    tally.answer_lengths.append(len(row["output"]))


_LAYOUTS: dict[str, tuple[set[str], Callable[[Mapping[str, Any], _Tally], None]]] = {
    "prediction": ({"case_id", "prompt_sha", "text"}, _prediction),
    "case": ({"id", "text", "group"}, _case),
    "training row": ({"messages", "answer"}, _row),
    "HealthAI": ({"id", "feature_content"}, _healthai),
    "instruction": ({"instruction", "input", "output"}, _instruction),
}
"""Each layout by keys that it alone has."""


def _diagnosis(output: Diagnosis | None, said: Any, tally: _Tally) -> None:
    tally.answer_lengths.append(len(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)))
    if output is None:
        tally.failed += 1
        return
    tally.abstained += output.abstained
    tally.reasons.append(len(output.reason))
    tally.diseases.append(len(output.diseases))


def _spread(lengths: list[int]) -> str:
    if not lengths:
        return _NONE
    median, most = np.percentile(lengths, [50, 95])
    return f"{median:,.0f}, {most:,.0f}, {max(lengths):,}"


def _mean(counts: list[int]) -> str:
    return f"{np.mean(counts):.2f}" if counts else _NONE
