"""Exported folders are what other programs load, whole or not there; the hub is a real server on this machine."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.core.errors import UserError
from preceptor.core.records import Request, Sampling
from preceptor.model import export, load
from preceptor.model.generate import generate
from tests.model import tiny
from tests.model.test_merge import trained

PLAIN = """
import json, sys
sys.modules["preceptor"] = None  # an import of it would fail
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

for auto, folder in zip((AutoModelForCausalLM, AutoPeftModelForCausalLM), sys.argv[1:]):
    model = auto.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "<record>\\n发热3天, fever\\n</record>"}]
    ids = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12)
    print(json.dumps({"said": out[0].tolist(), "eos": model.generation_config.eos_token_id}))
"""


@pytest.fixture
def adapter(tmp_path):
    return trained(tmp_path, noise=0.1, target_modules="all-linear")


def plain(*folders: Path):
    """What a fresh process says with the libraries alone: of a whole model, and of an adapter."""
    words = [sys.executable, "-c", PLAIN, *map(str, folders)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
    assert ended.returncode == 0, ended.stderr
    return map(json.loads, ended.stdout.splitlines())


@pytest.mark.slow
def test_other_programs_load_both_and_hear_the_same(adapter, tmp_path):
    """Without this package: the greedy answer of adapter and base is that of the merged model."""
    export.whole(adapter, tmp_path / "out" / "model", {"README.md": "a card"})
    export.adapter(adapter, tmp_path / "out" / "adapter", {"README.md": "a card"})
    merged, apart = plain(tmp_path / "out" / "model", tmp_path / "out" / "adapter")
    assert merged["said"] == apart["said"]
    assert merged["eos"] == [2, 0], "the end of the chat turn, then that of the text"
    for kind, files in {
        "model": {"model.safetensors", "config.json", "generation_config.json", "merge.json"},
        "adapter": {"adapter_model.safetensors", "adapter_config.json"},
    }.items():
        shared = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {file.name for file in (tmp_path / "out" / kind).iterdir()} == files | shared
    told = export.figures(tmp_path / "out" / "model")
    assert told["dtype"] == "float32"
    assert told["divergence"] < 1e-6
    assert told["moved"] > 0.1


def test_the_exported_model_answers_as_the_adapter_does_here(adapter, tmp_path):
    export.whole(adapter, tmp_path / "model", {})
    request = Request(messages=tiny.messages("发热3天"), sampling=Sampling(max_tokens=12))
    ours, theirs, base = (
        generate(load.load(folder), [request])[0].text for folder in (adapter, tmp_path / "model", tmp_path / "base")
    )
    assert ours == theirs != base


def test_the_base_gives_the_dtype_and_a_sampler_does_not_go_along(tmp_path):
    """A base that samples, as some are told to, was evaluated greedily."""
    base = tiny.qwen().to(torch.bfloat16)
    base.generation_config.update(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.05, eos_token_id=[0])
    tiny.save(base, tmp_path / "base")
    export.whole(tmp_path / "base", tmp_path / "model", {})
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings.keys() - {"transformers_version", "_from_model_config"} == {"eos_token_id", "pad_token_id"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())
    assert export.figures(tmp_path / "model") == {"dtype": "bfloat16", "divergence": 0, "moved": 0}


def test_a_whole_model_is_split_as_its_library_does(tmp_path, monkeypatch):
    tiny.save(tiny.qwen(), tmp_path / "base")
    save = load.PreTrainedModel.save_pretrained
    monkeypatch.setattr(load.PreTrainedModel, "save_pretrained", lambda self, to: save(self, to, max_shard_size="40KB"))
    export.whole(tmp_path / "base", tmp_path / "model", {})
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "model").glob("model-0*.safetensors"))) > 1
    export.whole(tmp_path / "model", tmp_path / "again", {})
    assert export.figures(tmp_path / "again")["divergence"] == 0


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(adapter, tmp_path):
    out = tmp_path / "out"
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match=r"base/model\.safetensors: damaged safetensors"):
        export.whole(adapter, out / "model", {})
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="is quantised"):
        export.whole(adapter, out / "model", {})
    assert not list(tmp_path.glob("out/*"))


def test_a_disk_that_is_full_is_told_by_its_number(adapter, tmp_path, small_disk):
    with pytest.raises(OSError, match="No space left") as full:
        export.whole(adapter, small_disk / "model", {})
    assert full.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


KILLED = """
import sys
from pathlib import Path
from preceptor.model import export
print("loaded", flush=True)
export.whole(Path(sys.argv[1]), Path(sys.argv[2]), {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.05, 0.1])
def test_a_kill_leaves_a_whole_folder_or_none(wait, adapter, tmp_path):
    out = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", KILLED, adapter, out], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"loaded\n"
    while not (beside := tmp_path / ".model.new").exists() and not out.exists():
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if not out.exists():
        export.whole(adapter, out, {})
    assert export.figures(out)["divergence"] < 1e-6
    assert not beside.exists()
