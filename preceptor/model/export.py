"""Weights as other programs load them: an adapter in PEFT's layout, a whole model in that of transformers.

A folder is written beside its place and renamed, so that what is there is whole.
"""

import errno
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from preceptor.core.errors import UserError, WorkError
from preceptor.model import load, tokens
from preceptor.model.merge import check, check_base, divergence, log_probs, merge

MERGE_FILE = "merge.json"
"""In a whole model: how far it is from what it was made of."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def adapter(source: Path, out: Path, notes: Mapping[str, str]) -> None:
    """Write an adapter to the folder `out`, with its tokenizer and chat template. `notes`: texts to lie with it."""
    with _replacing(out, notes) as beside:
        for file in ("adapter_config.json", load.ADAPTER_FILE, load.BASE_FILE):
            if (source / file).is_file():
                shutil.copyfile(source / file, beside / file)
        load.load_tokenizer(source).save_pretrained(beside)


def whole(source: Path, out: Path, notes: Mapping[str, str]) -> None:
    """Write a model to the folder `out` in the dtype of its base, an adapter merged into it. `notes`: as above.

    What lies there is loaded again and must say what the source does. It answers greedily, as it was evaluated.

    Raises:
        UserError: the source is damaged, or says something else once it is merged.
        WorkError: there is not the memory for it.
    """
    tokenizer = load.load_tokenizer(source)
    merged = (source / "adapter_config.json").is_file()
    base = load.base_of(source) if merged else source
    check_base(base, source)
    dtype = _stored(base)
    try:
        model = load.load_model(base, dtype).eval()
        reference = before = log_probs(model, tokenizer)
        if merged:
            made = merge(load.load_adapter(model, base, source), tokenizer, source)
            model, reference = made.model, made.reference
        with _replacing(out, notes) as beside:
            model.generation_config = _greedy(model, tokens.end_of_turn(tokenizer))
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            del model
            gc.collect()  # one model in memory, not two
            figures = {
                "dtype": str(dtype).removeprefix("torch."),
                "divergence": check(reference, load.load_model(beside, dtype), tokenizer, source),
                "moved": divergence(reference, before),
            }
            (beside / MERGE_FILE).write_text(json.dumps(figures) + "\n")
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"{source}: the GPU's memory is too small to merge it; hide the GPU, with CUDA_VISIBLE_DEVICES= before the "
            "command, to merge on the CPU"
        ) from error


def figures(model: Path) -> dict[str, float | str]:
    """Of a whole model: its dtype, its `divergence` from its adapter, how far that `moved` its base (nats a token)."""
    found: dict[str, float | str] = json.loads((model / MERGE_FILE).read_text())
    return found


def _stored(folder: Path) -> torch.dtype:
    """The dtype of most of a folder's weights."""
    found: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                found.update(weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise UserError(f"{file}: damaged safetensors ({error}); fetch or make it again") from error
    name = found.most_common(1)[0][0] if found else ""
    if name not in _DTYPES:
        kind = f"in {name}" if name else "in no safetensors"
        raise UserError(f"{folder}: its weights are {kind}; name a model in float32, float16 or bfloat16 as the base")
    return _DTYPES[name]


def _greedy(model: PreTrainedModel, end: int) -> GenerationConfig:
    """Generation that ends with the chat turn, or where the base ends a text."""
    old = model.generation_config
    ends = old.eos_token_id if isinstance(old.eos_token_id, list) else [old.eos_token_id]
    ends = list(dict.fromkeys([end, *(token for token in ends if token is not None)]))
    pad = end if old.pad_token_id is None else old.pad_token_id
    return GenerationConfig(eos_token_id=ends, pad_token_id=pad, bos_token_id=old.bos_token_id)


@contextmanager
def _replacing(out: Path, notes: Mapping[str, str]) -> Iterator[Path]:
    """A folder beside `out` that becomes it, with its notes, if all went well, and vanishes if not."""
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)  # of a kill
    beside.mkdir(parents=True)
    try:
        yield beside
        for name, text in notes.items():
            (beside / name).write_text(text, "utf-8")
        for file in beside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        beside.rename(out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, SafetensorError) and "os error 28" in str(error):  # it has a number only in its words
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        raise
