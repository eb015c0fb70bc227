"""A real HTTP server on loopback that answers as a function says, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[Mapping[str, Any]], str | Mapping[str, Any] | int]
"""From a request's body to the text of a reply, the fields of its message, or the status of a refusal."""


@dataclass
class Scripted:
    """`asked` are the bodies received."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)

    def teacher(self, **endpoint: Any) -> str:
        """As a recipe names it, in YAML."""
        return json.dumps({"model": "m", "endpoint": {"url": self.url, "name": "scripted", **endpoint}})


class Server(ThreadingHTTPServer):
    """Lets more callers wait than the five of the library's, beyond whom a busy machine turns some away."""

    request_queue_size = 128


@contextmanager
def scripted(answer: Answer, port: int = 0) -> Iterator[Scripted]:
    """The server, for as long as it is needed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "m"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            said = answer(body)
            if isinstance(said, int):
                self._send(said, {"error": {"message": "no"}})
                return
            message = {"content": said} if isinstance(said, str) else dict(said)
            finish, model = message.pop("finish", "stop"), message.pop("model", body["model"])
            choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": _tokens(str(message["content"]), body.get("top_logprobs", 0))}
            usage = {
                "prompt_tokens": 7,
                "completion_tokens": 3,
                "completion_tokens_details": {"reasoning_tokens": 2 if "reasoning_content" in message else 0},
            }
            self._send(200, {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage})

        def _send(self, status: int, value: Mapping[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = Server(("127.0.0.1", port), Handler)
    server = Scripted(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def _tokens(text: str, alternatives: int) -> list[dict[str, Any]]:
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    entries = [{"token": part, "bytes": list(part.encode()), "logprob": -0.25} for part in parts]
    others = [{"token": f"~{n}", "bytes": list(f"~{n}".encode()), "logprob": -2.0 - n} for n in range(alternatives)]
    return [{**entry, "top_logprobs": [entry, *others][:alternatives]} for entry in entries]
