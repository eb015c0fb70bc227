"""A real HTTP server on loopback that behaves badly on demand.

The text of a request's last message names its behaviours, one a send, the last one repeated:
"case 3 do: 429, 500, ok". The server keeps every body that it received in full.
"""

import asyncio
import contextlib
import json
import threading
from collections import Counter
from types import TracebackType
from typing import Any, Self

ANSWER = '{"diseases": ["肺炎"], "reason": ["咳嗽三天"]}'


def completion(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as servers give it."""
    return {
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


def said(act: str) -> str:
    """The body of an answer with status 200."""
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
        "thinkprobs": spelt(f"<think>hm</think>{ANSWER}", f"<think>hm</think>{ANSWER}"),
        "misspelt": spelt(ANSWER, "something else"),
    }
    return "<html>Welcome</html>" if act == "html" else json.dumps(bodies.get(act, completion(ANSWER)))


class Hostile:
    """`bodies` are the requests received; `url` is the API's base."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
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
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await self._end.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
                    if not await self._answer(writer, body):
                        writer.transport.abort()
                        return
                finally:
                    self._busy -= 1

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        text = body["messages"][-1]["content"]
        plan = [word.strip() for word in text.partition("do:")[2].split(",")] if "do:" in text else ["ok"]
        act = plan[min(self._sends[text], len(plan) - 1)]
        self._sends[text] += 1
        await asyncio.sleep(self.delay)
        if act == "reset":
            return False
        if act == "hang":
            await asyncio.sleep(30)
        elif act == "cut":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [{"mess')
            await writer.drain()
            writer.close()
        elif act == "spaces":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
            while True:
                writer.write(b" " * 65536)
                await writer.drain()
        elif act.isdigit():
            more = {"429": "Retry-After: 0.2\r\n", "302": "Location: http://127.0.0.1:1/\r\n"}
            error = {"error": {"message": f"no:\n{self.headers[-1]}"}}
            self._write(writer, int(act), json.dumps(error), more.get(act, ""))
        else:
            self._write(writer, 200, said(act))
        return True

    def _write(self, writer: asyncio.StreamWriter, status: int, body: str, headers: str = "") -> None:
        data = body.encode()
        writer.write(f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data)
