"""Prediction with the local engine beside the loop that everyone writes: the library's `generate`, a case at a time.

The model is SmolLM2-135M, which is asked for diagnoses of the textbook's cases, and writes the same number of tokens in
every way. The engine answers all cases, through its queue, in the precision that it chooses for this machine; the loop,
in bf16, a few of them. Beside it stands the loop in float32, where engine and loop must say the same word for word.
Then both with a few-shot prefix of 1,500 tokens before each case, and the engine without sharing it. Next, what it
costs to hold replies to their schema, in seconds a token. Last, the package's own small student, in float32.

The ways take turns, with all cores; each ratio is of one turn. The median is told, and the range. Where there is a
GPU, a random model of the shape of a 7B writes beside the library's `generate` at the same batch size.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Message, Reply, Request, Sampling
from preceptor.llm.local import Local
from preceptor.model import cache, smollm2, tokens
from preceptor.model.load import Loaded, load_model, load_tokenizer, torch_dtype
from preceptor.model.resolve import resolve
from preceptor.tasks import prompts
from preceptor.tasks.strategies import SCHEMAS

TURNS, ROWS, LOOPED, NEW = 2, 128, 2, 96
PREFIX, SHOWN = 1_500, 24
"""Tokens of the few-shot prefix, and of the replies after it: with and without, prompts are the work there."""
BUDGET = 8.0

Way = Callable[[], int]
"""Answers; how much was done."""


def _loaded(dtype: torch.dtype | None = None) -> Loaded:
    """In the precision that is chosen for this machine, or in that one."""
    folder = smollm2.folder()
    return Loaded(load_model(folder, dtype or torch_dtype(folder)).eval(), load_tokenizer(folder), folder)


def _requests(loaded: Loaded, new: int, *, shots: bool = False, rows: int = ROWS) -> list[Request]:
    """The prompts of cases, after the same long beginning if `shots`."""
    prompt, cases = prompts.load("diagnosis", "zero_shot", "en"), sample(rows + 40, 0, "en")
    shown = ""
    for case in cases[rows:]:
        if shots and len(loaded.tokenizer.encode(shown)) < PREFIX:
            shown += f"{case.text}\n{case.gold}\n\n"
    begun = (Message(role="system", content=shown),) if shots else ()
    sampling = Sampling(max_tokens=new)
    return [Request(messages=begun + prompt.render(case.text), sampling=sampling, logprobs=0) for case in cases[:rows]]


def _ours(loaded: Loaded, requests: Sequence[Request]) -> list[Reply]:
    async def answers() -> list[Reply]:
        local = Local(loaded, "")
        replies = await asyncio.gather(*map(local.complete, requests))
        await local.close()
        return replies

    return asyncio.run(answers())


def _loop(loaded: Loaded, requests: Sequence[Request], counts: Sequence[int] | None = None) -> list[str]:
    """Texts from the library, a prompt at a time; of so many tokens each, if `counts` are given."""
    texts = []
    for at, request in enumerate(requests):
        ids = torch.tensor([tokens.prompt_ids(loaded.tokenizer, request.messages)], device=loaded.model.device)
        count = counts[at] if counts else None
        with torch.inference_mode():
            written = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count or request.sampling.max_tokens,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        texts.append(loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def _seconds(ways: Mapping[str, Way], turns: int = TURNS) -> dict[str, list[float]]:
    """For what a way did once, in each turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.perf_counter()
            done = way()
            taken[name].append((time.perf_counter() - start) / done)
    return taken


def _looped(loaded: Loaded, requests: Sequence[Request], counts: Sequence[int]) -> Way:
    return lambda: len(_loop(loaded, requests[: len(counts)], counts))


def _row(slow: list[float], fast: list[float], unit: str, budget: float | None = None) -> dict[str, Any]:
    """How many times as fast the second is."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    value = round(median(ratios), 2)
    unit = f"x {unit} ({min(ratios):.2f} to {max(ratios):.2f}; {median(fast):.3g} s to {median(slow):.3g} s)"
    return {"value": value, "unit": unit, "budget": budget, "ok": budget is None or value >= budget}


def _unshared(loaded: Loaded, requests: Sequence[Request]) -> int:
    with patch.object(cache.Prefixes, "wanted", lambda *_: iter(())):
        return len(_ours(loaded, requests))


def _written(loaded: Loaded, requests: Sequence[Request]) -> int:
    return sum(reply.usage.completion_tokens for reply in _ours(loaded, requests))


def _on_a_gpu() -> dict[str, dict[str, Any]]:
    """Tokens a second of a 7B's shape in bf16, beside the library at the same batch size."""
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        eos_token_id=0,
        bos_token_id=None,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    loaded = Loaded(model, load_tokenizer(resolve("mini")), Path())
    requests = _requests(loaded, NEW)
    ids = [tokens.prompt_ids(loaded.tokenizer, request.messages) for request in requests]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device="cuda")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device="cuda")

    def theirs() -> int:
        with torch.inference_mode():
            model.generate(padded, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        torch.cuda.synchronize()
        return NEW * len(requests)

    _written(loaded, requests), theirs()
    taken = _seconds({"ours": lambda: _written(loaded, requests), "theirs": theirs})
    unit = f"generate at batch {ROWS}, a token"
    return {"predict, 7B shape on a GPU": _row(taken["theirs"], taken["ours"], unit)}


def measure() -> dict[str, dict[str, Any]]:
    """How many times as many cases a second the engine answers as others do."""
    loaded, half = _loaded(), _loaded(torch.bfloat16)
    single = loaded if loaded.model.dtype == torch.float32 else _loaded(torch.float32)
    plain, shots = _requests(loaded, NEW), _requests(loaded, SHOWN, shots=True)
    assert [reply.text for reply in _ours(single, plain[:LOOPED])] == _loop(single, plain[:LOOPED]), "other words"
    counts = [reply.usage.completion_tokens for reply in _ours(loaded, plain[:LOOPED])]
    long = [reply.usage.completion_tokens for reply in _ours(loaded, shots[:1])]
    alone = _seconds(
        {
            "ours": lambda: len(_ours(loaded, plain)),
            "loop": _looped(half, plain, counts),
            "loop, float32": _looped(single, plain, counts),
        }
    )
    after = _seconds(
        {
            "ours": lambda: len(_ours(loaded, shots[:32])),
            "loop": _looped(half, shots, long),
            "unshared": lambda: _unshared(loaded, shots[:2]),
        }
    )
    some = plain[:32]
    held = [request.model_copy(update={"json_schema": SCHEMAS["diagnosis"]}) for request in some]
    free = _seconds({"held": lambda: _written(loaded, held), "free": lambda: _written(loaded, some)})
    small = Loaded(load_model(resolve("mini"), torch.float32).eval(), load_tokenizer(resolve("mini")), resolve("mini"))
    many = _requests(small, NEW)
    lengths = [reply.usage.completion_tokens for reply in _ours(small, many)][: 8 * LOOPED]
    mini = _seconds({"ours": lambda: len(_ours(small, many)), "loop": _looped(small, many, lengths)})
    loop = "a batch-1 generate loop"
    results = {
        "predict": _row(alone["loop"], alone["ours"], f"{loop} in bf16, a case", BUDGET),
        "predict, loop in float32": _row(alone["loop, float32"], alone["ours"], f"{loop}, a case"),
        "predict, shared prefix": _row(after["loop"], after["ours"], f"{loop} in bf16, a case", BUDGET),
        "predict, prefix not shared": _row(after["unshared"], after["ours"], "without sharing, a case"),
        "predict, constrained": _row(free["free"], free["held"], "unconstrained, a token"),
        "predict, mini": _row(mini["loop"], mini["ours"], f"{loop} in float32, a case"),
    }
    return results | (_on_a_gpu() if torch.cuda.is_available() else {})


if __name__ == "__main__":
    print(measure())
