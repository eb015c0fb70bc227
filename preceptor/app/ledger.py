"""Care of the ledger, for the one who pays: is it whole, what does it hold, what may go."""

import json
from pathlib import Path

from preceptor.app.console import Show
from preceptor.core.errors import UserError, WorkError
from preceptor.llm import ledger_file, upkeep
from preceptor.llm.ledger import Ledger
from preceptor.stages.base import LEDGER, replacing


def verify(runs: Path, show: Show) -> None:
    """Says what a look at every row found.

    Raises:
        WorkError: it is damaged.
    """
    path = _path(runs)
    health = upkeep.verify(path)
    show.result(
        f"{path}: {health.replies:,} replies, {health.failures:,} failures and {health.intents:,} sends without an "
        f"outcome are whole; {_size(path)}"
    )
    for old in sorted(path.parent.glob(f"{path.name}.{ledger_file.DAMAGED}-*")):
        show.result(f"{old}: a damaged file that was kept when what could be read of it was saved")
    if health.problems:
        raise WorkError(f"{path}: {'; '.join(health.problems)}: save what can be read with: preceptor ledger mend")


def mend(runs: Path, show: Show) -> None:
    """Reads what can be read into a fresh file. The log says how much that was."""
    path = _path(runs)
    if not upkeep.verify(path).problems:
        show.result(f"{path}: it is whole; there is nothing to mend")
        return
    with ledger_file.opening(path):
        ledger_file.mend(path, alone=not ledger_file.users(path)[0])
    show.result(f"{path}: mended; {upkeep.verify(path).replies:,} replies")


def export(file: Path, run: str | None, runs: Path, show: Show) -> None:
    """Writes JSONL, a line a send: whole, or not at all.

    Raises:
        UserError: the ledger knows no such run; nothing is written.
        WorkError: rows are damaged; the others are written.
    """
    path = _path(runs)
    with Ledger(path):
        pass  # an earlier version's is moved over, a damaged one mended
    written = damaged = 0
    with replacing(file) as beside, beside.open("w", encoding="utf-8") as out, show.progress("exporting", None) as tick:
        for line in upkeep.export(path, run):
            if line is None:
                damaged += 1
                continue
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
            tick()
        if run and not written and not damaged:
            raise UserError(f"the ledger has no run {run!r}; `preceptor status` names them")
    show.result(f"{file}: {written:,} lines")
    if damaged:
        raise WorkError(f"{path}: {damaged} rows are damaged and were left out; see: preceptor ledger verify")


def prune(days: float, runs: Path, show: Show, *, gone: bool, yes: bool) -> None:
    """Says what may go, and takes it away if the user says yes."""
    path = _path(runs)
    with Ledger(path):
        pass  # as above
    names = upkeep.missing(path, runs) if gone else []
    found = upkeep.prunable(path, days, names)
    what = f"{found.failures:,} failures and {found.intents:,} sends without an outcome, older than {days:g} days" + (
        f" or of runs that are no longer there, and {found.replies:,} replies of those runs" if gone else ""
    )
    for name in names:
        show.result(f"no longer there: {name}")
    if not any((found.replies, found.failures, found.intents)):
        show.result(f"{path}: nothing may go, {_size(path)}")
    elif not yes:
        paid = " What is asked again after that is paid again." if found.replies else ""
        show.result(f"{path}: {what} would go.{paid} Add --yes to do it; what they cost stays in the accounts")
    else:
        before = _size(path)
        upkeep.prune(path, days, names)
        show.result(f"{path}: {what} are gone; {before} became {_size(path)}")


def _path(runs: Path) -> Path:
    path = runs / LEDGER
    if not path.exists():
        raise UserError(f"{path}: no ledger here; name the folder of your runs with --runs")
    return path


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"
