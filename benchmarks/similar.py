"""The similarity filter on 3,000 texts of 250 characters at .7, in Chinese and in English.

Half of the texts are fresh records of the textbook, half are altered ones, so that some fall on either side of
the threshold. The naive definition compares every text with all that were kept before it, in one thread, and
must keep the same; only its comparisons with the same library are timed, not a slower library's.
"""

import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Language
from preceptor.data.similar import kept, similarity

HERE = Path(__file__).parent
TEXTS, LENGTH, THRESHOLD, BUDGET = 3_000, 250, 0.7, 5.0
MANY, MEMORY = 50_000, 1.0


def _texts(number: int, language: Language) -> list[str]:
    rng = random.Random(0)
    joined = "\n".join(case.text for case in sample(number, 0, language, "full"))
    texts = [joined[start : start + LENGTH] for start in rng.sample(range(len(joined) - LENGTH), number // 2)]
    for text in texts[: number - len(texts)]:
        start = rng.randrange(len(joined) - LENGTH)
        cut = rng.randrange(LENGTH)
        texts.append(text[:cut] + joined[start : start + LENGTH - cut])
    rng.shuffle(texts)
    return texts


def _naive(texts: list[str]) -> list[int]:
    found: list[int] = []
    for number, text in enumerate(texts):
        if all(similarity(text, texts[other]) < THRESHOLD for other in found):
            found.append(number)
    return found


def _many() -> None:
    """Prints the seconds that the filter takes for many texts and the peak of memory in GB."""
    texts = _texts(MANY, "zh")
    started = time.perf_counter()
    kept(texts, THRESHOLD)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(round(time.perf_counter() - started), round(peak, 3))


def measure() -> dict[str, dict[str, Any]]:
    """Seconds of the filter in either language beside the naive one's, and the peak of memory for many texts."""
    rows: dict[str, dict[str, Any]] = {}
    languages: tuple[Language, ...] = ("zh", "en")
    for language in languages:
        texts = _texts(TEXTS, language)
        started = time.perf_counter()
        found = kept(texts, THRESHOLD)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        same = found == _naive(texts)
        naive = time.perf_counter() - started
        rows[f"similar {language}"] = {
            "value": round(seconds, 2),
            "unit": f"s (naive {naive:.1f} s, {'the same' if same else 'ANOTHER'} kept set of {len(found)})",
            "budget": BUDGET,
            "ok": seconds <= BUDGET and same,
        }
    command = [sys.executable, "-m", "benchmarks.similar", "many"]
    told = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, peak = map(float, told.split())
    rows["similar memory"] = {
        "value": peak,
        "unit": f"GB ({MANY:,} texts in {seconds:.0f} s)",
        "budget": MEMORY,
        "ok": peak <= MEMORY,
    }
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["many"]:
        _many()
    else:
        print(measure())
