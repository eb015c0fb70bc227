"""How runs stand: what is done, owed and failed by section, and what all of it spent."""

import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.app.run import read_json
from preceptor.core.errors import UserError
from preceptor.llm.ledger import Ledger
from preceptor.stages.base import LEDGER, nearest


def tables(names: Sequence[str], runs: Path) -> Iterator[Table]:
    """One table a run: its sections in the order in which they were begun, then the account.

    Raises:
        UserError: there is no such run.
    """
    known = sorted({path.parent.parent.name for path in runs.glob("*/*/config.json")})
    for name in names:
        if Path(name).name not in known:
            raise UserError(f"{runs}: no run {name!r}{nearest(name, known)}")
    if not known:
        raise UserError(f"{runs}: no runs here; begin one with: preceptor run RECIPE, or name a folder with --runs")
    for name in known:
        if not names or name in [Path(n).name for n in names]:
            yield _table(runs / name)
    if (runs / LEDGER).exists():
        yield _spent(runs, names or known)


def _table(folder: Path) -> Table:
    shown = Table(title=folder.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("section", "state", "what came of it"):
        shown.add_column(column)
    rows = [(*_begun(path.parent), path.parent.name) for path in folder.glob("*/config.json")]
    for _, state, told, section in sorted(rows, key=lambda row: (row[0], row[-1])):
        shown.add_row(section, Text(state), Text(told))
    return shown


def _begun(section: Path) -> tuple[str, str, str]:
    """When a section was begun, and how it stands; one that can't be read hides no other."""
    try:
        config = read_json(section / "config.json", "started") or {}
        return (str(config["started"]), *_state(section))
    except UserError as error:
        return "", "damaged", str(error)


def _state(section: Path) -> tuple[str, str]:
    if (section / "done.json").exists():
        done = read_json(section / "done.json", "seconds") or {}
        return f"done in {done['seconds']:.0f} s", _brief(read_json(section / "metrics.json") or {})
    state = "running" if _is_locked(section) else "not done"
    rows = section / "predictions.jsonl"
    so_far = f"{len(rows.read_bytes().splitlines())} answers so far. " if rows.exists() else ""
    log = section / "log.txt"
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
    return state, so_far + (errors[-1] if errors and state == "not done" else "")


def _brief(metrics: dict[str, Any]) -> str:
    """The numbers at the top of a section's metrics."""
    parts = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {v}" for k, v in value.items() if isinstance(v, (int, float)) and v)
            parts += [f"{key}: {inner}"] if inner else []
        elif isinstance(value, (int, float, str)):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "; ".join(parts)


def _is_locked(section: Path) -> bool:
    try:
        with (section.parent / f".{section.name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _spent(runs: Path, names: Sequence[str]) -> Table:
    shown = Table(title="asked of models", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("section", "requests", "replies", "failures", "tokens in", "tokens out"):
        shown.add_column(column, justify="left" if column in ("section", "failures") else "right")
    with Ledger(runs / LEDGER) as ledger:
        for config in sorted(path for name in names for path in (runs / Path(name).name).glob("*/config.json")):
            section = f"{config.parent.parent.name}/{config.parent.name}"
            account = ledger.summary(section)
            if account.requests:
                failures = ", ".join(f"{kind} {count}" for kind, count in account.failures.items())
                numbers = (account.requests, account.replies)
                tokens = (account.tokens_in, account.tokens_out)
                shown.add_row(section, *map(str, numbers), failures, *(f"{n:,}" for n in tokens))
    return shown
