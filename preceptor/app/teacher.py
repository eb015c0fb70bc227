"""The textbook teacher: an OpenAI-compatible server whose model is the textbook's exact posterior.

It reads the record between `<record>` marks and the act from the marker line of a prompt file, and answers in the
language of the record. Illustrative, not for care.
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from preceptor.clinical.textbook.exact import exact
from preceptor.core.errors import UserError
from preceptor.core.records import Language, Message
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import canonical

MODEL = "textbook"
_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])", re.ASCII)
_HAN = re.compile(r"[\u4e00-\u9fff]")


class _Asked(BaseModel):
    """The part of a chat completion request that this server understands; the rest is refused by name."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None
    stream: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None


class _BadRequestError(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


app = FastAPI(title="preceptor teacher", openapi_url=None)


@app.exception_handler(_BadRequestError)
async def _bad_request(_: Request, error: _BadRequestError) -> JSONResponse:
    return _refusal(str(error), error.status)


@app.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
    return _refusal(f"{field}: {first['msg']}", 400)


def _refusal(message: str, status: int) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004  HTTP
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    """The one model, and that it is a simulation."""
    return {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "preceptor"}],
    }


@app.post("/v1/chat/completions")
async def chat_completions(asked: _Asked) -> dict[str, Any]:
    """Answers one conversation, `n` times."""
    if asked.model != MODEL:
        raise _BadRequestError(f"model {asked.model!r} is not here; this server has {MODEL!r}", 404)
    act, record = _question(asked)
    texts = [_ACTS[act](record, asked, number) for number in range(asked.n or 1)]
    choices = [_choice(number, text, asked) for number, text in enumerate(texts)]
    prompt_tokens = sum(len(_tokens(str(message.get("content")))) for message in asked.messages)
    completion_tokens = sum(len(_tokens(choice["message"]["content"])) for choice in choices)
    return {
        "id": "chatcmpl-" + hashlib.sha256(repr(asked).encode()).hexdigest()[:24],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _diagnosis(record: str, asked: _Asked, number: int) -> str:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return canonical(exact().answer(record, _language(record), temperature, _seed(asked, number)))


def _language(record: str) -> Language:
    return "zh" if _HAN.search(record) else "en"


def _thinking(record: str, asked: _Asked, number: int) -> str:
    thought = exact().thinking(record, _language(record))
    return f"<think>\n{thought}\n</think>\n\n{_diagnosis(record, asked, number)}"


def _metadata(record: str, _: _Asked, __: int) -> str:
    return json.dumps(exact().metadata(record))


_ACTS: Mapping[str, Callable[[str, _Asked, int], str]] = {
    "diagnosis": _diagnosis,
    "thinking": _thinking,
    "metadata": _metadata,
}


def _question(asked: _Asked) -> tuple[str, str]:
    """The act that the messages ask for, and the record that they show."""
    try:
        messages = [Message(role=m["role"], content=_content(m["content"])) for m in asked.messages]
    except (KeyError, TypeError, ValueError) as error:
        raise _BadRequestError("messages: each needs a role (system, user, assistant) and a text content") from error
    act, record = prompts.act_in(messages), prompts.record_in(messages)
    if act is None:
        raise _BadRequestError("the textbook teacher needs a line such as '[act: diagnosis]' in the prompt")
    if act not in _ACTS:
        raise _BadRequestError(f"the textbook teacher doesn't know the act {act!r}; it knows {', '.join(_ACTS)}")
    if record is None:
        raise _BadRequestError("the textbook teacher needs the record between <record> and </record>")
    if asked.response_format and asked.response_format.get("type") not in (
        "text",
        "json_object",
        "json_schema",
    ):
        raise _BadRequestError("response_format.type: one of text, json_object, json_schema")
    return act, record


def _content(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise TypeError("a message without text")
    content.encode()  # half of a surrogate pair is no text
    return content


def _seed(asked: _Asked, number: int) -> int | None:
    """The same request with the same seed gets the same answers; without a seed each draw is fresh."""
    if asked.seed is None:
        return None
    basis = repr((asked.seed, asked.messages, number)).encode()
    return int.from_bytes(hashlib.sha256(basis).digest()[:8], "big")


def _choice(number: int, text: str, asked: _Asked) -> dict[str, Any]:
    """The text as the request lets it stand: cut at a stop string and at the limit of tokens."""
    finish = "stop"
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    text = text[: min(places, default=len(text))]
    limit = asked.max_completion_tokens or asked.max_tokens
    tokens = _tokens(text)
    if limit is not None and len(tokens) > limit:
        text, finish = "".join(tokens[:limit]), "length"
    return {
        "index": number,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": finish,
        "logprobs": None,
    }


def _tokens(text: str) -> list[str]:
    """Words and marks with the space before them: this server's unit of length."""
    return _WORDS.findall(text)


def serve(host: str, port: int) -> None:
    """Serves until it is stopped.

    Raises:
        UserError: it can't listen there.
    """
    exact()
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise UserError(f"{host}:{port} can't be listened at ({why}); choose another --port or --host") from error
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])
