"""Rows of a data set on a hub, as they come."""

import importlib
from collections.abc import Iterator
from typing import Any

from preceptor.core.errors import UserError, WorkError
from preceptor.data.rows import json_value

PREFIX = "hub:"


def rows(address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of `hub:owner/name[:config][:split]` with their numbers, from 1; by default of `train`.

    Raises:
        UserError: the address is wrong, or nothing can be reached at it.
        WorkError: the hub broke off.
    """
    name, *rest = address.removeprefix(PREFIX).split(":")
    config, split = {0: (None, "train"), 1: (None, *rest), 2: tuple(rest)}.get(len(rest), (None, ""))
    if not name or not split:
        raise UserError(f"{address}: a hub's data set is written hub:owner/name[:config][:split]")
    try:
        found = iter(importlib.import_module("datasets").load_dataset(name, config, split=split, streaming=True))
        first = next(found, None)
    except ImportError as error:
        raise UserError(f"{address} needs datasets: pip install 'preceptor[train]'") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{address}: not reached ({reason}); check name and network, or name a file") from error
    number = 0
    try:
        while first is not None:
            number += 1
            yield number, json_value(first)
            first = next(found, None)
    except Exception as error:
        raise WorkError(f"{address}: it broke off after row {number} ({type(error).__name__}); run again") from error
