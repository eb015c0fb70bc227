"""kill -9 while training, in another process, and then the weights of a run that nobody touched."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.train.config import SftConfig
from preceptor.train.sft import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]
CONFIG = SftConfig(method="full", batch_size=4, epochs=2, lr=1e-3, accumulation=1, checkpoint_steps=1)

KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from preceptor.train.fit import On
from preceptor.train.sft import train
from tests.train.test_kill import CONFIG, ROWS
def kill(step, total, values):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train(Path(sys.argv[1]), ROWS, Path(sys.argv[2]), CONFIG, on=On(kill))
"""


@pytest.mark.slow
def test_killed_and_resumed_is_exactly_unbroken(tmp_path):
    torch.set_num_threads(1)
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, base, broken],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (broken / "model").exists()
    assert (broken / "checkpoints" / "checkpoint-4").is_dir()
    train(base, ROWS, broken, CONFIG)
    train(base, ROWS, unbroken, CONFIG)
    left, right = (load_file(out / "model" / "model.safetensors") for out in (broken, unbroken))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
