"""Who may see patients' text: this machine, hosts listed as `inside`, anyone once the user attests `privacy: public`.

The check stands where a connection is made, on the very address that it will reach, so that a name that
resolves elsewhere gets nothing. Redirects are not followed.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpcore2
import httpx2

from preceptor.core.errors import UserError
from preceptor.llm.config import EndpointConfig

_BLANK, _LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"
_FULL = 1 << 20
"""Bytes that may wait to be read."""
_KEEP = 4.0
"""Seconds; many servers drop an idle connection after five."""


class Wire(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """A connection that knows whether more came over it than was asked for.

    A server that answers twice leaves its second answer here or, if both came at once, with the parser: it must not
    be taken for the reply to the next request.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._body = -1
        """Bytes after the reply's head, once that has come whole."""
        self._tail = b""
        self._asking = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._ended = False
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes came, asked for or not."""
        self._data += data
        if len(self._data) > _FULL and self._transport:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """No more will come."""
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """It stands no more."""
        self._ended, self._error = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  its interface
        """Bytes that came; none at the end."""
        self._asking = False
        if not self._data and not self._ended:
            self._waiting = self._loop.create_future()
            try:
                async with asyncio.timeout(timeout):
                    await self._waiting
            except TimeoutError as error:
                raise httpcore2.ReadTimeout from error
        if self._error and not self._data:
            raise httpcore2.ReadError(str(self._error)) from self._error
        taken = bytes(self._data[:max_bytes])
        del self._data[:max_bytes]
        if self._transport and not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()
        self._note(taken)
        return taken

    def _note(self, taken: bytes) -> None:
        self._tail = (self._tail + taken)[-len(_LAST_CHUNK) :]
        if self._body >= 0:
            self._body += len(taken)
            return
        self._head += taken
        _, blank, body = self._head.partition(_BLANK)
        if blank:
            self._body, self._head = len(body), bytearray()

    def has_more(self, headers: httpx2.Headers) -> bool:
        """Whether more came than the reply with these headers."""
        length = headers.get("content-length", "")
        if length.isdecimal() and "transfer-encoding" not in headers:
            return bool(self._data) or self._body > int(length)
        return bool(self._data) or self._tail != _LAST_CHUNK

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  its interface
        """Send bytes; a request is small enough to wait in memory for a slow reader."""
        if not self._asking and (self._data or self._ended):  # before a byte of the request went
            raise httpcore2.ConnectError(str(self._error or "the server closed the connection, or sent too much"))
        if not self._asking:
            self._asking, self._body, self._tail = True, -1, b""
            self._head.clear()
        if self._ended or self._transport is None:
            raise httpcore2.WriteError(str(self._error or "the server closed the connection"))
        self._transport.write(buffer)

    async def aclose(self) -> None:
        """Close it."""
        if self._transport:
            self._transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  its interface
    ) -> "Wire":
        """The same connection, encrypted."""
        assert self._transport
        try:
            async with asyncio.timeout(timeout):
                secure = await self._loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        except OSError as error:  # a certificate that can't be trusted is one
            raise httpcore2.ConnectError(str(error)) from error
        assert isinstance(secure, asyncio.Transport)
        self._transport = secure
        return self

    def get_extra_info(self, info: str) -> Any:
        """What the connection is; it is readable when there is what nobody asked for, or its end."""
        if info == "is_readable":
            return bool(self._data) or self._ended
        return self._transport.get_extra_info(info) if self._transport else None


class Guard(httpcore2.AsyncNetworkBackend):
    """Connects to this machine and to addresses inside; elsewhere with public text alone."""

    def __init__(self, config: EndpointConfig) -> None:
        self._open = config.privacy == "public"
        self._names = {name.lower() for name in config.inside}
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
        """A connection to one of the host's addresses, if all of them are inside.

        Raises:
            UserError: one is outside.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not (self._open or host.lower() in self._names or self._is_inside(address)):
                raise UserError(
                    f"{host} ({address}) is outside and the text is private: list the host under `inside`"
                    " if it may see patients' text, or attest `privacy: public`"
                )
        failed: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                async with asyncio.timeout(timeout):
                    _, wire = await loop.create_connection(Wire, address, port)
            except TimeoutError as error:
                failed = httpcore2.ConnectTimeout(str(error))
            except OSError as error:
                failed = httpcore2.ConnectError(str(error))
            else:
                return wire
        raise failed

    def _is_inside(self, address: str) -> bool:
        ip = ipaddress.ip_address(address)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip in network for network in self._networks)


class Direct(httpx2.AsyncHTTPTransport):
    """Connects without a proxy, through the guard."""

    def __init__(self, tls: ssl.SSLContext, config: EndpointConfig) -> None:
        super().__init__(verify=tls)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls, keepalive_expiry=_KEEP, network_backend=Guard(config)
        )


def line(config: EndpointConfig, tls: ssl.SSLContext, headers: dict[str, str]) -> httpx2.AsyncClient:
    """A client with one connection, into the zone that the endpoint's text may reach."""
    by_proxy = config.privacy == "public" and getproxies()
    return httpx2.AsyncClient(
        transport=None if by_proxy else Direct(tls, config),  # the environment's proxies serve public text alone
        verify=tls,
        limits=httpx2.Limits(keepalive_expiry=_KEEP),
        timeout=httpx2.Timeout(config.timeout, connect=config.connect_timeout, read=config.read_timeout),
        headers=headers,
    )


def zone(config: EndpointConfig) -> tuple[str, str]:
    """What the user attests of who may see the text (`private`, `inside: …`, `public`), and the host that gets it."""
    host = urlsplit(config.url or "").hostname or "this machine"
    if config.privacy == "public" or not config.inside:
        return config.privacy, host
    return f"inside: {', '.join(config.inside)}", host
