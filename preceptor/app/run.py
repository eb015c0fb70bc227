"""Runs sections, each in its folder: what is done is skipped, what is owed is done, what differs is refused.

The folder says by itself what made it: the configuration, the digests of what was read, the code. `done.json`
is written last, so its being there means that all else is.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import preceptor
from preceptor.app.console import Show
from preceptor.app.recipe import Recipe, Section, inputs
from preceptor.core.errors import UserError, WorkError
from preceptor.stages.base import FAILED, Context, Stage, replacing, result_fields

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_ALMOST_NOTHING = 1 << 20
_Json = dict[str, Any]


def run(
    recipe: Recipe, names: Sequence[str], runs: Path, show: Show, *, fresh: bool = False, retry: bool = False
) -> None:
    """Run the named sections, or all, in the file's order. `retry` tries again what failed in them.

    Raises:
        UserError: a run was made from another request, or another process is at it.
        WorkError: the work failed.
    """
    logging.raiseExceptions = False  # a full disk is told once, not for every line of the log
    for section in recipe.chosen(names):
        with _told_in_one_line(runs), _locked(runs / recipe.name, section.name):
            if retry and not fresh:
                _owe_failures(section, runs / recipe.name / section.name, show)
            _run_section(recipe, section, runs, show, fresh=fresh)


def _owe_failures(section: Section, folder: Path, show: Show) -> None:
    if section.stage.retry and (count := section.stage.retry(folder)):
        (folder / "done.json").unlink(missing_ok=True)
        show.line(f"{section.name}: {count} that failed are tried again (the failures are kept in {folder / FAILED})")


def _run_section(recipe: Recipe, section: Section, runs: Path, show: Show, *, fresh: bool) -> None:
    folder = runs / recipe.name / section.name
    found = inputs(recipe, section, runs)
    wanted = _Request.of(recipe, section, runs, found)
    decision = "starts over: --fresh" if fresh else _decide(folder, wanted, section.stage)
    if decision == _SKIP:
        seconds = (read_json(folder / "done.json", "seconds") or {})["seconds"]
        show.line(f"{section.name}: done already, in {_duration(seconds)} ({folder})")
        return
    if decision.startswith(_OVER):
        _put_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").unlink(missing_ok=True)
    _write_json(folder / "config.json", wanted.record())
    (folder / "code.diff").write_text(_code()["diff"], "utf-8")
    show.line(f"{section.name}: {decision}")
    start = time.monotonic()
    with _logged(folder / "log.txt", section.name, show) as log:
        log.info("%s: %s", section.name, decision)
        context = Context(recipe.name, section.name, folder, runs, found, log, show.progress, show.result)
        metrics = section.stage.run(section.config, context)
        _write_json(folder / "metrics.json", metrics)
        seconds = round(time.monotonic() - start, 3)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        _write_json(folder / "done.json", {"digest": wanted.digest, "seconds": seconds, "finished": finished})
        log.info("done in %s", _duration(seconds))
    show.line(f"{section.name}: done in {_duration(seconds)} ({folder})")


def is_done(recipe: Recipe, section: Section, runs: Path, folder: Path) -> bool:
    """Whether a start would skip a section with this folder, whose inputs lie in `runs`.

    Raises:
        UserError: it would refuse.
    """
    if not (folder / "config.json").exists():
        return False
    wanted = _Request.of(recipe, section, runs, inputs(recipe, section, runs))
    return _decide(folder, wanted, section.stage) == _SKIP


@dataclass(frozen=True)
class _Request:
    """All that a section's result depends on, and beside it what is only recorded."""

    config: _Json
    result: _Json
    """The result fields and the inputs' digests, by dotted key."""
    limits: dict[str, int | None]
    """The limit of this section, and of those whose work it reads."""
    about: _Json

    @classmethod
    def of(cls, recipe: Recipe, section: Section, runs: Path, found: Mapping[str, tuple[Path, ...]]) -> "_Request":
        watched = {need.name for need in section.config.needs() if need.watched}
        sources = {
            name: [{"path": str(path), "sha256": sha256(path)} for path in paths]
            for name, paths in found.items()
            if name not in watched
        }
        result = dict(_flat(result_fields(section.config)))
        result |= {f"inputs.{name}": [s["sha256"] for s in given] for name, given in sources.items()}
        limits: dict[str, int | None] = {}
        for path in (path for paths in found.values() for path in paths):
            with suppress(UserError):  # beside a file from elsewhere it may hold anything
                limits |= (read_json(path.parent / "config.json", "limits") or {"limits": {}})["limits"]
        limits[section.name] = section.config.limit
        if (failed := runs / recipe.name / section.name / FAILED).exists():  # for those who read what comes of it
            limits[f"{section.name} retried"] = 1 + len(failed.read_bytes().splitlines())
        code = _code()
        about = {
            "recipe": recipe.path,
            "section": section.name,
            "stage": section.stage.name,
            "inputs": sources,
            "code": {
                "version": preceptor.__version__,
                "commit": code["commit"],
                "changed": bool(code["diff"]),
            },
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        return cls(section.config.model_dump(mode="json", by_alias=True), result, limits, about)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.result, sort_keys=True).encode()).hexdigest()

    def record(self) -> _Json:
        seed = self.config.get("seed")
        return {
            **self.about,
            "seed": seed,
            "config": self.config,
            "result": self.result,
            "limits": self.limits,
            "digest": self.digest,
        }


_SKIP, _START, _OVER = "done", "starts", "starts over"
_NOT_WORK = {"config.json", "code.diff", "log.txt", "server.log", "issues.jsonl", "report.html"}


def _decide(folder: Path, wanted: _Request, stage: Stage) -> str:
    """What to do with a section's folder, as the user is told it.

    Raises:
        UserError: what lies there was made from another request.
    """
    old = read_json(folder / "config.json", "result", "limits")
    if old is None:
        return _START
    before: _Json = old["result"]
    absent = object()
    differ = sorted(
        key for key in before.keys() | wanted.result.keys() if before.get(key, absent) != wanted.result.get(key, absent)
    )
    own = _steps(old["limits"], wanted.limits, [folder.name])
    upstream = _steps(old["limits"], wanted.limits, old["limits"].keys() - {folder.name})
    more = own > 0 or (upstream > 0 and any(key.startswith("inputs.") for key in differ))
    changes = [
        _change(key, before.get(key), wanted.result.get(key))
        for key in differ
        if not (more and key.startswith("inputs."))
    ]
    if own < 0:
        changes.append(_change("limit", old["limits"][folder.name], wanted.limits[folder.name]))
    if changes and not _holds_work(folder):
        return _START
    if changes and stage.anew and not (folder / "done.json").exists():
        return f"{_OVER}: it was not finished, and is asked otherwise now; the old folder is kept"
    if changes:
        raise UserError(
            f"{folder} was made from another request: {'; '.join(changes)}. Undo the change, give the recipe "
            "another name, or start over with --fresh, which keeps the old folder"
        )
    if more:
        return f"goes on with more cases ({folder})" if stage.grows else f"{_OVER}: there are more cases"
    return _SKIP if (folder / "done.json").exists() else f"goes on where it was ({folder})"


def _holds_work(folder: Path) -> bool:
    """Whether an earlier start got as far as to make anything; a request that failed before binds nobody."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return any(str(path.relative_to(folder)) not in _NOT_WORK for path in files)


def _steps(old: Mapping[str, int | None], new: Mapping[str, int | None], sections: Iterable[str]) -> int:
    """Whether limits grew (1), shrank (-1: one of them is enough) or stayed; none is the largest."""
    pairs = [(old[s] or sys.maxsize, new[s] or sys.maxsize) for s in sections if s in old and s in new]
    return min((1 if now > before else -1 for before, now in pairs if now != before), default=0)


def _change(key: str, before: Any, now: Any) -> str:
    if key.startswith("inputs."):
        return f"{key} changed"
    return f"{key} was {json.dumps(before, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)}"


def sha256(path: Path) -> str:
    """Digest of a file, or of all files in a folder by name."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file_path.relative_to(path)} {sha256(file_path)}\n".encode())
    return total.hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put_aside(folder: Path) -> None:
    """Keep an old folder under the next free number."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)


@contextmanager
def _locked(folder: Path, section: str) -> Iterator[None]:
    """One process at a time; the system lets go when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{section}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"{folder / section}: process {lock.read().strip()} is running it; wait for it, or stop it"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class _Shown(logging.Handler):
    """Shows what is logged as a warning."""

    def __init__(self, show: Show) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """One line of it."""
        self._show.line(record.getMessage())


@contextmanager
def _logged(path: Path, section: str, show: Show) -> Iterator[logging.Logger]:
    """All that is logged goes to the section's file too, and what goes wrong with its traceback.

    What the ledger warns of, such as damage that it mended, is the user's to know at once.
    """
    warned = _Shown(show)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, log = logging.getLogger(), logging.getLogger("preceptor")
    root.addHandler(handler)
    logging.getLogger("preceptor.llm").addHandler(warned)
    log.setLevel(logging.INFO)
    try:
        yield log
    except (UserError, WorkError) as error:
        log.error("%s", error)  # noqa: TRY400  the line says it all
        raise
    except KeyboardInterrupt:
        log.warning("stopped by the user")
        raise
    except Exception as error:
        log.error("%s: %s\n%s", type(error).__name__, error, traceback.format_exc())  # noqa: TRY400  `status` shows it
        if _disk_is_full(path.parent, error):
            raise
        raise WorkError(f"{section} failed: {type(error).__name__}: {error} (see {path})") from error
    finally:
        root.removeHandler(handler)
        logging.getLogger("preceptor.llm").removeHandler(warned)
        handler.close()


@contextmanager
def _told_in_one_line(runs: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:
        if _disk_is_full(runs, error):
            where = runs.resolve()
            raise WorkError(
                f"{where}: the disk is full; free some space and run it again: it goes on where it was"
            ) from error
        if isinstance(error, OSError) and error.filename:
            way = "check the path, or choose another folder with --runs"
            raise UserError(f"{error.filename}: {error.strerror}; {way}") from error
        raise


def _disk_is_full(folder: Path, error: Exception) -> bool:
    """Libraries that write models don't all say so by number."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return folder.exists() and shutil.disk_usage(folder).free < _ALMOST_NOTHING


@cache
def _code() -> dict[str, str]:
    """The commit of the code and what was changed since, where it runs from a checkout."""
    package = Path(preceptor.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, errors="replace")
        return done.stdout if done.returncode == 0 else ""

    if shutil.which("git") is None or not git("ls-files", "__init__.py"):
        return {"commit": "", "diff": ""}
    return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD", "--", ".")}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value.item()  # NumPy's numbers


def read_json(path: Path, *keys: str) -> _Json | None:
    """What a run wrote down there, with these keys at least; None where there is nothing.

    Raises:
        UserError: it is damaged, or not a run's.
    """
    try:
        loaded: Any = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); start over with --fresh") from error
    if not isinstance(loaded, dict) or not loaded.keys() >= set(keys):
        raise UserError(f"{path}: damaged, or no run's ({', '.join(keys)} missing); start over with --fresh")
    return dict(loaded)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
