"""Engines on Ray: workers, each a process on this machine or another of a cluster, that hold a completer each.

Only requests and replies travel. Conversations, files, the ledger and its limits stay with the one runner, so that
whatever resumes without Ray resumes with it. A worker that ends takes the replies on their way with it: they are lost
as a server's are, and asked for again; another worker takes its place.

Ray's own words: https://docs.ray.io/en/latest/ray-core/actors.html
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import FailureKind, Reply, Request, Usage
from preceptor.llm.completer import Completer, ProviderError
from preceptor.llm.server import last_line, watched

Build = Callable[[], Sequence[Completer]]
"""Makes the completers in a worker that will hold them; it travels there by pickle, and must hold no key."""
_START = 900.0
"""Seconds that a cluster may take to find room for a worker."""
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""No call home; and workers without GPUs see none."""
# Ray's processes outlive a kill of the one that started them; its group does not.
_HEAD = """
import sys, time
import ray
ray.init("local", num_cpus=int(sys.argv[1]), object_store_memory=int(sys.argv[2]), include_dashboard=False,
         log_to_driver=False, logging_level="critical")
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(1e9)
"""
_STORE = 100 * 2**20
"""Bytes of Ray's store on this machine; requests and replies are too small to go through it."""
_BETWEEN = "ray://"


class RayConfig(BaseModel):
    """Workers that share the work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(default=2, gt=0)
    address: str | None = None
    """Of a cluster that is running, as host:port; without one, the workers are processes of this machine."""
    inside: tuple[str, ...] = ()
    """Addresses or networks (10.0.0.0/8) of the cluster's other machines, which may see the text."""
    cpus: float = Field(default=1, ge=0, allow_inf_nan=False)
    """Of each worker."""
    gpus: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Of each worker; with 0 it sees no GPU."""

    @field_validator("inside", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @field_validator("inside")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            try:
                ipaddress.ip_network(one, strict=False)
            except ValueError as error:
                raise ValueError(f"{one!r} is no address or network such as 10.0.0.0/8") from error
        return value

    @field_validator("address")
    @classmethod
    def _direct(cls, value: str | None) -> str | None:
        if value and value.startswith(_BETWEEN):
            raise ValueError(f"{value!r} goes through another machine: run this on one of the cluster, as host:port")
        return value

    def check(self, address: str, here: str) -> None:
        """Refuse a machine of the cluster that may not see the text. `here` is this machine's address there.

        Raises:
            UserError: it is another one, and is not listed.
        """
        listed = (ipaddress.ip_network(one, strict=False) for one in self.inside)
        if address != here and not any(ipaddress.ip_address(address) in network for network in listed):
            raise UserError(
                f"ray: the cluster's machine {address} is outside and the text is private: list it under `ray.inside` "
                "if it may see patients' text"
            )


class Worker:
    """What runs in a worker's process: completers, made when the first request comes."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._lanes: Sequence[Completer] = ()

    async def address(self) -> str:
        """Of the machine that it is on."""
        import ray

        return str(ray.util.get_node_ip_address())

    async def complete(self, lane: int, model: str, request: Request) -> tuple[Any, float]:
        """A reply, an error, or the fields of a ProviderError; seconds until the next send may go.

        An error that was raised would be written, with what it quotes, into Ray's logs.
        """
        try:
            self._lanes = self._lanes or self._build()
        except (UserError, WorkError) as error:
            return type(error)(f"a worker of Ray: {error}"), 0.0
        completer = self._lanes[lane]
        if completer.model != model:  # a folder of that name, on another machine
            return UserError("a worker of Ray finds other weights in the model's folder than this machine does"), 0.0
        try:
            outcome: Any = await completer.complete(request)
        except ProviderError as error:
            outcome = vars(error)
        except (UserError, WorkError) as error:
            outcome = error
        return outcome, completer.resume_at - time.monotonic()


class _Place:
    """One of the workers, and whoever takes its place when it ends."""

    def __init__(self, config: RayConfig, build: Build) -> None:
        self._config, self._build = config, build
        self._actor: Any = None
        self._starting = asyncio.Lock()
        self.busy = 0

    async def complete(self, lane: int, model: str, request: Request) -> tuple[Any, float]:
        from ray.exceptions import RayError, RayTaskError

        self.busy += 1
        actor = None
        try:
            actor = await self._started()
            outcome: tuple[Any, float] = await actor.complete.remote(lane, model, request)
        except RayTaskError:
            raise
        except RayError as error:
            if self._actor is actor:
                self.end()
            detail = f"the worker ended before it answered ({type(error).__name__})"
            raise ProviderError(FailureKind.PROVIDER, detail, retryable=True, sent=actor is not None) from error
        finally:
            self.busy -= 1
        return outcome

    async def _started(self) -> Any:
        """The worker, once it is known that its machine may see the text."""
        async with self._starting:
            if self._actor is None:
                import ray

                actor = self._new()
                self._config.check(await self._reached(actor), ray.util.get_node_ip_address())
                self._actor = actor
            return self._actor

    def _new(self) -> Any:
        import ray

        # Never restarted by Ray, which might choose a machine that nobody has looked at.
        how = {"num_cpus": self._config.cpus, "num_gpus": self._config.gpus, "max_restarts": 0}
        return ray.remote(Worker).options(**how).remote(self._build)

    async def _reached(self, actor: Any) -> str:
        try:
            return str(await asyncio.wait_for(actor.address.remote(), _START))
        except TimeoutError as error:
            wanted = f"{self._config.cpus:g} CPUs and {self._config.gpus:g} GPUs"
            raise WorkError(
                f"ray: no room for a worker with {wanted} within {_START:g} s; lower `workers`, `cpus` or `gpus`"
            ) from error

    def end(self) -> None:
        """End the worker; the next request starts another."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


class Ray(Completer):
    """A lane to a completer that each worker holds. `face` is one like it, asked for names, limits and prices alone."""

    def __init__(self, face: Completer, lane: int, config: RayConfig, places: Sequence[_Place]) -> None:
        self._face, self._lane, self._places = face, lane, places
        self.name, self.model, self.zone, self.rpm, self.tpm = face.name, face.model, face.zone, face.rpm, face.tpm
        if config.address:
            said, host = face.zone or ("private", "this machine")
            self.zone = f"{said}; cluster inside: {', '.join(config.inside)}", f"{host}, by {config.address}"

    async def complete(self, request: Request) -> Reply:
        """Send once, by way of the least busy worker."""
        place = min(self._places, key=lambda one: one.busy)
        outcome, wait = await place.complete(self._lane, self.model, request)
        if wait > 0:
            self.resume_at = max(self.resume_at, time.monotonic() + wait)
        if isinstance(outcome, Reply):
            return outcome
        if isinstance(outcome, Exception):
            raise outcome
        usage = outcome.pop("usage")
        error = ProviderError(**outcome)
        error.usage = usage
        raise error

    async def close(self) -> None:
        """End the workers, which all lanes share."""
        for place in self._places:
            place.end()

    def gone(self) -> WorkError | None:
        """Whether the server is, that the workers ask."""
        return self._face.gone()

    def most(self, request: Request) -> Money | None:
        """The most that a send can cost; None where no price is known."""
        return self._face.most(request)

    def cost(self, usage: Usage) -> Money | None:
        """What a reply cost that took these tokens; None where that is not known."""
        return self._face.cost(usage)


def workers(config: RayConfig, faces: Sequence[Completer], build: Build) -> list[Ray]:
    """Lanes to the workers of a cluster that `cluster` opened, one for each completer that `build` makes."""
    places = [_Place(config, build) for _ in range(config.workers)]
    return [Ray(face, lane, config, places) for lane, face in enumerate(faces)]


@contextlib.contextmanager
def cluster(config: RayConfig, log: Path) -> Iterator[None]:
    """The cluster at the address, or one on this machine that ends with the context, or with this process.

    Raises:
        UserError: Ray is not installed, or this machine has too few GPUs.
        WorkError: the cluster does not start, or can't be reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray: it is not installed: pip install 'preceptor[ray]'")
    with contextlib.ExitStack() as ended:
        os.environ.update(_ENVIRONMENT)
        address = config.address or ended.enter_context(_here(config, log))
        import ray

        try:
            ray.init(address, log_to_driver=False, logging_level="critical")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise WorkError(f"ray: no cluster at {address}: {str(error).strip().splitlines()[0]}") from error
        ended.callback(ray.shutdown)
        wanted, there = config.workers * config.gpus, ray.cluster_resources().get("GPU", 0)
        if not config.address and wanted > there:
            raise UserError(f"ray: {config.workers} workers want {wanted:g} GPUs and this machine has {there:g}")
        yield


@contextlib.contextmanager
def _here(config: RayConfig, log: Path) -> Iterator[str]:
    """The address of a cluster on this machine. Its ports are open to the network, so it asks for a token."""
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":  # which Ray reads when it is imported
        raise UserError("ray: this process imported it before its ports could be guarded; start anew without that")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cpus = max(1, math.ceil(config.workers * config.cpus))  # shares of the work, not of the machine
    command = [sys.executable, "-c", _HEAD, str(cpus), str(_STORE)]
    with watched(command, log, stdout=subprocess.PIPE) as head:
        assert head.stdout is not None
        address = head.stdout.readline().decode().strip()
        if not address:
            raise WorkError(f"ray: no cluster starts on this machine: {last_line(log)} (see {log})")
        yield address
