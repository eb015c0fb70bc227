"""A model in memory, with its tokenizer, on the device and in the precision that serve it best here."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from preceptor.core.errors import UserError
from preceptor.model.merge import check_base, merge
from preceptor.model.resolve import digest, resolve

DtypeName = Literal["auto", "float32", "bfloat16"]

BASE_FILE = "base.json"
"""Beside an adapter that was trained here: the digest of the base under it."""

ADAPTER_FILE = "adapter_model.safetensors"

_SMALL = 50_000_000
"""Below so many parameters a CPU gains nothing from half precision."""
_FEWEST = 8
"""Tokens of a tokenizer that writes anything."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """Where it came from: the adapter's folder where there is one."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may take together."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load(base: str | Path, adapter: str | Path | None = None, dtype: DtypeName = "auto") -> Loaded:
    """The model of a folder or name; an adapter is merged into its base, which its folder may name.

    Raises:
        UserError: what is there is damaged or missing, or merged it would answer otherwise.
    """
    folder = resolve(base)
    if (folder / "adapter_config.json").is_file():
        if adapter is not None:
            raise UserError(f"{folder}: an adapter can't be the base of another ({adapter})")
        folder, adapter = base_of(folder), folder
    if adapter is None:
        return Loaded(load_model(folder, torch_dtype(folder, dtype)).eval(), load_tokenizer(folder), folder)
    at = Path(adapter)
    with _one_line(folder):
        check_base(folder, at)
    tokenizer = load_tokenizer(at)
    model = load_adapter(load_model(folder, torch_dtype(folder, dtype)), folder, at)
    return Loaded(merge(model, tokenizer, at).model.eval(), tokenizer, at)


def load_model(
    folder: Path, dtype: torch.dtype, *, four_bit: bool = False, device: str | None = None
) -> PreTrainedModel:
    """The weights of a folder. Nothing that runs code is read.

    `device` is by default the GPU where there is one. `four_bit`: linear layers in double-quantised nf4 (Dettmers et
    al. 2023), to train an adapter over.
    """
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with _one_line(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            quantization_config=nf4 if four_bit else None,
            device_map={"": device} if four_bit else None,
        )
    if info["missing_keys"]:  # they would be random
        raise UserError(f"{folder}: its weights lack {min(info['missing_keys'])}; fetch or make it again")
    loaded: PreTrainedModel = model if four_bit else model.to(device)
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    with _one_line(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    if len(tokenizer) < _FEWEST:  # the library makes an empty one where files are missing
        raise UserError(f"{folder}: its tokenizer knows no words; put its tokenizer.json there")
    return tokenizer


def load_adapter(model: PreTrainedModel, base: Path, adapter: Path, *, trainable: bool = False) -> Any:
    """The model under its adapter, which must be whole and have been trained on that base."""
    from peft import PeftModel  # a second to import, and only for adapters

    for file in ("adapter_config.json", ADAPTER_FILE):
        if not (adapter / file).is_file():
            raise UserError(f"{adapter}: no adapter here ({file} is missing)")
    known = adapter / BASE_FILE
    with _one_line(known):
        other = known.is_file() and json.loads(known.read_text())["digest"] != digest(base)
    if other:
        raise UserError(f"{adapter}: trained on another base than {base} (its weights differ)")
    with _one_line(adapter), warnings.catch_warnings(action="ignore"):  # what it warns of is refused below
        try:
            wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, local_files_only=True)
        except (RuntimeError, ValueError) as error:  # sizes differ; no such layers
            raise UserError(f"{adapter}: made for another base than {base}") from error
        except TypeError as error:
            raise UserError(f"{adapter / 'adapter_config.json'}: no adapter's: {error}") from error
    _check_whole(wrapped, adapter / ADAPTER_FILE, base)
    return wrapped


def _check_whole(model: Any, file: Path, base: Path) -> None:
    """Refuse an adapter that lacks weights or has some for layers that aren't there: the library passes over both."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with safe_open(file, "pt") as weights:
        found = set(weights.keys())
    if lacking := wanted - found:
        raise UserError(f"{file}: damaged: it lacks {min(lacking)}; fetch or train it again")
    if foreign := found - wanted - model.state_dict().keys():
        raise UserError(f"{file.parent}: made for another base than {base}, which has no {min(foreign)}")


def base_of(adapter: Path) -> Path:
    """The folder of the base that an adapter's configuration names."""
    config = adapter / "adapter_config.json"
    try:
        name = json.loads(config.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config}: doesn't name the base model") from error
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{adapter}: its base is missing: {error}") from error


def torch_dtype(folder: Path, name: DtypeName = "auto") -> torch.dtype:
    """The precision to load a folder in: bfloat16 on a GPU; on a CPU where it is clearly the faster one."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if torch.cuda.is_available():
        return torch.bfloat16
    return torch.bfloat16 if _parameters(folder) >= _SMALL and _bf16_is_faster() else torch.float32


def _parameters(folder: Path) -> int:
    count = 0
    for file in folder.glob("*.safetensors"):
        with _one_line(file), safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a mapping
                shape = weights.get_slice(key).get_shape()
                count += torch.Size(shape).numel()
    return count


def _bf16_is_faster() -> bool:
    """Machines differ both ways, up to threefold, and their names don't tell."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        left @ right  # the first call picks a kernel
        start = time.perf_counter()
        for _ in range(8):
            left @ right
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


@contextmanager
def _one_line(where: Path) -> Iterator[None]:
    """What goes wrong while reading model files, as one line with the place."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{where}: damaged safetensors ({error}); fetch or make it again") from error
    except OSError as error:
        raise UserError(f"{where}: {str(error).strip().splitlines()[0]}") from error
    except (ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a model that can be read: {' '.join(str(error).split())[:300]}") from error
