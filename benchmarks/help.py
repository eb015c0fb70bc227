"""`preceptor --help`: the first thing that anyone types must not load what it doesn't show."""

import subprocess
import sys
import time
from typing import Any

RUNS, BUDGET = 5, 0.3


def measure() -> dict[str, dict[str, Any]]:
    """Seconds of the fastest of a few runs: the others wait for the machine, not for us."""
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "preceptor", "--help"], stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - start)
    seconds = round(min(taken), 3)
    return {"help": {"value": seconds, "unit": "s", "budget": BUDGET, "ok": seconds <= BUDGET}}
