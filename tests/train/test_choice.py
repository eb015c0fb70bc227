"""Which checkpoint is written, when training stops early, and what becomes of damaged checkpoints."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Request
from preceptor.model import load
from preceptor.model.generate import generate
from preceptor.train.config import SftConfig
from preceptor.train.fit import On
from preceptor.train.sft import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]
LORA = SftConfig(batch_size=4, epochs=2, lr=5e-3, rank=2, dropout=0.0, checkpoint_steps=1)
FULL = LORA.model_copy(update={"method": "full"})


def grades(*values: float):
    """A grader that gives each checkpoint the next of the values, whatever is answered."""
    given = iter(values)
    return lambda row, reply: next(given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def kept(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*checkpoint-*"))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


@pytest.mark.parametrize(("config", "made"), [(LORA, "adapter"), (FULL, "model")])
def test_the_best_graded_checkpoint_is_written_and_the_last_is_kept(base, tmp_path, config, made):
    """Six steps, the third of them the best, the fifth as good: the later of equals."""
    metrics = train(base, ROWS, tmp_path, config, (ROWS[:1], grades(0.1, 0.2, 0.9, 0.3, 0.9, 0.4)))
    assert kept(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    assert (metrics["chosen_step"], metrics["chosen_grade"], metrics["last_grade"]) == (5, 0.9, 0.4)
    best, last = (weights(tmp_path / "checkpoints" / name) for name in kept(tmp_path))
    written = weights(tmp_path / made)
    assert all(torch.equal(written[key], best[key]) for key in written)
    assert any(not torch.equal(written[key], last[key]) for key in written)
    assert [line["grade"] for line in lines(tmp_path) if "grade" in line] == [0.1, 0.2, 0.9, 0.3, 0.9, 0.4]


def test_without_validation_the_last_is_written_and_all_may_be_kept(base, tmp_path):
    metrics = train(base, ROWS, tmp_path, LORA.model_copy(update={"checkpoints": None}))
    assert kept(tmp_path) == [f"checkpoint-{step}" for step in range(1, 7)]
    assert metrics["chosen_step"] == 6
    assert "chosen_grade" not in metrics
    last = weights(tmp_path / "checkpoints" / "checkpoint-6")
    assert all(torch.equal(value, last[key]) for key, value in weights(tmp_path / "adapter").items())


@pytest.mark.slow
@pytest.mark.parametrize("config", [LORA, FULL])
def test_any_checkpoint_answers(base, tmp_path, config):
    """It has all that a model's folder has."""
    train(base, ROWS, tmp_path, config.model_copy(update={"checkpoints": None}))
    (reply,) = generate(load.load(tmp_path / "checkpoints" / "checkpoint-2"), [Request(messages=ROWS[0].messages)])
    assert reply.usage.completion_tokens


@pytest.mark.slow
def test_the_grader_sees_what_the_model_answers(base, tmp_path):
    """Greedily, with room for twice the longest answer, and in the rows' order; training goes on undisturbed."""
    seen = []

    def grade(row, reply):
        seen.append((row.id, reply))
        return 0.0

    train(base, ROWS, tmp_path / "graded", LORA, (ROWS[:3], grade))
    train(base, ROWS, tmp_path / "not", LORA.model_copy(update={"checkpoints": None}))
    assert [name for name, _ in seen] == ["r0", "r1", "r2"] * 6
    assert seen[0][1].usage.completion_tokens > 1
    last = weights(tmp_path / "not" / "checkpoints" / "checkpoint-6")
    assert all(torch.equal(value, last[key]) for key, value in weights(tmp_path / "graded" / "adapter").items())
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("graded", "not")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_patience_ends_a_run_and_a_kill_after_that_changes_nothing(base, tmp_path):
    """The best at step 2, and two that are no better."""
    config = LORA.model_copy(update={"patience": 2})
    metrics = train(base, ROWS, tmp_path, config, (ROWS[:1], grades(0.1, 0.5, 0.5, 0.4)))
    assert (metrics["steps"], metrics["chosen_step"]) == (4, 3)
    written = weights(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    again = train(base, ROWS, tmp_path, config, (ROWS[:1], grades()))
    assert (again["steps"], again["chosen_step"]) == (4, 3)
    assert all(torch.equal(value, written[key]) for key, value in weights(tmp_path / "adapter").items())
    with pytest.raises(UserError, match=r"patience: .* no validation_rows\.jsonl"):
        train(base, ROWS, tmp_path / "none", config)


def spoil(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["optimizer.pt", pytest.param("sha256.json", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_put_aside_and_said(base, tmp_path, name):
    """Training goes on from the one before, to the weights that it would have come to anyway."""
    train(base, ROWS, tmp_path, LORA)
    written = weights(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    spoil(tmp_path / "checkpoints" / "checkpoint-6" / name)
    said, steps = [], []
    train(base, ROWS, tmp_path, LORA, on=On(lambda step, *_: steps.append(step), note=said.append))
    assert len(said) == 1
    assert "checkpoint-6 is damaged: put aside as damaged-checkpoint-6" in said[0]
    assert steps[0] == 6
    assert all(torch.equal(value, written[key]) for key, value in weights(tmp_path / "adapter").items())
    for step in (5, 6):
        spoil(tmp_path / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(WorkError, match="no checkpoint is left that is whole; start over with --fresh"):
        train(base, ROWS, tmp_path, LORA)


@pytest.mark.parametrize("harm", ["spoiled", "gone"])
def test_the_best_checkpoint_must_be_whole(base, tmp_path, harm):
    """Else the best of those left is written, and it is said."""
    best = tmp_path / "checkpoints" / "checkpoint-3"
    config = LORA.model_copy(update={"checkpoints": 3})
    train(base, ROWS, tmp_path, config, (ROWS[:1], grades(0.1, 0.2, 0.9, 0.3, 0.5, 0.4)))
    shutil.rmtree(tmp_path / "adapter")
    if harm == "gone":
        shutil.rmtree(best)
    else:
        spoil(best / "adapter_model.safetensors")
    said = []
    metrics = train(base, ROWS, tmp_path, config, (ROWS[:1], grades()), On(note=said.append))
    told = {"spoiled": "is damaged, and put aside as damaged-checkpoint-3", "gone": "is gone"}[harm]
    assert said == [f"{best}, graded best, {told}: checkpoint-5, the best of those left, is taken"]
    assert (metrics["chosen_step"], metrics["chosen_grade"]) == (5, 0.5)
    fifth = weights(tmp_path / "checkpoints" / "checkpoint-5")
    assert all(torch.equal(value, fifth[key]) for key, value in weights(tmp_path / "adapter").items())


@pytest.mark.slow
def test_what_a_user_puts_beside_or_into_checkpoints_harms_nothing(base, tmp_path):
    train(base, ROWS, tmp_path, LORA)
    last = tmp_path / "checkpoints" / "checkpoint-6"
    shutil.copytree(last, last.with_name("checkpoint-6-keep"))
    (last / ".DS_Store").write_text("x")
    said, steps = [], []
    train(base, ROWS, tmp_path, LORA, on=On(lambda step, *_: steps.append(step), note=said.append))
    assert (said, steps) == ([], [])
    assert last.with_name("checkpoint-6-keep").is_dir()


def test_an_adapter_is_not_gone_on_with_over_another_base(base, tmp_path):
    train(base, ROWS, tmp_path, LORA)
    moved = tiny.save(tiny.qwen(seed=1), tmp_path / "moved")
    with pytest.raises(WorkError, match="checkpoint-6: learned over another base than is there now"):
        train(moved, ROWS, tmp_path, LORA)


def test_a_single_step_learns(base, tmp_path):
    """The rise of the learning rate takes none of so few steps."""
    train(base, ROWS, tmp_path, FULL.model_copy(update={"epochs": 1, "batch_size": 12}))
    before, after = weights(base), weights(tmp_path / "model")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    (line,) = lines(tmp_path)
    assert (line["step"], line["lr"]) == (1, 5e-3)


@pytest.mark.slow
def test_a_checkpoint_without_its_seal_was_being_written(base, tmp_path):
    train(base, ROWS, tmp_path, LORA)
    (tmp_path / "checkpoints" / "checkpoint-6" / "sha256.json").unlink()
    said, steps = [], []
    train(base, ROWS, tmp_path, LORA, on=On(lambda step, *_: steps.append(step), note=said.append))
    assert (said, steps[0]) == ([], 6)


def test_a_checkpoint_of_another_shape_is_one_line(base, tmp_path):
    """The state of an optimizer over other weights."""
    train(base, ROWS, tmp_path, LORA)
    with pytest.raises(WorkError, match="checkpoint-6: can't be gone on from") as caught:
        train(base, ROWS, tmp_path, LORA.model_copy(update={"rank": 4}))
    assert "\n" not in str(caught.value)


def test_memory_that_runs_out_is_one_line(base, tmp_path):
    """Real allocations that no machine has room for."""

    def grade(row, reply):
        return float(torch.empty(1 << 50)[0])

    with pytest.raises(WorkError, match="out of memory: lower batch_size") as caught:
        train(base, ROWS, tmp_path, LORA, (ROWS[:1], grade))
    assert "\n" not in str(caught.value)


def test_grading_is_no_training_time(base, tmp_path, monkeypatch):
    """An hour of grading at each checkpoint slows no training step, by what is told."""
    real, hours = time.perf_counter, []
    monkeypatch.setattr("time.perf_counter", lambda: real() + 3600 * len(hours))

    def grade(row, reply):
        hours.append(row)
        return 0.5

    metrics = train(base, ROWS, tmp_path, LORA, (ROWS[:1], grade))
    assert len(hours) == metrics["steps"] == 6
    assert metrics["seconds"] > 6 * 3600
    assert metrics["tokens_per_second"] > metrics["tokens"] / 3600
    told = [line["tokens_per_second"] for line in lines(tmp_path) if "loss" in line]
    assert min(told) > metrics["tokens"] / 3600
