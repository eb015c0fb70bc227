"""What the user sees while work goes on: bars and lines on stderr, results on stdout."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from preceptor.stages.base import Ticks

_FIRST_LINE, _EACH_LINE = 2.0, 10.0
"""Seconds before the first plain line of progress, and between two."""


class Show:
    """Bars on a terminal; plain lines where stderr is a file."""

    def __init__(self) -> None:
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    @property
    def width(self) -> int:
        """Characters of a line of results."""
        return self._out.width

    def line(self, text: str) -> None:
        """Say how the work stands."""
        self._err.print(Text(text), soft_wrap=True)

    def result(self, thing: Any) -> None:
        """Show what came out: a line, or anything that rich renders."""
        if isinstance(thing, str):
            self._out.print(Text(thing), soft_wrap=True)
        else:
            self._out.print(thing)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Ticks]:
        """Count work that is under way."""
        if not self._err.is_terminal:
            yield _PlainTicks(what, total)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}", style="dim")
        with Progress(*columns, TimeRemainingColumn(), note, console=self._err, transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def tick(done: int = 1, note: str = "", total: int | None = None) -> None:
                bar.update(task, advance=done, note=note, total=total)

            yield tick


class _PlainTicks:
    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = time.monotonic()
        self._next = self._start + _FIRST_LINE

    def __call__(self, done: int = 1, note: str = "", total: int | None = None) -> None:
        self._done += done
        self._total = total or self._total
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EACH_LINE
        of, left = "", ""
        if self._total:
            of = f"/{self._total}"
            rest = (now - self._start) * (self._total - self._done) / max(self._done, 1)
            left = f", {rest:.0f} s left"
        print(f"{self._what}: {self._done}{of}{left} {note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201  plain lines for a file
