"""Replies of a model in this process: batches of like length, each row drawn as if it were alone.

A loop of our own over the model's cache: rows that are done leave the batch, every row has its own sampling
and its own stream of random numbers, and the log-probability of each chosen token is kept.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from preceptor.core.records import Reply, Request, Token, Usage
from preceptor.model import pieces, tokens
from preceptor.model.load import Loaded


@dataclass
class _Row:
    """A reply in the making."""

    request: Request
    prompt: list[int]
    room: int
    """Tokens it may still take: what was asked for, and what the model's context leaves."""
    dice: random.Random
    finish: str = ""
    opened: str = ""
    """What the prompt has begun of the reply: to whoever reads it, thinking has then begun."""
    written: list[bytes] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[tuple[tuple[bytes, float], ...]] = field(default_factory=list)
    spent: int = 0


def generate(loaded: Loaded, requests: Sequence[Request], batch_tokens: int = 16_384) -> list[Reply]:
    """A reply to each request, in order; a batch takes at most `batch_tokens` tokens, prompts and room.

    A prompt that doesn't fit the model even with its record cut gets an empty reply that ended by length.
    """
    rows = [_row(loaded, request) for request in requests]
    piece = pieces.reader(loaded.tokenizer)
    waiting = sorted((row for row in rows if row.room > 0), key=lambda row: len(row.prompt) + row.room)
    for batch in _batches(waiting, batch_tokens):
        _run(loaded, batch, piece)
    return [_reply(row) for row in rows]


def _row(loaded: Loaded, request: Request) -> _Row:
    wanted = request.sampling.max_tokens
    limit = max(loaded.context - wanted, loaded.context // 2)
    dice = random.Random(request.sampling.seed)  # without a seed: the system's entropy
    try:
        prompt = tokens.prompt_ids(loaded.tokenizer, request.messages, limit)
    except tokens.TooLongError:
        return _Row(request, [], 0, dice, finish="length")
    opened = tokens.opening(loaded.tokenizer, request.messages)
    return _Row(request, prompt, min(wanted, loaded.context - len(prompt)), dice, opened=opened)


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows come sorted, so the last of a batch is its longest."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * (len(row.prompt) + row.room) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _run(loaded: Loaded, rows: list[_Row], piece: Callable[[int], bytes]) -> None:
    model, device = loaded.model, loaded.model.device
    ends = _ends(loaded)
    width = max(len(row.prompt) for row in rows)
    pads = torch.tensor([width - len(row.prompt) for row in rows], device=device)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
    columns = torch.arange(width + max(row.room for row in rows), device=device)
    mask = (columns >= pads[:, None]).long()
    padded = bool(pads.any())  # without padding the kernels need no mask
    positions = (columns[:width] - pads[:, None]).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [_roomy(layer, len(columns)) for layer in cache.layers]
    while rows:
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, :width] if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = _choose(logits, rows)
        _write(logits, chosen, rows, ends, piece)
        alive = [at for at, row in enumerate(rows) if not row.finish]
        following = torch.tensor(chosen, device=device)
        if len(alive) < len(rows):
            rows = [rows[at] for at in alive]
            keep = torch.tensor(alive, device=device, dtype=torch.long)
            following, mask, pads = following[keep], mask[keep], pads[keep]
            if rows:
                cache.batch_select_indices(keep)
        ids, positions = following[:, None], (width - pads)[:, None]
        width += 1


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # its types aren't read
    """Keys and values in memory that is taken once: the library's layer copies all of them at each token."""

    room = 0

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new ones behind the old."""
        start = self.get_seq_length()
        if not start:
            self.is_initialized = True
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self._buffers = keys.new_empty(shape), values.new_empty(shape)
        end = start + keys.shape[2]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        end = self.get_seq_length()
        self._buffers = self._buffers[0][indices], self._buffers[1][indices]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


def _roomy(layer: Any, room: int) -> Any:
    """Layers that slide or are of another kind stay as they are."""
    if type(layer) is not DynamicLayer:
        return layer
    made = _RoomyLayer()
    made.room = room
    return made


def _ends(loaded: Loaded) -> set[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those of the model's own settings."""
    settings = loaded.model.generation_config
    named = settings.eos_token_id if settings is not None else None
    several = named if isinstance(named, list) else [named]
    ends = {tokens.end_of_turn(loaded.tokenizer), loaded.tokenizer.eos_token_id, *several}
    return {int(token) for token in ends if token is not None}


def _choose(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
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


def _write(
    logits: Tensor, chosen: list[int], rows: Sequence[_Row], ends: set[int], piece: Callable[[int], bytes]
) -> None:
    """Give every row its token, with log-probabilities where they are wanted, and see which rows are done."""
    wanted = [row.request.logprobs for row in rows if row.request.logprobs is not None]
    if wanted:
        logprobs = logits.float().log_softmax(-1)
        own = logprobs.gather(-1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
        top = logprobs.topk(max(wanted), -1) if max(wanted) else None
    for at, row in enumerate(rows):
        row.spent += 1
        if chosen[at] in ends:
            row.finish = "stop"
            continue
        row.written.append(piece(chosen[at]))
        if (count := row.request.logprobs) is not None:
            row.logprobs.append(own[at])
            likeliest = (
                zip(top.indices[at, :count].tolist(), top.values[at, :count].tolist(), strict=True) if top else ()
            )
            row.alternatives.append(tuple((piece(token), value) for token, value in likeliest))
        if row.request.sampling.stop and _stop(row):
            row.finish = "stop"
        elif row.spent == row.room:
            row.finish = "length"


def _stop(row: _Row) -> bool:
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


def _reply(row: _Row) -> Reply:
    written = pieces.readable(row.written)
    opened = (Token(utf8=row.opened.encode(), logprob=None),) if row.opened and row.logprobs else ()
    return Reply(
        text=row.opened + b"".join(written).decode(),
        finish="length" if row.finish == "length" else "stop",
        usage=Usage(prompt_tokens=len(row.prompt), completion_tokens=row.spent),
        tokens=opened
        + tuple(
            Token(utf8=text, logprob=logprob, alternatives=alternatives)
            for text, logprob, alternatives in zip(written, row.logprobs, row.alternatives, strict=False)
        ),
    )
