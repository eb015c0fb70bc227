"""Every recipe that trains: two steps, a kill -9 after the first, and then the weights of a run that nobody touched.

The students are models of the same architecture with random weights and two layers, with the chat templates of the
real ones; the teacher is the textbook.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model import tiny
from tests.model.test_templates import FAMILIES, tokenizer_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
TRAINING = [
    (name, section)
    for name, recipe in RECIPES.items()
    for section in recipe
    if section.split("_")[0] in ("sft", "distill") and not name.startswith("results")  # which trains as these do
]
ARCHITECTURES = {
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2.5", "qwen2"),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2.5", "qwen2"),
    "Qwen/Qwen3-1.7B": ("qwen3", "qwen3"),
    "smollm2": ("smollm2", "llama"),
}
"""The kind of chat template, and of model, behind a student's name."""
KILLED = """
import os, pathlib, signal, sys, threading, time
def watch(sealed):
    while not sealed.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, args=(pathlib.Path(sys.argv.pop(1)),), daemon=True).start()
from preceptor.app.cli import main
main()
"""
"""The command in a process that kills itself as soon as the first checkpoint is whole."""


def student(name: str, folder: Path, padding: int = 0) -> Path:
    """A model of the architecture that the recipe names, and its kind of chat template; its head may be padded."""
    family, kind = ARCHITECTURES[name]
    words = tokenizer_of(FAMILIES[family])
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(words) + padding,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return tiny.save(AutoModelForCausalLM.from_config(config), folder, words)


def questions(path: Path) -> Path:
    rows = (
        {"question": f"咳嗽{n}天怎么办？", "think": f"病程{n}天，无红旗信号。", "answer": f"多喝水，{n}天后复诊。"}
        for n in range(1, 61)
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def overrides(name: str, section: str, folder: Path) -> list[str]:
    """Parts that are here in place of those that are not, and two steps of training."""
    recipe, how = RECIPES[name], RECIPES[name][section]
    default = {"full": 8}.get(how["method"], 1)
    rows = 2 * how.get("batch_size", 16) * how.get("accumulation", default)
    words = [f"{section}.epochs=1", f"{section}.limit={rows}", f"{section}.checkpoint_steps=1"]
    words += [f"{key}.compile=false" for key, value in recipe.items() if isinstance(value, dict) and "compile" in value]
    if recipe.get("teacher"):
        words += ["teacher.model=textbook", "teacher.endpoint=textbook"]
    if recipe["student"] == "lessons":
        words += ["lessons.rows=40", "lessons.hidden=32", "lessons.layers=1", "lessons.vocabulary=512"]
        return [*words, "lessons_more.rows=40"]
    if recipe["student"] != "mini":
        words.append(f"student={student(recipe['student'], folder / 'student')}")
    if "local_teacher" in how:
        words.append(f"{section}.local_teacher={student(how['local_teacher'], folder / 'teacher', padding=128)}")
    source = questions(folder / "qa.jsonl") if recipe["task"] == "consult" else "textbook"
    sizes = ["prepare.train=80", "prepare.validation=10", "prepare.test=10"]
    return [*words, f"prepare.source={source}", *(sizes if source == "textbook" else [])]


def made(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return load_file(file)


@pytest.mark.parametrize(("name", "section"), TRAINING)
def test_two_steps_killed_and_resumed_match_an_unbroken_run(command, tmp_path, name, section):
    recipe = RECIPES[name]
    words = overrides(name, section, tmp_path)
    order = [key for key, value in recipe.items() if isinstance(value, dict) and key != "teacher"]
    before = order[: order.index(section)]
    told = ["run", str(ROOT / "recipes" / f"{name}.yaml")]
    code, _, err = command(*told, *before, *words, "--runs", "broken")
    assert code == 0, err
    shutil.copytree("broken", "unbroken")
    sealed = Path("broken", recipe["name"], section, "checkpoints", "checkpoint-1", "sha256.json")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, sealed, *told, section, *words, "--runs", "broken"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folders = [Path(runs, recipe["name"], section) for runs in ("broken", "unbroken")]
    assert not any((folders[0] / name).exists() for name in ("model", "adapter", "done.json"))
    for runs in ("broken", "unbroken"):
        code, _, err = command(*told, section, *words, "--runs", runs)
        assert code == 0, err
    steps = [[json.loads(line)["step"] for line in (f / "metrics.jsonl").open() if "loss" in line] for f in folders]
    assert steps == [[1, 2], [1, 2]]
    one, other = map(made, folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
