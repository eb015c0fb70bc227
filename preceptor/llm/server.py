"""Starts the server of a model on this machine, and never leaves one behind."""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path

import httpx2

from preceptor.core.errors import UserError, WorkError
from preceptor.llm.config import EndpointConfig

_NOT_YET = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)

# A process of its own between us and the server: it ends the server's whole group when it is told to, or
# when its parent is gone, even by kill -9. The server's group is not the terminal's, so that Ctrl-C reaches
# us alone and replies on their way can still arrive.
_WATCH = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
server = None
try:
    server = subprocess.Popen(sys.argv[2:], start_new_session=True)
    while server.poll() is None and os.getppid() == int(sys.argv[1]):
        time.sleep(0.1)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if server:
        for sign in signal.SIGTERM, signal.SIGKILL:
            try:
                os.killpg(server.pid, sign)
                server.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
"""


_OURS: dict[str, Callable[[], WorkError | None]] = {}
"""By address, servers that run now: what became of each, once it has ended."""


def gone(url: str) -> WorkError | None:
    """Why nobody will answer at an address again: a server that was started here has ended."""
    return _OURS[url]() if url in _OURS else None


@contextlib.contextmanager
def started(config: EndpointConfig, model: str, log: Path) -> Iterator[str]:
    """The address of the endpoint's API; for one with a command, run for as long as the context lasts."""
    if config.start is None:
        yield str(config.url)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        part.replace("{python}", sys.executable).replace("{model}", model).replace("{port}", str(port))
        for part in shlex.split(config.start)
    ]
    if shutil.which(command[0]) is None:
        raise UserError(f"start: there is no command {command[0]!r}: install it, or mend `start`")
    url = f"http://127.0.0.1:{port}/v1"
    with watched(command, log) as watch:
        _await(url, watch, config, log)
        _OURS[url] = lambda: None if watch.poll() is None else _ended(config, "while it was asked", log)
        try:
            yield url
        finally:
            del _OURS[url]


@contextlib.contextmanager
def watched(command: Sequence[str], log: Path, stdout: int | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that runs a command for as long as the context lasts, and ends it and all that it starts.

    It ends when the command does. What the command writes goes to `log`, or its output to `stdout`, as for Popen.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        watch = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output,
            start_new_session=True,
        )
    with watch:
        try:
            yield watch
        finally:
            watch.terminate()


def _await(url: str, watch: "subprocess.Popen[bytes]", config: EndpointConfig, log: Path) -> None:
    end = time.monotonic() + config.start_timeout
    with httpx2.Client(trust_env=False, timeout=5) as client:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                # Nearly any answer will do: one that asks for a key is there too, and some have no such list.
                if client.get(f"{url}/models").status_code not in _NOT_YET:
                    return
            if watch.poll() is not None:
                raise _ended(config, "before it answered", log)
            if time.monotonic() > end:
                raise WorkError(
                    f"`{config.start}` gave no answer at {url}/models within {config.start_timeout:g} s:"
                    f" see {log}, or raise start_timeout"
                )
            time.sleep(0.1)


def _ended(config: EndpointConfig, when: str, log: Path) -> WorkError:
    return WorkError(f"`{config.start}` ended {when}: {last_line(log)} (see {log})")


def last_line(log: Path) -> str:
    """The last words of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it wrote nothing")
