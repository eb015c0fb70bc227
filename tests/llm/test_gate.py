"""How sends are spread over endpoints and keys, and over a minute."""

import asyncio
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preceptor.core.errors import UserError
from preceptor.core.records import Reply, Usage
from preceptor.llm import gate
from preceptor.llm.completer import Completer
from preceptor.llm.config import EndpointConfig
from preceptor.llm.endpoint import lanes
from preceptor.llm.gate import Gate, Lane
from preceptor.llm.ledger import Ledger
from preceptor.llm.runner import run
from tests.llm.conftest import ask, talk
from tests.llm.server import ANSWER, Hostile


class Kind(Hostile):
    """Does well whatever it is told."""

    def _act(self, text: str) -> str:
        return "ok"


class Limited(Completer):
    """Has limits, and is never asked."""

    name = model = "limited"

    def __init__(self, rpm: float | None = None, tpm: float | None = None) -> None:
        self.rpm, self.tpm = rpm, tpm


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_requests_a_minute(clock: list[float]) -> None:
    lane, request = Lane(Limited(rpm=2), 8), ask("x")
    lane.enter(request)
    clock[0] += 20
    lane.enter(request)
    assert lane.ready_in(request) == 40  # until the first is a minute old
    clock[0] += 40
    assert lane.ready_in(request) == 0


def test_tokens_a_minute_are_those_that_replies_took(clock: list[float]) -> None:
    lane, request = Lane(Limited(tpm=1000), 8), ask("x" * 300)  # 100 tokens by its bytes, and 512 to come
    entry = lane.enter(request)
    assert lane.ready_in(request) == 60
    lane.replied(Reply(text="y", usage=Usage(prompt_tokens=80, completion_tokens=20)), entry)
    assert lane.ready_in(request) == 0  # 100 taken, and the next is 100 and 20
    for _ in range(8):
        lane.enter(request)
        lane.busy = 0
    assert lane.ready_in(request) == 60


def test_a_request_past_the_limit_of_tokens_goes_alone() -> None:
    assert Lane(Limited(tpm=10), 8).ready_in(ask("x" * 300)) == 0


def test_slower_by_half_and_back_by_one_a_round(clock: list[float]) -> None:
    lane, request = Lane(Limited(), 8), ask("x")
    lane.slow(5)
    lane.slow(3)  # within the pause: no second half
    assert lane.ready_in(request) == 5
    clock[0] += 6
    entries = [lane.enter(request) for _ in range(4)]
    assert lane.ready_in(request) == gate.inf
    for entry in [*entries, entries[0]]:  # 4 and five times about a fifth
        lane.replied(Reply(text="y"), entry)
    assert lane.ready_in(request) == 0
    lane.enter(request)
    assert lane.ready_in(request) == gate.inf


def test_never_more_at_once_than_asked_for_over_all_lanes() -> None:
    async def main() -> int:
        spread, most = Gate([Limited(), Limited(), Limited()], 4), [0]

        async def send() -> None:
            async with spread.through(ask("x")):
                most[0] = max(most[0], sum(lane.busy for lane in spread._lanes))
                await asyncio.sleep(0.005)

        await asyncio.gather(*(send() for _ in range(40)))
        return most[0]

    assert asyncio.run(main()) == 4


def label(configs: list[dict[str, Any]], ledger: Path, count: int, act: str = "ok") -> dict[str, Any]:
    results: dict[str, Any] = {}

    async def main() -> None:
        endpoints = [EndpointConfig.model_validate({"timeout": 5, **config}) for config in configs]
        spread = lanes(endpoints, "m", [str(config.url) for config in endpoints])
        with Ledger(ledger) as book:
            talks = ((str(n), talk(f"case {n} do: {act}")) for n in range(count))
            await run(talks, spread, book, 8, results.__setitem__)
        for endpoint in spread:
            await endpoint.close()

    asyncio.run(main())
    return results


def test_keys_share_the_work(hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "sk-planted-a")
    monkeypatch.setenv("KEY_B", "sk-planted-b")
    label([{"url": hostile.url, "key_env": ["KEY_A", "KEY_B"]}], tmp_path / "l.db", 60)
    keys = Counter("planted-a" in head for head in hostile.headers)
    assert len(hostile.headers) == 60
    assert min(keys[True], keys[False]) > 15


def test_endpoints_share_the_work_and_what_was_paid_for(tmp_path: Path) -> None:
    with Hostile(delay=0.01) as one, Hostile(delay=0.01) as other:
        both = [{"url": one.url, "name": "a"}, {"url": other.url, "name": "b"}]
        results = label(both, tmp_path / "l.db", 60)
        assert list(results.values()) == [[ANSWER]] * 60
        assert len(one.bodies) + len(other.bodies) == 60
        assert min(len(one.bodies), len(other.bodies)) > 15
        label(both[:1], tmp_path / "l.db", 60)  # what either answered is known under the first one's name
        assert len(one.bodies) + len(other.bodies) == 60


def test_a_dead_endpoint_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    with Hostile() as alive:
        results = label([{"url": "http://127.0.0.1:1/v1"}, {"url": alive.url}], tmp_path / "l.db", 60)
        assert list(results.values()) == [[ANSWER]] * 60


def test_a_slow_down_is_one_lanes_alone(tmp_path: Path) -> None:
    with Hostile() as busy, Kind(delay=0.01) as free:
        results = label([{"url": busy.url}, {"url": free.url}], tmp_path / "l.db", 30, "429, 429, 429, ok")
        assert list(results.values()) == [[ANSWER]] * 30
        assert len(free.bodies) > len(set(busy.texts()))


def test_no_send_before_an_announced_limit_is_renewed(hostile: Hostile, tmp_path: Path) -> None:
    begin = time.monotonic()
    results: dict[str, Any] = {}

    async def main() -> None:
        spread = lanes([EndpointConfig(url=hostile.url)], "m", [hostile.url])
        with Ledger(tmp_path / "l.db") as book:
            talks = ((str(n), talk(f"case {n} do: used", f"then {n}")) for n in range(2))
            await run(talks, spread, book, 1, results.__setitem__)
        await spread[0].close()

    asyncio.run(main())
    assert len(results) == 2
    assert time.monotonic() - begin >= 0.6  # each `used` announces 300 ms


def test_a_key_that_is_refused_leaves_its_work_to_the_others(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "sk-planted-a")
    monkeypatch.setenv("KEY_B", "sk-refused-b")
    hostile.refused = "sk-refused-b"
    results = label([{"url": hostile.url, "key_env": ["KEY_A", "KEY_B"]}], tmp_path / "l.db", 60)
    assert list(results.values()) == [[ANSWER]] * 60
    monkeypatch.setenv("KEY_A", "sk-refused-b")
    with pytest.raises(UserError, match="refuses the key"):
        label([{"url": hostile.url, "key_env": ["KEY_A", "KEY_B"]}], tmp_path / "other.db", 60)


@pytest.mark.slow
def test_a_server_that_is_gone_for_a_while_loses_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: dict[str, Any] = {}

    async def main() -> None:
        spread = lanes([EndpointConfig(url=f"http://127.0.0.1:{port}/v1")], "m", [f"http://127.0.0.1:{port}/v1"])
        with Ledger(tmp_path / "l.db") as book:
            talks = ((str(n), talk(f"case {n}")) for n in range(30))
            await run(talks, spread, book, 2, results.__setitem__)
        await spread[0].close()

    def serve() -> None:
        with Hostile(delay=0.05, port=port) as first:
            while len(first.bodies) < 8:
                time.sleep(0.01)
            first.hang_up()
        time.sleep(2)
        with Hostile(port=port):
            while len(results) < 30:
                time.sleep(0.05)

    server = threading.Thread(target=serve)
    server.start()
    time.sleep(0.3)
    asyncio.run(main())
    server.join()
    assert list(results.values()) == [[ANSWER]] * 30


def test_a_limit_a_minute_outlives_the_process(hostile: Hostile, tmp_path: Path) -> None:
    """A run that begins where another ended has the same minute."""

    async def main(count: int) -> None:
        spread = lanes([EndpointConfig(url=hostile.url, rpm=8)], "m", [hostile.url])
        with Ledger(tmp_path / "l.db") as book:
            talks = ((str(n), talk(f"case {count} {n}")) for n in range(count))
            await asyncio.wait_for(run(talks, spread, book, 4, lambda *_: None), 1.5)
        await spread[0].close()

    asyncio.run(main(6))
    with pytest.raises(TimeoutError):
        asyncio.run(main(5))
    assert len(hostile.bodies) == 8


def test_what_a_useless_reply_took_is_paid_at_its_own_endpoints_price(tmp_path: Path) -> None:
    """Two endpoints share the work; only the dear one gives replies of nothing."""

    def priced(url: str, output: float) -> dict[str, Any]:
        return {"url": url, "price": {"currency": "CNY", "input": 0, "output": output, "as_of": "2026-11-01"}}

    with Kind(delay=0.05) as cheap, Hostile() as dear:
        label([priced(cheap.url, 1), priced(dear.url, 1000)], tmp_path / "l.db", 8, "null, ok")
        with Ledger(tmp_path / "l.db") as book:
            account = book.summary()
        assert dear.bodies
        tokens = 3  # of every reply, whatever it held
        spent = (len(cheap.bodies) * 1 + len(dear.bodies) * 1000) * tokens / 1e6
        assert account.spent["CNY"] == pytest.approx(spent)
