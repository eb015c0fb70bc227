"""A recipe of toy stages, and the real command over them: `python -m tests.app.toy run …`."""

import json
import sys
import time
import types
from typing import Annotated, Any

from pydantic import Field

from preceptor.app import cli
from preceptor.app.stages import STAGES
from preceptor.core.records import Row
from preceptor.stages.base import Context, How, Lines, Need, Stage, StageConfig, read_records, write_records

RECIPE = """
name: toy
seed: 3
numbers: {n: 6}
double: {}
total: {}
"""


class Numbers(StageConfig):
    n: int = Field(gt=0)
    seed: int = 0
    seconds: Annotated[float, How()] = 0.0


class Double(StageConfig):
    seconds: Annotated[float, How()] = 0.0
    fail: Annotated[str, How()] = ""

    def needs(self) -> tuple[Need, ...]:
        return (Need("rows.jsonl"),)


class Total(StageConfig):
    def needs(self) -> tuple[Need, ...]:
        return (Need("doubled.jsonl"),)


def _row(number: int) -> Row:
    return Row(id=str(number), messages=(), answer=str(number), case_id="c")


def numbers(config: Numbers, context: Context) -> dict[str, Any]:
    count = min(config.n, config.limit or config.n)
    write_records(context.folder / "rows.jsonl", map(_row, range(config.seed, config.seed + count)))
    return {"rows": count}


def double(config: Double, context: Context) -> dict[str, Any]:
    if config.fail == "space":
        raise OSError(28, "No space left on device")
    if config.fail == "bug":
        raise ZeroDivisionError("a bug")
    if config.fail == "stop":
        raise KeyboardInterrupt
    path = context.folder / "doubled.jsonl"
    with Lines(path) as lines:
        done = {row.id for row in read_records(path, Row)}
        for row in read_records(context.input("rows.jsonl"), Row, config.limit):
            if row.id not in done:
                time.sleep(config.seconds)
                (context.folder / "worked").open("a").write(f"{row.id}\n")
                lines.write(_row(2 * int(row.answer)).model_copy(update={"id": row.id}))
    return {"rows": len(path.read_bytes().splitlines())}


def total(config: Total, context: Context) -> dict[str, Any]:
    found = sum(int(row.answer) for row in read_records(context.input("doubled.jsonl"), Row))
    context.say(f"total {found}")
    (context.folder / "total").write_text(json.dumps(found))
    return {"total": found}


TOYS = {
    "numbers": Stage("numbers", Numbers, numbers, leaves=("rows.jsonl",)),
    "double": Stage("double", Double, double, leaves=("doubled.jsonl",)),
    "total": Stage("total", Total, total, leaves=("total",), grows=False),
}


def register() -> None:
    for name, stage in TOYS.items():
        STAGES[name] = "a toy"
        module = types.ModuleType(f"preceptor.stages.{name}")
        module.__dict__["STAGE"] = stage
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    register()
    cli.main()
