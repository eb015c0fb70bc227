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
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import Field

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, Record, Reply, Request
from preceptor.llm import ledger_file, packing
from preceptor.llm import ledger_rows as rows

_R = TypeVar("_R")
_OUTCOMES = f"SELECT {rows.COLUMNS} FROM outcomes"  # noqa: S608  our own names
_WINDOW, _LATEST = 300_000, 5_000
"""The rate is that of the last milliseconds, within the last sends."""


class CapError(WorkError):
    """The next request might cost more than the cap leaves."""


class Summary(Record):
    """What was asked, and what came of it. Requests without an outcome are in flight, or were so at a stop."""

    requests: int = 0
    replies: int = 0
    failures: dict[str, int] = Field(default_factory=dict)
    tokens_in: int = 0
    tokens_cached: int = 0
    """Of those in."""
    tokens_out: int = 0
    tokens_thinking: int = 0
    """Of those out."""
    spent: dict[str, float] = Field(default_factory=dict)
    """By currency, as are those below."""
    possible: dict[str, float] = Field(default_factory=dict)
    """The most that sends without a known cost can have cost: those in flight, lost or failed."""
    unpriced: int = 0
    """Replies whose cost is not known."""


@dataclass(frozen=True)
class Claim:
    """The committed intent to send: the right to do it once."""

    request: bytes
    attempt: int
    endpoint: str = ""
    model: str = ""
    reserve: Money | None = None
    """The most that it can cost."""


class Busy:
    """The same request is in flight, here or in another process: its reply will serve both."""


def request_key(name: str, model: str, request: Request, sample: int = 0, repeat: int = 0) -> bytes:
    """Digest of all that decides a reply, but for the attempt.

    `repeat` tells apart the same request made again within one conversation.
    """
    asked = request.model_dump(mode="json", exclude=None if request.candidates else {"candidates"})
    parts = json.dumps([name, model, asked, sample, repeat], ensure_ascii=True)
    return hashlib.sha256(parts.encode()).digest()[: rows.DIGEST]


class Ledger:
    """See the module. `run`, as in `recipe/section`, marks this process's sends, for the account of one run.

    `cap` is the most that all sections of the recipe may cost together, in its currency; what sends without a known
    cost can have cost counts as spent.
    """

    def __init__(self, path: Path, run: str = "", cap: Money | None = None) -> None:
        self.path = path
        self._run = run
        self._cap = cap
        self._flying: set[bytes] = set()  # in this process; touched by the writer alone
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._owner = uuid.uuid4().hex
        self._mark = ledger_file.mark_of(path, self._owner)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ledger_file.opening(path):
                alive, dead = ledger_file.users(path)
                self._alive = self._mark.open("w")
                fcntl.flock(self._alive, fcntl.LOCK_EX)
                self._db = ledger_file.opened(path, alone=not alive, crashed=dead > 0)
        except (OSError, sqlite3.Error, WorkError) as error:
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
            with contextlib.suppress(OSError), ledger_file.opening(self.path):
                ledger_file.users(self.path)  # dead ones' marks go: what they left in the log goes to the file now
            self._db.close()
            self._mark.unlink(missing_ok=True)
            self._alive.close()

    async def claim(
        self, request: bytes, endpoint: str, model: str, reserve: Money | None = None
    ) -> Reply | Claim | Busy:
        """The stored reply; else the committed right to send once; else the news that another is at it.

        `reserve` is the most that the send can cost. It counts as possibly spent until the cost is known.

        Raises:
            CapError: it might cost more than the cap leaves.
            UserError: the cap can't be held, as the price is not known or in another currency.
        """
        found = await self._soon(lambda: self._claim(Claim(request, 0, endpoint, model, reserve)))
        return found.reply() if isinstance(found, rows.Outcome) else found

    async def settle(self, claim: Claim, outcome: Reply | Failure | None, cost: Money | None = None) -> Reply | None:
        """Commit what a send brought, None if that can't be known, and what it cost, None as before.

        A reply comes back with its key, and in all as it will come from the ledger ever after.
        """
        what = rows.packed(outcome) if outcome is not None else None
        # The commit goes on if the caller is cancelled: the reply is paid for.
        future = self._submit(lambda: self._settle(claim, what, cost))
        await asyncio.shield(asyncio.wrap_future(future))
        if not isinstance(outcome, Reply):
            return None
        tokens = packing.unpack(what[1]).tokens if what and outcome.tokens else ()
        return outcome.model_copy(update={"key": rows.key_of(claim.request, claim.attempt), "tokens": tokens})

    def drop(self, claim: Claim) -> None:
        """End a claim whose outcome will never be known, without waiting."""
        self._submit(lambda: self._settle(claim, None, None))

    def withdraw(self, claim: Claim) -> None:
        """Take back an intent of which no byte was sent, without waiting."""
        self._submit(lambda: self._withdraw(claim))

    def attest(self, endpoint: str, privacy: str, host: str = "") -> None:
        """Write down, once for a run, who was allowed to see its text, and since when."""
        words = (self._run, endpoint, privacy, host, _now())
        query = "INSERT OR IGNORE INTO attestations VALUES (?, ?, ?, ?, ?)"
        self._submit(lambda: self._db.execute(query, words)).result()

    def find(self, key: str) -> Reply | Failure | None:
        """What the send with this key (`Reply.key`) brought."""
        request, _, attempt = key.partition("-")
        place = (bytes.fromhex(request)[: rows.DIGEST], int(attempt))
        query = f"{_OUTCOMES} WHERE request = ? AND attempt = ?"
        found = self._submit(lambda: self._db.execute(query, place).fetchone()).result()
        outcome = rows.Outcome(*found) if found else None
        return outcome.load() if outcome and outcome.is_whole else None

    def summary(self, run: str | None = None) -> Summary:
        """The account of one run, or of all."""
        query = (
            f"SELECT currency, kind, {rows.TOTALS}"  # noqa: S608  our own names
            " FROM accounts JOIN origins ON origin = id WHERE ?1 IS NULL OR run = ?1 GROUP BY currency, kind"
        )
        found = self._submit(lambda: self._db.execute(query, (run,)).fetchall()).result()
        counts: dict[str, int] = {}
        spent: dict[str, int] = {}
        possible: dict[str, int] = {}
        for currency, kind, count, *_, money, most, _ in found:
            counts[kind] = counts.get(kind, 0) + count
            spent[currency] = spent.get(currency, 0) + money
            possible[currency] = possible.get(currency, 0) + most
        prompt, cached, completion, thinking, _, _, unpriced = (sum(row[n] for row in found) for n in range(3, 10))
        return Summary(
            requests=sum(counts.values()),
            replies=counts.get(rows.REPLY, 0),
            failures={kind: n for kind, n in sorted(counts.items()) if kind not in ("", rows.REPLY) and n},
            tokens_in=prompt,
            tokens_cached=cached,
            tokens_out=completion,
            tokens_thinking=thinking,
            spent={currency: amount / rows.NANO for currency, amount in sorted(spent.items()) if amount},
            possible={currency: amount / rows.NANO for currency, amount in sorted(possible.items()) if amount},
            unpriced=unpriced,
        )

    def recent(self, endpoint: str, seconds: float) -> list[tuple[float, int]]:
        """How long ago, in seconds, sends to an endpoint ended or began of late, and the tokens that each took."""
        now = _now()
        query = (
            "SELECT at, prompt + completion FROM outcomes JOIN origins ON origin = origins.id"
            " WHERE outcomes.id > (SELECT MAX(id) FROM outcomes) - ?1 AND at > ?2 AND endpoint = ?3"
            " UNION ALL SELECT at, 0 FROM intents JOIN origins ON origin = origins.id WHERE at > ?2 AND endpoint = ?3"
        )
        bounds = (_LATEST, now - seconds * 1_000, endpoint)
        found = self._submit(lambda: self._db.execute(query, bounds).fetchall()).result()
        return sorted(((now - at) / 1_000, tokens) for at, tokens in found)[::-1]

    def rate(self, run: str) -> float:
        """Replies to a run a minute, of late."""
        now = _now()
        query = (
            "SELECT COUNT(*), MIN(at) FROM outcomes WHERE id > (SELECT MAX(id) FROM outcomes) - ? AND at > ?"
            " AND kind = ? AND origin IN (SELECT id FROM origins WHERE run = ?)"
        )
        bounds = (_LATEST, now - _WINDOW, rows.REPLY, run)
        count, first = self._submit(lambda: self._db.execute(query, bounds).fetchone()).result()
        return count * 60_000 / max(now - first, 1_000) if count else 0.0

    def _claim(self, wanted: Claim) -> rows.Outcome | Claim | Busy:
        request = wanted.request
        for outcome in map(rows.Outcome._make, self._db.execute(f"{_OUTCOMES} WHERE request = ?", (request,))):
            if outcome.kind == rows.REPLY and outcome.is_whole:  # a damaged one is asked again
                return outcome
        owners = self._db.execute("SELECT owner FROM intents WHERE request = ?", (request,)).fetchall()
        if request in self._flying or any(
            owner not in (None, self._owner) and ledger_file.is_alive(self.path, owner) for (owner,) in owners
        ):
            return Busy()
        self._hold_cap(wanted.reserve)
        # By the index alone, which refuses a second row of the same attempt: a damaged row may say anything.
        (last,) = self._db.execute(
            "SELECT MAX(CAST(attempt AS INTEGER)) FROM (SELECT attempt FROM outcomes WHERE request = ?1"
            " UNION ALL SELECT attempt FROM intents WHERE request = ?1)",
            (request,),
        ).fetchone()
        claim = Claim(request, 0 if last is None else last + 1, wanted.endpoint, wanted.model, wanted.reserve)
        self._open(claim, _nano(claim.reserve) or 0, self._owner)
        self._flying.add(request)
        return claim

    def _hold_cap(self, reserve: Money | None) -> None:
        if self._cap is None:
            return
        amount, currency = self._cap
        cant = f"teacher.cap: {amount:g} {currency} can't be held, as"
        if reserve is None or reserve.currency != currency:
            known = f"the price is in {reserve.currency}" if reserve else "the price is not known"
            raise UserError(f"{cant} {known}: give it in the endpoint's `price`, or take the cap away")
        found = self._db.execute(
            "SELECT currency, CAST(TOTAL(spent) AS INTEGER), CAST(TOTAL(possible) AS INTEGER) FROM accounts"
            " JOIN origins ON origin = id WHERE run = ?1 OR run >= ?1 || '/' AND run < ?1 || '0' GROUP BY currency",
            (self._run.partition("/")[0],),  # '0' follows '/'
        )
        sums = {name: most for name, *most in found if any(most)}
        spent, possible = sums.pop(currency, (0, 0))
        for other, most in sums.items():
            told = f"{_told(sum(most))} {other} is or may be spent on this recipe"
            raise UserError(f"{cant} {told}: give the price in {other}, or take the cap away")
        if spent + possible + (_nano(reserve) or 0) > round(amount * rows.NANO):
            also = f", {_told(possible)} more may be (in flight, or of unknown cost)" if possible else ""
            raise CapError(
                f"the cap of {amount:g} {currency}: {_told(spent)} is spent{also}, and the next request may cost "
                f"{_told(_nano(reserve) or 0)}; raise it with teacher.cap=..., and the same command goes on from here"
            )

    def _open(self, claim: Claim, possible: int, owner: str | None) -> None:
        place = (claim.request, claim.attempt, self._origin(claim, claim.reserve), _now())
        rows.add_intent(self._db, place, possible, owner)

    def _settle(self, claim: Claim, what: rows.Packed | None, cost: Money | None) -> None:
        self._withdraw(claim)
        known, reserve = _nano(cost), _nano(claim.reserve) or 0
        if what is None:
            self._open(claim, reserve if known is None else known, None)
        else:
            place = (claim.request, claim.attempt, self._origin(claim, cost or claim.reserve), _now())
            rows.add_outcome(self._db, place, what, (known, 0 if known is not None else reserve))

    def _withdraw(self, claim: Claim) -> None:
        self._flying.discard(claim.request)
        self._db.execute("DELETE FROM intents WHERE request = ? AND attempt = ?", (claim.request, claim.attempt))

    def _origin(self, claim: Claim, money: Money | None) -> int:
        return rows.origin_of(self._db, self._run, claim.endpoint, claim.model, money.currency if money else "")

    def _submit(self, work: Callable[[], _R]) -> "Future[_R]":
        if self._closed:
            raise WorkError(f"ledger {self.path}: it is closed; open it again")
        future: Future[_R] = Future()
        self._queue.put((work, future))
        return future

    async def _soon(self, work: Callable[[], Claim | Busy | rows.Outcome]) -> Any:
        future = self._submit(work)
        mine = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(mine)
        except asyncio.CancelledError:
            mine.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else will look at it
            future.add_done_callback(self._unclaim)
            raise

    def _unclaim(self, future: "Future[Any]") -> None:
        if not future.exception() and isinstance(claim := future.result(), Claim):
            here = threading.current_thread() is self._writer  # it may be the last thing that it does
            (self._withdraw if here else self.withdraw)(claim)

    def _write(self) -> None:
        """The writer thread: one transaction for all that has gathered."""
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            work = [item for item in batch if item is not None]
            try:
                try:
                    results = self._commit([todo for todo, _ in work])
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                    if not ledger_file.is_damage(error):
                        raise
                    self._mend()
                    results = self._commit([todo for todo, _ in work])
            except Exception as error:  # noqa: BLE001  those who wait for it hear of it
                reason = self._explain(error) if isinstance(error, (sqlite3.Error, OSError)) else error
                results = [reason] * len(work)
            for (_, future), result in zip(work, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            if len(work) < len(batch):
                return

    def _commit(self, work: list[Callable[[], Any]]) -> list[Any]:
        """What each piece of work gave, or the error of one that refused before it wrote anything."""
        flying, results = set(self._flying), []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for todo in work:
                try:
                    results.append(todo())
                except (CapError, UserError) as error:
                    results.append(error)
            self._db.execute("COMMIT")
        except BaseException:
            self._flying = flying
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return results

    def _mend(self) -> None:
        with ledger_file.opening(self.path):
            alive, _ = ledger_file.users(self.path)
            alone = alive == 1  # ourselves
            if alone:
                self._db.close()
            ledger_file.mend(self.path, alone=alone)
            self._db = ledger_file.opened(self.path, alone=True)

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, WorkError):
            return error
        name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        return WorkError(f"ledger {self.path}: {ledger_file.MEND.get(name, f'{error}: check its folder and disk')}")


def _now() -> int:
    return int(time.time() * 1000)


def _nano(money: Money | None) -> int | None:
    return None if money is None else round(money.amount * rows.NANO)


def _told(nano: int) -> str:
    return f"{nano / rows.NANO:.4g}"
