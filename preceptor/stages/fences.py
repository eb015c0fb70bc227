"""What must hold before anything is learned: nothing that is tested on, and no red-team item, is among the rows."""

from collections.abc import Iterable, Sequence

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Row
from preceptor.data import redteam
from preceptor.data.splits import crossings, member
from preceptor.stages.base import Context, Need, read_records
from preceptor.tasks import prompts

HELD_OUT = ("validation", "test", "benchmark", "redteam")
TARGET = "target"
_SHOWN = 3


def needs() -> tuple[Need, ...]:
    """What prepare left, to be held against the rows."""
    return tuple(
        Need(name, files=(f"{name}.jsonl",), stages=("prepare",), required=False, watched=True)
        for name in ("train", *HELD_OUT, TARGET)
    )


def check(context: Context, rows: Sequence[Row], *, include_target: bool) -> int:
    """Prove that the rows may be learned; returns how many of them are about target cases.

    Raises:
        UserError: a family stands in two splits, a row is about a held-out case, or it holds a red-team item.
    """
    splits = {
        need.name: [member(case) for case in read_records(context.inputs[need.name][0], Case)]
        for need in needs()
        if context.optional(need.name)
    }
    apart = {name: cases for name, cases in splits.items() if name != TARGET or not include_target}
    if crossed := crossings(apart):
        _refuse(
            context, f"{len(crossed)} families stand in more than one split", crossed, "run prepare again with --fresh"
        )
    held = {case.id: name for name, cases in apart.items() if name != "train" for case in cases}
    if about := [f"{row.id} ({held[row.case_id]})" for row in rows if row.case_id in held]:
        _refuse(context, f"{len(about)} rows are about held-out cases", about, "label and curate the training cases")
    texts = (prompts.record_in(row.messages) or row.messages[-1].content for row in rows)
    own = read_records(file, Case) if (file := context.optional("redteam")) else ()
    if planted := [f"{rows[at].id} ({item})" for at, item in redteam.present(texts, own)]:
        _refuse(context, f"{len(planted)} rows hold red-team items", planted, "take them out; they are for tests alone")
    target = {case.id for case in splits.get(TARGET, ())}
    return sum(row.case_id in target for row in rows)


def _refuse(context: Context, what: str, shown: Iterable[str], mend: str) -> None:
    named = list(shown)
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    raise UserError(f"{context.section}: {what}: {'; '.join(named[:_SHOWN])}{more}; {mend}")
