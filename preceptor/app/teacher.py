"""The textbook teacher: an OpenAI-compatible server whose model is the textbook's exact posterior.

It reads the record between `<record>` marks and the act from the marker line of a prompt file, and answers in the
language of the record. Illustrative, not for care.

Its model is a distribution over whole replies. Temperature T raises the probabilities to the power 1 / T, and 0 gives
the best reply; `logprobs` are the model's own, at temperature 1, whatever the temperature asked for.
"""

import hashlib
import json
import socket
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from preceptor.app.teacher_acts import Teacher, question
from preceptor.app.teacher_tokens import Step, Tokens
from preceptor.clinical.textbook.exact import Confidence
from preceptor.core.errors import UserError
from preceptor.core.records import Message

MODEL = "textbook"
_MOST = 20
"""Alternatives that a token may have, as with OpenAI."""
_FORMATS = ("text", "json_object", "json_schema")
router = APIRouter(prefix="/v1")


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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    user: str | None = None


class _BadRequestError(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def create(teacher: Teacher) -> FastAPI:
    """The server of a teacher."""
    app = FastAPI(title="preceptor teacher", openapi_url=None)
    app.state.teacher = teacher
    app.include_router(router)
    app.add_exception_handler(_BadRequestError, _bad_request)
    app.add_exception_handler(UserError, _bad_request)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


async def _bad_request(_: Request, error: Exception) -> JSONResponse:
    return _refusal(str(error), getattr(error, "status", 400))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
    return _refusal(f"{field}: {first['msg']}", 400)


def _refusal(message: str, status: int) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004  HTTP
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


@router.get("/models")
async def models() -> dict[str, Any]:
    """The one model, and that it is a simulation."""
    return {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "preceptor"}],
    }


@router.post("/chat/completions")
async def chat_completions(asked: _Asked, request: Request) -> Response:
    """Answers one conversation, `n` times."""
    if asked.model != MODEL:
        raise _BadRequestError(f"model {asked.model!r} is not here; this server has {MODEL!r}", 404)
    if asked.response_format and asked.response_format.get("type") not in _FORMATS:
        raise _BadRequestError(f"response_format.type: one of {', '.join(_FORMATS)}")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise _BadRequestError("top_logprobs: only with logprobs: true")
    teacher: Teacher = request.app.state.teacher
    messages = _messages(asked)
    replies = teacher.replies(question(messages))
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    drawn = [replies.choice.draw(temperature, _seed(asked, number)) for number in range(asked.n or 1)]
    steps = {place: replies.steps(place, top) for place in set(drawn)}
    choices = [_choice(number, steps[place], asked) for number, place in enumerate(drawn)]
    prompt_tokens = sum(map(len, teacher.tokens.encode([message.content for message in messages])))
    completion_tokens = sum(taken for _, taken in choices)
    answer = {
        "id": "chatcmpl-" + hashlib.sha256(repr(asked).encode()).hexdigest()[:24],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [choice for choice, _ in choices],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return Response(json.dumps(answer, ensure_ascii=False).encode(), media_type="application/json")


def _messages(asked: _Asked) -> list[Message]:
    try:
        return [Message(role=m["role"], content=_content(m["content"])) for m in asked.messages]
    except (KeyError, TypeError, ValueError) as error:
        raise _BadRequestError("messages: each needs a role (system, user, assistant) and a text content") from error


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


def _choice(number: int, steps: Sequence[Step], asked: _Asked) -> tuple[dict[str, Any], int]:
    """The reply as the request lets it stand, and its tokens: cut at the limit, and before what would stop it.

    A character that the limit parts is left out whole. A token that a stop string parts shows what is left of it.
    """
    limit = asked.max_completion_tokens or asked.max_tokens or len(steps)
    raw = b"".join(step.utf8 for step in steps[:limit])
    text = raw.decode(errors="ignore")  # only its end can be a part of a character
    finish = "stop" if len(steps) <= limit else "length"
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    if places:
        text, finish = text[: min(places)], "stop"
    entries: list[dict[str, Any]] = []
    left = len(text.encode())
    for step in steps[:limit]:
        if left <= 0:
            break
        shown = step.utf8[:left]
        left -= len(step.utf8)
        others = [_token(utf8, logprob) for utf8, logprob in step.alternatives]
        entries.append({**_token(shown, step.logprob), "top_logprobs": others})
    choice = {
        "index": number,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": finish,
        "logprobs": {"content": entries, "refusal": None} if asked.logprobs else None,
    }
    return choice, len(entries)


def _token(utf8: bytes, logprob: float) -> dict[str, Any]:
    return {"token": utf8.decode(errors="replace"), "logprob": logprob, "bytes": list(utf8)}


def serve(host: str, port: int, confidence: Confidence = "honest", tokenizer: str = "mini") -> None:
    """Serves until it is stopped.

    Raises:
        UserError: it can't listen there, or there is no such tokenizer.
    """
    teacher = Teacher(confidence, Tokens(tokenizer))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise UserError(f"{host}:{port} can't be listened at ({why}); choose another --port or --host") from error
    server = uvicorn.Server(uvicorn.Config(create(teacher), log_level="warning", access_log=False))
    server.run(sockets=[listening])
