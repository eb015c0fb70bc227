"""Who is asked: the teacher of a recipe, and one way to hold many conversations with a model."""

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from preceptor.core.money import Money
from preceptor.core.records import Failure, Reply, Request
from preceptor.llm.completer import Completer
from preceptor.llm.config import EndpointConfig
from preceptor.llm.endpoint import lanes
from preceptor.llm.ledger import Ledger
from preceptor.llm.ray import Build, RayConfig, cluster, workers
from preceptor.llm.runner import run
from preceptor.llm.server import started
from preceptor.stages.base import LEDGER, Context, How

T = TypeVar("T")
K = TypeVar("K")
_NOWHERE = "http://127.0.0.1"
"""The address of endpoints that nobody will ask."""


def _one_or_many(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _alike(endpoints: tuple[EndpointConfig, ...]) -> tuple[EndpointConfig, ...]:
    for other in endpoints[1:]:
        if (other.extra, other.json_mode) != (endpoints[0].extra, endpoints[0].json_mode):
            raise ValueError(f"{other.name} is asked otherwise than {endpoints[0].name} (extra, json_mode, thinking)")
    return endpoints


Endpoints = Annotated[
    tuple[EndpointConfig, ...],
    BeforeValidator(_one_or_many),
    AfterValidator(_alike),
    How(keep=("name", "extra", "json_mode")),
]
"""A server's URL, a preset's name such as `textbook`, or the fields of an endpoint; several share the work. Only the
first one's name, its `extra` and its JSON mode decide replies."""


class TeacherConfig(BaseModel):
    """Who labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "textbook"
    endpoint: Endpoints
    cap: Annotated[float | None, How()] = Field(default=None, gt=0)
    """Most money that the recipe may spend, in the currency of the endpoint's price."""
    tokenizer: Annotated[str, How()] = ""
    """With what `plan` counts tokens: a folder, a tokenizer.json, or a name in the hub's cache; by default the model's
    own, if it is on this disk."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.endpoint:
            raise ValueError("endpoint: name one at least")
        object.__setattr__(self, "endpoint", tuple(one.of(self.model) for one in self.endpoint))
        currencies = {one.price.currency if one.price else None for one in self.endpoint}
        if self.cap is not None and (None in currencies or len(currencies) > 1):
            raise ValueError("cap: it needs the price of every endpoint, in one currency; give it in `endpoint.price`")
        return self

    @property
    def limit(self) -> Money | None:
        """The cap as a sum."""
        price = self.endpoint[0].price
        return Money(self.cap, price.currency) if self.cap is not None and price else None


@dataclass(frozen=True)
class Answerer:
    """Who answers: completers that share the work under one name, and the most that may be spent on them."""

    completers: Sequence[Completer]
    cap: Money | None = None

    @property
    def name(self) -> str:
        """As the ledger knows it."""
        return self.completers[0].name


@dataclass(frozen=True)
class Rehearsal(Context):
    """A context in which nobody is asked: `hold` gets what `converse` would hold."""

    hold: Callable[
        [
            Iterable[tuple[Any, Generator[Request, Reply, Any]]],
            Answerer,
            Callable[[Any, Any], None],
            Callable[[Any], int],
        ],
        None,
    ]


@contextmanager
def teacher(config: TeacherConfig, context: Context, ray: RayConfig | None = None) -> Iterator[Answerer]:
    """The teacher's endpoints, started if they are ours to start; workers of Ray ask them, where there are any."""
    if isinstance(context, Rehearsal):
        keyless = [one.model_copy(update={"key_env": ()}) for one in config.endpoint]
        yield Answerer(lanes(keyless, config.model, [_NOWHERE] * len(keyless)), config.limit)
        return
    with addresses(config.endpoint, config.model, context) as urls:
        build = partial(lanes, config.endpoint, config.model, urls)
        with shared(build(), build, ray, context) as completers:
            yield Answerer(completers, config.limit)


@contextmanager
def addresses(
    endpoints: Sequence[EndpointConfig], model: str, context: Context, *, folder: str = "", number: int = 0
) -> Iterator[list[str]]:
    """Where endpoints answer; those that are ours to start run for as long as the context lasts.

    {model} is the `folder` of the weights where they are ours, and else what the endpoint calls the model. `number`
    tells the logs of servers apart that run at once.
    """
    with ExitStack() as servers:
        urls = []
        for place, one in enumerate(endpoints, number):
            log = context.folder / f"server{place or ''}.log"
            if one.start:
                with context.progress(f"starting {one.name}", None):
                    urls.append(servers.enter_context(started(one, folder or one.model or model, log)))
            else:
                urls.append(str(one.url))
        yield urls


@contextmanager
def shared(
    completers: Sequence[Completer], build: Build, ray: RayConfig | None, context: Context
) -> Iterator[Sequence[Completer]]:
    """The completers, or lanes like them to workers of Ray, in each of which `build` makes them anew."""
    if ray is None:
        yield completers
        return
    with ExitStack() as ended:
        with context.progress(f"starting Ray for {ray.workers} workers", None):
            ended.enter_context(cluster(ray, context.folder / "ray.log"))
        yield workers(ray, completers, build)


def check_ray(ray: RayConfig | None, endpoints: Sequence[EndpointConfig]) -> None:
    """Refuse a server on this machine for workers on others.

    Raises:
        ValueError: there is one.
    """
    if ray and ray.address and any(one.start for one in endpoints):
        raise ValueError("ray.address: other machines can't reach a server that `start` starts here; give its `url`")


def converse(
    conversations: Iterable[tuple[K, Generator[Request, Reply, T]]],
    answerer: Answerer,
    context: Context,
    concurrency: int,
    keep: Callable[[K, T | Failure], None],
    sample: Callable[[K], int] = lambda _: 0,
) -> None:
    """Bring every conversation to its result or failure, through the ledger of all runs; `keep` hears of each once.

    `sample` numbers a conversation's draw. The completers are closed in the end.
    """
    if isinstance(context, Rehearsal):
        context.hold(conversations, answerer, keep, sample)
        return

    async def drive() -> None:
        with Ledger(context.runs / LEDGER, f"{context.recipe}/{context.section}", answerer.cap) as ledger:
            for completer in answerer.completers:
                if completer.zone:
                    ledger.attest(completer.name, *completer.zone)
            try:
                await run(conversations, answerer.completers, ledger, concurrency, keep, sample=sample)
            finally:
                for completer in answerer.completers:
                    await completer.close()

    asyncio.run(drive())
