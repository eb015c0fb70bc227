"""Runs sections, each in its folder: what is done is skipped, what is owed is done, what differs is refused.

The folder says by itself what made it: the configuration, the digests of what was read, the code. `done.json`
is written last, so its being there means that all else is.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import preceptor
from preceptor.app.console import Show
from preceptor.app.guard import Silent, locked, logged, told_in_one_line
from preceptor.app.recipe import Recipe, Section, inputs
from preceptor.core.errors import UserError
from preceptor.stages.base import FAILED, Context, Stage, replacing, result_fields, sha256
from preceptor.train import world

_Json = dict[str, Any]


def run(
    recipe: Recipe, names: Sequence[str], runs: Path, show: Show, *, fresh: bool = False, retry: bool = False
) -> None:
    """Run the named sections, or all, in the file's order. `retry` tries again what failed in them.

    Of several processes that a launcher started, the first locks, decides and writes; the others only work.

    Raises:
        UserError: a run was made from another request, or another process is at it.
        WorkError: the work failed.
    """
    logging.raiseExceptions = False  # a full disk is told once, not for every line of the log
    chosen = recipe.chosen(names)
    if world.size() > 1:
        _check_launched(chosen)
    for section in chosen:
        with told_in_one_line(runs), ExitStack() as held:

            def begin(section: Section = section, held: ExitStack = held) -> str:
                held.enter_context(locked(runs / recipe.name, section.name))
                if retry and not fresh:
                    _owe_failures(section, runs / recipe.name / section.name, show)
                return _begin(recipe, section, runs, show, fresh=fresh)

            if (decision := world.agree(begin)) != _SKIP:
                _work(recipe, section, runs, Silent() if world.rank() else show, decision)
    world.leave()


def _check_launched(chosen: Sequence[Section]) -> None:
    alone = next((section.name for section in chosen if "devices" not in type(section.config).model_fields), None)
    if alone:
        raise UserError(
            f"{alone}: the launcher started {world.size()} processes, and only training is shared among devices; run "
            "the other sections without it, then the training sections with it, by name"
        )


def _owe_failures(section: Section, folder: Path, show: Show) -> None:
    if section.stage.retry and (count := section.stage.retry(folder)):
        (folder / "done.json").unlink(missing_ok=True)
        show.line(f"{section.name}: {count} that failed are tried again (the failures are kept in {folder / FAILED})")


def _begin(recipe: Recipe, section: Section, runs: Path, show: Show, *, fresh: bool) -> str:
    """Decide what to do with a section, and write down what for."""
    folder = runs / recipe.name / section.name
    wanted = _Request.of(recipe, section, runs, inputs(recipe, section, runs))
    decision = "starts over: --fresh" if fresh else _decide(folder, wanted, section.stage)
    if decision == _SKIP:
        seconds = (read_json(folder / "done.json", "seconds") or {})["seconds"]
        show.line(f"{section.name}: done already, in {_duration(seconds)} ({folder})")
        return decision
    if decision.startswith(_OVER):
        _put_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").unlink(missing_ok=True)
    _write_json(folder / "config.json", wanted.record())
    (folder / "code.diff").write_text(_code()["diff"], "utf-8")
    show.line(f"{section.name}: {decision}")
    return decision


def _work(recipe: Recipe, section: Section, runs: Path, show: Show, decision: str) -> None:
    folder = runs / recipe.name / section.name
    start = time.monotonic()
    with logged(folder / (f"log.{world.rank()}.txt" if world.rank() else "log.txt"), section.name, show) as log:
        log.info("%s: %s", section.name, decision)
        found = inputs(recipe, section, runs)
        context = Context(recipe.name, section.name, folder, runs, found, log, show.progress, show.result)
        metrics = section.stage.run(section.config, context)
        if world.rank() == 0:
            _write_json(folder / "metrics.json", metrics)
            seconds = round(time.monotonic() - start, 3)
            digest = (read_json(folder / "config.json", "digest") or {})["digest"]
            finished = datetime.now(UTC).isoformat(timespec="seconds")
            _write_json(folder / "done.json", {"digest": digest, "seconds": seconds, "finished": finished})
        log.info("done in %s", _duration(time.monotonic() - start))
    show.line(f"{section.name}: done in {_duration(time.monotonic() - start)} ({folder})")


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
        failed = runs / recipe.name / section.name / FAILED
        tried = len(failed.read_bytes().splitlines()) if failed.exists() else 0
        limits[f"{section.name} retried"] = 1 + tried  # those who read what comes of it see that it grew
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
_NOT_WORK = {"config.json", "code.diff", "server.log", "issues.jsonl", "report.html"}


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
    names = (str(path.relative_to(folder)) for path in files)
    return any(name not in _NOT_WORK and not fnmatch(name, "log*.txt") for name in names)


def _steps(old: Mapping[str, int | None], new: Mapping[str, int | None], sections: Iterable[str]) -> int:
    """Whether limits grew (1), shrank (-1: one of them is enough) or stayed; none is the largest."""
    pairs = [(old[s] or sys.maxsize, new[s] or sys.maxsize) for s in sections if s in old and s in new]
    return min((1 if now > before else -1 for before, now in pairs if now != before), default=0)


def _change(key: str, before: Any, now: Any) -> str:
    if key.startswith("inputs."):
        return f"{key} changed"
    return f"{key} was {json.dumps(before, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)}"


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
