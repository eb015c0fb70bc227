"""Drives conversations, thousands at once, through the ledger to a completer.

A conversation is a generator that yields requests and receives replies; it sees neither network nor clock,
so it resumes by being replayed. Each send has its own committed intent. A failure ends its conversation
alone; what would fail every request (a refused key, a full disk) ends the run, after what is in flight.
"""

import asyncio
import logging
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Generic, TypeVar

import stamina

from preceptor.core.errors import WorkError
from preceptor.core.records import Failure, Reply, Request
from preceptor.llm.completer import Completer, ProviderError
from preceptor.llm.ledger import Claim, Ledger, request_key

T = TypeVar("T")
K = TypeVar("K")
_DRAIN = 5.0
_THROTTLES = 20
logging.getLogger("stamina").setLevel(logging.ERROR)  # retries are counted in the ledger


async def run(
    conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
    completer: Completer,
    ledger: Ledger | None,
    concurrency: int,
    on_result: Callable[[K, T | Failure], None],
    *,
    sample: Callable[[K], int] = lambda _: 0,
    attempts: int = 5,
) -> None:
    """Bring every conversation to its result or its failure; `on_result` hears of each once.

    Conversations are drawn as there is room for them, so that millions take no memory. `sample` numbers a
    conversation's draw. Without a ledger nothing is stored or replayed.
    The first Ctrl-C stops sending and waits five seconds for replies, a second one stops at once.
    """
    runner = _Runner(conversations, completer, ledger, concurrency, on_result, sample, attempts)
    await runner.run()


class _Gate:
    """At most `limit` sends at once: fewer while the server asks us to slow down, then slowly more."""

    def __init__(self, top: int) -> None:
        self.closed = False
        self._top = top
        self._limit = float(top)
        self._busy = 0
        self._until = 0.0
        self._free = asyncio.Condition()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._free:
            await self._free.wait_for(lambda: self._busy < int(self._limit))
            self._busy += 1
        try:
            while (wait := self._until - loop.time()) > 0:  # noqa: ASYNC110  it may have grown meanwhile
                await asyncio.sleep(wait + random.uniform(0, 0.2 * wait))
            if self.closed:
                raise asyncio.CancelledError
        except asyncio.CancelledError:
            self._busy -= 1
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._busy -= 1
        async with self._free:
            self._free.notify(max(1, int(self._limit) - self._busy))

    def slow(self, seconds: float) -> None:
        """Half the limit, once for each pause, and no send before it is over."""
        now = asyncio.get_running_loop().time()
        if now >= self._until:
            self._limit = max(1.0, self._limit / 2)
        self._until = max(self._until, now + seconds)

    def widen(self) -> None:
        """A reply came: one more at once for each full round of replies."""
        self._limit = min(float(self._top), self._limit + 1 / self._limit)


class _Runner(Generic[K, T]):
    def __init__(
        self,
        conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
        completer: Completer,
        ledger: Ledger | None,
        concurrency: int,
        on_result: Callable[[K, T | Failure], None],
        sample: Callable[[K], int],
        attempts: int,
    ) -> None:
        self._conversations = iter(conversations)
        self._open: dict[K, Generator[Request, Reply, T]] = {}
        self._completer = completer
        self._ledger = ledger
        self._on_result = on_result
        self._sample = sample
        self._attempts = attempts
        self._concurrency = concurrency
        self._gate = _Gate(concurrency)
        self._sending: set[asyncio.Task[None]] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._interrupts = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
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
            self._open[name] = conversation
            await self._drive(name, conversation)
            del self._open[name]

    async def _drive(self, name: K, conversation: Generator[Request, Reply, T]) -> None:
        repeats: Counter[Request] = Counter()
        reply: Reply | None = None
        while True:
            try:
                request = conversation.send(reply) if reply else next(conversation)
            except StopIteration as end:
                self._on_result(name, end.value)
                return
            try:
                reply = await self._ask(request, self._sample(name), repeats[request])
            except ProviderError as error:
                if not error.sent:
                    raise WorkError(error.detail) from error
                self._on_result(name, error.failure())
                return
            repeats[request] += 1

    async def _ask(self, request: Request, sample: int, repeat: int) -> Reply:
        key = request_key(self._completer.name, self._completer.model, request, sample, repeat)
        async for attempt in stamina.retry_context(
            on=lambda error: isinstance(error, ProviderError) and error.retryable,
            attempts=self._attempts,
            timeout=None,
            wait_initial=0.5,
            wait_max=30,
            wait_jitter=1,
        ):
            with attempt:
                return await self._patiently(key, request)
        raise AssertionError("unreachable")

    async def _patiently(self, key: bytes, request: Request) -> Reply:
        """One attempt. To be told to slow down is none, within bounds; nor is to wait for another's."""
        throttles, wait = 0, 0.05
        while True:
            try:
                if reply := await self._once(key, request):
                    return reply
            except ProviderError as error:
                throttles += 1
                if error.retry_after is None or not error.retryable:
                    raise
                if throttles > _THROTTLES:
                    raise ProviderError(error.kind, error.detail, retryable=False) from error
                self._gate.slow(max(error.retry_after, min(30.0, 0.25 * 2**throttles)))
            else:
                await asyncio.sleep(wait)
                wait = min(2.0, wait * 1.5)

    async def _once(self, key: bytes, request: Request) -> Reply | None:
        """The stored reply or a send's; None while the same request is in flight elsewhere."""
        if self._ledger is None:
            async with self._gate:
                return await self._completer.complete(request)
        claim = await self._ledger.claim(key, self._completer.name, self._completer.model)
        if not isinstance(claim, Claim):
            return claim if isinstance(claim, Reply) else None
        task = asyncio.current_task()
        assert task is not None
        open_claim = True
        try:
            async with self._gate:
                self._sending.add(task)
                outcome = await self._completer.complete(request)
            self._gate.widen()
            open_claim = False
            return await self._ledger.settle(claim, outcome)
        except ProviderError as error:
            open_claim = False
            await self._ledger.settle(claim, error.failure() if error.sent else None)
            if self._gate.closed:  # no time for another attempt: it is owed to the next run
                raise asyncio.CancelledError from error
            raise
        finally:
            self._sending.discard(task)
            if open_claim:
                self._ledger.drop(claim)
