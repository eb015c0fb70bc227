"""Servers that speak OpenAI's chat API: near or far, started by us or by others."""

import asyncio
import hashlib
import json
import os
import re
import ssl
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import FailureKind, Reply, Request, Usage
from preceptor.llm import server, zone
from preceptor.llm.chat import is_called, reply_of, start_of
from preceptor.llm.completer import Completer, ProviderError
from preceptor.llm.config import SHORTEST_KEY, EndpointConfig

_MOST_BYTES = 32 << 20
_LONGEST_WAIT = 3600.0
"""Seconds that a server may ask us to wait; for longer is a refusal."""
_REST = 0.1
"""Seconds that a connection rests, so that what comes late is found before it is used again."""
_STRANGERS = 20
"""Replies from another model, before any from the one that was asked for, after which the name must be wrong."""
_AROUND = 16
"""Tokens that a chat template may add to a message."""
_NO_LOGPROBS = "gives no log-probabilities: write `logprobs: 0` among its fields, or use another endpoint"
_RETRYABLE = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class _Last(NamedTuple):
    """A reply's id, and the digests of what was asked and what was said."""

    id: bytes
    asked: bytes
    said: bytes


_NONE = _Last(b"", b"", b"")


@dataclass
class _Line:
    """One connection, and the last reply that came over it."""

    client: httpx2.AsyncClient
    last: _Last = _NONE
    since: float = 0.0
    """When it was last used."""


class Endpoint(Completer):
    """A completer over HTTP. `url` is the address that `server.started` gave; `variable` names the key's."""

    def __init__(self, config: EndpointConfig, model: str, url: str | None = None, variable: str | None = None) -> None:
        base = (url or config.url or "").rstrip("/")
        self._url = base if urlsplit(base).path else f"{base}/v1"
        self._target = httpx2.URL(f"{self._url}/chat/completions")
        self.config = config
        self._variable = variable or next(iter(config.key_env), None)
        self._key = _key(config.name, self._variable)
        self._bare = _bare(self._key) if len(self._key) >= SHORTEST_KEY else "\0"  # short ones are mere fillers
        how = {**config.extra, **({"json_mode": config.json_mode} if config.json_mode != "none" else {})}
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
        self.name = f"{config.name}+{digest[:8]}" if how else config.name
        self.model = model
        self.zone, self.rpm, self.tpm = zone.zone(config), config.rpm, config.tpm
        # To read the machine's certificates takes a while, and plain HTTP needs none.
        plain = urlsplit(self._url).scheme == "http"
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else httpx2.create_ssl_context()
        self._lines: list[_Line] = []
        self._idle: deque[_Line] = deque()
        self._met, self._strangers, self._ids_tell = False, 0, True

    async def close(self) -> None:
        """Close the connections."""
        for line in self._lines:
            await line.client.aclose()

    def gone(self) -> WorkError | None:
        """What became of a server that was started here."""
        return server.gone(self._url)

    def most(self, request: Request) -> Money | None:
        """The most that a send can cost: a token has a byte at least, and the reply its limit."""
        limits = {"max_tokens": request.sampling.max_tokens, "n": 1, **self.config.extra}
        reply = max(_whole(limits["max_tokens"]), _whole(limits.get("max_completion_tokens"))) * _whole(limits["n"])
        if (price := self.config.price) is None or not reply:
            return None
        tokens = sum(len(message.content.encode("utf-8", "replace")) + _AROUND for message in request.messages)
        dearer = max(price.input, price.cached or 0)
        return Money((tokens * dearer + reply * price.output) / 1e6, price.currency)

    def cost(self, usage: Usage) -> Money | None:
        """What a reply cost that took these tokens; None where price or tokens are unknown."""
        price, known = self.config.price, usage.prompt_tokens and usage.completion_tokens
        return price.cost(usage) if price and known else None

    async def complete(self, request: Request) -> Reply:
        """One send, one reply."""
        self._hold_logprobs(request.logprobs, self.config.logprobs)
        try:
            reply = await self._complete(request)
        except ProviderError as error:
            error.detail = self._without_key(error.detail)
            error.ends = error.ends and type(error.ends)(self._without_key(str(error.ends)))
            raise
        if any(self._without_key(said) != said for said in (reply.text, reply.thinking, reply.model)):
            raise ProviderError(FailureKind.PROVIDER, "the reply holds the key: it is withheld", retryable=False)
        return reply

    async def _complete(self, request: Request) -> Reply:
        provider = FailureKind.PROVIDER
        try:
            async with asyncio.timeout(self.config.timeout):
                response, body = await self._post(self._body(request))
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            detail = f"{self.name} can't be reached at {self._url} ({_words(error)}): start it, or mend `url`"
            raise ProviderError(provider, detail, retryable=True, sent=False) from error
        except (TimeoutError, httpx2.TimeoutException) as error:
            detail = f"no reply within {self.config.timeout:g} s"
            raise ProviderError(FailureKind.TIMEOUT, detail, retryable=True) from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.DecodingError) as error:
            raise ProviderError(provider, _words(error), retryable=True) from error
        self._announced(response.headers)
        if response.status_code != HTTPStatus.OK:
            raise self._refusal(response, body)
        reply = reply_of(body, request)
        self._know(reply, request.logprobs)
        return reply

    def _without_key(self, text: str) -> str:
        """The text, unless it holds the key in any writing: a server that echoes it must not get it written down."""
        plain = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
        return "[key] withheld: the server's words hold it" if self._bare in _bare(plain) else text

    def _hold_logprobs(self, wanted: int | None, most: int | None) -> None:
        if wanted is None or most is None:
            return
        if most == 0:
            raise UserError(f"{self.name} {_NO_LOGPROBS}")
        if wanted > most:
            raise UserError(f"{self.name} gives {most} alternatives a token at most: ask for no more")

    async def _post(self, body: dict[str, Any]) -> tuple[httpx2.Response, bytes]:
        # A shared pool probes every idle connection before each send, which costs more than the send.
        rested = self._idle and time.monotonic() - self._idle[0].since >= _REST
        line = self._idle.popleft() if rested else self._new_line()
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        chunks, size, whole = [], 0, False
        try:
            async with line.client.stream(
                "POST", self._target, content=content, headers={"Content-Type": "application/json"}
            ) as response:
                async for chunk in response.aiter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > _MOST_BYTES:
                        detail = f"the reply has no end: {size} bytes"
                        raise ProviderError(FailureKind.PROVIDER, detail, retryable=True)
            text = b"".join(chunks)
            self._hold_apart(line, text, content)
            wire = response.extensions.get("network_stream")
            whole = not (isinstance(wire, zone.Wire) and wire.has_more(response.headers))
        finally:
            if whole:
                line.since = time.monotonic()
                self._idle.append(line)
            else:
                self._lines.remove(line)
                await line.client.aclose()
        return response, text

    def _new_line(self) -> _Line:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        line = _Line(zone.line(self.config, self._tls, headers))
        self._lines.append(line)
        return line

    def _hold_apart(self, line: _Line, text: bytes, content: bytes) -> None:
        """A server that answers twice must not have its second answer taken for that to the next question.

        An id tells replies apart only where it does: some servers give every reply the same one.
        """
        found = re.search(rb'"id"\s*:\s*"([^"]+)"', text[:512])
        this = _Last(found[1] if found else b"", hashlib.sha256(content).digest(), hashlib.sha256(text).digest())
        before, line.last = line.last, this
        if not this.id or this.id != before.id or this.asked == before.asked:
            return
        self._ids_tell &= this.said == before.said
        if self._ids_tell:
            detail = "the reply to the last request came again, in place of this one's"
            raise ProviderError(FailureKind.PROVIDER, detail, retryable=True)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.config.model or self.model,
            "messages": [message.model_dump() for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
            "response_format": self._format(request.json_schema) if request.json_schema else None,
            "logprobs": True if request.logprobs is not None else None,
            "top_logprobs": request.logprobs,
        }
        return {name: value for name, value in {**body, **self.config.extra}.items() if value is not None}

    def _format(self, schema: str) -> dict[str, Any] | None:
        if self.config.json_mode == "schema":
            wanted = {"name": "answer", "strict": True, "schema": json.loads(schema)}
            return {"type": "json_schema", "json_schema": wanted}
        return {"type": "json_object"} if self.config.json_mode == "object" else None

    def _announced(self, headers: httpx2.Headers) -> None:
        """No send before a limit that the server says is used up is renewed."""
        for what in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{what}", "").strip() == "0":
                wait = _span(headers.get(f"x-ratelimit-reset-{what}", ""))
                self.resume_at = max(self.resume_at, time.monotonic() + min(wait, _LONGEST_WAIT))

    def _know(self, reply: Reply, wanted: int | None) -> None:
        """Raise ProviderError for a reply of another model, or without its log-probabilities.

        It ends the run where that is so of the first ones, and of no other.
        """
        asked, detail = self.config.model or self.model, ""
        if not any(is_called(name, reply.model) for name in (asked, *self.config.answers_as)):
            self._strangers += 1
            told = f"asked for {asked!r}, and {reply.model!r} answered; if that is its name, write it in `answers_as`"
            detail, ends = told, self._strangers >= _STRANGERS
        elif wanted is not None and reply.text and reply.finish != "refusal" and not reply.tokens:
            detail, ends = f"{self.name} {_NO_LOGPROBS}", True
        if not detail:
            self._met = True
            return
        if ends and not self._met:
            error = _end(UserError(detail), answered=False)
        else:
            error = ProviderError(FailureKind.PROVIDER, detail, retryable=True)
        error.usage = reply.usage
        raise error

    def _refusal(self, response: httpx2.Response, body: bytes) -> ProviderError:
        """What an answer other than 200 means: for this request, or for every one that would follow."""
        status, start = response.status_code, start_of(body)
        if status == HTTPStatus.UNAUTHORIZED:
            mend = f"check {self._variable}" if self._variable else "name the key's variable in `key_env`"
            return _end(UserError(f"{self.name} refuses the key (401): {mend}"))
        if status == HTTPStatus.NOT_FOUND:
            return _end(
                UserError(
                    f"{self._url} has no {(self.config.model or self.model)!r} (404: {start}): mend `url` or the model"
                )
            )
        if response.is_redirect:
            return _end(UserError(f"{self._url} redirects ({status}): put the address it leads to in `url`"))
        if status == HTTPStatus.PAYMENT_REQUIRED or b"insufficient_quota" in body:
            return _end(WorkError(f"{self.name} wants payment ({status}: {start}): top up, then run it again"))
        if status == HTTPStatus.BAD_REQUEST and b"content_filter" in body:
            return ProviderError(FailureKind.REFUSED, f"400: {start}", retryable=False, answered=True)
        unsaid = "1" if status == HTTPStatus.TOO_MANY_REQUESTS else ""
        wait = _retry_after(response.headers.get("retry-after", unsaid))
        return ProviderError(
            FailureKind.PROVIDER,
            f"{status}: {start}",
            retryable=status in _RETRYABLE and (wait or 0) <= _LONGEST_WAIT,
            retry_after=wait,
            answered=True,
        )


def lanes(config: Sequence[EndpointConfig], model: str, urls: Sequence[str]) -> list[Endpoint]:
    """An endpoint for each key of each: they share the work, under the first one's name."""
    pairs = [(one, url, key) for one, url in zip(config, urls, strict=True) for key in one.key_env or (None,)]
    found = [Endpoint(one, model, url, key) for one, url, key in pairs]
    for endpoint in found[1:]:
        endpoint.name = found[0].name
    return found


def _end(error: UserError | WorkError, *, answered: bool = True) -> ProviderError:
    return ProviderError(FailureKind.PROVIDER, str(error), retryable=False, answered=answered, ends=error)


def _key(name: str, variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{name} needs a key: put it in the environment variable {variable}")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {variable} has characters that no key has: copy it again")
    return key


def _bare(text: str) -> str:
    """Its letters and digits alone."""
    return re.sub(r"[\W_]", "", text)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _span(value: str) -> float:
    """Seconds of a time such as `1s`, `6m0s` or `20ms`; a bare number is seconds."""
    parts = _SPAN.findall(value)
    if parts:
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return _retry_after(value) or 1.0


def _retry_after(value: str) -> float | None:
    """Seconds to wait, from a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            return 1.0
