"""`make bench`: every benchmark in turn, a table, and results.json.

Each module here has `measure() -> {name: {value, unit, budget, ok}}`; words after the command choose modules.
"""

import importlib
import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main() -> int:
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("work", "measured", "budget", ""):
        shown.add_column(column)
    ok = True
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        for work, row in importlib.import_module(f"benchmarks.{name}").measure().items():
            results[work] = row
            ok &= row["ok"]
            shown.add_row(
                work,
                f"{row['value']} {row['unit']}",
                "" if row["budget"] is None else str(row["budget"]),
                "ok" if row["ok"] else "past",
            )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(shown)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
