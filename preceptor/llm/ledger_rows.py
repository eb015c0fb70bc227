"""The ledger's tables, and the checksums of its rows.

An outcome is written once and never changed, so that rows lie close, and one with a good checksum is true
wherever it is found. Triggers keep the accounts, in the transaction of what they count.
"""

import sqlite3
import zlib
from typing import NamedTuple

from preceptor.core.records import Failure, FailureKind, Reply, Usage
from preceptor.llm.packing import deflate, inflate, pack, unpack

REPLY = "reply"
DIGEST = 16
"""Bytes of a request's digest."""
NANO = 1_000_000_000
"""Money is kept in whole billionths, so that sums are exact."""
MADE_BY = (0x50524C47, 2)
"""Application id and version in the file's header."""
SUMS = ("count", "prompt", "cached", "completion", "thinking", "spent", "possible", "unpriced")
TOTALS = ", ".join(f"CAST(TOTAL({name}) AS INTEGER)" for name in SUMS)
ADD = "ON CONFLICT (origin, kind, gone) DO UPDATE SET " + ", ".join(f"{s} = {s} + excluded.{s}" for s in SUMS)


def _counted(event: str, table: str, row: str, sign: str) -> str:
    """A trigger that adds a row to its account, or takes it off."""
    amounts = ["1", "0", "0", "0", "0", "0", f"{row}.possible", "0"]
    if table == "outcomes":
        unpriced = f"({row}.kind = '{REPLY}' AND {row}.spent IS NULL)"
        usage = [f"{row}.{name}" for name in SUMS[1:5]]
        amounts = ["1", *usage, f"IFNULL({row}.spent, 0)", f"{row}.possible", unpriced]
    kind = f"{row}.kind" if table == "outcomes" else "''"
    values = ", ".join((f"{row}.origin", kind, "0", *(sign + amount for amount in amounts)))
    add = f"INSERT INTO accounts VALUES ({values}) {ADD}"  # noqa: S608  our own names
    return f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} BEGIN {add}; END"


_SCHEMA = (
    """
    CREATE TABLE origins (        -- who asked whom: the words that rows share
        id INTEGER PRIMARY KEY,
        run TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        model TEXT NOT NULL,
        currency TEXT NOT NULL,   -- of the row's money; '' where it has none
        UNIQUE (run, endpoint, model, currency)
    )""",
    """
    CREATE TABLE intents (        -- what is in flight, and what was when its process ended
        id INTEGER PRIMARY KEY,
        request BLOB NOT NULL,    -- digest of all that decides the reply
        attempt INTEGER NOT NULL,
        origin INTEGER NOT NULL,
        at INTEGER NOT NULL,      -- of the intent, in milliseconds since 1970
        possible INTEGER NOT NULL,  -- the most that it can cost
        checksum INTEGER NOT NULL,
        owner TEXT,               -- the process that waits for the outcome
        UNIQUE (request, attempt)
    )""",
    """
    CREATE TABLE outcomes (
        id INTEGER PRIMARY KEY,
        request BLOB NOT NULL,
        attempt INTEGER NOT NULL,
        origin INTEGER NOT NULL,
        at INTEGER NOT NULL,      -- when it came
        kind TEXT NOT NULL,       -- 'reply', or the kind of failure
        prompt INTEGER NOT NULL,  -- tokens, as in Usage
        cached INTEGER NOT NULL,
        completion INTEGER NOT NULL,
        thinking INTEGER NOT NULL,
        spent INTEGER,            -- NULL: not known, and `possible` at most
        possible INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        body BLOB NOT NULL,
        UNIQUE (request, attempt)
    )""",
    f"""
    CREATE TABLE accounts (
        origin INTEGER NOT NULL,
        kind TEXT NOT NULL,       -- '' for intents
        gone INTEGER NOT NULL,    -- 1: rows that were pruned or lost, whose money stays spent
        {", ".join(f"{name} INTEGER NOT NULL" for name in SUMS)},
        PRIMARY KEY (origin, kind, gone)
    ) WITHOUT ROWID""",
    """
    CREATE TABLE attestations (   -- who was allowed to see text
        run TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        privacy TEXT NOT NULL,
        host TEXT NOT NULL,
        at INTEGER NOT NULL,
        UNIQUE (run, endpoint, privacy, host)
    )""",
    """
    CREATE VIEW sends AS          -- all that was sent, for those who look
        SELECT request, attempt, origin, at, NULL AS kind FROM intents
        UNION ALL SELECT request, attempt, origin, at, kind FROM outcomes""",
    _counted("INSERT", "intents", "NEW", ""),
    _counted("DELETE", "intents", "OLD", "-"),
    _counted("INSERT", "outcomes", "NEW", ""),
    _counted("DELETE", "outcomes", "OLD", "-"),
    f"PRAGMA application_id = {MADE_BY[0]}",
    f"PRAGMA user_version = {MADE_BY[1]}",
)
OF_OUTCOMES = (
    "SELECT origin, kind, COUNT(*), SUM(prompt), SUM(cached), SUM(completion), SUM(thinking), IFNULL(SUM(spent), 0),"
    " SUM(possible), SUM(kind = 'reply' AND spent IS NULL) FROM outcomes"
)
"""The accounts of outcomes, recounted; to be grouped by origin and kind."""
OF_INTENTS = "SELECT origin, '', COUNT(*), 0, 0, 0, 0, 0, SUM(possible), 0 FROM intents"
"""Those of intents, to be grouped by origin."""


def create(db: sqlite3.Connection) -> None:
    """Make the tables."""
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("COMMIT")


Packed = tuple[str, bytes, Usage]
"""Kind, body and usage of an outcome."""


def schema(db: sqlite3.Connection) -> set[str]:
    """What the tables were made with."""
    return {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}


class Outcome(NamedTuple):
    """A row of `outcomes` without its number."""

    request: bytes
    attempt: int
    origin: int
    at: int
    kind: str
    prompt: int
    cached: int
    completion: int
    thinking: int
    spent: int | None
    possible: int
    checksum: int
    body: bytes

    @property
    def key(self) -> str:
        """As in `Reply.key`."""
        return key_of(self.request, self.attempt)

    @property
    def is_whole(self) -> bool:
        """Whether the row is what was once written."""
        return self.checksum == checksum(*self[:-2], body=self.body)

    @property
    def usage(self) -> Usage:
        """Tokens that it took."""
        return Usage(
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            completion_tokens=self.completion,
            thinking_tokens=self.thinking,
        )

    def reply(self) -> Reply:
        """What came, where that is a reply."""
        return unpack(self.body).model_copy(update={"usage": self.usage, "key": self.key})

    def load(self) -> Reply | Failure:
        """What came."""
        if self.kind == REPLY:
            return self.reply()
        return Failure(kind=FailureKind(self.kind), detail=inflate(self.body).decode())


COLUMNS = ", ".join(Outcome._fields)


def key_of(request: bytes, attempt: int) -> str:
    """The key of a send, on which stores join."""
    return f"{request.hex()}-{attempt}"


def packed(outcome: Reply | Failure) -> Packed:
    """Kind, body and usage of an outcome, as they are stored."""
    if isinstance(outcome, Reply):
        return REPLY, pack(outcome), outcome.usage
    return outcome.kind.value, deflate(outcome.detail.encode()), Usage()


def add_outcome(
    db: sqlite3.Connection,
    place: tuple[bytes, int, int, int],
    what: Packed,
    money: tuple[int | None, int],
) -> None:
    """Store an outcome, unless it is there: (request, attempt, origin, at), what `packed` gave, (spent, possible)."""
    kind, body, usage = what
    fields = (
        *place,
        kind,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        usage.thinking_tokens,
        *money,
    )
    marks = ", ".join("?" * (len(fields) + 2))
    db.execute(f"INSERT OR IGNORE INTO outcomes VALUES (NULL, {marks})", (*fields, checksum(*fields, body=body), body))  # noqa: S608  marks alone


def add_intent(db: sqlite3.Connection, place: tuple[bytes, int, int, int], possible: int, owner: str | None) -> None:
    """Store an intent, unless it is there: (request, attempt, origin, at), the most that it can cost, whose it is."""
    fields = (*place, possible)
    db.execute("INSERT OR IGNORE INTO intents VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", (*fields, checksum(*fields), owner))


def origin_of(db: sqlite3.Connection, run: str, endpoint: str, model: str, currency: str) -> int:
    """The number of who asked whom, new if need be."""
    words = (run, endpoint, model, currency)
    db.execute("INSERT OR IGNORE INTO origins VALUES (NULL, ?, ?, ?, ?)", words)
    query = "SELECT id FROM origins WHERE run = ? AND endpoint = ? AND model = ? AND currency = ?"
    return int(db.execute(query, words).fetchone()[0])


def checksum(*fields: bytes | int | str | None, body: bytes = b"") -> int:
    """Of a row's columns in their order."""
    return zlib.crc32(body, zlib.crc32(repr(fields).encode())) & 0x7FFFFFFF  # 31 bits are four bytes on disk
