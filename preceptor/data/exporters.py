"""Rows and answers as other programs read them: LLaMA-Factory, ms-swift, and the competition's judges.

Every file is written beside its place and renamed, so that nobody finds half of one.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Prediction, Record, Row
from preceptor.data.layouts import diagnosis_of
from preceptor.data.rows import BadRow

_TRAIN, _VALIDATION = "train.jsonl", "validation.jsonl"
_LLAMAFACTORY = {
    # "openai" would be another formatting there, which adds words of its own to the system's turn.
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,99}")
"""Ids that are integers and look it: 007 is a text."""

Separator = Literal["；", ";", "；\n", "\n"]


class SubmissionStyle(Record):
    """How a submission's strings are written. The defaults are what the competition's own files look like."""

    separator: Separator = "；"
    """Between diseases."""
    reason_separator: Separator = "；\n"
    """Between reasons, which are always numbered."""
    numbering: Literal["none", "several", "all"] = "several"
    """Whether diseases are numbered: never, where there are several, or one alone too."""
    fallback: str = ""
    """What stands where a case has no disease: it failed, or the model abstained."""


class SubmissionReport(Record):
    """What a submission holds, and which of its rows to look at; each with the case's id and why."""

    cases: int
    failed: tuple[tuple[str, str], ...]
    """They have the fallback."""
    ambiguous: tuple[tuple[str, str], ...]
    """Whoever takes their strings apart finds other diseases or reasons than the answer gave."""


def llamafactory(rows: Iterable[Row], validation: Iterable[Row], folder: Path) -> None:
    """A dataset folder (`dataset_dir`) with `preceptor` and, if there are rows for it, `preceptor_validation`.

    The layout is that of LLaMA-Factory's data/README.md, "OpenAI Format". Where rows have earlier answers in their
    prompts, as few-shot ones do, it learns those as well unless it is told `mask_history: true`.

    Raises:
        UserError: there are no rows.
    """
    written = _dataset(rows, validation, folder, _conversation)
    names = {_TRAIN: "preceptor", _VALIDATION: "preceptor_validation"}
    info = {names[file]: {"file_name": file, **_LLAMAFACTORY} for file in written}
    with _replacing(folder / "dataset_info.json") as file:
        file.write(json.dumps(info, indent=2).encode() + b"\n")


def ms_swift(rows: Iterable[Row], validation: Iterable[Row], folder: Path) -> None:
    """The files for `--dataset` and, if there are rows for it, `--val_dataset`, in ms-swift's standard format.

    Its docs/source_en/Customization/Custom-dataset.md has it. Answers within the prompts carry no loss.

    Raises:
        UserError: there are no rows.
    """
    _dataset(rows, validation, folder, lambda row: _conversation(row, loss=False))


def submission(
    cases: Iterable[Case], predictions: Mapping[str, Prediction], style: SubmissionStyle, path: Path
) -> SubmissionReport:
    """The competition's file: a line for every case, in their order, and what is to be said of it.

    `predictions` are by case id. An id that is a whole number is written as one. The record is as its source had it,
    which is `meta["feature_content"]` where the importer's text differs.

    Raises:
        UserError: a case comes twice, or was answered with advice.
    """
    met: set[str] = set()
    failed, ambiguous = [], []
    with _replacing(path) as file:
        for case in cases:
            if case.id in met:
                raise UserError(f"{path.name}: case {case.id!r} comes twice; a submission has every id once")
            met.add(case.id)
            diagnosis, why = _said(case.id, predictions.get(case.id))
            strings = {
                "reason": _reasons(diagnosis, style),
                "diseases": _diseases(diagnosis, style) if diagnosis.diseases else style.fallback,
            }
            identity = int(case.id) if _WHOLE_NUMBER.fullmatch(case.id) else case.id
            file.write(_line({"id": identity, **strings, "feature_content": _source_text(case)}))
            if why:
                failed.append((case.id, why))
            elif doubt := _misread(strings, diagnosis):
                ambiguous.append((case.id, doubt))
    return SubmissionReport(cases=len(met), failed=tuple(failed), ambiguous=tuple(ambiguous))


def _said(identity: str, prediction: Prediction | None) -> tuple[Diagnosis, str]:
    """The answer to a case, and why it names no disease, if it names none."""
    if prediction is None:
        return Diagnosis(), "no prediction"
    if prediction.failure is not None:
        kind, detail = prediction.failure.kind.value, prediction.failure.detail
        return Diagnosis(), f"{kind}: {detail}" if detail else kind
    if not isinstance(prediction.output, Diagnosis):
        raise UserError(f"case {identity!r} was answered with advice; a submission names diseases: use task: diagnosis")
    if held := prediction.withheld:
        told = f"withheld: {held.output.diseases[0]} at {held.confidence:.2f}, below {held.threshold:.2f}"
        return prediction.output, f"{told}; leave `risk` out of calibrate to submit it"
    return prediction.output, "abstained" if prediction.output.abstained else ""


def _diseases(diagnosis: Diagnosis, style: SubmissionStyle) -> str:
    several = len(diagnosis.diseases) > 1
    numbered = style.numbering == "all" or (style.numbering == "several" and several)
    return style.separator.join(_numbered(diagnosis.diseases) if numbered else diagnosis.diseases)


def _reasons(diagnosis: Diagnosis, style: SubmissionStyle) -> str:
    return style.reason_separator.join(_numbered(diagnosis.reason))


def _numbered(points: Iterable[str]) -> Iterator[str]:
    return (f"{number}. {point}" for number, point in enumerate(points, 1))


def _source_text(case: Case) -> str:
    return str(case.meta.get("feature_content", case.text))


def _misread(strings: Mapping[str, str], said: Diagnosis) -> str:
    """What our own importer makes of the strings, where that is something else than was said."""
    try:
        read = diagnosis_of("diseases", strings["diseases"], strings["reason"])
    except BadRow as error:
        return str(error.reason)
    if read is None or read.diseases != said.diseases:
        return f"its diseases read as {list(read.diseases) if read else []}, not {list(said.diseases)}"
    if read.reason != said.reason:
        return f"its reasons read as {list(read.reason)}, not {list(said.reason)}"
    return ""


def _conversation(row: Row, **earlier: Any) -> dict[str, Any]:
    """The messages of a row with its answer; answers before it carry what is `earlier` too."""
    turns = [
        {"role": message.role, "content": message.content, **(earlier if message.role == "assistant" else {})}
        for message in row.messages
    ]
    return {"messages": [*turns, {"role": "assistant", "content": row.answer}]}


def _dataset(
    rows: Iterable[Row], validation: Iterable[Row], folder: Path, written: Callable[[Row], dict[str, Any]]
) -> list[str]:
    """Write both files; which of them there are. An empty one would be refused where it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, given in ((_TRAIN, rows), (_VALIDATION, validation)):
        left = iter(given)
        first = next(left, None)
        if first is None:
            if name == _TRAIN:
                raise UserError(f"{folder}: no rows to export; curate some first")
            (folder / name).unlink(missing_ok=True)  # of an earlier export
            continue
        with _replacing(folder / name) as file:
            for row in chain([first], left):
                file.write(_line(written(row)))
        names.append(name)
    return names


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that becomes it if all went well, and vanishes if not."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
