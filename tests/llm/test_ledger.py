"""The ledger under two processes, kills, a full disk and damage."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from preceptor.core.errors import WorkError
from preceptor.core.records import Failure, FailureKind, Reply, Request, Sampling, Token, Usage
from preceptor.llm.ledger import Busy, Claim, Ledger, request_key
from tests.llm.conftest import ask

T = TypeVar("T")
REPLY = Reply(
    text="肺炎",
    usage=Usage(prompt_tokens=5, completion_tokens=2),
    tokens=(
        Token(utf8=b"\xe8\x82", logprob=-0.25, alternatives=((b"\xff", -3.0),)),
        Token(utf8=b"\xba", logprob=0),
    ),
)
KEY = request_key("e", "m", ask("x"))


def go(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def claim(ledger: Ledger, key: bytes = KEY) -> Reply | Claim | Busy:
    return go(ledger.claim(key, "e", "m"))


def claimed(ledger: Ledger, key: bytes = KEY) -> Claim:
    found = claim(ledger, key)
    assert isinstance(found, Claim)
    return found


def test_a_reply_is_kept_and_found(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a" / "ledger.db") as ledger:
        stored = go(ledger.settle(claimed(ledger), REPLY))
        assert stored
    with Ledger(tmp_path / "a" / "ledger.db") as ledger:
        assert claim(ledger) == stored == ledger.find(stored.key)
        assert stored.model_copy(update={"key": ""}) == REPLY
        assert ledger.find("00-0") is None


def test_only_live_processes_leave_marks(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    (tmp_path / f"{path.name}.{'0' * 32}.alive").touch()
    with Ledger(path):
        assert len(list(tmp_path.glob("*.alive"))) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.db"]


def test_failures_are_attempts_and_counted(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", run="r1") as ledger:
        first = claimed(ledger)
        go(ledger.settle(first, Failure(kind=FailureKind.TIMEOUT, detail="slow")))
        second = claimed(ledger)
        assert (first.attempt, second.attempt) == (0, 1)
        go(ledger.settle(second, REPLY))
        claimed(ledger, request_key("e", "m", ask("y")))
        summary = ledger.summary()
        assert (summary.requests, summary.replies, summary.failures) == (3, 1, {"timeout": 1})
        assert (summary.tokens_in, summary.tokens_out) == (5, 2)
        assert summary == ledger.summary("r1")
        assert ledger.summary("another").requests == 0


def test_key_holds_all_that_decides_a_reply() -> None:
    x = ask("x")
    others: list[Request] = [
        ask("y"),
        ask("x", logprobs=0),
        ask("x", logprobs=5),
        x.model_copy(update={"json_schema": "{}"}),
        x.model_copy(update={"sampling": Sampling(seed=1)}),
    ]
    keys = [request_key("e", "m", request) for request in [x, *others]]
    keys += [request_key("f", "m", x), request_key("e", "n", x)]
    keys += [request_key("e", "m", x, sample=1), request_key("e", "m", x, repeat=1)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == request_key("e", "m", ask("x"))


def test_a_request_in_flight_is_not_sent_again(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as one, Ledger(tmp_path / "l.db") as two:
        mine = claimed(one)
        assert isinstance(claim(one), Busy)
        assert isinstance(claim(two), Busy)
        go(one.settle(mine, REPLY))
        assert isinstance(claim(two), Reply)
        other = request_key("e", "m", ask("y"))
        one.drop(claimed(one, other))
        one.summary()  # waits for the writer
        assert isinstance(claim(two, other), Claim)


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\nfrom tests.llm.test_ledger import KEY, Ledger, Path\n"
        "ledger = Ledger(Path(sys.argv[1]))\nasyncio.run(ledger.claim(KEY, 'e', 'm'))\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "l.db"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    with Ledger(path) as ledger:
        assert claimed(ledger).attempt == 1
        assert ledger.summary().requests == 2


def test_two_processes_pay_once(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from tests.llm.test_ledger import *
async def main():
    paid = 0
    with Ledger(Path(sys.argv[1])) as ledger:
        for number in range(60):
            key = request_key("e", "m", ask(str(number)))
            while isinstance(found := await ledger.claim(key, "e", "m"), Busy):
                await asyncio.sleep(0.001)
            if isinstance(found, Claim):
                await asyncio.sleep(0.002)
                await ledger.settle(found, REPLY)
                paid += 1
    print(paid)
asyncio.run(main())
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l.db")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sum(int(run.communicate()[0]) for run in runs) == 60


def test_full_disk_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    big = Reply(text=os.urandom(200_000).hex())
    with Ledger(path) as ledger:
        go(ledger.settle(claimed(ledger), REPLY))
        ledger._db.execute("PRAGMA max_page_count = 20")
        other = claimed(ledger, request_key("e", "m", ask("y")))
        with pytest.raises(WorkError, match="disk is full: free some space") as caught:
            go(ledger.settle(other, big))
        assert "\n" not in str(caught.value)
        ledger._db.execute("PRAGMA max_page_count = 100000")
        go(ledger.settle(other, big))  # once there is space, it goes on
        assert ledger.summary().replies == 2


def test_damage_and_wrong_places(tmp_path: Path) -> None:
    noise = tmp_path / "noise.db"
    noise.write_bytes(os.urandom(8192))
    with pytest.raises(WorkError, match="move it aside"):
        Ledger(noise)
    with pytest.raises(WorkError, match="check its folder"):
        Ledger(noise / "ledger.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(WorkError, match="can't be opened"):
        Ledger(tmp_path / "folder.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE sends (something)")
    with Ledger(tmp_path / "other.db") as ledger, pytest.raises(WorkError, match="another version"):
        claim(ledger)
    with Ledger(tmp_path / "l.db") as ledger:
        go(ledger.settle(claimed(ledger), REPLY))
        ledger._db.execute("UPDATE sends SET body = x'00'")
        with pytest.raises(WorkError, match="damaged"):
            claim(ledger)
    with pytest.raises(WorkError, match="closed"):
        ledger.summary()


def test_a_cancelled_claim_lets_go(tmp_path: Path) -> None:
    async def main() -> Reply | Claim | Busy:
        task = asyncio.create_task(ledger.claim(KEY, "e", "m"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)
        return await ledger.claim(KEY, "e", "m")

    with Ledger(tmp_path / "l.db") as ledger:
        assert isinstance(go(main()), Claim)
