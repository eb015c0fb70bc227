import asyncio
import json
import os
from pathlib import Path

import pytest

from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply
from preceptor.llm.ledger import Claim, Ledger

LEDGER = Path("runs/ledger.sqlite")


@pytest.fixture
def paid(command):
    """Two replies, a failure and a send without an outcome of a run that is there, a reply of one that is not."""
    outcomes = [Reply(text="肺炎"), Reply(text="cold"), Failure(kind=FailureKind.TIMEOUT), None]
    for run, came in (("quick/label", outcomes), ("old/label", outcomes[:1])):
        with Ledger(LEDGER, run) as ledger:
            for number, outcome in enumerate(came):
                claim = asyncio.run(ledger.claim(f"{run} {number}".encode(), "e", "m", Money(0.5, "CNY")))
                assert isinstance(claim, Claim)
                asyncio.run(ledger.settle(claim, outcome, Money(0.25, "CNY") if isinstance(outcome, Reply) else None))
    Path("runs/quick/label").mkdir(parents=True)
    return command


@pytest.mark.parametrize("words", [["verify"], ["mend"], ["export", "out.jsonl"], ["prune"]])
def test_without_a_ledger(command, words):
    code, out, err = command("ledger", *words)
    assert (code, out) == (2, "")
    assert err == "preceptor: runs/ledger.sqlite: no ledger here; name the folder of your runs with --runs\n"
    assert not LEDGER.exists()


def test_a_whole_ledger(paid):
    code, out, err = paid("ledger", "verify")
    assert (code, err) == (0, "")
    assert "3 replies, 1 failures and 1 sends without an outcome are whole" in out
    assert "nothing to mend" in paid("ledger", "mend")[1]


def test_a_damaged_ledger_is_found_and_mended(paid, caplog):
    data = bytearray(LEDGER.read_bytes())
    data[:100] = os.urandom(100)
    LEDGER.write_bytes(data)
    code, _, err = paid("ledger", "verify")
    assert code == 1
    assert "save what can be read with: preceptor ledger mend" in err
    assert len(err.splitlines()) == 1
    code, out, _ = paid("ledger", "mend")
    assert (code, "mended; 3 replies" in out) == (0, True)
    assert "3 replies were saved" in caplog.text
    code, out, _ = paid("ledger", "verify")
    assert (code, "ledger.sqlite.damaged-1: a damaged file that was kept" in out) == (0, True)


def test_export(paid):
    assert paid("ledger", "export", "all.jsonl")[:2] == (0, "all.jsonl: 5 lines\n")
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["reply", "reply", "timeout", "reply", "no outcome"]
    assert lines[0]["reply"]["text"] == "肺炎"
    assert "肺炎" in Path("all.jsonl").read_text()
    paid("ledger", "export", "old.jsonl", "--run", "old")
    assert len(Path("old.jsonl").read_text().splitlines()) == 1
    code, _, err = paid("ledger", "export", "old.jsonl", "--run", "odl")
    assert (code, "the ledger has no run 'odl'" in err) == (2, True)
    assert len(Path("old.jsonl").read_text().splitlines()) == 1, "what was there stays"


def test_prune_asks_first(paid):
    assert "nothing may go" in paid("ledger", "prune")[1]
    before = LEDGER.read_bytes()
    code, out, _ = paid("ledger", "prune", "--days", "0")
    assert "1 failures and 1 sends without an outcome, older than 0 days would go. Add --yes" in out
    code, out, _ = paid("ledger", "prune", "--gone")
    assert "no longer there: old/label" in out
    assert "and 1 replies of those runs would go. What is asked again after that is paid again. Add --yes" in out
    assert (code, LEDGER.read_bytes()) == (0, before)
    code, out, _ = paid("ledger", "prune", "--days", "0", "--gone", "--yes")
    assert (code, "are gone; 0.0 MB became 0.0 MB" in out or "are gone; " in out) == (0, True)
    assert "2 replies, 0 failures and 0 sends" in paid("ledger", "verify")[1]
    assert "nothing may go" in paid("ledger", "prune", "--days", "0", "--gone")[1]


def test_prune_while_it_is_used(paid):
    with Ledger(LEDGER):
        code, _, err = paid("ledger", "prune", "--days", "0", "--yes")
    assert (code, "another process uses it" in err) == (1, True)
