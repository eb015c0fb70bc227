"""The ledger: every send and what came of it, so that what was paid for is never paid again.

One SQLite file serves all runs and several processes at once. The intent to send is committed before the
send and the reply before it counts as received; one thread writes, and each commit takes whatever has
gathered while the last one ran. Messages are kept as a digest only; keys and headers never come here.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import queue
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import Field

from preceptor.core.errors import WorkError
from preceptor.core.records import Failure, Record, Reply, Request

_R = TypeVar("_R")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sends (
    request BLOB NOT NULL,     -- digest of all that decides the reply
    attempt INTEGER NOT NULL,
    run TEXT NOT NULL,         -- who asked, for the account of one run
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    at REAL NOT NULL,
    owner TEXT,                -- the process that waits for the outcome
    kind TEXT,                 -- NULL: no outcome; 'reply', or the kind of failure
    body BLOB,
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (request, attempt)
)
"""
_MEND = {
    "SQLITE_FULL": "the disk is full: free some space and run it again; replies stored so far are kept",
    "SQLITE_IOERR": "the disk failed or is full: check it and run it again; replies stored so far are kept",
    "SQLITE_READONLY": "it can't be written: check its permissions, or name another place",
    "SQLITE_CANTOPEN": "it can't be opened: check that its folder exists and can be written",
    "SQLITE_BUSY": "another process has held it for a minute: end that one, or name another ledger",
    "SQLITE_CORRUPT": "it is damaged: recover it with `sqlite3 FILE .recover`, or move it aside",
    "SQLITE_ERROR": "another version made it: move it aside, or name another place",
    "SQLITE_NOTADB": "it is not a ledger, or damaged: move it aside, or name another place",
}


class Summary(Record):
    """What was asked, and what came of it. Requests without an outcome were in flight at a stop."""

    requests: int = 0
    replies: int = 0
    failures: dict[str, int] = Field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Claim:
    """The committed intent to send: the right to do it once."""

    request: bytes
    attempt: int


class Busy:
    """The same request is in flight, here or in another process: its reply will serve both."""


def request_key(name: str, model: str, request: Request, sample: int = 0, repeat: int = 0) -> bytes:
    """Digest of all that decides a reply, but for the attempt.

    `repeat` tells apart the same request made again within one conversation.
    """
    parts = json.dumps([name, model, request.model_dump(mode="json"), sample, repeat], ensure_ascii=True)
    return hashlib.sha256(parts.encode()).digest()


class Ledger:
    """See the module. `run` marks this process's sends, so that `summary` can account for one run."""

    def __init__(self, path: Path, run: str = "") -> None:
        self.path = path
        self._run = run
        self._flying: set[bytes] = set()  # in this process; touched by the writer alone
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._owner = uuid.uuid4().hex
        self._mark = self._mark_of(self._owner)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = self._mark.with_suffix(".new")  # seen under its name only once it is locked
            self._alive = new.open("w")
            fcntl.flock(self._alive, fcntl.LOCK_EX)
            new.rename(self._mark)
            for mark in path.parent.glob(self._mark_of("*").name):
                self._is_alive(mark.name.split(".")[-2])
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            with contextlib.suppress(OSError):
                self._mark.unlink()
            raise self._explain(error) from error
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Commit what is queued and let the file go."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._writer.join()
            self._db.close()
            self._mark.unlink(missing_ok=True)
            self._alive.close()

    async def claim(self, request: bytes, endpoint: str, model: str) -> Reply | Claim | Busy:
        """The stored reply; else the committed right to send once; else the news that another is at it."""
        found = await self._soon(lambda: self._claim(request, endpoint, model))
        return self._load(*found) if isinstance(found, tuple) else found

    async def settle(self, claim: Claim, outcome: Reply | Failure | None) -> Reply | None:
        """Commit what a send brought; None if that can't be known. A reply comes back with its key."""
        # The commit goes on if the caller is cancelled: the reply is paid for.
        future = self._submit(lambda: self._settle(claim, outcome))
        await asyncio.shield(asyncio.wrap_future(future))
        return outcome.model_copy(update={"key": _key(claim)}) if isinstance(outcome, Reply) else None

    def drop(self, claim: Claim) -> None:
        """End a claim whose outcome will never be known, without waiting."""
        self._submit(lambda: self._settle(claim, None))

    def find(self, key: str) -> Reply | Failure | None:
        """What the send with this key (`Reply.key`) brought."""
        request, _, attempt = key.partition("-")
        row = self._submit(
            lambda: self._db.execute(
                "SELECT kind, body FROM sends WHERE request = ? AND attempt = ?",
                (bytes.fromhex(request), int(attempt)),
            ).fetchone()
        ).result()
        if row is None or row[0] is None:
            return None
        return self._load(key, row[1]) if row[0] == "reply" else Failure.model_validate_json(row[1])

    def summary(self, run: str | None = None) -> Summary:
        """The account of one run, or of all."""
        rows = self._submit(
            lambda: self._db.execute(
                "SELECT kind, COUNT(*), SUM(tokens_in), SUM(tokens_out) FROM sends"
                " WHERE ?1 IS NULL OR run = ?1 GROUP BY kind",
                (run,),
            ).fetchall()
        ).result()
        counts = {kind: count for kind, count, _, _ in rows}
        return Summary(
            requests=sum(counts.values()),
            replies=counts.get("reply", 0),
            failures={k: n for k, n in sorted(counts.items(), key=str) if k not in (None, "reply")},
            tokens_in=sum(row[2] for row in rows),
            tokens_out=sum(row[3] for row in rows),
        )

    def _claim(self, request: bytes, endpoint: str, model: str) -> tuple[str, bytes] | Claim | Busy:
        rows = self._db.execute("SELECT attempt, owner, kind FROM sends WHERE request = ?", (request,)).fetchall()
        for attempt, _, kind in rows:
            if kind == "reply":
                body = self._db.execute(
                    "SELECT body FROM sends WHERE request = ? AND attempt = ?", (request, attempt)
                ).fetchone()[0]
                return _key(Claim(request, attempt)), body
        if request in self._flying or any(
            owner not in (None, self._owner) and self._is_alive(owner) for _, owner, _ in rows
        ):
            return Busy()
        claim = Claim(request, len(rows))
        self._db.execute(
            "INSERT INTO sends (request, attempt, run, endpoint, model, at, owner) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (request, claim.attempt, self._run, endpoint, model, time.time(), self._owner),
        )
        self._flying.add(request)
        return claim

    def _settle(self, claim: Claim, outcome: Reply | Failure | None) -> None:
        kind, body, usage = None, None, (0, 0)
        if isinstance(outcome, Reply):
            kind, body = "reply", zlib.compress(outcome.model_dump_json().encode())
            usage = outcome.usage.prompt_tokens, outcome.usage.completion_tokens
        elif outcome is not None:
            kind, body = outcome.kind.value, outcome.model_dump_json().encode()
        self._flying.discard(claim.request)
        self._db.execute(
            "UPDATE sends SET owner = NULL, kind = ?, body = ?, tokens_in = ?, tokens_out = ?"
            " WHERE request = ? AND attempt = ? AND kind IS NULL",
            (kind, body, *usage, claim.request, claim.attempt),
        )

    def _load(self, key: str, body: bytes) -> Reply:
        try:
            return Reply.model_validate_json(zlib.decompress(body)).model_copy(update={"key": key})
        except (zlib.error, ValueError) as error:
            raise WorkError(f"ledger {self.path}: {_MEND['SQLITE_CORRUPT']}") from error

    def _mark_of(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{owner}.alive")

    def _is_alive(self, owner: str) -> bool:
        """A process holds a lock on its mark for as long as it lives; a kill lets the lock go."""
        mark = self._mark_of(owner)
        try:
            with mark.open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        mark.unlink(missing_ok=True)
        return False

    def _submit(self, work: Callable[[], _R]) -> "Future[_R]":
        if self._closed:
            raise WorkError(f"ledger {self.path}: it is closed; open it again")
        future: Future[_R] = Future()
        self._queue.put((work, future))
        return future

    async def _soon(self, work: Callable[[], Claim | Busy | tuple[str, bytes]]) -> Any:
        future = self._submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(self._unclaim)
            raise

    def _unclaim(self, future: "Future[Any]") -> None:
        if not future.exception() and isinstance(claim := future.result(), Claim):
            self.drop(claim)

    def _write(self) -> None:
        """The writer thread: one transaction for all that has gathered."""
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            work = [item for item in batch if item is not None]
            flying = set(self._flying)
            try:
                self._db.execute("BEGIN IMMEDIATE")
                results = [todo() for todo, _ in work]
                self._db.execute("COMMIT")
            except Exception as error:  # noqa: BLE001  those who wait for it hear of it
                self._flying = flying
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                reason = self._explain(error) if isinstance(error, sqlite3.Error) else error
                for _, future in work:
                    future.set_exception(reason)
            else:
                for (_, future), result in zip(work, results, strict=True):
                    future.set_result(result)
            if len(work) < len(batch):
                return

    def _explain(self, error: OSError | sqlite3.Error) -> WorkError:
        name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        return WorkError(f"ledger {self.path}: {_MEND.get(name, f'{error}: check its folder and disk')}")


def _key(claim: Claim) -> str:
    return f"{claim.request.hex()}-{claim.attempt}"
