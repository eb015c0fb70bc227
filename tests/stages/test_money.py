"""What a labeller spends: never more than the cap, and what it says it spent is what the server took."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina

from preceptor.core.records import Case, Prediction
from preceptor.llm.ledger import Ledger
from preceptor.stages.base import LEDGER, read_records, write_records
from tests.llm.server import Hostile

REPLY = 7 * 1.0 + 3 * 10.0
"""Millionths that a reply of the server costs at these prices: 7 tokens in, 3 out."""


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with Hostile() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cases = [
        Case(id=f"c{n}", text=f"Case {n}. Cough for three days.", language="en", source="s", group=f"g{n}")
        for n in range(40)
    ]
    write_records(tmp_path / "train.jsonl", cases)
    return tmp_path


def recipe(server: Hostile, cap: float | None, **more: object) -> None:
    price = {"currency": "CNY", "input": 1, "output": 10, "as_of": "2026-11-01"}
    endpoint = {"url": server.url, "name": "e", "price": price, "answers_as": ["m-1"], **more}
    teacher = {"model": "m", "endpoint": endpoint, "cap": cap}
    label = {"from": "train.jsonl", "concurrency": 8, "max_tokens": 20}
    Path("r.yaml").write_text(json.dumps({"teacher": teacher, "label": label}))


def spent() -> float:
    with Ledger(Path("runs") / LEDGER) as ledger:
        return ledger.summary("r/label").spent.get("CNY", 0.0)


def test_the_cap_stops_before_it_is_passed_and_no_case_is_lost(folder: Path, hostile: Hostile, command) -> None:
    cap = 25 * REPLY / 1e6
    recipe(hostile, cap)
    code, _, err = command("label", "r.yaml")
    said = " ".join(err.split())
    assert code == 1
    assert "cap" in said
    assert "teacher.cap" in said
    bought = len(hostile.bodies)
    assert 0 < bought < 25
    assert spent() == pytest.approx(bought * REPLY / 1e6)
    assert spent() <= cap
    told = command("status")[1]
    assert "CNY" in told
    recipe(hostile, 1.0)  # the cap is raised, and nothing is paid twice
    assert command("label", "r.yaml")[0] == 0
    assert len(hostile.bodies) == 40
    assert spent() == pytest.approx(40 * REPLY / 1e6)
    predictions = list(read_records(Path("runs/r/label/predictions.jsonl"), Prediction))
    assert [p.case_id for p in predictions] == [f"c{n}" for n in range(40)]
    assert all(p.output for p in predictions)


def test_a_cap_without_a_price_is_refused(folder: Path, hostile: Hostile, command) -> None:
    recipe(hostile, 1.0, price=None)
    code, _, err = command("label", "r.yaml")
    assert (code, "cap: it needs the price of every endpoint" in " ".join(err.split())) == (2, True)
    assert not hostile.bodies


def test_a_reply_of_unknown_length_counts_at_its_most(folder: Path, command) -> None:
    with Hostile() as server:
        cases = [
            Case(id=f"c{n}", text=f"Case {n}.\ndo: nousage", language="en", source="s", group=f"g{n}") for n in range(4)
        ]
        write_records(folder / "train.jsonl", cases)
        recipe(server, 1.0)
        assert command("label", "r.yaml")[0] == 0
    with Ledger(Path("runs") / LEDGER) as ledger:
        account = ledger.summary("r/label")
    assert account.spent.get("CNY", 0.0) == 0.0
    assert account.possible["CNY"] > 4 * 20 * 10 / 1e6  # at least the reply's limit
    assert account.unpriced == 4


def test_terms_that_forbid_distillation_are_held(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-1")
    for endpoint, why in (("openai", "do not allow"), ("vllm", "are not known to allow")):
        text = {
            "rules": "open-teacher",
            "teacher": {"model": "m", "endpoint": endpoint},
            "label": {"from": "train.jsonl"},
        }
        Path("r.yaml").write_text(json.dumps(text))
        code, _, err = command("label", "r.yaml")
        assert (code, why in " ".join(err.split())) == (2, True), err
    text["teacher"]["endpoint"] = {"preset": "vllm", "distillation": True, "url": "http://127.0.0.1:1/v1"}
    Path("r.yaml").write_text(json.dumps(text))
    with stamina.set_testing(True, attempts=2):  # no waits
        code, _, err = command("label", "r.yaml")
    assert (code, "can't be reached" in " ".join(err.split())) == (1, True), err


def test_what_failed_is_tried_again_and_that_alone(folder: Path, hostile: Hostile, command) -> None:
    acts = {0: "length", 1: "400", 2: "refusal, ok", 3: "ok"}
    cases = [
        Case(id=f"c{n}", text=f"Case {n}.\ndo: {act}", language="en", source="s", group=f"g{n}")
        for n, act in acts.items()
    ]
    write_records(folder / "train.jsonl", cases)
    recipe(hostile, None)
    code, out, _ = command("label", "r.yaml")
    assert code == 0
    assert "3 failed" in out
    assert "--retry" in out
    sent = len(hostile.bodies)
    assert command("label", "r.yaml")[0] == 0
    assert len(hostile.bodies) == sent  # without the word nothing is asked again
    code, out, err = command("label", "r.yaml", "--retry", "label.max_tokens=999")
    assert code == 0, err
    assert "3 that failed are tried again" in " ".join(err.split())
    assert len(hostile.bodies) == sent + 3
    assert {body["max_tokens"] for body in hostile.bodies[sent:]} == {999}
    predictions = list(read_records(Path("runs/r/label/predictions.jsonl"), Prediction))
    assert [(p.case_id, p.output is not None) for p in predictions] == [
        ("c0", False),
        ("c1", False),
        ("c2", True),
        ("c3", True),
    ]
    assert len(list(read_records(Path("runs/r/label/failed.jsonl"), Prediction))) == 3


def test_what_was_tried_again_reaches_those_who_read_it(folder: Path, hostile: Hostile, command) -> None:
    cases = [
        Case(id=f"c{n}", text=f"Case {n}.\ndo: {act}", language="en", source="s", group=f"g{n}")
        for n, act in enumerate(("ok", "refusal, ok"))
    ]
    write_records(folder / "train.jsonl", cases)
    recipe(hostile, None)
    text = json.loads(Path("r.yaml").read_text()) | {"evaluate": {"from": ["train.jsonl", "label"]}}
    Path("r.yaml").write_text(json.dumps(text))
    assert command("run", "r.yaml")[0] == 0
    metrics = Path("runs/r/evaluate/metrics.json")
    before = json.loads(metrics.read_text())["teacher"]["parsed"]["value"]
    code, _, err = command("run", "r.yaml", "--retry")
    assert code == 0, err
    after = json.loads(metrics.read_text())["teacher"]["parsed"]["value"]
    assert (before, after) == (0.5, 1.0)
    assert command("run", "r.yaml")[0] == 0
