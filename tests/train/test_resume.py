"""A run that stopped and goes on ends with the weights of one that nobody touched."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.train.config import SftConfig
from preceptor.train.fit import On
from preceptor.train.sft import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]
LORA = SftConfig(batch_size=4, epochs=2, lr=1e-3, dropout=0.1, rank=2, checkpoint_steps=1)
FULL = LORA.model_copy(update={"method": "full", "dropout": 0.0, "embedding_lr": 5e-3})
PACKED = FULL.model_copy(update={"packing": True, "batch_size": 5, "dropout": 0.2})
QLORA = LORA.model_copy(update={"method": "qlora", "optimizer": "adamw_8bit", "gradient_checkpointing": True})
ACCUMULATED = LORA.model_copy(update={"batch_size": 2, "accumulation": 4, "epochs": 3})


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """The folder of a run that nobody touched, made once a configuration."""

    @cache
    def made(config: SftConfig) -> Path:
        out = tmp_path_factory.mktemp("unbroken")
        train(base, ROWS, out, config)
        return out

    return made


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What was learnt."""
    return load_file(next(out.glob("*/*.safetensors")))


def curve(out: Path) -> list[tuple[int, float]]:
    """Steps and their losses."""
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "metrics.jsonl").open())]


def same(a: Path, b: Path) -> bool:
    """Exactly equal weights."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class _KillError(Exception):
    """Stands for a kill that leaves checkpoints behind."""


@pytest.mark.parametrize(
    ("config", "at"),
    [
        (LORA, 5),
        (PACKED, 4),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((LORA, 4), (FULL, 3), (QLORA, 4), (ACCUMULATED, 4))),
    ],
)
def test_resumed_is_exactly_unbroken(base, unbroken, tmp_path, config, at):
    """Six steps, against some and a resume, at an epoch's end or amid one: equal to the last bit."""

    def stop(step, total, values):
        if step == at:
            raise _KillError

    with pytest.raises(_KillError):
        train(base, ROWS, tmp_path / "broken", config, on=On(stop))
    half = tmp_path / "broken" / "checkpoints" / f"checkpoint-{at}"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"torn")  # as a kill leaves it
    steps = []
    train(base, ROWS, tmp_path / "broken", config, on=On(lambda step, total, values: steps.append(step)))
    assert steps[0] == at
    assert steps[-1] >= 5
    assert same(unbroken(config), tmp_path / "broken")
    assert curve(tmp_path / "broken") == curve(unbroken(config))


def test_a_kill_before_the_first_checkpoint_is_told(base, unbroken, tmp_path):
    """Nothing to go on from: it says so, and begins at the beginning."""
    config = LORA.model_copy(update={"checkpoint_steps": 100})

    def stop(step, total, values):
        if step == 2:
            raise _KillError

    with pytest.raises(_KillError):
        train(base, ROWS, tmp_path, config, on=On(stop))
    steps, said = [], []
    train(base, ROWS, tmp_path, config, on=On(lambda step, total, values: steps.append(step), note=said.append))
    assert steps[0] == 1
    assert said == ["no checkpoint was reached before (they are 100 steps apart): from the beginning"]
    assert same(unbroken(LORA), tmp_path)
