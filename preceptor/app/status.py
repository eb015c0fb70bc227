"""How runs stand: what is done, owed and failed by section, and what all of it spent."""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.app.run import read_json
from preceptor.core.errors import UserError
from preceptor.core.money import Money
from preceptor.llm.ledger import Ledger, Summary
from preceptor.stages.base import LEDGER, nearest
from preceptor.stages.fences import TARGET


def tables(names: Sequence[str], runs: Path) -> Iterator[Table]:
    """Each run's sections in the order in which they were begun, and what was asked of models for them.

    Raises:
        UserError: there is no such run.
    """
    known = sorted({path.parent.parent.name for path in runs.glob("*/*/config.json")})
    for name in names:
        if Path(name).name not in known:
            raise UserError(f"{runs}: no run {name!r}{nearest(name, known)}")
    if not known:
        raise UserError(f"{runs}: no runs here; begin one with: preceptor run RECIPE, or name a folder with --runs")
    with Ledger(runs / LEDGER) if (runs / LEDGER).exists() else nullcontext() as ledger:
        for name in known:
            if not names or name in [Path(n).name for n in names]:
                yield _table(runs / name)
                if ledger:
                    yield from _asked(runs / name, ledger)


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
    so_far = f"{_answers(section):,} answers so far. " if rows.exists() else ""
    log = section / "log.txt"
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
    return state, so_far + (errors[-1] if errors and state == "not done" else "")


def _brief(metrics: dict[str, Any]) -> str:
    """The numbers at the top of a section's metrics."""
    parts = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {_figure(v)}" for k, v in value.items() if isinstance(v, (int, float)) and v)
            parts += [f"{key}: {inner}"] if inner else []
        elif isinstance(value, (int, float, str)):
            parts.append(f"{key} {_figure(value)}")
    return "; ".join(parts)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _is_locked(section: Path) -> bool:
    try:
        with (section.parent / f".{section.name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _asked(run: Path, ledger: Ledger) -> Iterator[Table]:
    """What models were asked for a run: the counts of each section, then its failures, money and time."""
    counts, notes = (Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)) for _ in range(2))
    counts.title = "asked of models, counted in sends: a case tried twice counts twice"
    counts.title_justify = "left"
    counts.add_column("section", overflow="fold")
    for column in ("requests", "replies", "failures", "tokens in", "cached", "tokens out"):
        counts.add_column(column, justify="right", no_wrap=True)
    for column in ("section", "failures, money, time"):
        notes.add_column(column, overflow="fold")
    for folder in sorted(path.parent for path in run.glob("*/config.json")):
        account = ledger.summary(f"{run.name}/{folder.name}")
        if account.requests:
            numbers = (account.requests, account.replies, sum(account.failures.values()))
            tokens = (account.tokens_in, account.tokens_cached, account.tokens_out)
            counts.add_row(folder.name, *(f"{n:,}" for n in (*numbers, *tokens)))
            if told := "\n".join(_told(folder, account, ledger)):
                notes.add_row(folder.name, Text(told))
    if told := _left(run, ledger):
        notes.add_row("all", Text(told))
    yield from (shown for shown in (counts, notes) if shown.row_count)


def _told(folder: Path, account: Summary, ledger: Ledger) -> Iterator[str]:
    if account.failures:
        yield "failed sends: " + ", ".join(f"{kind} {count:,}" for kind, count in account.failures.items())
    running = _is_locked(folder)
    if open_ := account.requests - account.replies - sum(account.failures.values()):
        yield f"{open_:,} in flight" if running else f"{open_:,} without an outcome: in flight at a stop"
    if account.spent or account.possible:
        free = f", and {account.unpriced:,} replies of unknown cost" if account.unpriced else ""
        more = f", at most {_money(account.possible)} more in flight or of unknown cost"
        yield f"spent {_money(account.spent) or 'nothing'}{more if account.possible else ''}{free}"
    if running and (rate := ledger.rate(f"{folder.parent.name}/{folder.name}")):
        answers, cases = _answers(folder), _cases(folder)
        # A strategy may take several replies a case.
        left = max(cases - answers, 0) * account.replies / max(answers, 1) / rate
        yield f"{rate:,.0f} replies a minute" + (f", about {_time(left)} to go" if answers and cases > answers else "")


def _left(run: Path, ledger: Ledger) -> str:
    """What the cap leaves, if there is one: it holds for all sections together."""
    sections = sorted(path.parent for path in run.glob("*/config.json"))
    caps = [cap for section in sections if (cap := _cap(section))]
    if not caps:
        return ""
    cap = max(caps)
    accounts = [ledger.summary(f"{run.name}/{section.name}") for section in sections]
    committed = sum(a.spent.get(cap.currency, 0) + a.possible.get(cap.currency, 0) for a in accounts)
    return f"{_sum(cap.amount - committed, cap.currency)} left of the cap of {_sum(*cap)}"


def _cap(section: Path) -> Money | None:
    """The cap that a section was last started with; one whose file is damaged is told of above."""
    with suppress(UserError):
        config = (read_json(section / "config.json") or {}).get("config", {})
        teacher = config.get("teacher") or {}
        if teacher.get("cap") is not None and (price := teacher["endpoint"][0]["price"]):
            return Money(teacher["cap"], price["currency"])
    return None


def _answers(folder: Path) -> int:
    path = folder / "predictions.jsonl"
    return _lines(path) if path.exists() else 0


def _cases(folder: Path) -> int:
    """How many answers a labelling section is to have; 0 if that can't be told."""
    record = read_json(folder / "config.json", "inputs", "config", "stage") or {"stage": ""}
    if record["stage"] != "label":
        return 0
    paths = [Path(source["path"]) for name in ("train.jsonl", TARGET) for source in record["inputs"].get(name, ())]
    count = sum(_lines(path) for path in paths if path.exists())
    return min(count, record["config"].get("limit") or count) * int(record["config"].get("samples", 1))


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


def _money(sums: Mapping[str, float]) -> str:
    return " and ".join(_sum(amount, currency) for currency, amount in sums.items())


def _sum(amount: float, currency: str) -> str:
    return f"{amount:,.{2 if abs(amount) >= 1 else 4}f} {currency}"


def _time(minutes: float) -> str:
    if minutes < 1:
        return "a minute"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
