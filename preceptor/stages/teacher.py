"""Who is asked: the teacher of a recipe, and one way to hold many conversations with a model."""

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict

from preceptor.core.records import Failure, Reply, Request
from preceptor.llm.completer import Completer
from preceptor.llm.endpoint import Endpoint, EndpointConfig
from preceptor.llm.ledger import Ledger
from preceptor.llm.runner import run
from preceptor.llm.server import started
from preceptor.stages.base import LEDGER, Context, How

T = TypeVar("T")
K = TypeVar("K")


class TeacherConfig(BaseModel):
    """Who labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "textbook"
    endpoint: Annotated[EndpointConfig, How(keep=("name", "extra"))]
    """A server's URL, `textbook`, or the fields of an endpoint. Only its name and `extra` decide replies."""


@contextmanager
def teacher(config: TeacherConfig, context: Context) -> Iterator[Completer]:
    """The teacher's endpoint, started if it is ours to start."""
    log = context.folder / "server.log"
    if config.endpoint.start:
        with context.progress(f"starting {config.endpoint.name}", None):
            server = started(config.endpoint, config.model, log)
            url = server.__enter__()
        try:
            yield Endpoint(config.endpoint, config.model, url)
        finally:
            server.__exit__(None, None, None)
    else:
        yield Endpoint(config.endpoint, config.model)


def converse(
    conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
    completer: Completer,
    context: Context,
    concurrency: int,
    keep: Callable[[K, T | Failure], None],
    sample: Callable[[K], int] = lambda _: 0,
) -> None:
    """Bring every conversation to its result or failure, through the ledger of all runs; `keep` hears of each once.

    `sample` numbers a conversation's draw. The completer is closed in the end.
    """

    async def drive() -> None:
        with Ledger(context.runs / LEDGER, f"{context.recipe}/{context.section}") as ledger:
            try:
                await run(conversations, completer, ledger, concurrency, keep, sample=sample)
            finally:
                await completer.close()

    asyncio.run(drive())
