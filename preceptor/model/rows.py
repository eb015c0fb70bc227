"""One reply in the making: what it may still take, its own dice, and each token with its log-probability."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preceptor.core.records import Reply, Request, Token, Usage
from preceptor.model import pieces


@dataclass
class Row:
    """A reply in the making."""

    name: Any
    request: Request
    prompt: list[int]
    room: int
    """Tokens it may still take: what was asked for, and what the model's context leaves."""
    opened: str = ""
    """What the prompt has begun of the reply: to whoever reads it, thinking has then begun."""
    cut: bool = False
    """The record in its prompt was cut to fit."""
    hold: Any = None
    """What holds it to its schema, of preceptor.model.constrain.Hold."""
    finish: str = ""
    dice: random.Random = field(default_factory=random.Random)
    written: list[bytes] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[tuple[tuple[bytes, float], ...]] = field(default_factory=list)
    spent: int = 0
    given: bool = False
    """Its reply has been told."""

    def begin(self, guide: Callable[[], Any]) -> None:
        """Make it as if nothing had been written."""
        request = self.request
        self.hold = guide().hold(request.json_schema) if request.json_schema else None
        self.dice = random.Random(request.sampling.seed)  # without a seed: the system's entropy
        self.finish, self.spent = "", 0
        self.written, self.logprobs, self.alternatives = [], [], []

    @property
    def columns(self) -> int:
        """Tokens that it may come to, with its prompt."""
        return len(self.prompt) + self.room


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row: the likeliest, or drawn by the row's own dice."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for at, row in enumerate(rows):
        sampling = row.request.sampling
        if sampling.temperature > 0:
            # float64, so that a batch's rounding all but never moves a draw over the edge of a token
            shares = (logits[at].double() / sampling.temperature).softmax(-1)
            chosen[at] = _draw(shares, sampling.top_p, row.dice.random())
    return chosen


def _draw(shares: Tensor, top_p: float, roll: float) -> int:
    if top_p == 1:
        sums = shares.cumsum(-1)
        return min(int(torch.searchsorted(sums, roll * sums[-1], right=True)), len(shares) - 1)
    ordered, order = shares.sort(descending=True, stable=True)
    sums = ordered.cumsum(-1)
    kept = int((sums - ordered < top_p).sum())  # the token that crosses top_p stays in
    at = int(torch.searchsorted(sums[:kept], roll * sums[kept - 1], right=True))
    return int(order[min(at, kept - 1)])


def write(
    logits: Tensor, chosen: list[int], rows: Sequence[Row], ends: Sequence[int], piece: Callable[[int], bytes]
) -> None:
    """Give every row its token, with log-probabilities where they are wanted, and see which rows are done."""
    wanted = [row.request.logprobs for row in rows if row.request.logprobs is not None]
    if wanted:
        whole = logits.float()
        total = whole.logsumexp(-1, keepdim=True)
        own = (whole.gather(-1, torch.tensor(chosen, device=logits.device)[:, None]) - total)[:, 0].tolist()
        top = whole.topk(max(wanted), -1) if max(wanted) else None
        values = (top.values - total).tolist() if top else []
        indices = top.indices.tolist() if top else []
    for at, row in enumerate(rows):
        token = chosen[at]
        row.spent += 1
        if row.hold:
            row.hold.write(token)
        if token in ends:
            row.finish = "length" if row.hold and row.hold.closed else "stop"
            continue
        row.written.append(piece(token))
        if (count := row.request.logprobs) is not None:
            row.logprobs.append(own[at])
            likeliest = zip(indices[at][:count], values[at][:count], strict=True) if top else ()
            row.alternatives.append(tuple((piece(other), value) for other, value in likeliest))
        if row.request.sampling.stop and _stop(row):
            row.finish = "stop"
        elif row.spent == row.room:
            row.finish = "length"


def _stop(row: Row) -> bool:
    """Whether a stop string has been written; the row is cut before it."""
    joined = b"".join(row.written)
    found = [at for stop in row.request.sampling.stop if (at := joined.find(stop.encode())) >= 0]
    if not found:
        return False
    left = min(found)
    for at, written in enumerate(row.written):
        row.written[at] = written[:left]
        left -= len(row.written[at])
    while row.written and not row.written[-1]:
        row.written.pop()
    return True


def reply(row: Row) -> Reply:
    """What has been written."""
    written = pieces.readable(row.written)
    begun = "" if row.hold else row.opened  # what is held to a schema is that alone
    opened = (Token(utf8=begun.encode(), logprob=None),) if begun and row.logprobs else ()
    return Reply(
        text=begun + b"".join(written).decode(),
        finish="length" if row.finish == "length" else "stop",
        usage=Usage(prompt_tokens=len(row.prompt), completion_tokens=row.spent),
        tokens=opened
        + tuple(
            Token(utf8=text, logprob=logprob, alternatives=alternatives)
            for text, logprob, alternatives in zip(written, row.logprobs, row.alternatives, strict=False)
        ),
        cut=row.cut,
    )
