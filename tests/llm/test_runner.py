"""Conversations through a hostile server, kills and Ctrl-C."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Failure, FailureKind, Reply, Request
from preceptor.llm import runner
from preceptor.llm.config import EndpointConfig
from preceptor.llm.endpoint import Endpoint
from preceptor.llm.ledger import Ledger
from preceptor.llm.runner import run
from tests.llm.conftest import ask, talk
from tests.llm.server import ANSWER, Hostile

Talks = Mapping[str, Generator[Request, Reply, Any]]


def label(url: str, ledger: Path | None, talks: Talks, concurrency: int = 8, **options: Any) -> dict[str, Any]:
    """Run the conversations; what came of each."""
    results: dict[str, Any] = {}

    def once(name: str, result: Any) -> None:
        assert name not in results
        results[name] = result

    async def main() -> None:
        endpoint = Endpoint(EndpointConfig(url=url, timeout=options.pop("timeout", 5)), "m")
        book = Ledger(ledger) if ledger else None
        try:
            await run(talks.items(), [endpoint], book, concurrency, once, **options)
        finally:
            await endpoint.close()
            if book:
                book.close()

    asyncio.run(main())
    return results


def many(count: int, *acts: str) -> dict[str, Generator[Request, Reply, list[str]]]:
    return {str(n): talk(f"case {n} do: {acts[n % len(acts)] if acts else 'ok'}") for n in range(count)}


@pytest.mark.usefixtures("at_once")
def test_a_bad_teacher_stops_nothing(hostile: Hostile, tmp_path: Path) -> None:
    acts = {
        "ok": None,
        "429, 500, ok": None,
        "reset, cut, html, ok": None,
        "choices, null, ok": None,
        "length": None,
        "refusal": None,
        "500": FailureKind.PROVIDER,
        "null": FailureKind.EMPTY,
        "hang": FailureKind.TIMEOUT,
        "400": FailureKind.PROVIDER,
    }
    talks = {act: talk(f"do: {act}") for act in acts}
    results = label(hostile.url, tmp_path / "l.db", talks, timeout=0.5)
    assert {act: result.kind if isinstance(result, Failure) else None for act, result in results.items()} == acts
    sent = Counter(hostile.texts())
    assert (sent["do: 500"], sent["do: 400"], sent["do: 429, 500, ok"]) == (4, 1, 3)
    with Ledger(tmp_path / "l.db") as ledger:
        summary = ledger.summary()
    assert summary.requests == len(hostile.bodies) == summary.replies + sum(summary.failures.values())
    assert summary.replies == 6


def test_replay_sends_nothing_and_gives_the_same(hostile: Hostile, tmp_path: Path) -> None:
    def talks() -> Talks:
        return {"a": talk("one", "two"), "b": talk("one"), "c": talk("three", "three")}

    first = label(hostile.url, tmp_path / "l.db", talks())
    assert Counter(hostile.texts()) == {"one": 1, "two": 1, "three": 2}  # b shares a's; c asks for two draws
    assert label("http://127.0.0.1:1", tmp_path / "l.db", talks()) == first


def test_samples_are_different_requests(hostile: Hostile, tmp_path: Path) -> None:
    talks = {"case#0": talk("one"), "case#1": talk("one")}
    label(hostile.url, tmp_path / "l.db", talks, sample=lambda name: int(name[-1]))
    assert hostile.texts() == ["one", "one"]


def test_without_a_ledger(hostile: Hostile) -> None:
    assert label(hostile.url, None, {"a": talk("one")}) == {"a": [ANSWER]}
    assert label(hostile.url, None, {}) == {}


def test_concurrency_is_kept(tmp_path: Path) -> None:
    with Hostile(delay=0.02) as server:
        label(server.url, tmp_path / "l.db", many(60), concurrency=5)
        assert server.most == 5


def test_slows_down_when_told_to(hostile: Hostile, tmp_path: Path) -> None:
    start = time.monotonic()
    results = label(hostile.url, tmp_path / "l.db", many(12, "429, ok"), attempts=1)
    assert all(result == [ANSWER] for result in results.values())  # a 429 is no attempt spent
    assert time.monotonic() - start >= 0.2
    assert len(hostile.bodies) == 24


@pytest.mark.usefixtures("at_once")
def test_what_fails_all_ends_the_run(hostile: Hostile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="401"):
        label(hostile.url, tmp_path / "l.db", many(200, "401"))
    assert len(hostile.bodies) < 100
    with pytest.raises(WorkError, match="can't be reached"):
        label("http://127.0.0.1:1", tmp_path / "l.db", many(200))
    with Ledger(tmp_path / "l.db") as ledger:
        account = ledger.summary()
        assert account.failures == {"provider": len(hostile.bodies)}  # none was lost in flight
        assert account.requests == len(hostile.bodies)  # and what was never sent is no request


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_a_server_that_was_there_is_waited_for_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "_OUTAGE", 3.0)
    server = Hostile().__enter__()

    def leaving() -> Generator[Request, Reply, str]:
        yield ask("one")
        server.hang_up()
        server.__exit__(None, None, None)
        yield ask("two")
        raise AssertionError

    with pytest.raises(WorkError, match="can't be reached"):
        label(server.url, tmp_path / "l.db", {"a": leaving()}, 1)
    (told,) = [message for message in caplog.messages if "waited for" in message]
    assert told.endswith("it is waited for, 0.05 minutes at most")
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.summary().replies == 1, "and it is there when the same is asked again"


def test_an_error_lets_what_is_in_flight_arrive(tmp_path: Path) -> None:
    def broken() -> Generator[Request, Reply, str]:
        yield ask("quick")
        raise ZeroDivisionError

    with Hostile(delay=0.2) as server:
        talks: dict[str, Any] = {"bad": broken(), **many(4)}
        with pytest.raises(ZeroDivisionError):
            label(server.url, tmp_path / "l.db", talks)
        with Ledger(tmp_path / "l.db") as ledger:
            assert ledger.summary().replies == len(server.bodies) == 5


# Labels 60 cases of two requests each; some of the first misbehave.
LABEL = """
import sys
from pathlib import Path
import stamina
from tests.llm.test_runner import label
from tests.llm.conftest import talk
url, ledger, concurrency = sys.argv[1:]
stamina.set_testing(True, attempts=4)
acts = ["ok", "reset, ok", "500, ok", "cut, ok", "html, ok"]
talks = {str(n): talk(f"case {n} do: {acts[n % 5]}", f"second {n}") for n in range(60)}
print("labelling", flush=True)
results = label(url, Path(ledger), talks, int(concurrency))
print(len(results), flush=True)
"""


def start(server: Hostile, ledger: Path, concurrency: int = 8) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", LABEL, server.url, str(ledger), str(concurrency)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "labelling\n"
    return process


@pytest.mark.slow
def test_kill_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "l.db", random.Random(7)
    with Hostile(delay=0.03) as server:
        for kills in range(1, 6):
            process = start(server, path)
            time.sleep(rng.uniform(0.05, 0.45))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            time.sleep(0.05)  # what was sent may still be on its way to the server
            with sqlite3.connect(path) as db:
                counts = dict(db.execute("SELECT kind, COUNT(*) FROM sends GROUP BY kind").fetchall())
            intents = sum(counts.values())
            in_flight = counts.pop(None, 0)
            assert intents - in_flight <= len(server.bodies) <= intents
            assert in_flight <= 11 * kills  # one for each worker
        process = start(server, path)
        assert process.communicate()[0] == "60\n"
        with sqlite3.connect(path) as db:
            rows = db.execute("SELECT request, kind FROM sends ORDER BY request, attempt").fetchall()
        replies = [request for request, kind in rows if kind == "reply"]
        assert len(replies) == len(set(replies)) == 120
        last = dict(rows)
        assert set(last.values()) == {"reply"}  # nothing was sent after a stored reply
        outcomes = sum(kind is not None for _, kind in rows)
        assert outcomes <= len(server.bodies) <= len(rows)
        again = len(server.bodies)  # and a run that has all replies sends nothing
        assert start(server, path).communicate()[0] == "60\n"
        assert len(server.bodies) == again


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    with Hostile(delay=0.01) as server:
        processes = [start(server, tmp_path / "l.db") for _ in range(2)]
        assert [process.communicate()[0] for process in processes] == ["60\n", "60\n"]
        sent = Counter(server.texts())
        assert all(sent[f"second {n}"] == 1 for n in range(60))


def test_first_ctrl_c_drains(tmp_path: Path) -> None:
    with Hostile(delay=0.8) as server:
        process = start(server, tmp_path / "l.db")
        while not server.bodies:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert "KeyboardInterrupt" in errors
        assert 0 < len(server.bodies) <= 8
        with Ledger(tmp_path / "l.db") as ledger:
            summary = ledger.summary()
            assert summary.replies + sum(summary.failures.values()) == summary.requests == len(server.bodies)
        assert "never retrieved" not in errors


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with Hostile(delay=20) as server:
        process = start(server, tmp_path / "l.db")
        while not server.bodies:
            time.sleep(0.01)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert time.monotonic() - begin < 3


def test_the_interrupt_handler_is_given_back(hostile: Hostile) -> None:
    before = signal.getsignal(signal.SIGINT)
    label(hostile.url, None, {"a": talk("one")})
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=label, args=(hostile.url, None, {"a": talk("one")}))
    thread.start()
    thread.join()
    assert len(hostile.bodies) == 2


def contents(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.iterdir()]


def test_no_key_in_any_file(hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-planted-123")

    async def main() -> None:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, key_env="SOME_KEY"), "m")
        with Ledger(tmp_path / "l.db") as ledger:
            await run([("a", talk("do: 400")), ("b", talk("x"))], [endpoint], ledger, 2, lambda *_: None)
            written.extend(await asyncio.to_thread(contents, tmp_path))
        await endpoint.close()

    written: list[bytes] = []
    asyncio.run(main())
    assert os.environ["SOME_KEY"] in hostile.headers[0]
    assert len(written) > 1
    assert not any(b"planted" in data for data in written)
