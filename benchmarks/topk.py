"""The loss of a teacher's top five tokens: its memory beside the dense loss's, its time beside cross-entropy's.

4,096 tokens meet a vocabulary of 151,936 words. The states are such that the student gives the label about a third, the
teacher's tokens have 98.5 % of its mass, and of every tenth token it says nothing. All have gradients by states and
head, in float32 on a CPU.

- Memory, at the width of Qwen2.5-0.5B, each in a process of its own: what its resident set grew by at most, less the
  gradients, which any loss leaves. The dense loss makes one log-softmax for label and teacher, and autograd does the
  rest.
- Time, at a width of 256: there the head's products take a quarter of what they do in that model, so that whatever the
  loss adds to cross-entropy weighs the more. Beside the chunked cross-entropy of this package stands the one that
  everyone writes, which checkpoints each chunk. On a CPU the time is the processor's, of one thread: what else runs on
  the machine hardly changes it. The ways take turns and each ratio is of one turn; the median is told, and the range.
- Gradients: the largest difference from those of the dense loss in double precision over the largest of these, of all
  five divergences and 256 tokens. (In single precision it is the dense loss that is 1e-5 to 4e-5 off.)

Where there is a GPU, the same at the shape of a 7B: 16,384 tokens, a width of 3,584, bfloat16.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from preceptor.train.config import Mix
from preceptor.train.divergence import DIVERGENCES
from preceptor.train.loss import Soft, chunked_cross_entropy

TOKENS, VOCABULARY, WIDTH, NARROW, FEW = 4_096, 151_936, 896, 256, 256
SEVEN_B = 16_384, 3_584
"""Tokens and width."""
TURNS = 3
BELIEVED = (0.9, 0.05, 0.02, 0.01, 0.005)
SILENT = 10
"""Of so many tokens there is one of which the teacher says nothing."""
SURE = 12.0
"""Logit of the label, others' being about normal."""
ROWS = 256
"""Tokens that the checkpointing way takes at a time."""
MEMORY, TIME, APART = 1 / 16, 1.1, 1e-5
MB = 1e6


@dataclass(frozen=True)
class _Work:
    hidden: Tensor
    head: Tensor
    labels: Tensor
    soft: Soft

    def ours(self, mix: Mix | None = None) -> Tensor:
        """The sum over all tokens; without a mixture cross-entropy."""
        soft = None if mix is None else self.soft
        return chunked_cross_entropy(self.hidden, self.head, self.labels, 1.0, soft=soft, mix=mix or Mix())

    def drawn(self) -> Soft:
        """The same teacher as draws from it, whose shares sum to 1."""
        there = self.soft.logprobs.isfinite()
        return self.soft._replace(logprobs=torch.where(there, self.soft.logprobs.log_softmax(-1), -torch.inf))

    def doubled(self) -> "_Work":
        """The same in double precision."""
        hidden, head = (part.detach().double().requires_grad_() for part in (self.hidden, self.head))
        return _Work(hidden, head, self.labels, Soft(self.soft.ids, *(part.double() for part in self.soft[1:])))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden, self.head])


def _work(tokens: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> _Work:
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (1, tokens + 1), device=device)
    head = torch.randn(VOCABULARY, width, dtype=dtype, device=device).mul_(width**-0.5)
    hidden = torch.randn(1, tokens + 1, width, dtype=dtype, device=device)
    hidden[:, :-1] += SURE * head[labels[:, 1:]]
    ids = (labels[..., None] + 7_919 * torch.arange(len(BELIEVED), device=device)) % VOCABULARY
    logprobs = torch.tensor(BELIEVED, device=device).log().repeat(1, tokens + 1, 1)
    logprobs[:, ::SILENT] = -torch.inf
    rest = torch.where(logprobs[..., 0].isfinite(), 1 - sum(BELIEVED), 0.0)
    return _Work(hidden.requires_grad_(), head.requires_grad_(), labels, Soft(ids, logprobs, rest))


def _dense(work: _Work, mix: Mix) -> Tensor:
    """The same sum, of the logits of everything at once."""
    targets, ids = work.labels[:, 1:, None], work.soft.ids[:, 1:]
    known = work.soft.logprobs[:, 1:, 0].isfinite()
    told = work.soft.logprobs[:, 1:].masked_fill(~known[..., None], 0.0)
    rest = work.soft.rest[:, 1:].masked_fill(~known, 0.5)
    exact = torch.promote_types(work.hidden.dtype, torch.float32)
    logprobs = (work.hidden[:, :-1] @ work.head.T).to(exact).log_softmax(-1)
    student = logprobs.gather(-1, torch.cat([targets, ids], -1))
    hard, student = -student[..., 0], student[..., 1:]
    soft = known * mix.share
    return ((1 - soft) * hard + soft * _apart(mix.divergence, student, told, rest)).sum()


def _apart(name: str, student: Tensor, teacher: Tensor, rest: Tensor) -> Tensor:
    """The divergence as its formula says."""
    p, q = teacher.exp(), student.exp()
    out, mass = 1 - q.sum(-1), 1 - rest
    theirs, ours = teacher.log_softmax(-1), student.log_softmax(-1)
    head = (theirs.exp() * (theirs - ours)).sum(-1)
    tail = rest * (rest / out).log()
    if name == "renormalised":
        return head
    if name == "bucket":
        return (p * (teacher - student)).sum(-1) + tail
    if name == "decoupled":
        return head + tail + mass * (mass / (1 - out)).log()
    if name == "reverse":
        return (q * (student - teacher)).sum(-1) + out * (out / rest).log()
    return -(p * student).sum(-1)


def _checkpointed(work: _Work) -> Tensor:
    """Cross-entropy as everyone writes it in chunks: the backward pass makes each chunk's logits again."""

    def chunk(states: Tensor, words: Tensor) -> Tensor:
        return cross_entropy((states @ work.head.T).float(), words, reduction="sum")

    both = (torch.split(part, ROWS) for part in (work.hidden[0, :-1], work.labels[0, 1:]))
    parts = [checkpoint(chunk, *pair, use_reentrant=False) for pair in zip(*both, strict=True)]
    return torch.stack(parts).sum()


def _differ() -> float:
    """The largest difference between our gradients and the dense, exact ones, over the largest of these."""
    work, most = _work(FEW, NARROW), 0.0
    for name in DIVERGENCES:
        mix = Mix(divergence=name)
        some = replace(work, soft=work.drawn()) if name == "sampled" else work
        exact = some.doubled()
        pairs = zip(some.gradients(some.ours(mix)), exact.gradients(_dense(exact, mix)), strict=True)
        most = max(most, *(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs))
    return most


def _resident(what: str) -> int:
    """Bytes that this process has, or had at most."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _grown(what: str) -> float:
    """Megabytes that a loss takes in this process at most, beside its inputs and gradients."""
    torch.set_num_threads(1)
    _losses(_work(8, 8))[what]()  # what libraries keep from their first call on
    work = _work(TOKENS, WIDTH)
    before = _resident("VmRSS")
    gradients = _losses(work)[what]()
    return (_resident("VmHWM") - before - sum(each.nbytes for each in gradients)) / MB


def _losses(work: _Work) -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    """All that is compared, forward and backward."""
    mixes = {name: Mix(divergence=name) for name in DIVERGENCES}
    return {
        "cross-entropy": lambda: work.gradients(work.ours()),
        **{name: lambda mix=mix: work.gradients(work.ours(mix)) for name, mix in mixes.items()},  # type: ignore[misc]
        "temperature": lambda: work.gradients(work.ours(Mix(temperature=2.0))),
        "checkpointed": lambda: work.gradients(_checkpointed(work)),
        "dense": lambda: work.gradients(_dense(work, Mix())),
    }


def _alone(what: str) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.topk", what], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _seconds(ways: Mapping[str, Callable[[], object]], now: Callable[[], float]) -> dict[str, list[float]]:
    """Of each way in each turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            start = now()
            way()
            taken[name].append(now() - start)
    return taken


def _times(taken: Mapping[str, list[float]], prefix: str) -> dict[str, dict[str, Any]]:
    """Each way's time as a multiple of chunked cross-entropy's."""
    rows, base = {}, taken["cross-entropy"]
    for name in taken:
        if name == "cross-entropy":
            continue
        ratios = [a / b for a, b in zip(taken[name], base, strict=True)]
        budget = TIME if name in DIVERGENCES else None
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}; {median(taken[name]):.3g} s to {median(base):.3g} s"
        rows[f"{prefix} time, {name}"] = _row(median(ratios), f"x chunked cross-entropy ({spread})", budget)
    return rows


def _memory(ours: float, dense: float, prefix: str) -> dict[str, dict[str, Any]]:
    unit = f"x the dense loss's extra memory ({ours:,.0f} MB to {dense:,.0f} MB)"
    return {f"{prefix} memory": _row(ours / dense, unit, MEMORY)}


def _row(value: float, unit: str, budget: float | None) -> dict[str, Any]:
    value = float(f"{value:.3g}")
    return {"value": value, "unit": unit, "budget": budget, "ok": budget is None or value <= budget}


def _on_a_gpu() -> dict[str, dict[str, Any]]:
    """The shape of a 7B in bfloat16; the dense loss only where it fits."""
    losses = dict(_losses(_work(*SEVEN_B, torch.bfloat16, "cuda")))
    extra: dict[str, float] = {}
    for name, run in list(losses.items()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            gradients = run()
        except torch.OutOfMemoryError:
            print(f"{name} does not fit into this GPU", file=sys.stderr)
            del losses[name]
            continue
        torch.cuda.synchronize()
        extra[name] = (torch.cuda.max_memory_allocated() - before - sum(each.nbytes for each in gradients)) / MB
        del gradients

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    results = _times(_seconds(losses, now), "topk, 7B shape on a GPU,")
    if "dense" in extra:
        results |= _memory(extra["bucket"], extra["dense"], "topk, 7B shape on a GPU,")
    unit = f"x chunked cross-entropy's extra memory ({extra['bucket']:,.0f} MB)"
    ratio = extra["bucket"] / extra["cross-entropy"]
    return results | {"topk, 7B shape on a GPU, memory to cross-entropy's": _row(ratio, unit, None)}


def measure() -> dict[str, dict[str, Any]]:
    """The memory, the gradients, and the time of each divergence."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = _memory(_alone("bucket"), _alone("dense"), "topk")
    results["topk gradients"] = _row(_differ(), "of the largest, apart from dense at most", APART)
    for run in _losses(_work(FEW, NARROW)).values():
        run()  # so that each way is warm
    losses = {name: run for name, run in _losses(_work(TOKENS, NARROW)).items() if name != "dense"}
    results |= _times(_seconds(losses, time.process_time), "topk")
    torch.set_num_threads(threads)
    print(f"one of {os.cpu_count()} cores under a load of {os.getloadavg()[1]:.1f}, {TURNS} turns", file=sys.stderr)
    return results | (_on_a_gpu() if torch.cuda.is_available() else {})


if __name__ == "__main__":
    print(_grown(sys.argv[1]) if sys.argv[1:] else measure())
