"""Checkpoints that can be trusted: a whole one is sealed, a damaged one is put aside, the best and the last stay."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from preceptor.core.errors import WorkError

SEAL = "sha256.json"
"""In a checkpoint, written last: the digest of each of its files."""

_NAME = re.compile(r"checkpoint-\d+")


def seal(checkpoint: Path) -> None:
    """Write down what is in a checkpoint: from now on it counts."""
    beside = checkpoint / f".{SEAL}"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != beside)
    digests = {str(path.relative_to(checkpoint)): _digest(path) for path in files}
    beside.write_text(json.dumps(digests) + "\n", "utf-8")
    beside.replace(checkpoint / SEAL)


def last(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole. One without a seal was being written or deleted at a kill, and goes.

    Raises:
        WorkError: there were checkpoints, and all are damaged.
    """
    for path in _found(folder):
        if not (path / SEAL).exists():
            shutil.rmtree(path)
    for path in reversed(_found(folder)):
        if _whole(path):
            return path
        say(f"{path} is damaged: put aside as {_put_aside(path)}, training goes on from the one before")
    if any(folder.glob("damaged-*")):
        raise WorkError(f"{folder}: no checkpoint is left that is whole; start over with --fresh, and check the disk")
    return None


def best(folder: Path, grades: Mapping[int, float], say: Callable[[str], None]) -> Path:
    """The checkpoint with the best grade, of equals the latest; what is damaged or gone is said, and done without.

    Raises:
        WorkError: none of them is whole.
    """
    order = sorted(grades, key=lambda step: (grades[step], step), reverse=True)
    lost = ""
    for number in order:
        path = folder / f"checkpoint-{number}"
        if (path / SEAL).exists() and _whole(path):
            if lost:
                say(f"{lost}: {path.name}, the best of those left, is taken")
            return path
        if path.exists():
            lost = lost or f"{path}, graded best, is damaged, and put aside as {_put_aside(path)}"
        elif number == order[0]:
            lost = f"{path}, graded best, is gone"
    raise WorkError(f"{folder}: no checkpoint is left that is whole; start over with --fresh, and check the disk")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    return max(_found(folder), key=step, default=None)


def rotate(folder: Path, keep: int | None, grades: Mapping[int, float]) -> None:
    """Delete all but the newest `keep`, the best and the last among them."""
    paths = _found(folder)
    spared = {paths[-1], max(paths, key=lambda path: (grades.get(step(path), -1.0), step(path)))} if paths else set()
    for path in paths:
        if keep is not None and path not in spared and len(paths) > keep:
            (path / SEAL).unlink(missing_ok=True)  # first, so that half a checkpoint never seems damaged
            shutil.rmtree(path)
            paths = [other for other in paths if other != path]


def step(checkpoint: Path) -> int:
    """After which step it was made."""
    return int(checkpoint.name.rpartition("-")[2])


def _found(folder: Path) -> list[Path]:
    """The checkpoints, the earliest first; what a user put beside them is the user's."""
    return sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step)


def _whole(checkpoint: Path) -> bool:
    """Whether each file that was sealed is there as it was."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text("utf-8"))
        return bool(sealed) and all(_digest(checkpoint / name) == digest for name, digest in sealed.items())
    except (OSError, ValueError, AttributeError):
        return False


def _put_aside(checkpoint: Path) -> str:
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    return aside.name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
