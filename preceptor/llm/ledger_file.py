"""The ledger's file: who uses it, how it is opened, and how what can be read of a damaged one is saved.

A damaged file, or one of the earlier version, is read into a fresh one, which takes its place; it is kept beside.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from preceptor.core.errors import WorkError
from preceptor.core.records import Failure, Reply
from preceptor.llm import ledger_rows as tables
from preceptor.llm import pages

_COLUMNS = ["request", "attempt", "run", "endpoint", "model", "at", "owner", "kind", "body", "tokens_in", "tokens_out"]
"""Columns of the earlier version's only table."""
_INTENT, _OUTCOME = 8, 14
"""Columns of the tables."""
DAMAGED, EARLIER, _MENDED = "damaged", "earlier", "mended"
MEND = {
    "SQLITE_FULL": "the disk is full: free some space and run it again; replies stored so far are kept",
    "SQLITE_IOERR": "the disk failed or is full: check it and run it again; replies stored so far are kept",
    "SQLITE_READONLY": "it can't be written: check its permissions, or name another place",
    "SQLITE_CANTOPEN": "it can't be opened: check that its folder exists and can be written",
    "SQLITE_BUSY": "another process has held it for a minute: end that one, or name another ledger",
    "SQLITE_CORRUPT": "it is damaged: run `preceptor ledger mend`",
}
"""What SQLite says, and what to do about it."""
log = logging.getLogger(__name__)


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """One process at a time opens, mends or prunes what lies in this folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def mark_of(path: Path, owner: str) -> Path:
    """The file that a process holds a lock on for as long as it lives; a kill lets the lock go."""
    return path.with_name(f"{path.name}.{owner}.alive")


def is_alive(path: Path, owner: str) -> bool:
    """Whether a process that uses the ledger still runs; a dead one's mark is taken away."""
    mark = mark_of(path, owner)
    try:
        with mark.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    mark.unlink(missing_ok=True)
    return False


def users(path: Path) -> tuple[int, int]:
    """How many processes use the ledger, and how many ended without letting it go; for one who is `opening` it."""
    marks = [mark.name.split(".")[-2] for mark in path.parent.glob(mark_of(path, "*").name)]
    alive = sum(is_alive(path, owner) for owner in marks)
    return alive, len(marks) - alive


def opened(path: Path, *, alone: bool, crashed: bool = False) -> sqlite3.Connection:
    """The database: made, moved over from the earlier version, or mended, where that is needed.

    `alone`: no other process uses it. `crashed`: one ended without letting it go.

    Raises:
        WorkError: it is damaged and in use, it is no ledger, or a newer version made it.
        sqlite3.Error: the disk is full, or the like.
    """
    log_path = pages.log_of(path)
    if alone:
        _finish(path)
        if crashed and path.exists() and not log_path.exists():
            log.warning(
                "ledger %s: its write-ahead log is gone, and with it perhaps the last replies before a crash; "
                "what is missing will be asked again",
                path,
            )
        emptied = path.exists() and path.stat().st_size == 0 and log_path.exists() and log_path.stat().st_size > 0
        if emptied or pages.holds_more(log_path):
            mend(path, alone=True)
    try:
        return _connected(path, alone=alone)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
    mend(path, alone=alone)
    return _connected(path, alone=alone)


class DamageError(sqlite3.DatabaseError):
    """The file is one of ours, and not as it was made."""


def is_damage(error: BaseException) -> bool:
    """Whether an error says that the file is damaged."""
    name = getattr(error, "sqlite_errorname", "")
    # SQLite quotes what it can't understand, and that may be no text.
    return isinstance(error, (DamageError, UnicodeDecodeError)) or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def is_ours(db: sqlite3.Connection) -> bool:
    """Whether this version made the file.

    Raises:
        sqlite3.DatabaseError: it did, and header or schema are damaged.
    """
    db.text_factory = _text
    header = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        tables.create(model)
        alike = (header == tables.MADE_BY, tables.schema(db) == tables.schema(model))
    if any(alike) and not all(alike):
        raise DamageError("its header or schema is damaged")
    return all(alike)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # a damaged one then fails by its checksum


def _connected(path: Path, *, alone: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        is_new = not db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if is_new or is_ours(db):
            for pragma in (f"page_size={pages.PAGE}", "journal_mode=WAL", "synchronous=FULL", "cell_size_check=ON"):
                db.execute(f"PRAGMA {pragma}")
            if is_new:
                tables.create(db)
            for table in ("origins", "accounts", "attestations"):  # small, and read to the end
                db.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608  our own names
            for table in ("intents", "outcomes"):
                db.execute(f"SELECT id FROM {table} ORDER BY id DESC LIMIT 1").fetchone()  # noqa: S608  as above
            return db
        is_earlier = _is_earlier(db)
    except BaseException:
        db.close()
        raise
    db.close()
    if not is_earlier:
        raise WorkError(f"ledger {path}: another version or program made it: move it aside, or name another place")
    mend(path, alone=alone, why=EARLIER)
    return _connected(path, alone=alone)


def _is_earlier(db: sqlite3.Connection) -> bool:
    return [row[1] for row in db.execute("PRAGMA table_info(sends)")] == _COLUMNS


def read_only(path: Path) -> sqlite3.Connection:
    """The database for one who looks: nothing is made or mended."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=60)


def mend(path: Path, *, alone: bool, why: str = DAMAGED) -> None:
    """Read what can be read into a fresh file, which takes the place of the damaged or earlier one.

    Raises:
        WorkError: another process uses it, or it holds no ledger's rows.
    """
    if not alone:
        told = "it is damaged" if why == DAMAGED else "an earlier version made it"
        raise WorkError(f"ledger {path}: {told}, and another process uses it: end that one, and run this again")
    fresh = _beside(path, "mending")
    fresh.unlink(missing_ok=True)
    db = sqlite3.connect(fresh, isolation_level=None)
    try:
        for pragma in (f"page_size={pages.PAGE}", "journal_mode=OFF", "synchronous=OFF"):
            db.execute(f"PRAGMA {pragma}")
        tables.create(db)
        db.execute("BEGIN")
        for number, values in pages.rows(path):
            with contextlib.suppress(ValueError, zlib.error, sqlite3.Error):  # no row of ours, or not whole
                _keep(db, number, values)
        if why == DAMAGED and not db.execute("SELECT 1 FROM sends").fetchone():
            advice = "move it aside, or name another place"
            raise WorkError(f"ledger {path}: it is not a ledger, or nothing of it can be read: {advice}")
        db.execute("DELETE FROM intents WHERE (request, attempt) IN (SELECT request, attempt FROM outcomes)")
        db.execute(
            "INSERT OR IGNORE INTO origins SELECT DISTINCT origin, '', 'lost ' || origin, '', 'XXX' FROM sends"
            " WHERE origin NOT IN (SELECT id FROM origins)"
        )
        lost = _lost(db, path)
        saved = db.execute("SELECT COUNT(*) FROM outcomes WHERE kind = ?", (tables.REPLY,)).fetchone()[0]
        db.execute("COMMIT")
    except BaseException:
        db.close()
        fresh.unlink(missing_ok=True)
        raise
    db.close()
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.rename(_beside(path, f"{why}.{_MENDED}"))
    aside = _finish(path)
    if why == DAMAGED or lost:
        known = "some" if lost is None else lost
        log.warning(
            "ledger %s: it was damaged: %d replies were saved, %s lost, which will be asked again; it is kept as %s",
            *(path, saved, known, aside),
        )
    else:
        log.info("ledger %s: an earlier version's %d replies were moved over; it is kept as %s", path, saved, aside)


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.name}.{word}")


def _finish(path: Path) -> str:
    """Put a mended file in its place, which a kill may have left undone; returns the name of the one it replaces."""
    for why in (DAMAGED, EARLIER):
        mended, number = _beside(path, f"{why}.{_MENDED}"), 1
        if mended.exists():
            while (aside := _beside(path, f"{why}-{number}")).exists():
                number += 1
            if path.exists():
                path.rename(aside)
            log_path = pages.log_of(path)  # beside the new file it would be read as its own
            if log_path.exists() and log_path.stat().st_size:
                log_path.rename(pages.log_of(aside))
            log_path.unlink(missing_ok=True)
            path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
            mended.rename(path)
            return aside.name
    return ""


def _keep(db: sqlite3.Connection, number: int, values: list[Any]) -> None:
    """Put a row into a fresh database, if it is one of ours and whole."""
    match values:
        case [None, str(), str(), str(), str()]:
            db.execute("INSERT OR IGNORE INTO origins VALUES (?, ?, ?, ?, ?)", (number, *values[1:]))
        case [str(), str(), str(), str(), int()]:
            db.execute("INSERT OR IGNORE INTO attestations VALUES (?, ?, ?, ?, ?)", values)
        case [None, bytes(), *fields, checksum, _] if len(values) == _INTENT and checksum == tables.checksum(
            values[1], *fields
        ):
            tables.add_intent(db, (values[1], *fields[:3]), fields[3], None)
        case [None, bytes(), *_, bytes()] if len(values) == _OUTCOME and tables.Outcome(*values[1:]).is_whole:
            row = tables.Outcome(*values[1:])
            tables.add_outcome(db, row[:4], (row.kind, row.body, row.usage), (row.spent, row.possible))
        case [
            bytes() as request,
            int() as attempt,
            str() as run,
            str() as endpoint,
            str() as model,
            at,
            _,
            kind,
            *_,
        ] if len(values) == len(_COLUMNS):
            place = (request[: tables.DIGEST], attempt, tables.origin_of(db, run, endpoint, model, ""), int(at * 1000))
            if kind is None:
                tables.add_intent(db, place, 0, None)
            elif kind == tables.REPLY:
                reply = Reply.model_validate_json(zlib.decompress(values[8]))
                tables.add_outcome(db, place, tables.packed(reply), (None, 0))
            else:
                tables.add_outcome(db, place, tables.packed(Failure.model_validate_json(values[8])), (None, 0))


def _lost(db: sqlite3.Connection, path: Path) -> int | None:
    """How many replies of the old file are not in the new one, whose accounts keep their money; None: not known."""
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError), contextlib.closing(read_only(path)) as old:
        count = "SELECT COUNT(*) FROM {} WHERE kind = 'reply'"
        if _is_earlier(old):
            before, now = (c.execute(count.format(t)).fetchone()[0] for c, t in ((old, "sends"), (db, "outcomes")))
            return max(0, int(before) - int(now))
        query = f"SELECT origin, kind, {tables.TOTALS} FROM accounts GROUP BY 1, 2"  # noqa: S608  our own names
        new = {row[:2]: row[2:] for row in db.execute(query)}
        lost = 0
        for origin, kind, *sums in old.execute(query).fetchall():
            less = [
                max(0, then - now) for then, now in zip(sums, new.get((origin, kind), [0] * len(sums)), strict=True)
            ]
            lost += less[0] if kind == tables.REPLY else 0
            if any(less):
                marks = ", ".join("?" * len(less))
                db.execute(f"INSERT INTO accounts VALUES (?, ?, 1, {marks}) {tables.ADD}", (origin, kind, *less))  # noqa: S608  marks alone
        return lost
    return None
