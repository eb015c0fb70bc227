"""Weights in this process, behind the same interface as an API.

Requests that arrive together are answered together: a thread takes what has gathered while the last batch
ran, of similar length first, since padding is wasted work.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from preceptor.core.records import FailureKind, Reply, Request
from preceptor.llm.completer import Completer, ProviderError
from preceptor.tasks.prompts import act_in

Generate = Callable[[Any, list[Request]], Sequence[Reply]]
_GATHER = 0.02
"""Seconds for which requests that are on their way may still join a batch."""


class Local(Completer):
    """A completer over `preceptor.model.generate`. `model` is the digest of the weights."""

    name = "local"

    def __init__(self, loaded: Any, model: str, batch: int = 32, generate: Generate | None = None) -> None:
        if generate is None:
            from preceptor.model.generate import generate as ours  # torch is loaded only when used

            generate = ours
        self.model = model
        self._loaded = loaded
        self._batch = batch
        self._generate: Generate = generate
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._task: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Reply:
        """Wait for a place in a batch."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def close(self) -> None:
        """Stop taking requests."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER)
            self._waiting = [item for item in self._waiting if not item[1].cancelled()]
            self._waiting.sort(key=lambda item: sum(len(message.content) for message in item[0].messages))
            taken, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            outcomes = await self._in_thread([request for request, _ in taken])
            for (_, future), outcome in zip(taken, outcomes, strict=True):
                if future.cancelled():
                    continue
                if isinstance(outcome, Reply):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)

    async def _in_thread(self, requests: list[Request]) -> list[Reply | ProviderError]:
        # A daemon thread, so that a second Ctrl-C need not wait for the batch.
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Reply | ProviderError]] = loop.create_future()

        def finish(outcomes: list[Reply | ProviderError]) -> None:
            if not done.cancelled():
                done.set_result(outcomes)

        def work() -> None:
            outcomes = self._answer(requests)
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, outcomes)

        threading.Thread(target=work, name="generate", daemon=True).start()
        return await done

    def _answer(self, requests: list[Request]) -> list[Reply | ProviderError]:
        """One outcome a request. A batch that fails is halved, so that one bad request fails alone."""
        try:
            replies = list(self._generate(self._loaded, requests)) if requests else []
            if len(replies) != len(requests):
                raise RuntimeError(f"{len(replies)} replies to {len(requests)} requests")
        except Exception as error:  # noqa: BLE001  whatever it is, it is one request's failure
            if len(requests) == 1:
                detail = f"{type(error).__name__}: {error}"[:300]
                return [ProviderError(FailureKind.PROVIDER, detail, retryable=False)]
            half = len(requests) // 2
            return self._answer(requests[:half]) + self._answer(requests[half:])
        return [*replies]


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

    async def close(self) -> None:
        """Stop both."""
        for completer in self._by_act.values():
            await completer.close()
