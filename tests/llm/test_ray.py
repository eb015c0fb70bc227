"""Workers of Ray: what one says comes back as if it had been said here, and one that dies takes nothing with it."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money, Price
from preceptor.core.records import FailureKind, Message, Reply, Request, Usage
from preceptor.llm.completer import Completer, ProviderError
from preceptor.llm.config import EndpointConfig
from preceptor.llm.endpoint import Endpoint
from preceptor.llm.ray import Ray, RayConfig, Worker, cluster, workers

ROOT = Path(__file__).parents[2]


class Echo(Completer):
    """Says what it is asked, or does what that says."""

    name, model, rpm = "echo", "m", 7.0

    async def complete(self, request: Request) -> Reply:
        text = request.messages[-1].content
        if text == "busy":
            error = ProviderError(FailureKind.TIMEOUT, "慢", retryable=True, retry_after=3.0, answered=True)
            error.usage = Usage(prompt_tokens=5)
            raise error
        if text == "key":
            refused = UserError("the key is refused")
            raise ProviderError(FailureKind.PROVIDER, "the key", retryable=False, ends=refused)
        if text == "zone":
            raise UserError("outside")
        if text == "wait":
            self.resume_at = time.monotonic() + 50
        if text == "slow":
            await asyncio.sleep(60)
        return Reply(text=f"{text} by {os.getpid()}")


def echo() -> list[Completer]:
    return [Echo()]


def broken() -> list[Completer]:
    raise UserError("./gone: no such folder")


def ask(text: str) -> Request:
    return Request(messages=(Message(role="user", content=text),))


async def outcomes(lane: Ray) -> dict[str, Any]:
    async def one(text: str) -> Any:
        try:
            return await lane.complete(ask(text))
        except (ProviderError, UserError, WorkError) as error:
            return error

    return {text: await one(text) for text in ("busy", "key", "zone", "wait", "咳嗽")}


def hold(found: dict[str, Any], lane: Ray) -> None:
    """What `Echo` says, by way of a worker."""
    busy, key = found["busy"], found["key"]
    assert (busy.kind, busy.detail, busy.retryable, busy.retry_after) == (FailureKind.TIMEOUT, "慢", True, 3.0)
    assert (busy.answered, busy.sent, busy.ends, busy.usage) == (True, True, None, Usage(prompt_tokens=5))
    assert (key.retryable, type(key.ends), str(key.ends)) == (False, UserError, "the key is refused")
    assert (type(found["zone"]), str(found["zone"])) == (UserError, "outside")
    assert 40 < lane.resume_at - time.monotonic() <= 50
    assert found["咳嗽"].text.startswith("咳嗽 by ")


class Here:
    """A worker in this process."""

    busy = 0

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def complete(self, lane: int, model: str, request: Request) -> Any:
        return await self._worker.complete(lane, model, request)

    def end(self) -> None:
        """It has no process."""


def test_errors_limits_and_replies_come_through() -> None:
    lane = Ray(Echo(), 0, RayConfig(), [Here(Worker(echo))])
    hold(asyncio.run(outcomes(lane)), lane)
    assert (lane.name, lane.model, lane.rpm, lane.tpm, lane.zone) == ("echo", "m", 7.0, None, None)


def test_prices_are_those_of_the_endpoint() -> None:
    price = Price(currency="USD", input=1.0, output=2.0, as_of=date(2026, 1, 1))
    face = Endpoint(EndpointConfig(url="http://h/v1", price=price), "m")
    (lane,) = workers(RayConfig(), [face], echo)
    assert lane.cost(Usage(prompt_tokens=1_000_000, completion_tokens=1_000_000)) == Money(3.0, "USD")
    assert lane.most(ask("x")) == face.most(ask("x"))
    assert lane.zone == ("private", "h")
    (lane,) = workers(RayConfig(address="10.0.0.5:6379", inside="10.0.0.0/8"), [face], echo)
    assert lane.zone == ("private; cluster inside: 10.0.0.0/8", "h, by 10.0.0.5:6379")
    (lane,) = workers(RayConfig(address="auto"), [Echo()], echo)
    assert lane.zone == ("private; cluster inside: ", "this machine, by auto")


@pytest.mark.parametrize(
    ("build", "model", "told"),
    [
        (broken, "m", "a worker of Ray: ./gone: no such folder"),
        (echo, "n", "a worker of Ray finds other weights in the model's folder than this machine does"),
    ],
)
def test_a_worker_without_the_model(build: Any, model: str, told: str) -> None:
    outcome, _ = asyncio.run(Worker(build).complete(0, model, ask("x")))
    assert (type(outcome), str(outcome)) == (UserError, told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"workers": 0}, "greater than 0"),
        ({"cpus": -1}, "greater than or equal to 0"),
        ({"gpus": float("inf")}, "finite"),
        ({"inside": "ward-7"}, "'ward-7' is no address or network such as 10.0.0.0/8"),
        ({"address": "ray://head:10001"}, "goes through another machine"),
        ({"wokers": 2}, "Extra inputs"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        RayConfig(**fields)


@pytest.mark.parametrize(
    ("inside", "address", "seen"),
    [
        ((), "10.0.0.7", False),
        ("10.0.0.0/8", "10.200.0.7", True),
        (["192.168.1.4", "10.0.0.0/8"], "192.168.1.4", True),
        ("192.168.1.4", "192.168.1.5", False),
        ("fd00::/8", "fd00::1", True),
        ("10.0.0.0/8", "fd00::1", False),
    ],
)
def test_which_machines_may_see_the_text(inside: Any, address: str, seen: bool) -> None:
    config, here = RayConfig(inside=inside), "10.9.9.9"
    config.check(here, here)
    if seen:
        config.check(address, here)
    else:
        with pytest.raises(UserError, match=re.escape(f"the cluster's machine {address} is outside and the text is")):
            config.check(address, here)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find this module."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


STRANGER = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="critical")
print("in")
"""


@pytest.mark.slow
def test_workers_share_the_work_and_one_that_dies_is_replaced(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(lane: Ray) -> None:
        first = await asyncio.gather(*(lane.complete(ask(str(n))) for n in range(8)))
        both = {int(reply.text.split()[-1]) for reply in first}
        assert [reply.text.split()[0] for reply in first] == [str(n) for n in range(8)]
        assert (len(both), os.getpid() in both) == (2, False)
        hold(await outcomes(lane), lane)
        slow = [asyncio.create_task(lane.complete(ask("slow"))) for _ in range(4)]
        await asyncio.sleep(2)
        dead = both.pop()
        os.kill(dead, signal.SIGKILL)
        await asyncio.wait(slow, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(1)
        lost = [task.exception() for task in slow if task.done()]
        assert len(lost) == 2, "those of the other worker are on their way"
        assert all(
            isinstance(e, ProviderError) and (e.retryable, e.sent, e.answered) == (True, True, False) for e in lost
        )
        for task in slow:
            task.cancel()
        again = await asyncio.gather(*(lane.complete(ask(str(n))) for n in range(8)))
        pids = {int(reply.text.split()[-1]) for reply in again}
        assert (len(pids), dead in pids, both < pids) == (2, False, True)

    monkeypatch.setenv("PLANTED", "sk-planted-secret-1")
    config = RayConfig(cpus=0.5)
    with cluster(config, tmp_path / "ray.log"):
        (lane,) = workers(config, [Echo()], echo)
        asyncio.run(main(lane))
        import ray  # not before its ports are guarded

        context = ray.get_runtime_context()
        logs = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        words = [sys.executable, "-c", STRANGER, context.gcs_address]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        stranger = subprocess.run(words, env=plain, capture_output=True, text=True, check=False, timeout=60)
        assert (stranger.returncode == 0, "in" in stranger.stdout) == (False, False), "no token, no way in"
    written = [path for path in (*logs.rglob("*"), tmp_path / "ray.log") if path.is_file()]
    assert len(written) > 5
    secret = ("sk-planted-secret-1", "咳嗽", "慢", os.environ["RAY_AUTH_TOKEN"])
    for path in written:
        held = path.read_bytes()
        assert not [word for word in secret if word.encode() in held], path


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=re.escape("pip install 'preceptor[ray]'")),
        cluster(RayConfig(), tmp_path / "l"),
    ):
        pass


@pytest.mark.slow
def test_a_cluster_that_cannot_be(tmp_path: Path) -> None:
    gpus = RayConfig(workers=3, gpus=999)
    told = r"3 workers want 2997 GPUs and this machine has \d+"
    with pytest.raises(UserError, match=told), cluster(gpus, tmp_path / "ray.log"):
        pass
