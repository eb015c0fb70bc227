"""A real HTTP server on loopback that behaves badly on demand.

The text of a request's last message names its behaviours, one a send, the last one repeated:
"case 3 do: 429, 500, ok". `any` is a behaviour drawn at random, and never more than three times for a text, so that
patience pays. The server keeps every body that it received in full.
"""

import asyncio
import contextlib
import json
import random
import re
import ssl
import threading
from collections import Counter
from itertools import count
from types import TracebackType
from typing import Any, Self

_ids = count()
ANSWER = '{"diseases": ["肺炎"], "reason": ["咳嗽三天"]}'


def completion(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as servers give it."""
    return {
        "id": "chat" if "constant" in (text or "") else f"chat-{next(_ids)}",
        "model": "m-1",
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


def spelt(text: str, tokens: str) -> dict[str, Any]:
    """A completion with log-probabilities: tokens of two bytes, then the end of the turn."""
    data = tokens.encode()
    pieces = [*(data[i : i + 2] for i in range(0, len(data), 2)), b"<|im_end|>"]
    entries = [{"token": str(piece), "bytes": list(piece), "logprob": -0.5} for piece in pieces]
    answer = completion(text)
    content = [{**entry, "top_logprobs": [entry]} for entry in entries]
    answer["choices"][0]["logprobs"] = {"content": content}
    return answer


def numbered(*, strange: bool = False) -> dict[str, Any]:
    """A completion of a vLLM that was asked for ids: bytes of each token, of an alternative those of its id."""
    answer = spelt(*[f"<think>hm</think>{ANSWER}"] * 2)
    for number, entry in enumerate(answer["choices"][0]["logprobs"]["content"]):
        names = [f"token_id:{number}", f"token_id:{number + 1000}"]
        others = [{"token": name, "bytes": list(name.encode()), "logprob": -0.5} for name in names]
        entry.update(token=names[0], top_logprobs=others)
    if strange:
        answer["choices"][0]["logprobs"]["content"][3].update(token="token_id:x", bytes=None)
    return answer


def gaps() -> dict[str, Any]:
    """A completion with log-probabilities, of which some tokens have none, or no number."""
    answer = spelt(ANSWER, ANSWER)
    content = answer["choices"][0]["logprobs"]["content"]
    content[0].update(logprob=None, top_logprobs=None)
    content[1].update(logprob=float("nan"))
    content[2].update(logprob=1e-9)
    return answer


def said(act: str) -> str:
    """The body of an answer with status 200; of no special act, one that says what was asked."""
    bodies: dict[str, Any] = {
        "list": [1],
        "choices": {**completion(ANSWER), "choices": []},
        "null": completion(None),
        "length": completion('{"diseases": ["肺', "length"),
        "refusal": completion(None, refusal="I can't help with that."),
        "filter": completion("", "content_filter"),
        "usage": {**completion(ANSWER), "usage": {"prompt_tokens": 10**30, "completion_tokens": "many"}},
        "half": completion("half \ud83d a character"),
        "think": completion(f"<think>hm</think>{ANSWER}"),
        "reasoning": completion(ANSWER, reasoning_content="hm"),
        "logprobs": spelt(ANSWER, ANSWER),
        "reasoning2": completion(ANSWER, reasoning="hm"),
        "nousage": {name: value for name, value in completion(ANSWER).items() if name != "usage"},
        "other": {**completion(ANSWER), "model": "another-7b"},
        "white": completion(" \n" * 2000, "length"),
        "gaps": gaps(),
        "thinkprobs": spelt(f"<think>hm</think>{ANSWER}", f"<think>hm</think>{ANSWER}"),
        "misspelt": spelt(ANSWER, "something else"),
        "ids": numbered(),
        "oddids": numbered(strange=True),
    }
    if " do:" in act:
        return json.dumps(completion(act))
    return "<html>Welcome</html>" if act == "html" else json.dumps(bodies.get(act, completion(ANSWER)))


_BAD = """429 429now 500 503 reset hang drip cut short html choices null white utf8 other twice nousage length refusal
think reasoning reasoning2"""
ANY = (*_BAD.split(), *(["ok"] * 2 * len(_BAD.split())))
"""What `any` may be."""
_PATIENCE = 3


class Hostile:
    """`bodies` are the requests received; `url` is the API's base."""

    def __init__(self, delay: float = 0.0, seed: int = 0, port: int = 0) -> None:
        self.delay = delay
        self.refused = ""
        """A key that is answered with 401."""
        self._port = port
        self.tls: ssl.SSLContext | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._random = random.Random(seed)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.most = 0
        self.url = ""
        self._busy = 0
        self._sends: Counter[str] = Counter()

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def texts(self) -> list[str]:
        """The last message of every request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self.tls, limit=1 << 24)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await self._end.wait()
        server.close()

    def hang_up(self) -> None:
        """Close every connection."""
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].partition("\r\n")[0] or 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                if head.startswith("GET"):
                    self._write(writer, 200, json.dumps({"data": []}))
                    continue
                self.headers.append(head)
                self.bodies.append(body)
                self._busy += 1
                self.most = max(self.most, self._busy)
                try:
                    if not await self._answer(writer, body, head):
                        writer.transport.abort()
                        return
                finally:
                    self._busy -= 1

    def _act(self, text: str) -> str:
        found = re.search(r"do: ([\w, ]+)", text)
        plan = [word.strip() for word in found[1].split(",")] if found else ["ok"]
        act = plan[min(self._sends[text], len(plan) - 1)]
        if act == "any":
            act = self._random.choice(ANY) if self._sends[text] < _PATIENCE else "ok"
        self._sends[text] += 1
        return act

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], head: str) -> bool:
        """Whether the connection lives on."""
        text = body["messages"][-1]["content"]
        act = self._act(text)
        await asyncio.sleep(self.delay)
        if act in _RAW:
            await _RAW[act](writer)
        elif act == "reset":
            return False
        elif self.refused and self.refused in head:
            self._write(writer, 401, "{}")
        elif act == "429now":
            self._write(writer, 429, json.dumps({"error": "slow down"}))
        elif act.isdigit():
            error = {"error": {"message": f"no:\n{head}"}}
            self._write(writer, int(act), json.dumps(error), _HEADERS.get(act, ""))
        elif act == "late":
            self._write(writer, 200, said(text))
            await writer.drain()
            await asyncio.sleep(0.05)
            self._write(writer, 200, said(text))
        elif act in ("echo", "twice"):
            body = said(text)
            for _ in range(1 + (act == "twice")):
                self._write(writer, 200, body)
        else:
            self._write(writer, 200, said(act), _HEADERS.get(act, ""))
        return True

    def _write(self, writer: asyncio.StreamWriter, status: int, body: str, headers: str = "") -> None:
        data = body.encode()
        writer.write(f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data)


async def _hang(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def _cut(writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [{"mess')
    await writer.drain()
    writer.close()


async def _spaces(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
    while True:
        writer.write(b" " * 65536)
        await writer.drain()


async def _drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    for _ in range(300):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.1)


async def _utf8(writer: asyncio.StreamWriter) -> None:
    body = json.dumps(completion("x")).encode().replace(b'"x"', b'"\xff\xfe"')
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def _short(writer: asyncio.StreamWriter) -> None:
    """The length ends within the body, and the rest of it stays on the wire."""
    body = json.dumps(completion(ANSWER)).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) - 9) + body)


_RAW = {"hang": _hang, "cut": _cut, "spaces": _spaces, "drip": _drip, "utf8": _utf8, "short": _short}
_HEADERS = {
    "429": "Retry-After: 0.2\r\n",
    "503": "Retry-After: 0.1\r\n",
    "302": "Location: http://127.0.0.1:1/\r\n",
    "used": "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 300ms\r\n",
}
