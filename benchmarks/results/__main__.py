"""Runs recipes/results.yaml for every teacher and seed, two at a time, and writes docs/results.md.

What is done is skipped, so that a run that was stopped goes on. `--quick` gives the outline, one seed a teacher with
few cases, and prints it. `--student smollm2` runs the recipe of the pretrained student, and writes its table alone.
"""

import os
import platform
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.results.figures import read
from benchmarks.results.page import MARK, PRETRAINED, About, page, pretrained, written
from preceptor.clinical.textbook.exact import Confidence
from preceptor.stages.base import replacing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
TEACHERS: tuple[Confidence, ...] = ("over", "honest", "under")
SEEDS = 3
AT_ONCE = 2
QUICK = ("prepare.train=800", "prepare.validation=200", "prepare.test=200")
SMOLLM2 = "results-smollm2"


@dataclass(frozen=True)
class Plan:
    """One run of the recipe."""

    name: str
    teacher: Confidence
    seed: int

    def overrides(self) -> tuple[str, ...]:
        start = f"'{{python}} -m preceptor teacher --confidence {self.teacher} --port {{port}}'"
        return (
            *(f"name={self.name}", f"seed={self.seed}"),
            *(f"teacher.endpoint.name={self.teacher}", f"teacher.endpoint.start={start}"),
        )


def plans(prefix: str, seeds: int = SEEDS) -> Iterator[Plan]:
    """Each teacher has seeds of its own, so that no two runs share a case; the teachers take turns."""
    for turn in range(seeds):
        for place, teacher in enumerate(TEACHERS):
            seed = place * seeds + turn + 1
            yield Plan(f"{prefix}-{teacher}-{seed}", teacher, seed)


def run(recipe: str, name: str, runs: Path, overrides: Sequence[str], threads: int = 1) -> None:
    """One run in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    runs.mkdir(parents=True, exist_ok=True)
    told = runs / f"{name}.log"
    command = [sys.executable, "-m", "preceptor", "run", str(ROOT / "recipes" / recipe), "--runs", str(runs)]
    with told.open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        ended = subprocess.run([*command, *overrides], stdout=log, stderr=log, env=environment, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} failed: {told.read_text().rstrip().rpartition(chr(10))[2]} ({told})")
    print(f"{name}: done", file=sys.stderr, flush=True)


def machine() -> str:
    """Processor, cores and the version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"


def main() -> None:
    """The command."""
    parser = ArgumentParser(prog="python -m benchmarks.results")
    parser.add_argument("--quick", action="store_true", help="The outline alone: few cases, one seed a teacher.")
    parser.add_argument("--student", choices=("mini", "smollm2"), default="mini", help="Whose runs are made.")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="The folder of all runs.")
    asked = parser.parse_args()
    if asked.quick and asked.student != "mini":
        parser.error("--quick is of mini's runs")
    if asked.student == "smollm2":
        run(f"{SMOLLM2}.yaml", SMOLLM2, asked.runs, (), os.cpu_count() or 1)
        found = read(asked.runs / SMOLLM2, "over", 1)
        _write(pretrained(found, About("make results STUDENT=smollm2", machine())), PRETRAINED)
        return
    wanted = list(plans("results-quick", 1) if asked.quick else plans("results"))
    few = QUICK if asked.quick else ()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda one: run("results.yaml", one.name, asked.runs, (*one.overrides(), *few)), wanted))
    done = [read(asked.runs / one.name, one.teacher, one.seed) for one in wanted]
    tables = page(done, About("make results" + (" QUICK=1" if asked.quick else ""), machine()))
    if asked.quick:
        print(tables)
        return
    _write(tables, MARK)


def _write(tables: str, mark: str) -> None:
    with replacing(PAGE) as beside:
        beside.write_text(written(PAGE.read_text("utf-8") if PAGE.exists() else "", tables, mark), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
