"""Servers that speak OpenAI's chat API: near or far, started by us or by others.

Patients' text goes only where the recipe allows: to this machine, to hosts listed as `inside`, or anywhere
once the user attests `privacy: public`. The check stands where a connection is made, on the very address
that it will reach, so that a name that resolves elsewhere gets nothing. Redirects are not followed.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shlex
import socket
import ssl
import time
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import httpcore2
import httpx2
from pydantic import BaseModel, ConfigDict, Field, model_validator

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import FailureKind, Reply, Request, Token, Usage
from preceptor.llm.completer import ProviderError

_MOST_BYTES = 32 << 20
_LONGEST_WAIT = 300.0
_SHORTEST_KEY = 8
_KEEP = 4.0  # seconds; many servers drop an idle connection after five
_THINKING = re.compile(
    r"\s*(?:<think>|(?![{\[`<]))(?P<closed>.*?)</think>"  # some templates open it within the prompt
    r"|\s*<think>(?P<open>.*)",
    re.DOTALL,
)
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_MOST_TOKENS = 1 << 40
_RETRYABLE = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class EndpointConfig(BaseModel):
    """Where a model answers. A recipe may write a plain URL, or the word `textbook`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = None
    """Base of the API, such as http://host:8000/v1."""
    start: str | None = None
    """Command that serves the API on {port}; {model} and {python} are filled in too."""
    key_env: str | None = None
    """Environment variable that holds the key."""
    name: str = ""
    """Stands for the endpoint in the ledger; by default the URL's host, or the command's name."""
    inside: tuple[str, ...] = ()
    """Hosts, addresses or networks (10.0.0.0/8) that may see the text."""
    privacy: Literal["private", "public"] = "private"
    """`public` attests that the text may go anywhere."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Fields to add to each request's body, such as chat_template_kwargs; null takes one away."""
    timeout: float = Field(default=300, gt=0)
    """Seconds for one reply, from the first byte sent to the last received."""
    connect_timeout: float = Field(default=10, gt=0)
    start_timeout: float = Field(default=900, gt=0)
    """Seconds that `start` may take to load the model."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if value == "textbook":
            return {"start": "{python} -m preceptor teacher --port {port}", "name": "textbook"}
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.url is None) == (self.start is None):
            raise ValueError("an endpoint needs either `url` or `start`")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(f"url {self.url!r}: write it as http://host:port/v1")
            if parts.username or parts.password or parts.query:
                raise ValueError("url: leave the key out, and name its environment variable in `key_env`")
        words = shlex.split(self.start or "")
        if self.url is None and not words:
            raise ValueError("start: it is empty; write the command that serves the API")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError("key_env: write the name of the environment variable, not the key")
        key = os.environ.get(self.key_env or "", "").strip()
        if len(key) >= _SHORTEST_KEY and key in f"{self.start} {self.url} {self.extra}":
            raise ValueError(f"leave the key out: `key_env: {self.key_env}` sends it, and a run writes down the rest")
        default = urlsplit(self.url).hostname if self.url else words[0]
        if not self.name:
            object.__setattr__(self, "name", Path(str(default)).name.strip("{}"))
        return self


class Endpoint:
    """A completer over HTTP. `url` is the address that `server.started` gave."""

    def __init__(self, config: EndpointConfig, model: str, url: str | None = None) -> None:
        base = (url or config.url or "").rstrip("/")
        self._url = base if urlsplit(base).path else f"{base}/v1"
        self._target = httpx2.URL(f"{self._url}/chat/completions")
        self._config = config
        self._key = _key(config)
        extra = json.dumps(config.extra, sort_keys=True).encode()
        self.name = f"{config.name}+{hashlib.sha256(extra).hexdigest()[:8]}" if config.extra else config.name
        self.model = model
        # To read the machine's certificates takes a while, and plain HTTP needs none.
        plain = urlsplit(self._url).scheme == "http"
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else httpx2.create_ssl_context()
        self._clients: list[httpx2.AsyncClient] = []
        self._idle: list[httpx2.AsyncClient] = []

    def _client(self) -> httpx2.AsyncClient:
        """An idle client or a new one, each with one connection.

        A shared pool probes every idle connection before each send, which costs more than the send.
        """
        if self._idle:
            return self._idle.pop()
        config, host = self._config, (urlsplit(self._url).hostname or "").lower()
        transport = None
        if config.privacy == "private":
            named = host in {name.lower() for name in config.inside}
            transport = _Direct(self._tls, None if named else _Guard(config))
        client = httpx2.AsyncClient(
            transport=transport,  # without one, the environment's proxies serve: for public text alone
            verify=self._tls,
            limits=httpx2.Limits(keepalive_expiry=_KEEP),
            timeout=httpx2.Timeout(config.timeout, connect=config.connect_timeout),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )
        self._clients.append(client)
        return client

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.aclose()

    async def complete(self, request: Request) -> Reply:
        """One send, one reply."""
        provider = FailureKind.PROVIDER
        try:
            async with asyncio.timeout(self._config.timeout):
                response, body = await self._post(self._body(request))
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            detail = f"{self.name} can't be reached at {self._url} ({_words(error)}): start it, or mend `url`"
            raise ProviderError(provider, detail, retryable=True, sent=False) from error
        except (TimeoutError, httpx2.TimeoutException) as error:
            detail = f"no reply within {self._config.timeout:g} s"
            raise ProviderError(FailureKind.TIMEOUT, detail, retryable=True) from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.DecodingError) as error:
            raise ProviderError(provider, _words(error), retryable=True) from error
        if response.status_code != HTTPStatus.OK:
            raise self._refusal(response, body)
        try:
            reply = _parse(json.loads(body), request)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            detail = f"the reply is not a chat completion: {_start(body)}"
            raise ProviderError(provider, detail, retryable=True) from error
        if request.logprobs is not None and reply.text and reply.finish != "refusal" and not reply.tokens:
            raise UserError(f"{self.name} gives no log-probabilities: ask for none, or use another endpoint")
        return reply

    async def _post(self, body: dict[str, Any]) -> tuple[httpx2.Response, bytes]:
        chunks, size = [], 0
        client = self._client()
        try:
            async with client.stream("POST", self._target, json=body) as response:
                async for chunk in response.aiter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > _MOST_BYTES:
                        detail = f"the reply has no end: {size} bytes"
                        raise ProviderError(FailureKind.PROVIDER, detail, retryable=True)
        finally:
            self._idle.append(client)
        text = b"".join(chunks)
        # A server that echoes the key must not get it written into a ledger. Short ones are mere fillers.
        return response, text.replace(self._key.encode(), b"[key]") if len(self._key) >= _SHORTEST_KEY else text

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.model_dump() for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
            "response_format": None,
            "logprobs": True if request.logprobs is not None else None,
            "top_logprobs": request.logprobs or None,
        }
        return {name: value for name, value in {**body, **self._config.extra}.items() if value is not None}

    def _refusal(self, response: httpx2.Response, body: bytes) -> Exception:
        """What an answer other than 200 means: for this request, or for every one that would follow."""
        status, start = response.status_code, _start(body)
        if status == HTTPStatus.UNAUTHORIZED:
            variable = self._config.key_env
            mend = f"check {variable}" if variable else "name the key's variable in `key_env`"
            return UserError(f"{self.name} refuses the key (401): {mend}")
        if status == HTTPStatus.NOT_FOUND:
            return UserError(f"{self._url} has no {self.model!r} (404: {start}): mend `url` or the model")
        if response.is_redirect:
            return UserError(f"{self._url} redirects ({status}): put the address it leads to in `url`")
        if status == HTTPStatus.PAYMENT_REQUIRED or b"insufficient_quota" in body:
            return WorkError(f"{self.name} wants payment ({status}: {start}): top up, then run it again")
        if status == HTTPStatus.BAD_REQUEST and b"content_filter" in body:
            return ProviderError(FailureKind.REFUSED, f"400: {start}", retryable=False)
        unsaid = "1" if status == HTTPStatus.TOO_MANY_REQUESTS else ""
        wait = _retry_after(response.headers.get("retry-after", unsaid))
        return ProviderError(
            FailureKind.PROVIDER,
            f"{status}: {start}",
            retryable=status in _RETRYABLE and (wait or 0) <= _LONGEST_WAIT,
            retry_after=wait,
        )


class _Guard(httpcore2.AsyncNetworkBackend):
    """Connects to this machine and to addresses inside; to nothing else."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._backend = httpcore2.AnyIOBackend()
        self._networks = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
        for entry in config.inside:
            with contextlib.suppress(ValueError):  # the others are names
                self._networks.append(ipaddress.ip_network(entry, strict=False))

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  its interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            ip = ipaddress.ip_address(address)
            ip = getattr(ip, "ipv4_mapped", None) or ip
            if not any(ip in network for network in self._networks):
                raise UserError(
                    f"{host} ({address}) is outside and the text is private: list the host under `inside`"
                    " if it may see patients' text, or attest `privacy: public`"
                )
        failed: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed


class _Direct(httpx2.AsyncHTTPTransport):
    """Connects without a proxy, through a guard if there is one."""

    def __init__(self, tls: ssl.SSLContext, guard: _Guard | None) -> None:
        super().__init__(verify=tls)
        self._pool = httpcore2.AsyncConnectionPool(ssl_context=tls, keepalive_expiry=_KEEP, network_backend=guard)


def _key(config: EndpointConfig) -> str:
    if config.key_env is None:
        return ""
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise UserError(f"{config.name} needs a key: put it in the environment variable {config.key_env}")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {config.key_env} has characters that no key has: copy it again")
    return key


def _parse(data: Any, request: Request) -> Reply:
    """A reply from the API's JSON. Servers differ in where they put thinking and refusals."""
    if not data["choices"]:
        raise ProviderError(FailureKind.EMPTY, "the reply has no choice", retryable=True)
    choice = data["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = _clean(message.get("content") or "")
    thinking = _clean(message.get("reasoning_content") or message.get("reasoning") or "")
    said = text
    if match := _THINKING.match(text):
        thinking, text = thinking or (match["closed"] or match["open"] or "").strip(), text[match.end() :]
    if message.get("refusal") or finish == "content_filter":
        text, finish = _clean(message.get("refusal") or text), "refusal"
    elif not text.strip() and finish != "length":
        raise ProviderError(FailureKind.EMPTY, "the reply is empty", retryable=True)
    wanted = request.logprobs is not None and finish != "refusal"
    return Reply(
        text=text,
        thinking=thinking,
        finish=finish if finish in ("length", "refusal") else "stop",
        model=str(data.get("model") or ""),
        usage=_usage(data.get("usage")),
        tokens=_tokens(choice.get("logprobs"), said, text) if wanted else (),
    )


def _usage(given: Any) -> Usage:
    """The tokens that a server counted; nonsense in their place costs no reply."""
    counts = given if isinstance(given, dict) else {}
    sane = {
        name: count
        for name in Usage.model_fields
        if isinstance(count := counts.get(name), int) and 0 <= count <= _MOST_TOKENS
    }
    return Usage(**sane)


def _tokens(logprobs: Any, said: str, text: str) -> tuple[Token, ...]:
    """The tokens that spell `text`, the end of `said`.

    Servers may give tokens before it (thinking) and after it (end of turn). A token that begins before
    `text` keeps its log-probability with the bytes that belong to `text`, and loses its alternatives.
    """
    entries = [
        (_bytes(entry), float(entry["logprob"]), entry.get("top_logprobs") or ())
        for entry in (logprobs or {}).get("content") or ()
    ]
    if not entries or not text:
        return ()
    joined, spelled = b"".join(entry[0] for entry in entries), said.encode()
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
            others = alternatives if cut == piece else ()
            pairs = tuple((_bytes(other), float(other["logprob"])) for other in others)
            tokens.append(Token(utf8=cut, logprob=logprob, alternatives=pairs))
    return tuple(tokens)


def _bytes(entry: Any) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


def _clean(text: str) -> str:
    """JSON can hold halves of characters, which no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _start(body: bytes) -> str:
    """The server's words, on one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        body = str(error.get("message") if isinstance(error, dict) else error).encode("utf-8", "replace")
    return " ".join(body.decode("utf-8", "replace").split())[:200] or "an empty body"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _retry_after(value: str) -> float | None:
    """Seconds to wait, from a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 1.0
