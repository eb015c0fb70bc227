"""What stands around a section's work: its lock, its log, one line for what goes wrong, and silence beside it."""

import errno
import fcntl
import logging
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preceptor.app.console import Show
from preceptor.core.errors import UserError, WorkError
from preceptor.stages.base import Ticks
from preceptor.train import world

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_ALMOST_NOTHING = 1 << 20


class Silent(Show):
    """The first process shows what all of them do."""

    def line(self, text: str) -> None:
        """Nothing."""

    def result(self, thing: Any) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Ticks]:
        """Nothing."""
        yield lambda done=1, note="", total=None: None


@contextmanager
def locked(folder: Path, section: str) -> Iterator[None]:
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
def logged(path: Path, section: str, show: Show) -> Iterator[logging.Logger]:
    """All that is logged goes to the section's file too, and what goes wrong with its traceback.

    What the ledger warns of, such as damage that it mended, is the user's to know at once.
    """
    warned = _Shown(show)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, log = logging.getLogger(), logging.getLogger("preceptor")
    root.addHandler(handler)
    logging.captureWarnings(world.rank() > 0)  # what one of several processes warns of is shown by the first
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
def told_in_one_line(runs: Path) -> Iterator[None]:
    """A disk that is full, and files that can't be had, as errors for the person who meets them."""
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
    if (isinstance(error, OSError) and error.errno in _NO_SPACE) or "os error 28" in str(error):
        return True
    return folder.exists() and shutil.disk_usage(folder).free < _ALMOST_NOTHING
