import asyncio
import hashlib
from pathlib import Path

import pytest

from preceptor.core.errors import WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Usage
from preceptor.llm.ledger import Claim, Ledger
from preceptor.llm.stored import Lengths, Stored


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def send(path, run, outcomes, cost=None, reserve=None):
    with Ledger(path, run) as ledger:
        for number, outcome in enumerate(outcomes):
            key = hashlib.md5(f"{run}{outcome}{number}".encode(), usedforsecurity=False).digest()
            claim = asyncio.run(ledger.claim(key, "e", "m", reserve))
            assert isinstance(claim, Claim)
            asyncio.run(ledger.settle(claim, outcome, cost))


def said(completion, thinking=0):
    return Reply(text="a", usage=Usage(prompt_tokens=9, completion_tokens=completion, thinking_tokens=thinking))


def test_where_there_is_no_ledger_none_is_made(path):
    with Stored(path) as stored:
        assert stored.reply(b"0" * 16) is None
        assert stored.lengths("e", "m", "r/s") is None
        assert (stored.committed("r", "CNY"), stored.pace("e", "m")) == (0, None)
    assert not list(path.parent.iterdir())


def test_lengths_are_the_runs_own_or_else_of_all(path):
    send(path, "r/s", [said(10), said(30, 8), Failure(kind=FailureKind.TIMEOUT)])
    send(path, "q/s", [said(50)])
    with Stored(path) as stored:
        assert stored.lengths("e", "m", "r/s") == Lengths(2, 20.0, 16.0, own=True)
        assert stored.lengths("e", "m", "x/y") == Lengths(3, 30.0, pytest.approx(82 / 3), own=False)
        assert stored.lengths("e", "other", "r/s") is None
        assert stored.lengths("other", "m", "r/s") is None
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]


def test_what_a_recipe_has_committed(path):
    send(path, "r/s", [said(1)], Money(0.25, "CNY"))
    send(path, "r/t", [Failure(kind=FailureKind.TIMEOUT)], None, Money(0.5, "CNY"))
    send(path, "r/u", [said(2)], Money(8, "USD"))
    send(path, "r2/s", [said(3)], Money(16, "CNY"))
    with Stored(path) as stored:
        assert stored.committed("r", "CNY") == 0.75
        assert stored.committed("r", "USD") == 8
        assert stored.committed("x", "CNY") == 0


def test_a_damaged_reply_is_none(path):
    send(path, "r/s", [said(10)])
    with Ledger(path) as ledger:
        key = ledger._submit(lambda: ledger._db.execute("SELECT request FROM outcomes").fetchone()[0]).result()
    with Stored(path) as stored:
        assert stored.reply(key).text == "a"
    with Ledger(path) as ledger:
        ledger._submit(lambda: ledger._db.execute("UPDATE outcomes SET checksum = checksum - 1")).result()
    with Stored(path) as stored:
        assert stored.reply(key) is None


@pytest.mark.parametrize(
    ("gaps", "expected"), [([3000] * 12, 20), ([3000] * 6 + [10**8] + [3000] * 6, 20), ([3000], None)]
)
def test_pace_is_that_of_the_times_in_which_replies_came(path, gaps, expected):
    send(path, "r/s", [said(n) for n in range(len(gaps) + 1)])
    with Ledger(path) as ledger:
        for number in range(len(gaps) + 1):
            query = "UPDATE outcomes SET at = ? WHERE id = ?"
            ledger._submit(lambda n=number, q=query: ledger._db.execute(q, (sum(gaps[:n]), n + 1))).result()
    with Stored(path) as stored:
        assert stored.pace("e", "m") == expected


@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_what_is_no_ledger_is_said_in_one_line(path, content):
    path.write_bytes(content)
    with pytest.raises(WorkError, match="`preceptor status` mends what a crash or an earlier version left"):
        Stored(Path(path))
    assert path.read_bytes() == content
