"""Solved cases, for a model to learn from in its prompt: where they come from, and which may serve."""

import random
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Issue, Prediction, Task
from preceptor.data import files
from preceptor.data.copies import copies
from preceptor.data.splits import member
from preceptor.stages.base import Context, Need, read_records
from preceptor.stages.fences import HELD_OUT

CASES, LABELS = "train.jsonl", "predictions.jsonl"
_SPLITTING = ("prepare", "refine")
_MOST = 5_000
"""Among how many cases examples are sought; of more, so many are drawn by lot."""


class From(Protocol):
    """Whose examples are sought."""

    @property
    def task(self) -> Task:
        """What is asked."""

    @property
    def examples_from(self) -> str:
        """A section, a file, or nothing for the training cases."""

    @property
    def seed(self) -> int:
        """Of the lots."""


def needs(examples_from: str) -> tuple[Need, ...]:
    """The solved cases; where a section's labels are the solutions, the cases that they are about; what is held out."""
    held = tuple(
        Need(f"held_{name}", files=(f"{name}.jsonl",), stages=("prepare",), required=False, watched=True)
        for name in HELD_OUT
    )
    if not examples_from:
        return (Need("examples", files=(CASES,), stages=_SPLITTING),)
    if _is_path(examples_from):
        return (Need("examples", paths=(examples_from,)), *held)
    return (
        Need("examples", files=(CASES, LABELS), section=examples_from),
        Need("examples_cases", files=(CASES,), stages=_SPLITTING, required=False),
    )


def _is_path(name: str) -> bool:
    return "/" in name or "." in name or Path(name).exists()


def solved(config: From, context: Context) -> list[Case]:
    """The solved cases in the order of their file; where some solutions hold reasons, those alone.

    Raises:
        UserError: none is solved, or all of them are held out or near copies of what is.
    """
    path = context.input("examples")
    kind = Consultation if config.task == "consult" else Diagnosis
    held, texts = _held_out(context)
    out = near = 0
    draw = random.Random(f"{config.seed}:examples")
    pools: dict[bool, list[tuple[int, Case]]] = {True: [], False: []}
    counts = {True: 0, False: 0}
    for number, case in enumerate(_labelled(path, context) if path.name == LABELS else _cases(path)):
        if not isinstance(case.gold, kind):
            continue
        one = member(case)
        if held & {one.id, one.group, one.text}:
            out += 1
            continue
        whole = case.expects_abstention or not isinstance(case.gold, Diagnosis) or bool(case.gold.reason)
        counts[whole] += 1
        pool = pools[whole]
        if len(pool) < _MOST:
            pool.append((number, case))
        elif (place := draw.randrange(counts[whole])) < _MOST:  # each is as likely to stay as any other
            pool[place] = (number, case)
    found: list[Case] = []
    for pool in pools.values():
        if not found:
            drawn = [case for _, case in sorted(pool, key=lambda item: item[0])]
            found = _apart(drawn, texts, context) if texts else drawn
            near += len(drawn) - len(found)
    if out + near:
        told = f" ({near} of them as near copies)" if near else ""
        context.say(
            f"{context.section}: {out + near} solved cases of {path} are held out{told}, and serve as no examples"
        )
    if not found:
        raise UserError(
            f"{context.section}: {path} has no solved case that may serve as an example; name in `examples_from` a "
            "file of cases with their answers, or a section `label` that answers training cases"
        )
    return found


def _held_out(context: Context) -> tuple[set[str], list[str]]:
    """Ids, groups and texts of the cases that are held out; and the texts as they stand."""
    keys: set[str] = set()
    texts: list[str] = []
    paths = [path for name in HELD_OUT if (path := context.optional(f"held_{name}"))]
    for case in chain.from_iterable(read_records(path, Case) for path in paths):
        one = member(case)
        keys |= {one.id, one.group, one.text}
        texts.append(case.text)
    return keys, texts


def _apart(cases: list[Case], held: list[str], context: Context) -> list[Case]:
    """The cases of which no near copy is held out."""
    with context.progress(f"{context.section}: near copies of held-out cases", None):
        near = copies([case.text for case in cases], held)
    return [case for number, case in enumerate(cases) if number not in near]


def _cases(path: Path) -> Iterator[Case]:
    """The cases of a run's file, or of any that `prepare` reads; a row that makes none is passed over."""
    layout = files.sniff(path) if path.stat().st_size else "preceptor"
    if layout == "preceptor":
        return read_records(path, Case)
    rows = files.read(path, files.importer_of(layout, path))
    return (row.case for row in rows if not isinstance(row, Issue))


def _labelled(labels: Path, context: Context) -> Iterator[Case]:
    """Cases with what a model answered to them as their gold."""
    answers: Iterable[Prediction] = read_records(labels, Prediction)
    output = {label.case_id: label.output for label in answers if label.output is not None}
    paths = context.inputs.get("examples_cases", ())
    for case in chain.from_iterable(read_records(path, Case) for path in paths):
        if found := output.get(case.id):
            abstained = isinstance(found, Diagnosis) and found.abstained
            yield case.model_copy(update={"gold": found, "expects_abstention": abstained})
