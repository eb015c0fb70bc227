"""The ledger checked, read out and made smaller."""

import asyncio
import random
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from preceptor.core.errors import WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Token, Usage
from preceptor.llm import upkeep
from preceptor.llm.ledger import Claim, Ledger

REPLY = Reply(text="肺炎", thinking="hm", usage=Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=2))
TIMEOUT = Failure(kind=FailureKind.TIMEOUT, detail="slow")


def send(ledger: Ledger, number: int, outcome: Any, reserve: Money | None = None, cost: Money | None = None) -> None:
    async def one() -> None:
        claim = await ledger.claim(number.to_bytes(16, "big"), "e", "m", reserve)
        assert isinstance(claim, Claim)
        await ledger.settle(claim, outcome, cost)

    asyncio.run(one())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "ledger.sqlite"
    with Ledger(path, "quick/label") as ledger:
        ledger.attest("e", "public", "api.example.com")
        send(ledger, 1, REPLY, Money(1, "CNY"), Money(0.5, "CNY"))
        send(ledger, 2, TIMEOUT, Money(1, "CNY"))
        send(ledger, 2, REPLY.model_copy(update={"tokens": (Token(utf8=b"\xe8", logprob=-0.5),)}))
        send(ledger, 3, None, Money(2, "CNY"))
    with Ledger(path, "old/label") as ledger:
        send(ledger, 4, REPLY, Money(1, "USD"), Money(0.25, "USD"))
        send(ledger, 5, None)
    return path


def test_a_whole_ledger(path: Path) -> None:
    assert upkeep.verify(path) == upkeep.Health(replies=3, failures=1, intents=2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE outcomes SET body = x'00' WHERE id = 1", "1 rows are damaged, and count as not there"),
        ("UPDATE outcomes SET request = x'00' WHERE id = 1", "1 rows are damaged"),
        ("UPDATE outcomes SET attempt = attempt + 7, kind = 'timeout'", "4 rows are damaged"),
        ("UPDATE outcomes SET spent = 0 WHERE id = 1", "1 rows are damaged"),
        ("UPDATE intents SET possible = 0 WHERE possible > 0", "1 rows are damaged"),
        ("UPDATE accounts SET spent = spent + 1", "the accounts are not those of its rows"),
        ("DELETE FROM accounts", "the accounts are not those of its rows"),
        ("DROP TRIGGER outcomes_INSERT", "it can't be read to its end: its header or schema is damaged"),
        ("PRAGMA user_version = 3", "it can't be read to its end: its header or schema is damaged"),
    ],
)
def test_what_is_not_as_it_was_made_is_found(path: Path, change: str, problem: str) -> None:
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute(change)
    assert [found[: len(problem)] for found in upkeep.verify(path).problems] == [problem]


def test_a_damaged_reply_is_asked_again(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE outcomes SET body = x'00' WHERE id = 1")
    db.close()
    with Ledger(path) as ledger:
        claim = asyncio.run(ledger.claim((1).to_bytes(16, "big"), "e", "m"))
        assert isinstance(claim, Claim)
        assert claim.attempt == 1
        assert ledger.find(f"{1:032x}-0") is None
        asyncio.run(ledger.settle(claim, REPLY))
        assert isinstance(asyncio.run(ledger.claim((1).to_bytes(16, "big"), "e", "m")), Reply)
    assert [line is None for line in upkeep.export(path)].count(True) == 1


def test_all_sends_are_read_out(path: Path) -> None:
    lines = [line for line in upkeep.export(path) if line]
    times = [line.pop("at") for line in lines]
    assert all(time.endswith("+00:00") for time in times)
    quick = {"run": "quick/label", "endpoint": "e", "model": "m"}
    usage = {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 2, "thinking_tokens": 0}
    said = {"text": "肺炎", "thinking": "hm", "finish": "stop", "model": "", "tokens": [], "cut": False}
    token = {"utf8": "6A==", "logprob": -0.5, "alternatives": []}
    assert lines == [
        {"attested": "public", "run": "quick/label", "endpoint": "e", "host": "api.example.com"},
        {
            "key": f"{1:032x}-0",
            **quick,
            "kind": "reply",
            "reply": said,
            "usage": usage,
            "spent": 0.5,
            "currency": "CNY",
        },
        {"key": f"{2:032x}-0", **quick, "kind": "timeout", "detail": "slow", "possible": 1.0, "currency": "CNY"},
        {"key": f"{2:032x}-1", **quick, "kind": "reply", "reply": {**said, "tokens": [token]}, "usage": usage},
        {
            "key": f"{4:032x}-0",
            **quick,
            "run": "old/label",
            "kind": "reply",
            "reply": said,
            "usage": usage,
            "spent": 0.25,
            "currency": "USD",
        },
        {"key": f"{3:032x}-0", **quick, "kind": "no outcome", "possible": 2.0, "currency": "CNY"},
        {"key": f"{5:032x}-0", **quick, "run": "old/label", "kind": "no outcome"},
    ]
    counts = {run: len(list(upkeep.export(path, run))) for run in ("quick", "quick/label", "qui", "old/label")}
    assert counts == {"quick": 5, "quick/label": 5, "qui": 0, "old/label": 2}


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    async def fill(ledger: Ledger) -> None:
        for start in range(0, 3_000, 500):
            claims = await asyncio.gather(
                *(ledger.claim(n.to_bytes(16, "big"), "e", "m") for n in range(start, start + 500))
            )
            await asyncio.gather(*(ledger.settle(claim, REPLY) for claim in claims if isinstance(claim, Claim)))

    tracemalloc.start()
    try:
        with Ledger(tmp_path / "l.db") as ledger:
            asyncio.run(fill(ledger))
        assert sum(1 for _ in upkeep.export(tmp_path / "l.db")) == 3_000
        assert upkeep.verify(tmp_path / "l.db").replies == 3_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_only_what_is_old_and_brought_nothing_goes(path: Path) -> None:
    assert upkeep.prunable(path, 30, ()) == upkeep.Prunable()
    found = upkeep.prunable(path, 0, ())
    assert found == upkeep.Prunable(failures=1, intents=2)
    with Ledger(path) as ledger:
        before = ledger.summary()
    upkeep.prune(path, 0, ())
    assert upkeep.verify(path) == upkeep.Health(replies=3)
    with Ledger(path) as ledger:
        assert ledger.summary() == before, "what it cost stays known"
        claim = asyncio.run(ledger.claim((2).to_bytes(16, "big"), "e", "m"))
        assert isinstance(claim, Reply)


def test_of_runs_that_are_gone_all_goes(path: Path) -> None:
    (path.parent / "quick" / "label").mkdir(parents=True)
    gone = upkeep.missing(path, path.parent)
    assert gone == ["old/label"]
    assert upkeep.prunable(path, 30, gone) == upkeep.Prunable(replies=1, intents=1)
    upkeep.prune(path, 30, gone)
    assert upkeep.verify(path) == upkeep.Health(replies=2, failures=1, intents=1)
    with Ledger(path) as ledger:
        assert ledger.summary("old/label").spent == {"USD": 0.25}


def test_space_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with Ledger(path) as ledger:
        send(ledger, 0, REPLY)
        for number in range(1, 200):
            send(ledger, number, Failure(kind=FailureKind.PROVIDER, detail=random.Random(number).randbytes(900).hex()))
    before = path.stat().st_size
    upkeep.prune(path, 0, ())
    assert path.stat().st_size < before / 3


def test_a_ledger_in_use_is_not_pruned(path: Path) -> None:
    with Ledger(path), pytest.raises(WorkError, match="another process uses it: wait for it"):
        upkeep.prune(path, 0, ())
    assert upkeep.verify(path).intents == 2
