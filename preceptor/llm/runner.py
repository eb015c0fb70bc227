"""Drives conversations, thousands at once, through the ledger to a completer.

A conversation is a generator that yields requests and receives replies, or an UnansweredError, which ends it unless
it goes on; it sees neither network nor clock, so it resumes by being replayed. Each send has its own committed
intent. A failure ends its conversation alone; what would fail every request (a refused key, a full disk) ends the
run, after what is in flight.
"""

import asyncio
import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Generic, TypeVar

import stamina

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, Reply, Request, UnansweredError
from preceptor.llm.completer import Completer, ProviderError
from preceptor.llm.gate import MINUTE, Gate, Lane
from preceptor.llm.ledger import Busy, CapError, Claim, Ledger, request_key

T = TypeVar("T")
K = TypeVar("K")
_DRAIN = 5.0
_THROTTLES = 20
_PAUSE = 2.0
_OUTAGE = 900.0
"""Seconds for which a server that gave replies may be gone."""
log = logging.getLogger(__name__)
_CAP = 0.05
"""Seconds between two looks at what is left to spend."""
logging.getLogger("stamina").setLevel(logging.ERROR)  # retries are counted in the ledger


async def run(
    conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
    completers: Sequence[Completer],
    ledger: Ledger | None,
    concurrency: int,
    on_result: Callable[[K, T | Failure], None],
    *,
    sample: Callable[[K], int] = lambda _: 0,
    attempts: int = 5,
) -> None:
    """Bring every conversation to its result or its failure; `on_result` hears of each once.

    Several completers share the work, under the first one's name. Conversations are drawn as there is room for them,
    so that millions take no memory. `sample` numbers a conversation's draw. Without a ledger nothing is stored or
    replayed.
    The first Ctrl-C stops sending and waits five seconds for replies, a second one stops at once.
    """
    runner = _Runner(conversations, completers, ledger, concurrency, on_result, sample, attempts)
    await runner.run()


class _Runner(Generic[K, T]):
    def __init__(
        self,
        conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
        completers: Sequence[Completer],
        ledger: Ledger | None,
        concurrency: int,
        on_result: Callable[[K, T | Failure], None],
        sample: Callable[[K], int],
        attempts: int,
    ) -> None:
        self._conversations = iter(conversations)
        self._open: dict[K, Generator[Request, Reply, T]] = {}
        self._completers = completers
        self._ledger = ledger
        self._on_result = on_result
        self._sample = sample
        self._attempts = attempts
        self._concurrency = concurrency
        self._gate = Gate(completers, concurrency)
        self._sending: set[asyncio.Task[None]] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._interrupts = 0
        self._claims = 0
        self._replied = 0.0  # when the last reply came
        self._told = 0.0  # when it was last said that a server is gone

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        if self._ledger and any(lane.rpm or lane.tpm for lane in self._completers):
            self._gate.recall(self._ledger.recent(self._completers[0].name, MINUTE))
        # A few more workers than sends: they commit intents and replies while others' are on their way.
        count = self._concurrency + self._concurrency // 4 + 1
        self._workers = {loop.create_task(self._work()) for _ in range(count)}
        main = threading.current_thread() is threading.main_thread()
        previous = signal.getsignal(signal.SIGINT)
        if main:
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            await self._finish()
        finally:
            if main:
                loop.remove_signal_handler(signal.SIGINT)
                signal.signal(signal.SIGINT, previous)
            for task in self._workers:
                task.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)
            for conversation in self._open.values():
                conversation.close()
        if self._interrupts:
            raise KeyboardInterrupt

    async def _finish(self) -> None:
        """Wait for all workers; after the first error of one, only for what is in flight."""
        pending = self._workers
        if not pending:
            return
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
        if pending and not self._interrupts:
            self._stop()
        if pending:
            more, _ = await asyncio.wait(pending, timeout=_DRAIN)
            done |= more
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                raise error

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._stop()
            asyncio.get_running_loop().call_later(_DRAIN, self._interrupt)
        else:
            for task in self._workers:
                task.cancel()

    def _stop(self) -> None:
        """Send nothing more, and let what is in flight arrive."""
        self._gate.closed = True
        for task in self._workers - self._sending:
            task.cancel()

    async def _work(self) -> None:
        for name, conversation in self._conversations:
            if self._gate.closed:
                return
            self._open[name] = conversation
            await self._drive(name, conversation)
            del self._open[name]

    async def _drive(self, name: K, conversation: Generator[Request, Reply, T]) -> None:
        repeats: Counter[Request] = Counter()
        step: Callable[[], Request] = partial(next, conversation)
        while True:
            try:
                request = step()
            except StopIteration as end:
                self._on_result(name, end.value)
                return
            except UnansweredError as lost:
                self._on_result(name, lost.failure)
                return
            try:
                reply = await self._ask(request, self._sample(name), repeats[request])
                step = partial(conversation.send, reply)
            except ProviderError as error:
                if not error.sent:
                    raise WorkError(error.detail) from error
                step = partial(conversation.throw, UnansweredError(error.failure()))
            repeats[request] += 1

    async def _ask(self, request: Request, sample: int, repeat: int) -> Reply:
        first = self._completers[0]
        key = request_key(first.name, first.model, request, sample, repeat)
        tries = 0

        def again(error: Exception) -> bool:
            # What the server refused costs nothing, and may be asked more often than what may have been paid for.
            return isinstance(error, ProviderError) and error.retryable and (error.answered or tries < self._attempts)

        async for attempt in stamina.retry_context(
            on=again, attempts=2 * self._attempts, timeout=None, wait_initial=0.5, wait_max=30, wait_jitter=1
        ):
            with attempt:
                tries += 1
                return await self._patiently(key, request)
        raise AssertionError("unreachable")

    async def _patiently(self, key: bytes, request: Request) -> Reply:
        """One attempt. To be told to slow down is none, within bounds; nor is to wait for another or a server."""
        throttles, wait, out = 0, 0.05, 1.0
        while True:
            try:
                if reply := await self._once(key, request):
                    return reply
            except _ThrottledError as told:
                throttles += 1
                if throttles > _THROTTLES:
                    raise ProviderError(told.error.kind, told.error.detail, retryable=False) from told.error
                more = min(30.0, 0.25 * 2**throttles) if throttles > 1 else 0.0
                told.lane.slow(max(told.error.retry_after or 0.0, more))
            except ProviderError as error:
                # A server that was there may come back; one that never was is the user's to mend, at once.
                out_for = time.monotonic() - self._replied if self._replied else inf
                if error.ends or error.sent or error.answered or out_for > _OUTAGE:
                    raise
                if out > 1 and len(self._completers) == 1 and self._told < self._replied:
                    log.warning("%s; it is waited for, %g minutes at most", error.detail, _OUTAGE / 60)
                    self._told = time.monotonic()
                await asyncio.sleep(out + random.uniform(0, out))
                out = min(30.0, 2 * out)
            else:
                await asyncio.sleep(wait)
                wait = min(2.0, wait * 1.5)

    async def _once(self, key: bytes, request: Request) -> Reply | None:
        """The stored reply or a send's; None while the same request is in flight elsewhere."""
        if self._gate.closed:
            raise asyncio.CancelledError
        flight = _Flight()
        if self._ledger is None:
            return (await self._send(request, flight))[0]
        claim = await self._claim(self._ledger, key, request)
        if not isinstance(claim, Claim):
            return claim if isinstance(claim, Reply) else None
        self._claims += 1
        try:
            reply, cost = await self._send(request, flight)
            flight.settled = True
            return await self._ledger.settle(claim, reply, cost)
        except (UserError, WorkError):
            flight.sent = False
            raise
        except ProviderError as error:
            flight.sent = error.sent
            if error.sent:
                flight.settled = True
                await self._ledger.settle(claim, error.failure(), flight.cost)
            if error.ends:
                raise error.ends from error
            if self._gate.closed:  # no time for another attempt: it is owed to the next run
                raise asyncio.CancelledError from error
            raise
        finally:
            self._claims -= 1
            if not flight.settled:
                (self._ledger.drop if flight.sent else self._ledger.withdraw)(claim)

    async def _claim(self, ledger: Ledger, key: bytes, request: Request) -> Reply | Claim | Busy:
        """The ledger's word; near the cap it may take replies on their way to tell what is left."""
        first = self._completers[0]
        while True:
            try:
                return await ledger.claim(key, first.name, first.model, self._most(request))
            except CapError:
                if not self._claims:
                    raise
                await asyncio.sleep(_CAP)

    def _most(self, request: Request) -> Money | None:
        return max((most for lane in self._completers if (most := lane.most(request))), default=None)

    async def _send(self, request: Request, flight: "_Flight") -> tuple[Reply, Money | None]:
        """A reply and what it cost, over the lane that is least busy."""
        task = asyncio.current_task()
        assert task is not None
        async with self._gate.through(request) as (lane, entry):
            self._sending.add(task)
            flight.sent = True
            try:
                reply = await lane.completer.complete(request)
            except ProviderError as error:
                if not error.sent:
                    error.ends = error.ends or lane.completer.gone()
                most = lane.completer.most(request) if error.answered else None
                flight.cost = Money(0.0, most.currency) if most else lane.completer.cost(error.usage)
                if error.retry_after is not None and error.retryable:
                    raise _ThrottledError(error, lane) from error
                if error.ends and (error.answered or not error.sent) and self._gate.retire(lane):
                    log.warning("%s: the others go on without it", error.ends)
                    again = ProviderError(error.kind, error.detail, retryable=True, answered=True, sent=error.sent)
                    raise again from error
                if not error.answered and len(self._completers) > 1:  # the others do its work meanwhile
                    lane.slow(_PAUSE)
                raise
            finally:
                self._sending.discard(task)
            lane.replied(reply, entry)
            self._replied = time.monotonic()
            return reply, lane.completer.cost(reply.usage)


@dataclass
class _Flight:
    """How far a send got."""

    sent: bool = False
    """A byte of it may have reached the server."""
    cost: Money | None = None
    """Of one that brought no reply; None where that is not known."""
    settled: bool = False
    """What came of it is known, and on its way to the ledger."""


class _ThrottledError(ProviderError):
    """A lane was told to slow down."""

    def __init__(self, error: ProviderError, lane: Lane) -> None:
        super().__init__(error.kind, error.detail, retryable=True, answered=error.answered)
        self.error = error
        self.lane = lane
