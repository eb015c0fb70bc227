"""Weights in this process, behind the same interface as an API.

One thread answers for as long as anything waits: requests that come meanwhile take the places of those that end, of
similar length first, since padding is wasted work.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import FailureKind, Reply, Request
from preceptor.llm.completer import Completer, ProviderError
from preceptor.tasks.prompts import act_in

_PATIENCE = 5.0
"""Seconds that a step of a large model may take."""
Generate = Callable[[Any, list[Request]], Sequence[Reply]]


class Local(Completer):
    """A completer over `preceptor.model.generate`. `model` is the digest of the weights.

    `batch` is how many replies are in the making at once, at most. `generate` may answer lists in the engine's stead.
    """

    name = "local"

    def __init__(self, loaded: Any, model: str, batch: int = 128, generate: Generate | None = None) -> None:
        self.model = model
        self._loaded, self._batch, self._generate = loaded, batch, generate
        self._engine: Any = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.Future[Reply], Request]] = []
        self._taken: set[asyncio.Future[Reply]] = set()
        self._thread: threading.Thread | None = None
        self._runs = False
        self.closed = False

    async def complete(self, request: Request) -> Reply:
        """Wait for a place in a batch."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append((future, request))
            start, self._runs, self.closed = not self._runs, True, False
        if start:
            self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
            self._thread.start()
        return await future

    async def close(self) -> None:
        """End what is under way too. A thread that outlived the interpreter would bring the process down."""
        with self._lock:
            self.closed = True
            self._waiting.clear()
        if self._thread:
            await asyncio.to_thread(self._thread.join, _PATIENCE)

    def take(self, most: int) -> list[tuple[asyncio.Future[Reply], Request]]:
        """For the engine: up to so many that wait now, the shortest."""
        with self._lock:
            waiting = [item for item in self._waiting if not item[0].cancelled()]
            waiting.sort(key=lambda item: sum(len(message.content) for message in item[1].messages))
            taken, self._waiting = waiting[:most], waiting[most:]
            self._taken.update(future for future, _ in taken)
        return taken

    def give(self, future: asyncio.Future[Reply], outcome: Reply | Exception) -> None:
        """For the engine: what became of one."""
        self._taken.discard(future)
        loop = future.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, future, outcome)

    def _work(self) -> None:
        while True:
            try:
                self._serve()
            except Exception as error:  # noqa: BLE001  nobody else would hear of it, and all would wait for ever
                for future in [*self._taken]:
                    self.give(future, error)
                for future, _ in self.take(len(self._waiting)):
                    self.give(future, error)
            with self._lock:
                if not self._waiting:
                    self._runs = False
                    return

    def _serve(self) -> None:
        if self._generate is not None:
            while taken := self.take(self._batch):
                replies = self._generate(self._loaded, [request for _, request in taken])
                for (future, _), reply in zip(taken, replies, strict=True):
                    self.give(future, reply)
            return
        if self._engine is None:
            from preceptor.model.generate import Engine  # torch is loaded only when used

            self._engine = Engine(self._loaded, self._batch)
        self._engine.serve(self)


def _settle(future: asyncio.Future[Reply], outcome: Reply | Exception) -> None:
    if future.cancelled():
        return
    if isinstance(outcome, Reply):
        future.set_result(outcome)
    elif isinstance(outcome, (UserError, WorkError)):
        future.set_exception(outcome)
    else:
        detail = str(outcome) if isinstance(outcome, MemoryError) else f"{type(outcome).__name__}: {outcome}"
        future.set_exception(ProviderError(FailureKind.PROVIDER, detail[:300], retryable=False))


class Chain(Completer):
    """Two models as one: the first names the diseases, the second gives the evidence for them.

    `model` is the digests of both, so that stored replies serve these two weights alone.
    """

    name = Local.name

    def __init__(self, diseases: Completer, evidence: Completer) -> None:
        self.model = f"{diseases.model}+{evidence.model}"
        self._by_act = {"diseases": diseases, "evidence": evidence}

    async def complete(self, request: Request) -> Reply:
        """The reply of the one whose act it is."""
        return await self._by_act[act_in(request.messages) or ""].complete(request)

    def gone(self) -> WorkError | None:
        """Either's end is the end of both."""
        return next(filter(None, (one.gone() for one in self._by_act.values())), None)

    async def close(self) -> None:
        """Stop both."""
        for completer in self._by_act.values():
            await completer.close()
