"""Who imports whom, and how large each room is; `python -m tests.rooms` prints the table."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "preceptor"
ORDER = (
    ("core",),
    ("clinical",),
    ("tasks",),
    ("data", "model"),
    ("llm", "train"),
    ("report",),
    ("stages",),
    ("app",),
    ("the top",),
)
"""A room imports those before it; rooms side by side don't import each other."""
SHARES = {
    "core": 900,
    "clinical": 1900,
    "tasks": 1100,
    "data": 1500,
    "model": 900,
    "llm": 1600,
    "train": 2200,
    "report": 1000,
    "stages": 1500,
    "app": 1200,
    "the top": 100,
}
"""Lines of Python that each room may take."""
LONGEST = 400
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}
HEAVY_ROOMS = {"model", "train"}
TOP = "the top"
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder of a file; what lies at the top (api, __main__) may import what app may."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else TOP


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    package = ("preceptor", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{name.name}" for name in node.names)


def mistakes(path: Path) -> Iterator[str]:
    """What a file imports against the order of the rooms."""
    room = room_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top in HEAVY and room not in HEAVY_ROOMS:
            yield f"{room} imports {top}"
        other = rest.partition(".")[0]
        if top != "preceptor" or other == room or other not in LEVEL:
            continue
        if LEVEL[other] >= LEVEL[room]:
            yield f"{room} imports {name}"
    if room == "stages":
        yield from (f"a stage imports {name}" for name in imports(path) if _verb(name) not in (None, path.stem))


def _verb(name: str) -> str | None:
    """The stage that a name belongs to; None for what stages share."""
    parts = name.split(".")
    if parts[:2] != ["preceptor", "stages"] or len(parts) < 3:
        return None
    source = (PACKAGE / "stages" / f"{parts[2]}.py").read_text("utf-8")
    return parts[2] if "\nSTAGE = " in source else None


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def table() -> str:
    """Lines by room against its share."""
    sizes = dict.fromkeys(SHARES, 0)
    for path in files():
        sizes[room_of(path)] += lines(path)
    rows = [
        f"{room:10}{size:7}{SHARES[room]:7}{size / SHARES[room]:8.0%}" + "  past its share" * (size > SHARES[room])
        for room, size in sizes.items()
    ]
    total, most = sum(sizes.values()), sum(SHARES.values())
    return "\n".join([f"{'room':10}{'lines':>7}{'share':>7}", *rows, f"{'all':10}{total:7}{most:7}{total / most:8.0%}"])


if __name__ == "__main__":
    print(table())  # noqa: T201
