"""What log-probabilities cost a teacher's labels: tokens, money, and bytes in the ledger and in a store.

300 of the textbook's cases in each language are labelled twice over HTTP, without log-probabilities and with five a
token, each time with a ledger of its own. The bytes are those of the ledger's file, less an empty one's, and of the
store that the replies make; a process's memory is its resident set at the most.

The textbook's replies are short, and most of their tokens have no other way to go on. A real teacher's have, and write
hundreds of tokens: so SmolLM2-135M reads the textbook's English records, and its five likeliest of each token make
replies of 400, which are packed as the ledger packs them. For 14,000 cases of that length stand the sums.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor

from preceptor.clinical.textbook.sampler import sample
from preceptor.core.money import Price
from preceptor.core.records import Prediction, Reply, Token, Usage
from preceptor.llm import ledger, packing
from preceptor.llm.config import presets
from preceptor.model import pieces, smollm2, tokens
from preceptor.model.load import load_model, load_tokenizer
from preceptor.model.resolve import resolve
from preceptor.stages.base import LEDGER, read_records
from preceptor.train.align import Tally, aligned
from preceptor.train.store import Beliefs, Header, Store, Writer

CASES, K = 300, 5
MANY, LONG, PROMPT = 14_000, 400, 400
"""Cases, and tokens of a real reply and prompt: a record of the HealthAI competition has 250 characters."""
TEXTS = 4
MODEL = "deepseek-v4-flash"
MB = 1e6
STORED, ENTRY = 28, 36
"""Bytes of a token and of a reply in a store (see benchmarks.store)."""
SUM = f"{MANY:,} replies of {LONG} tokens"
_PROCESS = """
import re
from pathlib import Path
from preceptor.app.cli import main
try:
    main()
finally:
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""
"""The command, which tells at last what memory it took."""
LANGUAGES = {"en": "English", "zh": "Chinese"}


def _label(folder: Path, language: str, *, logprobs: bool) -> tuple[dict[str, Any], int]:
    """The figures of a run of its own, and the bytes of memory that it took at most."""
    recipe = {
        "name": "cost",
        "task": "diagnosis",
        "language": language,
        "seed": 1,
        "teacher": {"model": "textbook", "endpoint": "textbook"},
        "prepare": {"source": "textbook", "style": "short", "train": CASES, "validation": 10, "test": 10},
        "label": {"logprobs": K} if logprobs else {},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    told = [_run(folder, section) for section in ("prepare", "label")]
    return json.loads((folder / "cost" / "label" / "metrics.json").read_text()), told[-1]


def _run(folder: Path, section: str) -> int:
    """The memory that a section takes, in a process of its own."""
    command = [sys.executable, "-c", _PROCESS, "run", str(folder / "recipe.yaml"), section, "--runs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _replies(folder: Path) -> list[Reply]:
    path = folder / "cost" / "label" / "predictions.jsonl"
    with ledger.Ledger(folder / LEDGER) as kept:
        found = (kept.find(prediction.reply) for prediction in read_records(path, Prediction))
        return [reply for reply in found if isinstance(reply, Reply)]


def _ledger_bytes(folder: Path, empty: int) -> float:
    """A case's."""
    return ((folder / LEDGER).stat().st_size - empty) / CASES


def _store(folder: Path, replies: Iterable[Reply]) -> tuple[float, float]:
    """Bytes of a store, and of FIRST's JSON lines, for each token that a student learns."""
    tokenizer, tally, theirs = load_tokenizer(resolve("mini")), Tally(), 0
    with Writer(folder, Header(K, "mini", "textbook")) as writer:
        for number, reply in enumerate(replies):
            ids = [*tokenizer.encode(reply.text, add_special_tokens=False), tokens.end_of_turn(tokenizer)]
            found = aligned(tokenizer, ids, reply.tokens, K, tally)
            assert found is not None
            writer.add(str(number), 0, found)
            theirs += _json_line(found)
    assert len(Store(folder)) == CASES
    return sum(file.stat().st_size for file in folder.iterdir()) / tally.tokens, theirs / tally.tokens


def _json_line(found: Beliefs) -> int:
    """Bytes of a text's line in FIRST's file."""
    pairs = zip(found.ids.tolist(), found.logprobs.tolist(), strict=True)
    top = [{str(token): value for token, value in zip(*pair, strict=True) if value > -float("inf")} for pair in pairs]
    line = {"text": found.written.tolist(), "attention_mask": [1] * len(top), "top_log_probs": top}
    return len(json.dumps(line)) + 1


@torch.inference_mode()
def _real() -> dict[str, float]:
    """Bytes a token of replies in which each token has its alternatives: as they are sent, packed, and in a store."""
    folder = smollm2.folder(lambda _: None)
    model, tokenizer = load_model(folder, torch.float32).eval(), load_tokenizer(folder)
    piece, found = pieces.reader(tokenizer), list[dict[str, float]]()
    words = "\n".join(case.text for case in sample(TEXTS * 20, 0, "en"))
    ids = tokenizer.encode(words, add_special_tokens=False)
    for start in range(0, TEXTS * LONG, LONG):
        some = ids[start : start + LONG + 1]
        logprobs = model(torch.tensor([some])).logits[0, :-1].log_softmax(-1)
        best = logprobs.topk(K)
        reply: dict[bool, list[Token]] = {False: [], True: []}
        for token, row, values, others in zip(some[1:], logprobs, *map(Tensor.tolist, best), strict=True):
            for by_id, told in reply.items():
                name, *names = (b"token_id:%d" % one if by_id else piece(one) for one in (token, *others))
                pairs = tuple(zip(names, values, strict=True))
                told.append(Token(utf8=name, logprob=float(row[token]), alternatives=pairs))
        text = b"".join(token.utf8 for token in reply[False]).decode()
        beliefs = aligned(tokenizer, some[1:], reply[False], K, Tally())
        assert beliefs is not None
        found.append(
            {
                "plain": len(packing.pack(Reply(text=text))),
                "packed": len(packing.pack(Reply(text=text, tokens=tuple(reply[False])))),
                "ids": len(packing.pack(Reply(text=text, tokens=tuple(reply[True])))),
                "sent": len(json.dumps({"content": [_sent(token) for token in reply[False]]})),
                "store": STORED * LONG + ENTRY,
                "lines": _json_line(beliefs),
            }
        )
    return {name: fmean(one[name] for one in found) / LONG for name in found[0]}


def _sent(token: Token) -> dict[str, Any]:
    """As the chat API says it."""
    first, *others = (
        {"token": utf8.decode(errors="replace"), "logprob": logprob, "bytes": list(utf8)}
        for utf8, logprob in ((token.utf8, token.logprob), *token.alternatives)
    )
    return {**first, "top_logprobs": others}


def _row(value: float, unit: str) -> dict[str, Any]:
    return {"value": float(f"{value:.3g}"), "unit": unit, "budget": None, "ok": True}


def _labelled(folder: Path, language: str, empty: int) -> dict[str, dict[str, Any]]:
    """What one language's labels took, without log-probabilities and with."""
    runs = {name: folder / f"{language} {name}" for name in ("without", "with")}
    told = {name: _label(run, language, logprobs=name == "with") for name, run in runs.items()}
    (plain, before), (figures, after) = told["without"], told["with"]
    asked = ("prompt_tokens", "completion_tokens")
    assert all(plain[name] == figures[name] for name in asked), f"not the same tokens: {plain}, {figures}"
    replies = _replies(runs["with"])
    count = sum(len(reply.tokens) for reply in replies)
    small, large = (_ledger_bytes(run, empty) for run in runs.values())
    store, lines = _store(folder / f"{language} store", replies)
    prompt, completion = (plain[name] / CASES for name in asked)
    whose = f"cost, {LANGUAGES[language]}:"
    more = (large - small) / count * CASES
    return {
        f"{whose} prompt": _row(prompt, "tokens a case, with log-probabilities as without"),
        f"{whose} completion": _row(completion, "tokens a case, with as without"),
        f"{whose} ledger": _row(large, f"B a case ({small:.0f} without; {more:.1f} B a token more)"),
        f"{whose} store": _row(store, f"B a token learned (JSON lines {lines:.0f})"),
        f"{whose} memory": _row(after / MB, f"MB at most ({before / MB:.0f} without)"),
    }


def _money() -> dict[str, Any]:
    """Of many cases with real prompts and replies."""
    price = Price.model_validate(presets()["deepseek"]["models"][MODEL]["price"])
    cost = price.cost(Usage(prompt_tokens=MANY * PROMPT, completion_tokens=MANY * LONG))
    return _row(cost.amount, f"{cost.currency} at {MODEL}'s price of {price.as_of}, with log-probabilities as without")


def measure() -> dict[str, dict[str, Any]]:
    """The figures of both languages, and of real replies."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ledger.Ledger(folder / LEDGER).close()
        empty = (folder / LEDGER).stat().st_size
        for language in LANGUAGES:
            results |= _labelled(folder, language, empty)
    real = _real()
    total = {name: MANY * LONG * each / MB for name, each in real.items()}
    results |= {
        "cost, real replies: ledger": _row(real["packed"], f"B a token ({real['plain']:.2f} without)"),
        "cost, real replies: ledger with ids": _row(real["ids"], "B a token"),
        "cost, real replies: sent": _row(real["sent"], f"B a token, {total['sent']:,.0f} MB of {SUM}"),
        "cost, real replies: ledger in all": _row(total["packed"], f"MB of {SUM} ({total['plain']:,.0f} without)"),
        "cost, real replies: money in all": _money(),
        "cost, real replies: store in all": _row(total["store"], f"MB of {SUM} (JSON lines {total['lines']:,.0f})"),
    }
    print(f"one of {os.cpu_count()} cores under a load of {os.getloadavg()[1]:.1f}", file=sys.stderr)
    return results


if __name__ == "__main__":
    print(measure())
