"""The rehearsal: whole recipes as a newcomer runs them, killed and repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data" / "healthai_cases.jsonl"
SMALL = (
    *("prepare.train=96", "prepare.validation=4", "prepare.test=12"),
    *("sft.epochs=1", "sft.batch_size=8", "sft.checkpoint_steps=4", "predict.max_tokens=96"),
)
SECTIONS = ("prepare", "label", "curate", "sft", "calibrate", "predict", "evaluate")
pytestmark = pytest.mark.slow


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "preceptor", *words]


def preceptor(*words: str) -> tuple[int, str]:
    ended = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["quickstart", "quickstart-zh"])
def test_the_quickstart_runs_whole_and_once(name: str, tmp_path: Path) -> None:
    words = ("run", f"recipes/{name}.yaml", "--runs", str(tmp_path))
    code, shown = preceptor(*words)
    assert code == 0, shown
    folder = tmp_path / name / "evaluate"
    metrics = json.loads((folder / "metrics.json").read_text())
    value = {model: {m: e["value"] for m, e in of.items()} for model, of in metrics.items()}
    assert {"base", "student", "teacher", "commonest", "bag_of_words", "exact"} <= set(value)
    assert value["student"]["parsed"] >= 0.98, shown
    assert value["student"]["evidence_grounded"] >= 0.9, shown
    assert value["student"]["top1"] >= 0.88 * value["exact"]["top1"], shown
    assert value["teacher"]["top1"] == value["exact"]["top1"]
    assert value["base"]["top1"] < 0.25, "the embedded student already knows medicine"
    assert {"ece", "ece_floor"} <= set(value["student"])
    for of in metrics.values():
        assert all(e["low"] <= e["value"] <= e["high"] and e["n"] for e in of.values())
    assert "<script" not in (folder / "report.html").read_text("utf-8")
    code, shown = preceptor(*words)
    assert (code, shown.count("done already")) == (0, len(SECTIONS)), shown


def test_killed_in_every_stage_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = ("run", "recipes/quickstart.yaml", *SMALL, "--runs", str(tmp_path / "whole"))
    assert preceptor(*whole)[0] == 0
    broken = ("run", "recipes/quickstart.yaml", *SMALL, "--runs", str(tmp_path / "broken"))
    for section in SECTIONS:
        assert _killed_in(section, broken, tmp_path / "broken" / "quickstart")
    code, shown = preceptor(*broken)
    assert code == 0, shown
    one, other = (tmp_path / run / "quickstart" for run in ("whole", "broken"))
    for file in ("prepare/test.jsonl", "curate/rows.jsonl", "evaluate/metrics.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    kept = [json.loads(line) for line in (other / "predict" / "predictions.jsonl").read_text().splitlines()]
    assert len({(p["model"], p["case_id"]) for p in kept}) == len(kept) == 3 * 12


def _killed_in(section: str, words: tuple[str, ...], folder: Path) -> bool:
    """Whether the run was killed after `section` began and before it was done."""
    running = subprocess.Popen(
        command(*words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    begun = {"label": "predictions.jsonl", "predict": "predictions.jsonl", "sft": "checkpoints/checkpoint-4"}
    while not _has_content(folder / section / begun.get(section, "config.json")):
        assert running.poll() is None, f"it ended before {section}"
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    return not (folder / section / "done.json").exists()


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def test_the_competitions_recipe_runs_on_the_embedded_parts(tmp_path: Path) -> None:
    source = SHARED if SHARED.exists() else _like_healthai(tmp_path / "cases.jsonl")
    code, shown = preceptor(
        *("run", "recipes/healthai.yaml", f"prepare.source={source}", "limit=24", "student=mini"),
        *("teacher.model=textbook", "teacher.endpoint=textbook", "sft.epochs=1", "predict.max_tokens=128"),
        *("--runs", str(tmp_path / "runs")),
    )
    assert code == 0, shown
    folder = tmp_path / "runs" / "healthai"
    labels = [json.loads(line) for line in (folder / "label" / "predictions.jsonl").read_text("utf-8").splitlines()]
    splits = [folder / "prepare" / f"{split}.jsonl" for split in ("train", "validation", "test")]
    assert all((p["output"] is None) != (p["failure"] is None) for p in labels)
    assert sum(len(split.read_text("utf-8").splitlines()) for split in splits) == 24
    page = (folder / "evaluate" / "report.html").read_text("utf-8")
    assert "一致" in page
    assert page.count("准确") == page.count("不是准确率"), "without gold nothing is called accuracy"
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert "agreement_top1" in metrics["student"]
    assert "top1" not in metrics["student"]


def _like_healthai(path: Path) -> Path:
    complaints = ("发热伴咳嗽3天", "反复上腹痛1周", "尿频尿急2天", "胸闷心悸半月", "右下腹痛1天", "复查血压")
    rows = (
        {"id": n, "feature_content": f"性别: 男\n年龄: {30 + n}\n主诉: {complaints[n % 6]}\n现病史: 无明显诱因出现。"}
        for n in range(30)
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_a_pretrained_model_takes_the_same_way(tmp_path: Path) -> None:
    code, shown = preceptor(
        *("run", "recipes/smollm2.yaml", "prepare.train=6", "prepare.validation=1", "prepare.test=3"),
        *("predict.models=[student]", "predict.max_tokens=48", "--runs", str(tmp_path)),
    )
    assert code == 0, shown
    metrics = json.loads((tmp_path / "smollm2" / "evaluate" / "metrics.json").read_text())
    assert metrics["student"]["parsed"]["n"] == 3
    assert (tmp_path / "smollm2" / "sft" / "adapter" / "adapter_model.safetensors").exists()
