"""Care of the ledger: whether it is whole, what it holds line by line, and what may go."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from preceptor.core.errors import WorkError
from preceptor.core.records import Record, Reply
from preceptor.llm import ledger_file, pages
from preceptor.llm import ledger_rows as rows

_DAY = 86_400_000
_AT_ONCE = 1_000


class Health(Record):
    """What a look at every row found."""

    replies: int = 0
    failures: int = 0
    intents: int = 0
    """Sends without an outcome."""
    problems: tuple[str, ...] = ()


class Prunable(Record):
    """What may go."""

    replies: int = 0
    failures: int = 0
    intents: int = 0


def verify(path: Path) -> Health:
    """Read the whole file, and say what is wrong with it; nothing is changed."""
    problems: list[str] = []
    counts = {"replies": 0, "failures": 0}
    intents = damaged = 0
    with ledger_file.opening(path):
        if not ledger_file.users(path)[0] and pages.holds_more(pages.log_of(path)):
            problems.append("its write-ahead log is damaged before its end")
    try:
        with contextlib.closing(ledger_file.read_only(path)) as db:
            if not ledger_file.is_ours(db):
                what = "another version or program made it; the next run moves an earlier version's over"
                return Health(problems=(*problems, what))
            for outcome in _outcomes(db):
                damaged += not outcome.is_whole
                counts["replies" if outcome.kind == rows.REPLY else "failures"] += outcome.is_whole
            for row in db.execute("SELECT request, attempt, origin, at, possible, checksum FROM intents"):
                damaged += rows.checksum(*row[:-1]) != row[-1]
                intents += 1
            if damaged:
                problems.append(f"{damaged} rows are damaged, and count as not there")
            whole = db.execute("PRAGMA integrity_check(3)").fetchall()
            problems += [f"SQLite: {' '.join(line.split())}" for (line,) in whole if line != "ok"]
            db.execute("BEGIN")  # both sums are of one moment
            if not problems and _recounted(db) != _accounts(db):
                problems.append("the accounts are not those of its rows")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        problems.append(f"it can't be read to its end: {error}")
    return Health(**counts, intents=intents, problems=tuple(problems))


def export(path: Path, run: str | None = None) -> Iterator[dict[str, Any] | None]:
    """Who was allowed to see text, every send and what came of it, one at a time; None for a damaged row.

    `run` is a recipe's name or `recipe/section`.
    """
    of_run = "?1 IS NULL OR run = ?1 OR substr(run, 1, length(?1) + 1) = ?1 || '/'"
    with contextlib.closing(ledger_file.read_only(path)) as db:
        origins = {n: names for n, *names in db.execute(f"SELECT * FROM origins WHERE {of_run}", (run,))}  # noqa: S608  our own words
        attested = db.execute(f"SELECT * FROM attestations WHERE {of_run} ORDER BY at", (run,))  # noqa: S608  as above
        for name, endpoint, privacy, host, at in attested.fetchall():
            yield {"attested": privacy, "run": name, "endpoint": endpoint, "host": host, "at": _iso(at)}
        for outcome in _outcomes(db):
            if outcome.origin in origins:
                yield _line(outcome, origins[outcome.origin]) if outcome.is_whole else None
        for request, attempt, origin, at, possible in db.execute(
            "SELECT request, attempt, origin, at, possible FROM intents ORDER BY id"
        ):
            if origin in origins:
                names = origins[origin]
                money = {"possible": possible / rows.NANO, "currency": names[-1]} if names[-1] else {}
                yield {**_about(request, attempt, names, at), "kind": "no outcome", **money}


def missing(path: Path, runs: Path) -> list[str]:
    """The runs in the ledger whose folders are no longer there."""
    with contextlib.closing(ledger_file.read_only(path)) as db:
        names = sorted(name for (name,) in db.execute("SELECT DISTINCT run FROM origins WHERE run <> ''"))
    return [name for name in names if not (runs / name).exists()]


def prunable(path: Path, days: float, runs: Sequence[str]) -> Prunable:
    """What may go: all of these runs, and what is older than these days and brought no reply."""
    with contextlib.closing(ledger_file.read_only(path)) as db:
        query = f"SELECT IFNULL(SUM(kind = 'reply'), 0), COUNT(*) FROM outcomes WHERE {_GOES}"  # noqa: S608  our own words
        replies, outcomes = db.execute(query, _bounds(days, runs)).fetchone()
        (intents,) = db.execute(f"SELECT COUNT(*) FROM intents WHERE {_GOES_OPEN}", _bounds(days, runs)).fetchone()  # noqa: S608  as above
    return Prunable(replies=replies, failures=outcomes - replies, intents=intents)


def prune(path: Path, days: float, runs: Sequence[str]) -> None:
    """Take away what `prunable` counts, and give its space back to the disk. The accounts keep what it cost.

    Raises:
        WorkError: another process uses the ledger, or it can't be written.
    """
    with ledger_file.opening(path):
        if ledger_file.users(path)[0]:
            raise WorkError(f"ledger {path}: another process uses it: wait for it, or end it, and prune then")
        try:
            with contextlib.closing(ledger_file.opened(path, alone=True)) as db:
                _prune(db, _bounds(days, runs))
        except sqlite3.Error as error:
            raise WorkError(f"ledger {path}: {error}: to prune takes as much free space as it is large") from error


def _prune(db: sqlite3.Connection, bounds: tuple[int, str]) -> None:
    db.execute("BEGIN IMMEDIATE")
    for table, counted, where in (
        ("outcomes", rows.OF_OUTCOMES, _GOES),
        ("intents", rows.OF_INTENTS, _GOES_OPEN),
    ):
        sums = f"SELECT *, 1 FROM ({counted} WHERE {where} GROUP BY 1, 2) WHERE true"  # noqa: S608  our own words
        columns = f"origin, kind, {', '.join(rows.SUMS)}, gone"
        db.execute(f"INSERT INTO accounts ({columns}) {sums} {rows.ADD}", bounds)
        db.execute(f"DELETE FROM {table} WHERE {where}", bounds)  # noqa: S608  as above
    db.execute("COMMIT")
    db.execute("VACUUM")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _bounds(days: float, runs: Sequence[str]) -> tuple[int, str]:
    return int(time.time() * 1000 - days * _DAY), json.dumps(list(runs))


_OF_RUNS = "origin IN (SELECT id FROM origins WHERE run IN (SELECT value FROM json_each(?2)))"
_GOES = f"(kind <> 'reply' AND at < ?1 OR {_OF_RUNS})"
_GOES_OPEN = f"(at < ?1 OR {_OF_RUNS})"


def _outcomes(db: sqlite3.Connection) -> Iterator[rows.Outcome]:
    """All, the earliest first, in flat memory and without holding up those who write."""
    last, query = 0, f"SELECT id, {rows.COLUMNS} FROM outcomes WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608  our own names
    while found := db.execute(query, (last, _AT_ONCE)).fetchall():
        for number, *values in found:
            last = number
            yield rows.Outcome(*values)


def _recounted(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return sorted(db.execute(f"{rows.OF_OUTCOMES} GROUP BY 1, 2 UNION ALL {rows.OF_INTENTS} GROUP BY 1, 2").fetchall())


def _accounts(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    query = f"SELECT origin, kind, {', '.join(rows.SUMS)} FROM accounts WHERE gone = 0 AND count <> 0"  # noqa: S608  our own names
    return sorted(db.execute(query).fetchall())


def _about(request: bytes, attempt: int, origin: Sequence[str], at: int) -> dict[str, Any]:
    run, endpoint, model, _ = origin
    return {
        "key": rows.key_of(request, attempt),
        "run": run,
        "endpoint": endpoint,
        "model": model,
        "at": _iso(at),
    }


def _line(outcome: rows.Outcome, origin: Sequence[str]) -> dict[str, Any]:
    about = {**_about(outcome.request, outcome.attempt, origin, outcome.at), "kind": outcome.kind}
    came = outcome.load()
    if isinstance(came, Reply):
        about["reply"] = came.model_dump(mode="json", exclude={"key", "usage"})
        about["usage"] = came.usage.model_dump()
    else:
        about["detail"] = came.detail
    if origin[-1]:
        known = outcome.spent is not None
        amount = (outcome.spent if known else outcome.possible) or 0
        about |= {"spent" if known else "possible": amount / rows.NANO, "currency": origin[-1]}
    return about


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
