"""What every stage shares: its configuration, what it reads and leaves, where it works, files of records.

A stage is a frozen `Config` and `run(config, context)`. It never finds its own inputs and never decides
whether it is done: the recipe and the run do, so that a stage reads from top to bottom.
"""

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from preceptor.core.errors import UserError
from preceptor.core.records import Record

_R = TypeVar("_R", bound=Record)

TRAINING = ("sft", "distill")
"""The stages that leave a model that was trained."""
LEDGER = "ledger.sqlite"
"""In the folder of all runs."""
CALIBRATION = "calibration.json"
"""Beside the weights that it is for: what their confidence is worth."""
RECALIBRATION = "recalibration.json"
"""What the probabilities of a teacher's tokens are worth; in the section's folder."""
FAILED = "failed.jsonl"
"""What failed, and was put back to be tried again; in a section's folder."""


@dataclass(frozen=True)
class How:
    """Marks a field that changes how the work is done, never its result: it may change between two starts.

    `keep` names what still counts of a nested model; of several, of the first.
    """

    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Need:
    """An input of a stage."""

    name: str
    """By which the stage asks for it."""
    files: tuple[str, ...] = ()
    """The files or folders, any of which will do; by default the one called `name`."""
    section: str | None = None
    """The section that leaves it; by default the nearest earlier one that does."""
    paths: tuple[str, ...] = ()
    """Where it lies, when the configuration itself says so."""
    stages: tuple[str, ...] = ()
    """Only sections of these stages are asked; by default all."""
    required: bool = True
    watched: bool = False
    """What is read is held against it, and never depends on it: another one is no other request."""

    @property
    def any_of(self) -> tuple[str, ...]:
        """The files, any of which will do."""
        return self.files or (self.name,)


class StageConfig(BaseModel):
    """Base of every stage's configuration. A field that the recipe's head has too takes the head's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    from_: Annotated[tuple[str, ...], How()] = Field(default=(), alias="from")
    """Sections or paths to read from; what comes of it is known by the inputs' digests."""
    limit: int | None = Field(default=None, gt=0)
    """The first n cases alone, for a try."""

    @field_validator("from_", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def needs(self) -> tuple[Need, ...]:
        """What the stage reads."""
        return ()


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The fields that decide the result: all but those marked `How`, and the limit, which may grow."""
    fields = config.model_dump(mode="json", by_alias=True)
    for name, field in type(config).model_fields.items():
        key = field.serialization_alias or field.alias or name
        value = getattr(config, name)
        how = next((mark for mark in field.metadata if isinstance(mark, How)), None)
        if name == "limit" or (how and not how.keep):
            del fields[key]
        elif how and fields[key]:
            one = fields[key][0] if isinstance(fields[key], list) else fields[key]
            fields[key] = {k: one[k] for k in how.keep}
        elif isinstance(value, BaseModel):
            fields[key] = result_fields(value)
    return fields


class Ticks(Protocol):
    """Counts what is done, for whoever waits."""

    def __call__(self, done: int = 1, note: str = "", total: int | None = None) -> None:
        """`done` more; `note` stands beside the bar; `total` where it becomes known later."""


Progress = Callable[[str, int | None], AbstractContextManager[Ticks]]
"""`progress(what, total)` shows a bar for as long as it is open."""


@dataclass(frozen=True)
class Context:
    """Where a stage works, and with what."""

    recipe: str
    """The recipe's name."""
    section: str
    folder: Path
    """All that the stage writes goes here."""
    runs: Path
    """The folder of all runs, where the ledger lives."""
    inputs: Mapping[str, tuple[Path, ...]]
    """By the name of the need, in the order of `from:`."""
    log: Logger
    progress: Progress
    say: Callable[[Any], None]
    """Shows a result to the user: a line, or anything that rich can render."""

    def input(self, name: str) -> Path:
        """The file of a need that is certainly met."""
        return self.inputs[name][0]

    def optional(self, name: str) -> Path | None:
        """The file of a need that may be unmet."""
        return next(iter(self.inputs.get(name, ())), None)


@dataclass(frozen=True)
class Stage:
    """A verb: how it is configured, what does it, what it leaves in its folder."""

    name: str
    config: type[StageConfig]
    run: Callable[[Any, Context], Mapping[str, Any]]
    """Does the work and returns its metrics."""
    leaves: tuple[str, ...]
    grows: bool = True
    """More cases are more work in the same folder, and no new start."""
    anew: bool = False
    """What it left unfinished is made anew, so that other settings may follow; nobody was paid for it."""
    retry: Callable[[Path], int] | None = None
    """Puts what failed in a folder back among what is owed, and returns how much that is; FAILED keeps the failures."""


class Lines:
    """A file of records that grows line by line; what a kill cut short is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        if whole < size:
            self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Add a record. It has reached the system when this returns, and survives the end of this process."""
        self._file.write(record.model_dump_json().encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_records(path: Path, kind: type[_R], limit: int | None = None) -> Iterator[_R]:
    """The records of a JSONL file, one a line.

    Raises:
        UserError: a line that is no such record, by file, line and field.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and number > limit:
                return
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                raise UserError(
                    f"{path}:{number}: {field + ': ' if field else ''}{first['msg']}; "
                    f"each line must be a {kind.__name__}: mend the line, or take it out"
                ) from error


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write a JSONL file whole or not at all; returns how many there were."""
    count = 0
    with replacing(path) as beside, beside.open("wb") as file:
        for record in records:
            file.write(record.model_dump_json().encode() + b"\n")
            count += 1
    return count


class replacing:  # noqa: N801  used as a verb: `with replacing(path) as beside`
    """A name beside `path` to write to; it becomes `path` if all went well, and vanishes if not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(f".{path.name}.new")

    def __enter__(self) -> Path:
        return self._beside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._beside.open("rb") as file:
                os.fsync(file.fileno())
            self._beside.replace(self._path)
        else:
            self._beside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Digest of a file, or of all files in a folder by name; of what isn't there as of an empty folder."""
    if not path.is_file():
        return total(digests(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Digest of each file in a folder, by its path there, in order.

    A calibration is no part of the weights that it lies beside: it comes later.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CALIBRATION)
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def total(digests: Mapping[str, str]) -> str:
    """The digest of a folder whose files have these."""
    return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in digests.items()).encode()).hexdigest()


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or which words there are."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""


def resolve_callable(name: str, builtins: Mapping[str, Callable[..., Any]], what: str) -> Callable[..., Any]:
    """What a recipe names: one of ours, or `path/to/file.py:function` of the user's own.

    Raises:
        UserError: there is no such thing. `what` says what was looked for.
    """
    file, colon, function = name.rpartition(":")
    if not colon:
        if name not in builtins:
            own = "or name your own: path/to/file.py:function"
            raise UserError(f"no {what} {name!r}{nearest(name, builtins)} ({own})")
        return builtins[name]
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"preceptor_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{what} {name!r}: no Python file {file}; write path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {name!r}: {path} can't be loaded: {reason}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{what} {name!r}: {path} has no function {function!r}{nearest(function, known)}")
    return found  # type: ignore[no-any-return]  # only calling it can tell


def folder(model: str) -> tuple[str, ...]:
    """A model's name if it is a folder's: what lies in it then belongs to the request."""
    return (model,) if model and Path(model).is_dir() else ()


def needs_torch(what: str) -> None:
    """One line instead of a traceback where the part that trains is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what} needs torch and transformers: pip install 'preceptor[train]'")
