"""What a ledger holds, for one who only looks: nothing is made, mended or locked."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from preceptor.core.errors import WorkError
from preceptor.core.records import Reply
from preceptor.llm import ledger_rows as rows
from preceptor.llm import pages
from preceptor.llm.ledger_file import is_ours, read_only

_OF = "FROM origins JOIN {} ON origin = origins.id WHERE kind = ? AND endpoint = ? AND model = ?"
_PAUSE, _LATEST, _LEAST = 60_000, 5_000, 10
"""Milliseconds without a reply after which nobody was asking; the pace is of these last sends, and of so many gaps."""


@dataclass(frozen=True)
class Lengths:
    """Of how many replies, and their tokens on average."""

    replies: int
    completion: float
    text: float
    """Without the thinking."""
    own: bool
    """Whether they are the run's own."""


class Stored:
    """A ledger's rows; none where there is no ledger.

    Raises:
        WorkError: it can't be read as it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        if path.exists():
            with self._readable():
                self._db = _opened(path)
                if not is_ours(self._db):
                    raise sqlite3.DatabaseError("another version made it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._db:
            self._db.close()

    def reply(self, request: bytes) -> Reply | None:
        """The stored reply to a request, by `ledger.request_key`."""
        query = f"SELECT {rows.COLUMNS} FROM outcomes WHERE request = ? AND kind = ?"  # noqa: S608  our own names
        found = map(rows.Outcome._make, self._rows(query, request, rows.REPLY))
        return next((outcome.reply() for outcome in found if outcome.is_whole), None)

    def lengths(self, endpoint: str, model: str, run: str) -> Lengths | None:
        """Of the replies to one run, or if there are none to all; None where nothing is known."""
        query = f"SELECT TOTAL(count), TOTAL(completion), TOTAL(thinking) {_OF.format('accounts')}"
        for and_run, words in ((" AND run = ?", (run,)), ("", ())):
            for count, completion, thinking in self._rows(query + and_run, rows.REPLY, endpoint, model, *words):
                if completion:
                    return Lengths(int(count), completion / count, (completion - thinking) / count, bool(words))
        return None

    def committed(self, recipe: str, currency: str) -> float:
        """What a recipe has spent, and may have spent beside."""
        query = (
            "SELECT TOTAL(spent) + TOTAL(possible) FROM accounts JOIN origins ON origin = id"
            " WHERE (run = ?1 OR run >= ?1 || '/' AND run < ?1 || '0') AND currency = ?2"  # '0' follows '/'
        )
        return float(sum(total for (total,) in self._rows(query, recipe, currency))) / rows.NANO

    def pace(self, endpoint: str, model: str) -> float | None:
        """Replies a minute of late, while any came; None where too few did."""
        query = f"SELECT at {_OF.format('outcomes')} AND outcomes.id > (SELECT MAX(id) FROM outcomes) - ?"  # noqa: S608  our own names
        times = sorted(at for (at,) in self._rows(query, rows.REPLY, endpoint, model, _LATEST))
        gaps = [b - a for a, b in pairwise(times) if b - a < _PAUSE]
        return len(gaps) * 60_000 / sum(gaps) if len(gaps) >= _LEAST and sum(gaps) else None

    def _rows(self, query: str, *words: Any) -> list[Any]:
        with self._readable():
            return self._db.execute(query, words).fetchall() if self._db else []

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            advice = "`preceptor status` mends what a crash or an earlier version left; then run this again"
            raise WorkError(f"ledger {self._path}: it can't be read as it is ({error}): {advice}") from error


def _opened(path: Path) -> sqlite3.Connection:
    log = pages.log_of(path)
    if log.exists() and log.stat().st_size:  # it is in use, or was at a crash
        return read_only(path)
    # A reader of a file with a write-ahead log would make one, and leave it.
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
