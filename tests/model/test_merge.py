"""Merging: what comes of it says what the adapter said, whatever the adapter is of, or it is one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from preceptor.core.errors import UserError
from preceptor.model import load
from preceptor.model.merge import TOLERANCE, check, divergence, log_probs, merge
from tests.model import tiny

LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "embedding": {"target_modules": [*LAYERS, "embed_tokens"]},
    "head": {"target_modules": [*LAYERS, "lm_head"]},
    "embedding and head": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"]},
    "embedding tied": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "whole head": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": LAYERS, "modules_to_save": ["norm"]},
    "tokens": {"target_modules": LAYERS, "trainable_token_indices": [5, 9, 11]},
}


def trained(folder: Path, *, tied: bool = True, noise: float = 0.05, **kind) -> Path:
    """An adapter as if it had learned something, over `folder/base`."""
    base = tiny.save(tiny.qwen(tied=tied), folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(tiny.qwen(tied=tied), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **kind))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    return saved(model, base, folder / "adapter")


def saved(model, base: Path, adapter: Path) -> Path:
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter, save_embedding_layers=False)
    tiny.tokenizer().save_pretrained(adapter)
    return adapter


def apart(adapter: Path, dtype: torch.dtype = torch.float32):
    """Base and adapter, not merged."""
    base = load.base_of(adapter)
    return load.load_adapter(load.load_model(base, dtype), base, adapter)


@pytest.mark.parametrize(
    ("kind", "tied", "dtype"),
    [
        *((kind, True, torch.float32) for kind in KINDS),
        *((kind, False, torch.float32) for kind in ("linear", "embedding and head")),
        *((kind, True, torch.bfloat16) for kind in ("linear", "dora", "embedding", "whole head")),
    ],
)
def test_the_merged_model_says_what_the_adapter_said(kind, tied, dtype, tmp_path):
    """Also after it was written and read again: a head that is no longer the embedding must stay so."""
    adapter, words = trained(tmp_path, tied=tied, **KINDS[kind]), tiny.tokenizer()
    base = log_probs(load.load_model(tmp_path / "base", dtype), words)
    expected = log_probs(apart(adapter, dtype).eval(), words)
    made = merge(apart(adapter, dtype), words, adapter)
    assert torch.equal(made.reference, expected)
    assert made.divergence <= TOLERANCE[dtype] / 10
    assert divergence(expected, base) > 100 * made.divergence
    made.model.save_pretrained(tmp_path / "out")
    again = load.load_model(tmp_path / "out", dtype)
    assert check(expected, again, words, adapter) == made.divergence


def test_each_weight_is_added_up_in_full_and_rounded_once(tmp_path):
    adapter = trained(tmp_path, target_modules="all-linear")
    made = merge(apart(adapter, torch.bfloat16), tiny.tokenizer(), adapter)
    learned = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (learned[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    base = load.load_model(tmp_path / "base", torch.bfloat16).get_submodule(name).weight
    expected = (base.float() + 2 * (b @ a)).to(torch.bfloat16)
    assert torch.equal(made.model.get_submodule(name).weight, expected)


def _nf4(model):
    functional = pytest.importorskip("bitsandbytes.functional")
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight
            weight.data = functional.dequantize_4bit(*functional.quantize_4bit(weight.data, quant_type="nf4"))


def _scaled(factor):
    def change(model):
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.scaling["default"] *= factor

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [_scaled(0), _scaled(0.5), _scaled(2), _nf4], ids=["none", "half", "twice", "nf4"])
def test_a_wrong_merge_is_refused(wrong, dtype, tmp_path):
    adapter, words = trained(tmp_path, noise=0.1, target_modules="all-linear"), tiny.tokenizer()
    expected = log_probs(apart(adapter, dtype).eval(), words)
    model = apart(adapter, dtype)
    wrong(model)
    with pytest.raises(UserError, match=r"nats a token apart, where at most 0\.\d+ is rounding") as refused:
        check(expected, model.merge_and_unload(), words, adapter)
    assert "\n" not in str(refused.value)


def test_an_adapter_that_has_learned_nothing_is_merged(tmp_path):
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    adapter = saved(get_peft_model(tiny.qwen(), LoraConfig(target_modules="all-linear")), base, tmp_path / "adapter")
    assert merge(apart(adapter), tiny.tokenizer(), adapter).divergence == 0


def _lacking(weights):
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def _foreign(weights):
    weights["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 4)


def _infinite(weights):
    weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_lacking, "damaged: it lacks base_model.model.model.layers.1.mlp.up_proj.lora_B.weight; fetch or train"),
        (_foreign, "made for another base than .*, which has no base_model.model.model.layers.7.mlp.up_proj"),
        (_infinite, "what it says is no number: its weights are damaged"),
    ],
)
def test_damaged_weights_are_one_line(damage, told, tmp_path):
    """None of them would stop the library."""
    adapter = trained(tmp_path, target_modules="all-linear")
    weights = load_file(adapter / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=told) as refused:
        load.load(adapter)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_cut_or_gone_is_one_line(tmp_path):
    """A pickle in its place is not read."""
    adapter = trained(tmp_path, target_modules="all-linear")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged safetensors"):
        load.load(adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter here \(adapter_model\.safetensors is missing\)"):
        load.load(adapter)


@pytest.mark.parametrize("change", [{"peft_type": "NEWS"}, {"r": "wide"}, {"target_modules": ["nowhere"]}])
def test_a_configuration_that_is_damaged_is_one_line(change, tmp_path):
    adapter = trained(tmp_path, target_modules="all-linear")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=re.escape(str(adapter))) as refused:
        load.load(adapter)
    assert "\n" not in str(refused.value)


def test_an_adapter_without_weights_to_add_is_refused(tmp_path):
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    prompt = get_peft_model(tiny.qwen(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    adapter = saved(prompt, base, tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter of the kind PROMPT_TUNING has no weights to merge"):
        load.load(adapter)


def test_what_cannot_be_merged_is_one_line(tmp_path):
    """A bias for layers without one works unmerged, and is lost when merged."""
    adapter = trained(tmp_path, target_modules="all-linear", lora_bias=True)
    with pytest.raises(UserError, match=r"this LORA adapter can't be merged \(Impossible to merge"):
        load.load(adapter)


def test_a_base_in_four_bits_is_refused(tmp_path):
    """The folder of a base that was stored so; one that is only trained so is named by its full weights."""
    pytest.importorskip("bitsandbytes")
    adapter = trained(tmp_path, target_modules="all-linear")
    small = load.load_model(tmp_path / "base", torch.float32, four_bit=True)
    tiny.save(small, tmp_path / "small")
    with pytest.raises(UserError, match=r"its base .*small is quantised.*name the full-precision model"):
        load.load(tmp_path / "small", adapter)
