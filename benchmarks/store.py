"""The store of a teacher's beliefs beside the JSON lines of FIRST: bytes a token, and tokens read and written a second.

The same beliefs of 2,000 replies of 300 tokens, five of 151,936 words each, in half precision. FIRST (arXiv
2408.12168) writes a line for each text, with its tokens, a mask, and for each token an object of ids and
log-probabilities; to read any it reads all, and makes lists of numbers of what it needs. At random: 500 replies in any
order from files that were not open, as a process that resumes does. The time is the processor's, of one thread, and
files lie in the system's memory. The ways take turns; the median is told.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from preceptor.train.store import TOKENS, Beliefs, Header, Store, Writer

REPLIES, LENGTH, SOME, VOCABULARY, K = 2_000, 300, 500, 151_936, 5
TURNS, BUDGET = 3, 28
THEIRS, OURS = "theirs.jsonl", "ours"


def _beliefs() -> list[Beliefs]:
    """Most tokens all but certain, as a teacher's are."""
    dice = np.random.default_rng(0)
    found = []
    for _ in range(REPLIES):
        ids = dice.integers(VOCABULARY - K, size=(LENGTH, 1)) + np.arange(K)
        logits = -np.sort(-dice.normal(0, 2, (LENGTH, K + 1)))
        logits[:, 0] += dice.choice([0, 8], LENGTH)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        rest = np.exp(logprobs[:, K]).astype(np.float32)
        found.append(Beliefs(ids, logprobs[:, :K].astype(np.float16).astype(np.float32), rest, np.zeros(LENGTH, int)))
    return found


def _write_ours(folder: Path, found: Sequence[Beliefs]) -> None:
    with Writer(folder / OURS, Header(K, "tokenizer", "teacher")) as writer:
        for number, beliefs in enumerate(found):
            writer.add(f"case {number}", 0, beliefs)


def _write_theirs(folder: Path, found: Sequence[Beliefs]) -> None:
    with (folder / THEIRS).open("w") as file:
        for beliefs in found:
            pairs = zip(beliefs.ids.tolist(), beliefs.logprobs.tolist(), strict=True)
            top = [dict(zip(map(str, ids), logprobs, strict=True)) for ids, logprobs in pairs]
            line = {"text": beliefs.written.tolist(), "attention_mask": [1] * LENGTH, "top_log_probs": top}
            file.write(json.dumps(line) + "\n")


def _read_ours(folder: Path, order: Sequence[int]) -> None:
    store = Store(folder / OURS)
    for number in order:
        assert len(store[f"case {number}", 0].ids) == LENGTH


def _read_theirs(folder: Path, order: Sequence[int]) -> None:
    with (folder / THEIRS).open() as file:
        lines = [json.loads(line)["top_log_probs"] for line in file]
    for number in order:
        ids = [[int(token) for token in top] for top in lines[number]]
        logprobs = [list(top.values()) for top in lines[number]]
        assert len(ids) == len(logprobs) == LENGTH


def _seconds(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(time.process_time() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def _row(tokens: int, ours: float, theirs: float) -> dict[str, Any]:
    unit = f"tokens/s (JSON lines {tokens / theirs:,.0f}: {theirs / ours:.1f} x as many)"
    return {"value": round(tokens / ours), "unit": unit, "budget": None, "ok": True}


def measure() -> dict[str, dict[str, Any]]:
    """Bytes, and tokens a second."""
    found, tokens = _beliefs(), REPLIES * LENGTH
    order = np.random.default_rng(1).permutation(REPLIES).tolist()
    with tempfile.TemporaryDirectory() as made:
        folders = iter(Path(made) / f"{number}" for number in range(2 * TURNS))

        def fresh() -> Path:
            folder = next(folders)
            folder.mkdir()
            return folder

        writing = _seconds(
            {"ours": lambda: _write_ours(fresh(), found), "theirs": lambda: _write_theirs(fresh(), found)}
        )
        folder = Path(made) / "read"
        folder.mkdir()
        _write_ours(folder, found)
        _write_theirs(folder, found)
        whole = _seconds(
            {"ours": lambda: _read_ours(folder, range(REPLIES)), "theirs": lambda: _read_theirs(folder, range(REPLIES))}
        )
        some = _seconds(
            {"ours": lambda: _read_ours(folder, order[:SOME]), "theirs": lambda: _read_theirs(folder, order[:SOME])}
        )
        size = (folder / OURS / TOKENS).stat().st_size / tokens
        all_ours = sum(file.stat().st_size for file in (folder / OURS).iterdir()) / tokens
        theirs = (folder / THEIRS).stat().st_size / tokens
    print(f"one of {os.cpu_count()} cores under a load of {os.getloadavg()[1]:.1f}, {TURNS} turns", file=sys.stderr)
    unit = f"B a token at k = {K} (with the entries of replies {all_ours:.1f}; JSON lines {theirs:.0f})"
    return {
        "store": {"value": round(size, 1), "unit": unit, "budget": BUDGET, "ok": size <= BUDGET},
        "store, written": _row(tokens, writing["ours"], writing["theirs"]),
        "store, read whole": _row(tokens, whole["ours"], whole["theirs"]),
        "store, read at random": _row(SOME * LENGTH, some["ours"], some["theirs"]),
    }


if __name__ == "__main__":
    print(measure())
