import asyncio
import fcntl
import json
import re
from pathlib import Path

import pytest

from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Usage
from preceptor.llm.ledger import Claim, Ledger

USAGE = Usage(prompt_tokens=1_000_000, cached_tokens=400_000, completion_tokens=1_000)
STARTED = {"started": "2026-01-01T00:00:00.000+00:00", "stage": "label", "limits": {}, "result": {}}


@pytest.fixture
def labelling(command, monkeypatch):
    """A section that labels 500 of 1,000 cases twice each, with a cap."""
    monkeypatch.setenv("COLUMNS", "80")
    section = Path("runs/quickstart/label_round2")
    section.mkdir(parents=True)
    Path("train.jsonl").write_text("{}\n" * 1_000)
    price = {"currency": "CNY", "input": 1, "cached": None, "output": 2, "as_of": "2026-01-01"}
    teacher = {"model": "m", "cap": 20.0, "endpoint": [{"name": "e", "price": price}]}
    config = {"teacher": teacher, "limit": 500, "samples": 2}
    inputs = {"train.jsonl": [{"path": "train.jsonl", "sha256": ""}], "prompt": [{"path": "p.txt", "sha256": ""}]}
    (section / "config.json").write_text(json.dumps({**STARTED, "inputs": inputs, "config": config}))
    (section / "predictions.jsonl").write_text("{}\n" * 10)
    send("quickstart/label_round2", [Reply(text="a", usage=USAGE)] * 20, Money(0.25, "CNY"))
    return command


def send(run, outcomes, cost=None, reserve=None):
    with Ledger(Path("runs/ledger.sqlite"), run) as ledger:
        for number, outcome in enumerate(outcomes):
            claim = asyncio.run(ledger.claim(f"{run}{outcome}{number}".encode(), "e", "m", reserve))
            assert isinstance(claim, Claim)
            asyncio.run(ledger.settle(claim, outcome, cost))


def test_what_was_asked_and_paid(labelling):
    timeout = Failure(kind=FailureKind.TIMEOUT)
    send("quickstart/label_round2", [timeout] * 3, None, Money(0.5, "CNY"))
    send("quickstart/label_round2", [timeout.model_copy(update={"kind": FailureKind.PROVIDER}), None])
    code, out, _ = labelling("status")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    told = " ".join(out.split())
    assert "10 answers so far" in told
    assert "label_round2 25 20 4 20,000,000 8,000,000 20,000" in told
    assert "asked of models, counted in sends: a case tried twice counts twice" in told
    assert "failed sends: provider 1, timeout 3" in told
    assert "1 without an outcome: in flight at a stop" in told
    assert "spent 5.00 CNY, at most 1.50 CNY more in flight or of unknown cost" in told
    assert "all 13.50 CNY left of the cap of 20.00 CNY" in told
    assert "to go" not in told


def test_rate_and_time_to_go_of_a_running_section(labelling):
    send("quickstart/label_round2", [None])
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        ledger._submit(lambda: ledger._db.execute("UPDATE outcomes SET at = at - 60000")).result()
    with Path("runs/quickstart/.label_round2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = " ".join(labelling("status")[1].split())
    # 1,000 answers are owed, two replies each, less 10; 20 replies came in the minute: 99 min
    assert "1 in flight" in told
    assert re.search("20 replies a minute, about 1 h (39|40|41) min to go", told)


def test_replies_of_unknown_cost_are_told(labelling):
    send("quickstart/label_round2", [Reply(text="b")])
    told = " ".join(labelling("status")[1].split())
    assert "spent 5.00 CNY, and 1 replies of unknown cost" in told


def test_a_ledger_in_which_nothing_was_asked(labelling):
    section = Path("runs/other/label")
    section.mkdir(parents=True)
    (section / "config.json").write_text(json.dumps({**STARTED, "inputs": {}, "config": {}}))
    code, out, _ = labelling("status", "other")
    assert (code, "asked of models" in out) == (0, False)


def test_figures_are_rounded_wherever_they_stand(labelling):
    section = Path("runs/quickstart/label_round2")
    metrics = {"m": {"cases": 200, "agreement": 0.9249999999999997, "failed": 0, "models": ["m"]}, "share": 1 / 3}
    (section / "metrics.json").write_text(json.dumps(metrics))
    (section / "done.json").write_text('{"seconds": 3.2}')
    code, out, _ = labelling("status")
    assert (code, max(map(len, out.splitlines())) <= 80) == (0, True)
    assert "done in 3 s m: cases 200, agreement 0.925; share 0.3333 " in " ".join(out.split())
