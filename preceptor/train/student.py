"""The model that learns: all its weights or an adapter over them, and how it is written down."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.model import load, tokens
from preceptor.model.resolve import digest, resolve
from preceptor.train import world
from preceptor.train.config import SftConfig
from preceptor.train.trainer import SftTrainer


def build(
    base: str | Path, folder: Path, tokenizer: PreTrainedTokenizerBase, config: SftConfig, compute: torch.dtype
) -> Any:
    """The model to train. Weights that learn are single precision: half loses small steps."""
    earlier = (folder / "adapter_config.json").is_file()
    if earlier and config.method == "full" and world.sharding() in ("FSDP2", "ZeRO-3"):
        raise UserError(
            f"{folder}: an adapter can't be merged where weights are shared; export it merged, and train that"
        )
    where = "cpu" if world.sharding() == "FSDP2" else None  # each GPU gets its share alone
    if config.method == "full":
        if earlier:
            model = load.load(folder, dtype="float32").model.requires_grad_(True)  # merged, it was frozen
        else:
            model = load.load_model(folder, torch.float32, device=where)
        model.generation_config.eos_token_id = tokens.end_of_turn(tokenizer)
        return model
    under = load.base_of(folder) if earlier else folder
    beneath = load.load_model(under, compute, four_bit=config.method == "qlora", device=where)
    if earlier:  # goes on learning
        student = load.load_adapter(beneath, under, folder, trainable=True)
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    else:
        from peft import get_peft_model

        student = get_peft_model(beneath, config.adapter())
        name = str(folder.resolve()) if Path(base).expanduser().is_dir() else str(base)
    student.peft_config["default"].base_model_name_or_path = name
    student.save_pretrained = partial(student.save_pretrained, save_embedding_layers=False)  # to decide asks the hub
    return student


def inner(model: Any) -> PreTrainedModel:
    """The model itself, out of its adapter's wrapping."""
    inner: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return inner


def settled(model: Any, config: SftConfig, note: Callable[[str], None]) -> dict[str, float]:
    """Rank, alpha and dropout that an adapter has; where an earlier one's differ from the recipe's, it is said."""
    if isinstance(model, PreTrainedModel):
        return {}
    lora = model.peft_config["default"]
    own = {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
    if any(getattr(config, name) != value for name, value in own.items()):
        told = ", ".join(f"{name} {value:g}" for name, value in own.items())
        note(f"the adapter that goes on learning keeps its own {told}")
    return own


def base_digest(model: Any) -> str | None:
    """The digest of the base under an adapter; None for a whole model."""
    if isinstance(model, PreTrainedModel):
        return None
    return digest(resolve(model.peft_config["default"].base_model_name_or_path))


def finish(tokenizer: PreTrainedTokenizerBase, under: str | None, folder: Path) -> None:
    """What a folder holds beside the weights: the tokenizer, and of an adapter which base it was trained over."""
    tokenizer.save_pretrained(folder)
    if under:
        (folder / load.BASE_FILE).write_text(json.dumps({"digest": under}) + "\n", "utf-8")


def write(
    trainer: SftTrainer, tokenizer: PreTrainedTokenizerBase, under: str | None, out: Path, compute: torch.dtype
) -> None:
    """Write the result beside its place, then rename it."""
    state = trainer.weights()
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    full = isinstance(model, PreTrainedModel)
    final = out / ("model" if full else "adapter")
    beside = final.with_name(f"{final.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=_in_dtype(state, compute) if full else state)
    if full:
        config = json.loads((beside / "config.json").read_text("utf-8"))
        config["dtype"] = str(compute).removeprefix("torch.")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    finish(tokenizer, under, beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype; what shared memory still does."""
    cast: dict[int, Tensor] = {}
    return {name: cast.setdefault(value.data_ptr(), value.to(dtype)) for name, value in state.items()}
