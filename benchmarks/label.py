"""Labelling against a slow endpoint: how near the runner comes to what the endpoint allows.

2,000 requests to a server on loopback that takes 200 ms, 64 at once, every reply committed to the ledger's
disk before it counts. The ideal is the server's time alone: 2,000 / 64 × 0.2 s.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REQUESTS, CONCURRENCY, SECONDS, BUDGET = 2000, 64, 0.2, 1.15


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


async def _label(url: str, folder: Path) -> float:
    from preceptor.core.records import Message, Request
    from preceptor.llm.endpoint import Endpoint, EndpointConfig
    from preceptor.llm.ledger import Ledger
    from preceptor.llm.runner import run

    def conversation(number: int) -> Any:
        text = f"Case {number}: " + "Cough and fever for three days. " * 40
        reply = yield Request(messages=(Message(role="user", content=text),))
        return reply.text

    results: dict[str, Any] = {}
    conversations = ((str(number), conversation(number)) for number in range(REQUESTS))
    with Ledger(folder / "ledger.db") as ledger:
        endpoint = Endpoint(EndpointConfig(url=url), "slow")
        start = time.perf_counter()
        await run(conversations, endpoint, ledger, CONCURRENCY, results.__setitem__)
        took = time.perf_counter() - start
        await endpoint.close()
        assert ledger.summary().replies == len(results) == REQUESTS
    return took


def measure() -> dict[str, dict[str, Any]]:
    """The ratio of the time taken to the ideal."""
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            took = asyncio.run(_label(url, Path(folder)))
        finally:
            server.kill()
            server.wait()
    ratio = round(took / (REQUESTS / CONCURRENCY * SECONDS), 3)
    return {"label": {"value": ratio, "unit": "x ideal", "budget": BUDGET, "ok": ratio <= BUDGET}}


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(_serve())
    else:
        print(json.dumps(measure()))
