"""What servers say in the chat API, read into one shape. They differ in where they put thinking, refusals, tokens."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import PurePosixPath
from typing import Any

from preceptor.core.records import FailureKind, Reply, Request, Token, Usage
from preceptor.core.text import token_id
from preceptor.llm.completer import ProviderError

_MOST_TOKENS = 1 << 30
_OPENS, _CLOSES = "<think>", "</think>"
_STARTS = ("{", "[", "`", "<")
"""How an answer begins that has no thinking before it: some templates open that within the prompt."""
_Entry = tuple[bytes, float | None, tuple[tuple[bytes, float], ...]]


def reply_of(body: bytes, request: Request) -> Reply:
    """The reply in a response's body.

    Raises:
        ProviderError: there is none in it; what it took all the same is told with it.
    """
    try:
        data = json.loads(body)
        try:
            return _reply(data, request)
        except ProviderError as error:
            error.usage = _usage(data.get("usage"))
            raise
    except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        detail = f"the reply is not a chat completion: {start_of(body)}"
        raise ProviderError(FailureKind.PROVIDER, detail, retryable=True) from error


def start_of(body: bytes) -> str:
    """The server's words, on one line."""
    try:
        said = json.loads(body)
        error = said.get("error") or said["detail"]
        body = str(error.get("message") if isinstance(error, dict) else error).encode("utf-8", "replace")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return " ".join(body.decode("utf-8", "replace").replace("\0", "").split())[:200] or "an empty body"


def is_called(asked: str, said: str) -> bool:
    """Whether a server that says this name may have answered with the model that was asked for.

    Servers add a date or a revision, leave the owner out, or give a file's path.
    """
    one, other = (PurePosixPath(name.casefold().partition("@")[0]).name for name in (asked, said))
    return not said or one in other or other in one


def _reply(data: Any, request: Request) -> Reply:
    if not data["choices"]:
        raise ProviderError(FailureKind.EMPTY, "the reply has no choice", retryable=True)
    choice = data["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = _clean(message.get("content") or "")
    thinking = _clean(message.get("reasoning_content") or message.get("reasoning") or "")
    said = text
    apart, text = _parted(text)
    thinking = thinking or apart
    if message.get("refusal") or finish == "content_filter":
        text, finish = _clean(message.get("refusal") or text), "refusal"
    elif not text.strip() and finish != "length":
        raise ProviderError(FailureKind.EMPTY, "the reply is empty", retryable=True)
    wanted = request.logprobs is not None and finish != "refusal"
    return Reply(
        text=text,
        thinking=thinking,
        finish=finish if finish in ("length", "refusal") else "stop",
        model=_clean(str(data.get("model") or "")),
        usage=_usage(data.get("usage")),
        tokens=_tokens(choice.get("logprobs"), said, text) if wanted else (),
    )


def _parted(text: str) -> tuple[str, str]:
    """The thinking that stands before an answer within tags, and the answer."""
    body = text.lstrip()
    opened = body.startswith(_OPENS)
    close = body.find(_CLOSES)
    if not opened and (close < 0 or body.startswith(_STARTS)):
        return "", text
    thought = body[len(_OPENS) * opened : close if close >= 0 else None]
    return thought.strip(), body[close + len(_CLOSES) :] if close >= 0 else ""


def _usage(given: Any) -> Usage:
    """The tokens that a server counted; nonsense in their place costs no reply."""
    counts = given if isinstance(given, dict) else {}
    inner = {name: counts[name] if isinstance(counts.get(name), dict) else {} for name in _DETAILS}
    told = {
        "prompt_tokens": counts.get("prompt_tokens"),
        "completion_tokens": counts.get("completion_tokens"),
        "cached_tokens": inner["prompt_tokens_details"].get("cached_tokens") or counts.get("prompt_cache_hit_tokens"),
        "thinking_tokens": inner["completion_tokens_details"].get("reasoning_tokens"),
    }
    return Usage(**{name: n for name, n in told.items() if isinstance(n, int) and 0 <= n <= _MOST_TOKENS})


_DETAILS = ("prompt_tokens_details", "completion_tokens_details")


def _tokens(logprobs: Any, said: str, text: str) -> tuple[Token, ...]:
    """The tokens that spell `text`, the end of `said`.

    Servers may give tokens before it (thinking) and after it (end of turn). A token that begins before
    `text` keeps its log-probability with the bytes that belong to `text`, and loses its alternatives. Where a server
    gives ids in place of bytes, all are kept as they are: what they spell only their tokenizer knows.
    """
    entries = list(_entries(logprobs or {}))
    if not entries or not text:
        return ()
    if all(token_id(piece) is not None for piece, _, _ in entries):
        return tuple(Token(utf8=piece, logprob=logprob, alternatives=others) for piece, logprob, others in entries)
    spelled = said.encode()
    if spelled not in b"".join(entry[0] for entry in entries):
        entries = _whole(entries, spelled)
    joined = b"".join(entry[0] for entry in entries)
    start = 0 if joined.startswith(spelled) else joined.rfind(spelled)
    if start < 0:
        detail = "the log-probabilities' tokens don't spell the reply"
        raise ProviderError(FailureKind.PROVIDER, detail, retryable=False)
    end = start + len(spelled)
    start = end - len(text.encode())
    tokens, at = [], 0
    for piece, logprob, alternatives in entries:
        low, at = at, at + len(piece)
        if cut := piece[max(start - low, 0) : max(end - low, 0)]:
            tokens.append(Token(utf8=cut, logprob=logprob, alternatives=alternatives if cut == piece else ()))
    return tuple(tokens)


def _whole(entries: Iterable[_Entry], spelled: bytes) -> list[_Entry]:
    """The tokens of a server that leaves out what is no whole character: those that share one become one."""
    whole: list[_Entry] = []
    at, halves = 0, list[float | None]()

    def fill(end: int) -> None:
        nonlocal at, halves
        if not halves and whole:  # the token before begins a character
            begun, before, _ = whole.pop()
            at, halves = at - len(begun), [before]
        if halves:
            whole.append((spelled[at:end], _sum(halves), ()))
            at, halves = end, []

    for piece, logprob, alternatives in entries:
        if not piece:
            halves.append(logprob)
            continue
        if (found := spelled.find(piece, at + len(halves))) < 0:
            break  # the end of the turn
        if found > at:
            fill(found)
        whole.append((piece, logprob, alternatives))
        at, halves = found + len(piece), []
    if at < len(spelled):
        fill(len(spelled))
    return whole


def _sum(logprobs: Sequence[float | None]) -> float | None:
    return None if None in logprobs else sum(value for value in logprobs if value is not None)


def _entries(logprobs: Mapping[str, Any]) -> Iterator[_Entry]:
    """Each token's bytes, log-probability and alternatives; what a server leaves out of one is unknown."""
    for entry in logprobs.get("content") or ():
        others = ((_bytes(other), _logprob(other.get("logprob"))) for other in entry.get("top_logprobs") or ())
        pairs = tuple((piece, logprob) for piece, logprob in others if logprob is not None)
        yield _bytes(entry), _logprob(entry.get("logprob")), pairs


def _logprob(value: Any) -> float | None:
    """A logarithm of a probability; a hair above 0 is 0, and what is no number is not known."""
    return min(0.0, float(value)) if isinstance(value, int | float) and isfinite(value) else None


def _bytes(entry: Mapping[str, Any]) -> bytes:
    """Its own, or its id where that is told: vLLM then gives the bytes of some tokens, and for others of the id."""
    given = entry.get("bytes")
    numbered = token_id(str(entry.get("token")).encode("utf-8", "replace")) is not None
    return bytes(given) if isinstance(given, list) and not numbered else str(entry["token"]).encode()


def _clean(text: str) -> str:
    """JSON can hold halves of characters, which no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
