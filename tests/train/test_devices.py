"""Several processes learn what one does, as they are started by a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.core.errors import UserError
from preceptor.stages.base import write_records
from preceptor.train import world
from preceptor.train.config import SftConfig
from tests.model import tiny
from tests.train import devices

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCH = ROOT / "recipes" / "launch"
TWO = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "-m")
SILENTLY_ONE = (BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "-m")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RECIPE = """
student: ./base
sft: {from: ./own, method: full, epochs: 4, lr: 1e-3, batch_size: 2, accumulation: 2, checkpoint_steps: 2}
evaluate: {from: ./own}
"""


def curve(out: Path) -> list[tuple[int, str, float]]:
    """What was measured at which step, apart from what a clock measures."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [(line["step"], key, line[key]) for line in lines for key in ("loss", "lr", "grade") if key in line]


def assert_alike(one: Path, other: Path) -> None:
    """The same curve, the same files and the same weights, to 1e-5."""
    assert [at[:2] for at in curve(one)] == [at[:2] for at in curve(other)]
    assert [at[2] for at in curve(other)] == pytest.approx([at[2] for at in curve(one)], abs=1e-5)
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) >= 2
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=0)


def launch(*words: object, cwd: Path | None = None) -> tuple[int, list[str], list[str]]:
    """A launcher's exit code, stdout, and what its processes wrote to stderr (a launcher adds words of its own)."""
    done = subprocess.run(
        list(map(str, words)), env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    own = [
        line for line in done.stderr.splitlines() if line.startswith(("preceptor:", "sft", "[rank", "[transformers"))
    ]
    return done.returncode, done.stdout.splitlines(), own


@pytest.mark.slow
def test_two_learn_what_one_does(base, tmp_path):
    """Rows that two can't share evenly, accumulation, packing, grades, an adapter and all weights."""
    code, _, said = launch(*TWO, "tests.train.devices", base, tmp_path / "two", *devices.CONFIGS)
    assert (code, said) == (0, [])
    for name in devices.CONFIGS:
        metrics = devices.learn(base, tmp_path / "one", name)
        assert metrics["steps"] > 3
        assert_alike(tmp_path / "one" / name, tmp_path / "two" / name)


@pytest.fixture
def recipe(tmp_path):
    """A folder with a recipe, its base and its rows."""
    tiny.save(tiny.qwen(), tmp_path / "base")
    (tmp_path / "own").mkdir()
    write_records(tmp_path / "own" / "rows.jsonl", devices.ROWS)
    write_records(tmp_path / "own" / "validation_rows.jsonl", devices.VALIDATION)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def interrupted(recipe: Path, runs: str, sign: signal.Signals, whom: str, *words: object) -> tuple[int, str]:
    """A run that is sent a signal once it has a checkpoint: the launcher's exit code, and stderr."""
    words = (*words, "sft", "r.yaml", "--runs", runs)
    with (recipe / "err").open("w") as err:
        process = subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, cwd=recipe, stdout=err, stderr=err)
        end = time.monotonic() + 120
        while not list((recipe / runs).glob("r/sft/checkpoints/*/sha256.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        ranks = workers(process.pid)
        assert sorted(ranks) == [0, 1]
        ends = {"launcher": [process.pid], "all": [process.pid, *ranks.values()]}.get(whom) or [ranks[int(whom)]]
        for pid in ends:
            os.kill(pid, sign)
        code = process.wait(60)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks.values()):
        assert time.monotonic() < end, "a process outlives the others"
        time.sleep(0.1)
    return code, (recipe / "err").read_text()


def workers(launcher: int) -> dict[int, int]:
    """A launcher's processes by their rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)
        if parent == launcher and rank is not None:
            found[rank] = int(path.name)
    return found


@pytest.mark.slow
def test_a_launched_run_is_one_run(recipe):
    """One process locks, decides, speaks and writes; a second start skips; another request is refused in one line."""
    start = (*TWO, "preceptor", "sft", "r.yaml")
    code, out, said = launch(*start, cwd=recipe)
    assert (code, len(out)) == (0, 2)
    assert [line for line in said if "starts" in line or "done in" in line] == [said[0], said[-1]]
    folder = recipe / "runs" / "r" / "sft"
    assert json.loads((folder / "metrics.json").read_text())["devices"] == 2
    assert "done in" in (folder / "log.1.txt").read_text()
    alone = subprocess.run(
        [sys.executable, "-m", "preceptor", "sft", "r.yaml", "--runs", "alone"], env=ENVIRONMENT, cwd=recipe, check=True
    )
    assert alone.returncode == 0
    assert_alike(recipe / "alone" / "r" / "sft", folder)

    assert launch(*start, cwd=recipe) == (0, [], [f"sft: done already, in {duration(folder)} (runs/r/sft)"])
    code, _, said = launch(*start, "sft.lr=2e-3", cwd=recipe)
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("preceptor: runs/r/sft was made from another request: lr was 0.001, now 0.002.")


def duration(folder: Path) -> str:
    return f"{json.loads((folder / 'done.json').read_text())['seconds']:.1f} s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            (*TWO, "preceptor", "run", "r.yaml"),
            "preceptor: evaluate: the launcher started 2 processes, and only training is shared among devices",
        ),
        ((*TWO, "preceptor", "sft", "none.yaml"), "preceptor: none.yaml: no such recipe"),
        (
            (*TWO, "preceptor", "sft", "r.yaml", "sft.devices=4"),
            "preceptor: devices: 4 were asked for, and 2 are here; start with: torchrun --nproc_per_node 4",
        ),
        (
            (*TWO, "preceptor", "sft", "r.yaml", "sft.accumulation=3"),
            "preceptor: accumulation: 3 batches a step can't be shared by 2 devices; set it to a multiple of 2",
        ),
        (  # the library starts one process here, and doesn't say so
            (*SILENTLY_ONE, "preceptor", "sft", "r.yaml", "sft.devices=2"),
            "preceptor: devices: 2 were asked for, and 1 is here; start with: torchrun --nproc_per_node 2",
        ),
    ],
)
def test_what_is_refused_is_one_line(recipe, words, line):
    code, out, said = launch(*words, cwd=recipe)
    assert (code, out) == (1, [])
    assert [told[: len(line)] for told in said if not told.startswith("sft: ")] == [line]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["0", "1", "all"])
def test_killed_and_resumed_is_unbroken(recipe, whom):
    """A process that dies ends the others, in one line at most: the launcher, who names it, may be quicker.

    The same command then ends with an unbroken run's weights.
    """
    code, err = interrupted(recipe, "broken", signal.SIGKILL, whom, *TWO, "preceptor")
    assert code == (-signal.SIGKILL if whom == "all" else 1)
    said = [line for line in err.splitlines() if line.startswith("preceptor:")]
    assert [line for line in said if "one of the 2 processes is gone" not in line] == []
    assert len(said) <= (whom != "all")
    assert whom == "all" or "exitcode  : -9" in err
    assert not (recipe / "broken" / "r" / "sft" / "model").exists()
    for runs in ("broken", "unbroken"):
        assert launch(*TWO, "preceptor", "sft", "r.yaml", "--runs", runs, cwd=recipe)[0] == 0
    assert_alike(recipe / "unbroken" / "r" / "sft", recipe / "broken" / "r" / "sft")


@pytest.mark.slow
def test_ctrl_c_ends_all_with_one_line(recipe):
    code, err = interrupted(recipe, "runs", signal.SIGINT, "launcher", *TWO, "preceptor")
    assert code != 0
    assert err.count("preceptor: stopped; the same command goes on from here") == 1


def config(name: str) -> tuple[object, ...]:
    return (BIN / "accelerate", "launch", "--config_file", LAUNCH / name, "-m")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_shared_weights_learn_what_whole_ones_do(recipe, name):
    """All weights, their embeddings faster, and an adapter; killed and resumed; the best of graded checkpoints."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    text = RECIPE.replace("checkpoint_steps", "embedding_lr: 3e-3, checkpoint_steps")
    lora = (
        "sft_lora: {from: ./own, rank: 2, dropout: 0, lr: 1e-3, batch_size: 2, accumulation: 2, checkpoint_steps: 5}\n"
    )
    (recipe / "r.yaml").write_text(text + lora)
    shared = (*config(name), "tests.train.sharded")
    interrupted(recipe, "shared", signal.SIGKILL, "1", *shared)
    code, _, said = launch(*shared, "sft", "r.yaml", "--runs", "shared", cwd=recipe)
    assert code == 0
    assert said[0].startswith("sft: goes on where it was")
    assert launch(sys.executable, "-m", "preceptor", "sft", "r.yaml", cwd=recipe)[0] == 0
    for section in ("sft", "sft_lora"):
        assert_alike(recipe / "runs" / "r" / section, recipe / "shared" / "r" / section)
    checkpoint = next((recipe / "shared" / "r" / "sft" / "checkpoints").iterdir())
    assert list(checkpoint.glob("*/*rank_1_*")) or list(checkpoint.glob("*/__1_0.distcp"))  # the second one's share


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO_3 = {**ZERO_2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("launcher", "how", "line"),
    [
        (SHARDED, {"method": "qlora"}, "method: qlora: FSDP2 would copy the 4-bit weights to each GPU"),
        (ZERO_3, {"method": "qlora"}, "method: qlora: ZeRO-3 would copy the 4-bit weights to each GPU"),
        (ZERO_2, {"method": "qlora"}, ""),
        ({}, {"method": "qlora", "optimizer": "adamw_8bit", "compile": True, "gradient_checkpointing": True}, ""),
        (SHARDED, {"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit doesn't know shared weights, as FSDP2 has them"),
        (ZERO_2, {"optimizer": "paged_adamw_8bit"}, "optimizer: paged_adamw_8bit doesn't know .* as ZeRO-2 has them"),
        (SHARDED, {"compile": True}, "compile: was not made for weights that FSDP2 gathers layer by layer"),
        (SHARDED, {"gradient_checkpointing": True}, ""),
        (
            {**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"gradient_checkpointing": True},
            "gradient_checkpointing: the launcher's configuration sets fsdp_activation_checkpointing too; drop one",
        ),
        ({**SHARDED, "FSDP_VERSION": "1"}, {}, "the launcher's configuration: set fsdp_version: 2"),
    ],
)
def test_what_does_not_go_together_is_refused(monkeypatch, launcher, how, line):
    monkeypatch.setattr(world, "find_spec", lambda name: object())  # DeepSpeed need not be there to be refused
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    told = SftConfig.model_validate(how)
    if not line:
        world.check(told)
        return
    with pytest.raises(UserError, match=line) as caught:
        world.check(told)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(world, "find_spec", lambda name: None)
    for name, value in ZERO_2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"needs DeepSpeed: pip install 'preceptor\[deepspeed\]'"):
        world.sharding()


@pytest.mark.slow
def test_weights_are_not_shared_among_cpus_in_silence(recipe):
    """The library would go on with a whole copy in each process."""
    code, out, said = launch(*config("fsdp2.yaml"), "preceptor", "sft", "r.yaml", cwd=recipe)
    assert (code, out) == (1, [])
    assert said[1:] == [
        "preceptor: the launcher's configuration: FSDP2 shares weights among GPUs, and none is here; use torchrun"
    ]
