"""Checkpoints that can be trusted: a whole one is sealed, a damaged one is put aside, the best and the last stay."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

from preceptor.core.errors import WorkError

SEAL = "sha256.json"
"""In a checkpoint, written last: the digest of each of its files."""


def seal(checkpoint: Path) -> None:
    """Write down what is in a checkpoint: from now on it counts."""
    beside = checkpoint / f".{SEAL}"
    beside.write_text(json.dumps(_digests(checkpoint)) + "\n", "utf-8")
    beside.replace(checkpoint / SEAL)


def last(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole. One without a seal was being written at a kill, and goes.

    Raises:
        WorkError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        try:
            sealed = json.loads((path / SEAL).read_text("utf-8"))
        except FileNotFoundError:
            shutil.rmtree(path)
            continue
        except ValueError:
            sealed = None
        if sealed == _digests(path):
            return path
        aside = folder / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        damaged.append(aside)
        say(f"{path} is damaged: put aside as {aside.name}, training goes on from the one before")
    if damaged:
        raise WorkError(f"{folder}: no checkpoint is left that is whole; start over with --fresh, and check the disk")
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    return max(folder.glob("checkpoint-*"), key=step, default=None)


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep`, the best among them."""
    rotate_checkpoints(output_dir=str(folder), save_total_limit=keep, best_model_checkpoint=best)


def step(checkpoint: Path) -> int:
    """After which step it was made."""
    return int(checkpoint.name.rpartition("-")[2])


def _digests(checkpoint: Path) -> dict[str, str]:
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in {SEAL, f".{SEAL}"}:
            with path.open("rb") as file:
                found[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
