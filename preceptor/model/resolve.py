"""From the name of a model to its folder: a folder, a hub's name, or one of the embedded students."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from preceptor.core.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_DIGESTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


def resolve(name: str | Path) -> Path:
    """The folder of a model: `mini`, `smollm2`, a folder, `modelscope:owner/name`, or a name on the hub."""
    text = str(name)
    if text == "mini":
        return _mini()
    if text == "smollm2":
        from preceptor.model.smollm2 import folder  # it loads torch

        return folder()
    if text.startswith("modelscope:"):
        return _modelscope(text.removeprefix("modelscope:"))
    path = Path(text).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: no model here (neither config.json nor adapter_config.json)")
        return path
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(text):
        raise UserError(f"{path}: no such folder")
    return _hub(text)


def digest(path: Path) -> str:
    """sha256 over what decides a model's answers: weights, configuration, tokenizer, template, adapter."""
    files = sorted({file for pattern in _DIGESTED for file in path.glob(pattern)})
    total = hashlib.sha256()
    for file in files:
        known = file.stat()
        total.update(f"{file.name} {_sha256(file, known.st_size, known.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, _size: int, _changed: int) -> str:
    """Of a file as it is now: many ask for it, and large weights take minutes to read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mini() -> Path:
    path = Path(__file__).parent / "mini"
    if not (path / "model.safetensors").is_file():
        raise UserError(f"mini: its weights are not in {path}; make them with: preceptor run recipes/mini.yaml")
    return path


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise UserError(f"{name}: the hub wants its licence accepted; accept it there and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: neither a folder here nor a model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name}: not in the hub's cache, and the hub can't be reached ({type(error).__name__}); "
            "name a folder, `mini`, or set HF_ENDPOINT to a mirror"
        ) from error
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{name}: the hub has no safetensors for it; weights in pickles are not loaded")
    return path


def _modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError as error:
        raise UserError(f"modelscope:{name}: needs `pip install modelscope`") from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # its errors share no base class
        raise UserError(f"modelscope:{name}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
