"""Labelling against a slow endpoint: how near the runner comes to what the endpoint allows, and what it takes to run.

2,000 requests to a server on loopback that takes 200 ms, 64 at once, every reply committed to the ledger's
disk before it counts. The ideal is the server's time alone: 2,000 / 64 × 0.2 s. Beside it, with nothing
stored: a plain asyncio loop with one client and a semaphore, and 50 requests one after another. Then 100,000
replies that cost no time, for the memory that they take.
"""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

REQUESTS, CONCURRENCY, SECONDS, BUDGET = 2000, 64, 0.2, 1.15
SEQUENTIAL = 50
REPLIES, MEGABYTES = 100_000, 32
"""How much the process may grow while it stores that many."""


class _Slow(asyncio.Protocol):
    """The least HTTP that the client needs, so that the server's own work does not count."""

    def __init__(self) -> None:
        self._data = b""
        content = json.dumps({"diseases": ["pneumonia"], "reason": ["cough for three days"]})
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 300, "completion_tokens": 30}
        body = json.dumps({"model": "slow", "choices": [choice], "usage": usage}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._answer = head.encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, blank, body = self._data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if blank and len(body) >= length:
            self._data = b""
            asyncio.get_running_loop().call_later(SECONDS, self._transport.write, self._answer)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Slow, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _text(number: int) -> str:
    return f"Case {number}: " + "Cough and fever for three days. " * 40


def _conversations(count: int) -> Iterator[tuple[int, Generator[Any, Any, str]]]:
    from preceptor.core.records import Message, Request

    def conversation(number: int) -> Generator[Any, Any, str]:
        reply = yield Request(messages=(Message(role="user", content=_text(number)),))
        return str(reply.text)

    return ((number, conversation(number)) for number in range(count))


async def _label(url: str, folder: Path) -> float:
    from preceptor.llm.config import EndpointConfig
    from preceptor.llm.endpoint import Endpoint
    from preceptor.llm.ledger import Ledger
    from preceptor.llm.runner import run

    results: dict[int, Any] = {}
    with Ledger(folder / "ledger.db") as ledger:
        endpoint = Endpoint(EndpointConfig(url=url), "slow")
        start = time.perf_counter()
        await run(_conversations(REQUESTS), [endpoint], ledger, CONCURRENCY, results.__setitem__)
        took = time.perf_counter() - start
        await endpoint.close()
        assert ledger.summary().replies == len(results) == REQUESTS
    return took


async def _plain(url: str, count: int, concurrency: int) -> float:
    """As anyone would write it: one client, and a semaphore for what goes at once."""
    import httpx2

    limit = asyncio.Semaphore(concurrency)
    async with httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_connections=concurrency)) as client:

        async def ask(number: int) -> None:
            async with limit:
                messages = [{"role": "user", "content": _text(number)}]
                response = await client.post(f"{url}/chat/completions", json={"model": "slow", "messages": messages})
                assert response.json()["choices"]

        start = time.perf_counter()
        await asyncio.gather(*(ask(number) for number in range(count)))
        return time.perf_counter() - start


async def _store(folder: Path) -> float:
    """Megabytes by which the process grows while it stores 100,000 replies, after the first 2,000."""
    from preceptor.core.records import Reply, Request, Usage
    from preceptor.llm.completer import Completer
    from preceptor.llm.ledger import Ledger
    from preceptor.llm.runner import run

    class Instant(Completer):
        name = model = "instant"

        async def complete(self, request: Request) -> Reply:
            return Reply(text=request.messages[0].content[:200], usage=Usage(prompt_tokens=300, completion_tokens=30))

    done = start = 0

    def count(*_: object) -> None:
        nonlocal done, start
        done += 1
        if done == REQUESTS:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with Ledger(folder / "many.db") as ledger:
        await run(_conversations(REPLIES), [Instant()], ledger, CONCURRENCY, count)
        assert ledger.summary().replies == done == REPLIES
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024


def _alone(what: str, folder: str, url: str = "") -> float:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, folder, url], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure() -> dict[str, dict[str, Any]]:
    """The ratio of the time taken to the ideal, beside two obvious ways, and the memory."""
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            took, plain, sequential = (_alone(what, folder, url) for what in ("label", "plain", "sequential"))
        finally:
            server.kill()
            server.wait()
        grown = _alone("store", folder)
    ideal = REQUESTS / CONCURRENCY * SECONDS
    return {
        "label": _row(took / ideal, "x ideal", BUDGET),
        "label, plain asyncio loop": _row(plain / ideal, "x ideal", None),
        "label, one after another": _row(sequential / SEQUENTIAL * REQUESTS / ideal, "x ideal", None),
        "label, 100,000 replies": _row(grown, "MB grown", MEGABYTES),
    }


def _row(value: float, unit: str, budget: float | None) -> dict[str, Any]:
    return {"value": round(value, 3), "unit": unit, "budget": budget, "ok": budget is None or value <= budget}


def main(what: str, folder: str = "", url: str = "") -> None:
    """One part of it, for a process of its own."""
    if what == "serve":
        asyncio.run(_serve())
    elif what == "label":
        print(asyncio.run(_label(url, Path(folder))))
    elif what == "plain":
        print(asyncio.run(_plain(url, REQUESTS, CONCURRENCY)))
    elif what == "sequential":
        print(asyncio.run(_plain(url, SEQUENTIAL, 1)))
    else:
        print(asyncio.run(_store(Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
