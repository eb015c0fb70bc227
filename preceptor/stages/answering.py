"""Models whose weights are ours, asked in this process, at a server, or by workers of Ray; and the teacher."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from preceptor.llm.completer import Completer
from preceptor.llm.endpoint import lanes
from preceptor.llm.ray import RayConfig
from preceptor.stages.asking import CHAIN, TEACHER, AskingConfig, asking_of
from preceptor.stages.base import TRAINING, Context, How, Need, folder, needs_torch
from preceptor.stages.candidates import CANDIDATES
from preceptor.stages.portions import check_parts
from preceptor.stages.teacher import Answerer, Endpoints, TeacherConfig, addresses, check_ray, shared, teacher
from preceptor.tasks.diagnosis import CLOSINGS
from preceptor.tasks.strategies import Asking

BASE, STUDENT = "base", "student"
_MODEL = ("adapter", "model")
_SERVED = "served"
"""An adapter and its base as one model, for a server; a folder for each, by digest."""


class EngineConfig(AskingConfig):
    """Who answers, and in which engine."""

    student: str | None = None
    teacher: TeacherConfig | None = None
    endpoint: Endpoints = ()
    """Where models answer whose weights are ours; by default in this process. `start` serves {model}, the folder of
    the weights, for each model anew; one at a `url` is trusted to serve them, by the folder's path or its `model`."""
    ray: Annotated[RayConfig | None, How()] = None
    """Workers of Ray that answer, or ask the endpoint, in place of this process."""
    constrained: bool = False
    """Hold the replies of models on this machine to the JSON schema of an answer, as `json_mode` does at endpoints."""
    batch: Annotated[int, How()] = Field(default=128, gt=0)
    """Most cases that a model on this machine answers at once, as memory allows; with Ray, one of a worker."""

    @model_validator(mode="after")
    def _one_engine(self) -> "EngineConfig":
        if self.constrained and self.endpoint:
            raise ValueError("constrained: at an endpoint its `json_mode` holds replies to JSON; set that instead")
        if self.confidence == CANDIDATES and self.endpoint:
            raise ValueError(f"confidence: {CANDIDATES} needs the weights in this process; leave out `endpoint`")
        check_ray(self.ray, self.endpoint)
        return self

    def model_needs(self, models: Iterable[str]) -> tuple[Need, ...]:
        """The folders of models that sections left, or that are named."""
        needs = []
        for link in dict.fromkeys(link for model in models for link in links(model)):
            if link == BASE:
                paths = folder(self.student or "")
                needs.append(Need(BASE, files=_MODEL, section=self.student, paths=paths, required=False))
            elif link == STUDENT:
                needs.append(Need(STUDENT, files=_MODEL, stages=TRAINING))
            elif paths := folder(link):
                needs.append(Need(link, paths=paths))
            elif link != TEACHER and not _is_elsewhere(link):
                needs.append(Need(link, files=_MODEL, section=link))
        return tuple(needs)


def links(model: str) -> tuple[str, ...]:
    """The models that answer in turn under one name: of `A+B` two, of any other one, and of a folder's the folder."""
    return folder(model) or tuple(model.split("+"))


def _is_elsewhere(model: str) -> bool:
    """Whether a name is one of the package's or the hub's."""
    return model in {"mini", "smollm2"} or "/" in model


def asking_for(config: EngineConfig, context: Context, model: str, name: str) -> Asking:
    """How a model is asked, whose predictions carry a name.

    A teacher corrects what can't be read; the others answer once, as they have learned to, and with log-probabilities
    where the engine has them.

    Raises:
        UserError: two models answer in turn, and the prompt asks for other parts than theirs.
    """
    if model == TEACHER:
        return asking_of(config, context, name, None, corrects=True)
    first = next(iter(config.endpoint), None)
    without = first and (first.logprobs == 0 or config.confidence not in (None, CHAIN))
    known = CLOSINGS if first is None or first.logprobs is None else min(CLOSINGS, first.logprobs)
    asking = asking_of(
        config,
        context,
        name,
        None if without else known,
        corrects=False,
        constrained=first.json_mode != "none" if first else config.constrained,
    )
    if len(links(model)) > 1:
        check_parts(asking.prompt, f"{context.section}.models: {model}")
    return asking


@dataclass(frozen=True)
class Engine:
    """Who answers for a model."""

    answerer: Answerer
    concurrency: int
    """Requests at once."""


def folders(config: EngineConfig, context: Context, model: str) -> tuple[Path, ...]:
    """Where a model's weights lie, of two that answer in turn both; of a teacher none.

    Raises:
        UserError: there is no such model.
    """
    if model == TEACHER:
        return ()
    from preceptor.model.resolve import resolve

    places = [context.optional(link) or (config.student or "" if link == BASE else link) for link in links(model)]
    return tuple(map(resolve, places))


@contextmanager
def answering(config: EngineConfig, context: Context, model: str) -> Iterator[Engine]:
    """Who answers for a model: the teacher, or weights in the engine that the configuration names.

    The ledger knows weights by their digest. What was started or loaded is gone when the context ends.

    Raises:
        UserError: there is no such model, it is damaged, or its engine can't be.
        WorkError: the engine does not start.
    """
    if model == TEACHER:
        assert config.teacher is not None
        with teacher(config.teacher, context, config.ray) as answerer:
            yield Engine(answerer, config.concurrency)
        return
    if not config.endpoint:
        needs_torch(context.section)
    weights = folders(config, context, model)
    if config.endpoint:
        with _served(config, context, weights) as completers:
            yield Engine(Answerer(completers), config.concurrency)
        return
    build = partial(_local, [str(one.resolve()) for one in weights], config.batch)
    if config.ray:
        with shared([_face(weights)], build, config.ray, context) as completers:
            yield Engine(Answerer(completers), 2 * config.batch * config.ray.workers)
        return
    with context.progress(f"{context.section}: loading {model}", None):
        loaded = build()
    yield Engine(Answerer(loaded), 2 * config.batch)
    loaded.clear()  # whoever asked still holds the engine
    gc.collect()  # ended tasks refer to themselves and so keep the weights, whose memory the next model needs


def _local(folders: Sequence[str], batch: int) -> list[Completer]:
    """The weights in this process, which may be a worker's."""
    from preceptor.llm.local import Chain, Local  # torch takes seconds to load
    from preceptor.model.load import load
    from preceptor.model.resolve import digest

    loaded = [load(Path(one)) for one in folders]
    made = [Local(one, digest(one.folder), batch) for one in loaded]
    return [made[0] if len(made) == 1 else Chain(*made)]


def _face(folders: Sequence[Path]) -> Completer:
    """As `_local`, of weights that others load."""
    from preceptor.llm.local import Chain, Local
    from preceptor.model.resolve import digest

    made = [Local(None, digest(one)) for one in folders]
    return made[0] if len(made) == 1 else Chain(*made)


@contextmanager
def _served(config: EngineConfig, context: Context, folders: Sequence[Path]) -> Iterator[Sequence[Completer]]:
    """The weights at endpoints; each of two that answer in turn at a server of its own, if it is ours to start."""
    from preceptor.model.resolve import digest

    with ExitStack() as servers:
        parts = []
        for number, one in enumerate(folders):
            known = digest(one)
            path = str(_whole(one, known, config, context))
            count = number * len(config.endpoint)
            found = addresses(config.endpoint, known, context, folder=path, number=count)
            called = [end.model_copy(update={"model": end.model or path}) for end in config.endpoint]
            parts.append((called, known, servers.enter_context(found)))
        build = partial(_in_turn, parts)
        yield servers.enter_context(shared(build(), build, config.ray, context))


def _in_turn(parts: Sequence[tuple[Any, str, list[str]]]) -> Sequence[Completer]:
    """Lanes to endpoints, or of two that answer in turn pairs of them."""
    first, *others = [lanes(*part) for part in parts]
    if not others:
        return first
    from preceptor.llm.local import Chain

    pairs = []
    for one, other in zip(first, *others, strict=True):
        pair = Chain(one, other)
        pair.name, pair.zone, pair.rpm, pair.tpm = one.name, one.zone, one.rpm, one.tpm
        pairs.append(pair)
    return pairs


def _whole(source: Path, known: str, config: EngineConfig, context: Context) -> Path:
    """A folder that a server can load: an adapter is merged into its base, once."""
    if not any(one.start for one in config.endpoint) or not (source / "adapter_config.json").is_file():
        return source
    out = context.folder / _SERVED / known[:16]
    if not out.is_dir():
        needs_torch(context.section)
        from preceptor.model import export

        with context.progress(f"{context.section}: merging {source}", None):
            export.whole(source, out, {})
    return out
