"""How many sends at once, and how many a minute: as many as each endpoint bears, and never more than were asked for."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from math import inf

from preceptor.core.records import Reply, Request
from preceptor.llm.completer import Completer

MINUTE = 60.0
_BYTES = 3
"""Of a prompt to a token, for limits a minute: about a Chinese character, and less than English takes."""


class Lane:
    """One endpoint with one key: fewer sends at once while it asks us to slow down, then slowly more."""

    def __init__(self, completer: Completer, top: int) -> None:
        self.completer = completer
        self.busy = 0
        self.retired = False
        self._top = top
        self._limit = float(top)
        self._until = 0.0
        self._sent: deque[list[float]] = deque()  # time and tokens of each send within the last minute
        self._replied: list[int] = [0, 0]

    @property
    def load(self) -> float:
        """Share of the sends at once that are taken."""
        return self.busy / int(self._limit)

    def ready_in(self, request: Request) -> float:
        """Seconds until a send may go; infinite while others must end first."""
        if self.retired or self.busy >= int(self._limit):
            return inf
        now = time.monotonic()
        while self._sent and self._sent[0][0] <= now - MINUTE:
            self._sent.popleft()
        wait = max(self._until, self.completer.resume_at) - now
        first = self._sent[0][0] + MINUTE - now if self._sent else 0.0
        if self.completer.rpm and len(self._sent) >= self.completer.rpm:
            wait = max(wait, first)
        if self.completer.tpm and sum(tokens for _, tokens in self._sent) + self._tokens(request) > self.completer.tpm:
            wait = max(wait, first)
        return max(0.0, wait)

    def recall(self, sends: Iterable[tuple[float, int]]) -> None:
        """Count sends of the last minute that were made before this process, oldest first: seconds ago, and tokens."""
        now = time.monotonic()
        self._sent.extend([now - ago, float(tokens)] for ago, tokens in sends)

    def enter(self, request: Request) -> list[float]:
        """Count a send; its entry among those of the last minute."""
        self.busy += 1
        entry = [time.monotonic(), self._tokens(request)]
        if self.completer.rpm or self.completer.tpm:
            self._sent.append(entry)
        return entry

    def replied(self, reply: Reply, entry: list[float]) -> None:
        """A reply came: one more at once for each full round of replies."""
        self._limit = min(float(self._top), self._limit + 1 / self._limit)
        if reply.usage.prompt_tokens:
            entry[1] = reply.usage.prompt_tokens + reply.usage.completion_tokens
        self._replied = [self._replied[0] + 1, self._replied[1] + reply.usage.completion_tokens]

    def slow(self, seconds: float) -> None:
        """Half the limit, once for each pause, and no send before it is over."""
        now = time.monotonic()
        if now >= self._until:
            self._limit = max(1.0, self._limit / 2)
        self._until = max(self._until, now + seconds)

    def _tokens(self, request: Request) -> float:
        """About what a request will take: its prompt, and a reply as long as those before it."""
        count, total = self._replied
        prompt = sum(len(message.content.encode()) for message in request.messages) / _BYTES
        return prompt + (total / count if count else request.sampling.max_tokens)


class Gate:
    """Spreads sends over lanes, at most `top` at once."""

    def __init__(self, completers: Sequence[Completer], top: int) -> None:
        self.closed = False
        self._lanes = [Lane(completer, top) for completer in completers]
        self._top = top
        self._changed = asyncio.Event()

    def recall(self, sends: Sequence[tuple[float, int]]) -> None:
        """The same for all lanes, which shared them."""
        for number, lane in enumerate(self._lanes):
            lane.recall(sends[number :: len(self._lanes)])

    def retire(self, lane: Lane) -> bool:
        """Send no more over a lane; False if it is the last one."""
        others = any(one is not lane and not one.retired for one in self._lanes)
        lane.retired = others
        return others

    @asynccontextmanager
    async def through(self, request: Request) -> AsyncIterator[tuple[Lane, list[float]]]:
        """The least busy lane that may send, when there is one, and the entry of this send."""
        while True:
            changed = self._changed
            wait, lane = min(((one.ready_in(request), one) for one in self._lanes), key=lambda w: (w[0], w[1].load))
            full = sum(one.busy for one in self._lanes) >= self._top
            if wait == 0 and not full:
                break
            await _either(changed, inf if full else wait)
        if self.closed:
            raise asyncio.CancelledError
        entry = lane.enter(request)
        try:
            yield lane, entry
        finally:
            lane.busy -= 1
            self._changed.set()
            self._changed = asyncio.Event()


async def _either(changed: asyncio.Event, seconds: float) -> None:
    """Until a send ends, or this long and a little more, so that not all go on at the same moment."""
    with suppress(TimeoutError):
        async with asyncio.timeout(None if seconds == inf else seconds + random.uniform(0, 0.2 * seconds)):
            await changed.wait()
