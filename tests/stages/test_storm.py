"""Labelling through everything at once: a server that does badly at random, and a labeller that is killed again, again.

What is paid for is stored, and what is stored is never asked again: case by case, the outcomes in the ledger are at
most the requests that the server counted, and these at most the intents in the ledger. The gap was in flight.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preceptor.core.records import Case, Message, Prediction, Request
from preceptor.llm.ledger import request_key
from preceptor.stages.base import read_records, write_records
from preceptor.tasks import prompts, strategies
from tests.llm.server import Hostile

CASES, KILLS, CONCURRENCY = 2_000, 20, 64


def start(recipe: Path, runs: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "preceptor", "label", str(recipe), "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.1)  # what was sent may still be on its way to the server


def sends(ledger: Path) -> list[tuple[bytes, int, str | None]]:
    with sqlite3.connect(ledger) as db:
        return db.execute("SELECT request, attempt, kind FROM sends ORDER BY request, attempt").fetchall()


def counted(server: Hostile, like: Request) -> Counter[bytes]:
    """The requests that the server received in full, by their key in the ledger."""
    keys: dict[str, bytes] = {}
    found: Counter[bytes] = Counter()
    for body in list(server.bodies):
        plain = json.dumps(body["messages"])
        if plain not in keys:
            messages = tuple(Message.model_validate(message) for message in body["messages"])
            keys[plain] = request_key("hostile", "m", like.model_copy(update={"messages": messages}))
        found[keys[plain]] += 1
    return found


def first_request(case: Case) -> Request:
    """What the labeller asks first."""
    asking = strategies.Asking(prompts.load("diagnosis", "zero_shot", "en"), "teacher", strategies.Sampling())
    return next(strategies.zero_shot(case, asking))


def hold(ledger: Path, server: Hostile, like: Request, in_flight: int) -> None:
    """The promise, case by case and in all."""
    at_server, rows = counted(server, like), sends(ledger)
    intents = Counter(request for request, _, _ in rows)
    outcomes = Counter(request for request, _, kind in rows if kind)
    assert at_server.keys() <= intents.keys()
    for request, count in intents.items():
        assert outcomes[request] <= at_server[request] <= count
    assert at_server.total() - outcomes.total() <= in_flight
    replied: dict[bytes, int] = {}
    for request, attempt, kind in rows:
        assert request not in replied, "sent again after its reply was stored"
        if kind == "reply":
            replied[request] = attempt


@pytest.mark.slow
def test_every_case_ends_labelled_or_with_a_named_failure(tmp_path: Path) -> None:
    rng, runs, recipe = random.Random(11), tmp_path / "runs", tmp_path / "storm.yaml"
    cases = [
        Case(id=f"c{n}", text=f"Case {n}. Cough for three days.\ndo: any", language="en", source="storm", group=f"g{n}")
        for n in range(CASES)
    ]
    write_records(tmp_path / "train.jsonl", cases)
    like, ledger = first_request(cases[0]), runs / "ledger.sqlite"
    with Hostile(delay=0.05, seed=3) as server:
        endpoint: dict[str, Any] = {"url": server.url, "name": "hostile", "timeout": 1, "answers_as": ["m-1"]}
        label = {"from": str(tmp_path / "train.jsonl"), "concurrency": CONCURRENCY}
        recipe.write_text(json.dumps({"teacher": {"model": "m", "endpoint": endpoint}, "label": label}))
        for kills in range(1, KILLS + 1):
            before = len(server.bodies)
            process = start(recipe, runs)
            while len(server.bodies) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.5))
            assert process.poll() is None, process.communicate()[0].decode()
            kill(process)
            hold(ledger, server, like, in_flight=CONCURRENCY * kills)
        process = start(recipe, runs)
        told = process.communicate()[0].decode()
        assert process.returncode == 0, told
        hold(ledger, server, like, in_flight=CONCURRENCY * KILLS)
        predictions = list(read_records(runs / "storm/label/predictions.jsonl", Prediction))
        assert [p.case_id for p in predictions] == [case.id for case in cases]
        labelled = sum(p.output is not None for p in predictions)
        failures = Counter(p.failure.kind.value for p in predictions if p.failure)
        assert labelled + failures.total() == CASES
        assert labelled > CASES // 2
        assert set(failures) <= {"provider", "timeout", "empty", "truncated", "refused", "unparsed"}
        replies = {p.reply for p in predictions if p.output}
        assert len(replies) == labelled  # each label has a reply of its own
        quiet = len(server.bodies)
        process = start(recipe, runs)
        assert b"done already" in process.communicate()[0]
        assert len(server.bodies) == quiet
