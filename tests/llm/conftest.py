"""A hostile server, and conversations for it."""

from collections.abc import Generator, Iterator

import pytest
import stamina

from preceptor.core.records import Message, Reply, Request
from tests.llm.server import Hostile


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with Hostile() as server:
        yield server


@pytest.fixture
def at_once() -> Iterator[None]:
    """Retries without their waits."""
    with stamina.set_testing(True, attempts=4):
        yield


def ask(text: str, logprobs: int | None = None) -> Request:
    return Request(messages=(Message(role="user", content=text),), logprobs=logprobs)


def talk(*texts: str) -> Generator[Request, Reply, list[str]]:
    """A conversation that asks one thing after another."""
    said = []
    for text in texts:
        reply = yield ask(text)
        said.append(reply.text)
    return said
