"""Replies of a model in this process: many at once, each drawn as if it were alone.

A loop of our own over the model's cache: rows that are done leave the batch and others take their places, every row
has its own sampling and its own stream of random numbers, and the log-probability of each chosen token is kept.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from preceptor.core.records import Reply, Request
from preceptor.model import cache, pieces, shared, tokens
from preceptor.model.cache import Prefix
from preceptor.model.load import Loaded
from preceptor.model.room import CHUNK, Room, ran_out
from preceptor.model.rows import Row, choose, reply, write
from preceptor.model.score import score

BATCH = 128
"""Replies in the making at once, at most."""
_SMALL = 20_000_000
"""Below so many parameters, threads of a CPU would wait for one another longer than they work."""
_GROUPS = "TRANSFORMERS_SDPA_FORCE_GQA"
"""The library's own switch, which it looks at in every layer."""
_LIKE = 2
"""Prompts go through the model with others that are at most so many times as long."""


def length(request: Request) -> int:
    """Characters of what is asked: requests of like length are best answered together."""
    return sum(len(message.content) for message in request.messages)


class Feed(Protocol):
    """Where requests come from, and what is told of each as soon as it is known."""

    closed: bool
    """Nobody waits any more, not for what is under way either."""

    def take(self, most: int) -> list[tuple[Any, Request]]:
        """Up to so many that wait now, likest in length, each with a name of its own."""

    def give(self, name: Any, outcome: Reply | Exception) -> None:
        """What became of one."""


@dataclass
class _Batch:
    """Rows under way, the keys and values of what they were told, and their last columns."""

    rows: list[Row]
    cache: DynamicCache
    pads: Tensor
    """Columns of padding before each row."""
    width: int
    following: Tensor
    """The token of each row that the model has not seen yet."""
    prefix: Prefix | None
    """What all rows begin with, if it is kept once for all: then cache and columns are of what comes after it."""

    def share(self, prefix: Prefix | None) -> None:
        """Keep this once for all, and what was kept so in each row."""
        if self.prefix is prefix:
            return
        if self.prefix:
            cache.spelt(self.cache, self.prefix, self.pads.tolist())
            self.width += len(self.prefix.ids)
        if prefix:
            cache.cut(self.cache, len(prefix.ids))
            self.width -= len(prefix.ids)
        self.prefix = prefix


def generate(loaded: Loaded, requests: Sequence[Request], batch: int = BATCH) -> list[Reply]:
    """A reply to each request, in order; `batch` is how many are in the making at once, at most.

    A prompt that doesn't fit the model even with its record cut gets an empty reply that ended by length.

    Raises:
        MemoryError: one of them alone doesn't fit into memory.
    """
    queue = _Queue(requests)
    Engine(loaded, batch).serve(queue)
    for outcome in queue.outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome for outcome in queue.outcomes if isinstance(outcome, Reply)]


class _Queue:
    """Requests that are all there from the beginning."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._waiting = deque(sorted(enumerate(requests), key=lambda item: length(item[1])))
        self.outcomes: list[Reply | Exception | None] = [None] * len(requests)
        self.closed = False

    def take(self, most: int) -> list[tuple[Any, Request]]:
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def give(self, name: Any, outcome: Reply | Exception) -> None:
        self.outcomes[name] = outcome


class Engine:
    """A model that answers. What it has learned of prompts and of memory stays with it, so its weights must too."""

    def __init__(self, loaded: Loaded, batch: int = BATCH) -> None:
        self._loaded, self._batch = loaded, batch
        self._model, self._device = loaded.model, loaded.model.device
        self._piece = pieces.reader(loaded.tokenizer)
        self._ends = _ends(loaded)
        self._plain = cache.plain(self._model)
        """Else batches can't be joined, nor begun from a prefix."""
        self._prefixes = cache.Prefixes()
        self._shares: bool | None = None
        """Whether rows can share one copy of what they begin with, once that is known."""
        self._memory: Room | None = None
        self._held: Any = None

    def serve(self, feed: Feed) -> None:
        """Answer all that a feed has; each outcome is given as soon as it is known.

        Rows whose batch breaks, for want of memory or for whatever else, begin again in two halves: so a bad one ends
        alone, as its own error.
        """
        apart: list[list[Row]] = []
        with torch.inference_mode(), _threads(self._model), _grouped(self._model):
            while not feed.closed and (waiting := apart.pop() if apart else self._take(feed, self._batch)):
                broken, error = self._run(waiting, feed, more=not apart)
                if waiting:
                    apart.append(waiting)
                if len(broken) == 1 and error:
                    feed.give(broken[0].name, self._told(error, broken[0].request))
                elif broken:
                    for row in broken:
                        row.begin(self._guide)
                    half = len(broken) // 2
                    apart += [broken[half:], broken[:half]]
                if error and self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _take(self, feed: Feed, most: int) -> list[Row]:
        """Up to so many rows; what can't become one has its outcome at once."""
        rows: list[Row] = []
        while not rows and (taken := feed.take(most)):
            for name, request in taken:
                try:
                    if request.candidates:
                        feed.give(name, score(self._loaded, [request])[0])
                    else:
                        rows.append(self._row(name, request))
                except tokens.TooLongError:
                    feed.give(name, Reply(text="", finish="length"))
                except Exception as error:  # noqa: BLE001  whatever it is, it is one request's
                    feed.give(name, self._told(error, request))
        return rows

    def _row(self, name: Any, request: Request) -> Row:
        loaded, wanted = self._loaded, request.sampling.max_tokens
        limit = max(loaded.context - wanted, loaded.context // 2)
        prompt = tokens.prompt_ids(loaded.tokenizer, request.messages)
        if cut := len(prompt) > limit:
            prompt = tokens.prompt_ids(loaded.tokenizer, request.messages, limit)
        opened = tokens.opening(loaded.tokenizer, request.messages)
        row = Row(name, request, prompt, min(wanted, loaded.context - len(prompt)), opened, cut)
        row.begin(self._guide)
        return row

    def _run(self, waiting: list[Row], feed: Feed, *, more: bool) -> tuple[list[Row], Exception | None]:
        """Answer what waits, and if `more`, what the feed has meanwhile, as rows end.

        Returns the rows that an error has cut short, and the error; `waiting` keeps those that had not begun.
        """
        batch: _Batch | None = None
        begun: list[Row] = []
        try:
            while not feed.closed:
                if batch is None or (self._plain and 2 * len(batch.rows) <= self._batch):
                    places = self._batch - (len(batch.rows) if batch else 0) - len(waiting)
                    waiting += self._take(feed, places) if more and places > 0 else []
                    begun = self._fitting(waiting, batch)
                    for rows, prefix in self._alike(begun, batch):
                        batch = _joined(batch, self._begin(rows, prefix, feed))
                if batch is None:
                    if not waiting:
                        return [], None
                    continue
                logits = self._forward(batch.following[:, None], batch.pads, batch.cache, batch.width, batch.prefix)
                batch.width += 1
                batch = self._advance(batch, logits, feed)
        except Exception as error:  # noqa: BLE001  its rows are tried again, or it is told as theirs
            under_way = [*(batch.rows if batch else ()), *begun]
            broken = {id(row): row for row in under_way if not row.given}
            if not broken:  # it broke before any of them had begun
                broken = {id(row): row for row in waiting}
                waiting.clear()
            if len(broken) > 1 and ran_out(error) and self._memory:
                self._memory.shrink(len(broken), max(row.columns for row in broken.values()))
            return list(broken.values()), error.with_traceback(None)  # whose frames hold what memory is short of
        return [], None

    def _fitting(self, waiting: list[Row], batch: _Batch | None) -> list[Row]:
        """Take from those that wait as many as fit beside those under way."""
        if not waiting:
            return []
        self._memory = self._memory or Room(self._model)
        waiting.sort(key=lambda row: row.columns)
        common = len(batch.prefix.ids) if batch and batch.prefix else 0  # others may want it copied
        there = [common + batch.width + row.room - row.spent for row in batch.rows] if batch else []
        held = len(there) * batch.width if batch else 0
        fit = self._memory.rows([*there, *(row.columns for row in waiting[: self._batch - len(there)])], held)
        rows = waiting[: max(0, fit - len(there))]
        del waiting[: len(rows)]
        return rows

    def _alike(self, rows: list[Row], batch: _Batch | None) -> Iterator[tuple[list[Row], Prefix | None]]:
        """The rows by how much of their prompts the model has yet to see, since padding is work too.

        With them, what they share with all others and with those under way.
        """
        if self._plain:
            for ids in self._prefixes.wanted([row.prompt for row in rows]):
                self._prefixes.add(self._computed(ids))
        prefix = self._common(rows, batch) if rows else None
        left = sorted(((len(row.prompt) - self._known(row, prefix)[1], at) for at, row in enumerate(rows)))
        start = 0
        for end in range(1, len(left) + 1):
            if end == len(left) or left[end][0] > _LIKE * left[start][0]:
                yield [rows[at] for _, at in left[start:end]], prefix
                start = end
        self._prefixes.trim()

    def _common(self, rows: list[Row], batch: _Batch | None) -> Prefix | None:
        """What all begin with, those under way too, where it is worth sharing."""
        if batch and batch.prefix and all(batch.prefix.begins(row.prompt) for row in rows):
            return batch.prefix
        found = self._prefixes.common([row.prompt for row in (*rows, *(batch.rows if batch else ()))])
        if found and self._shares is None:
            self._shares = shared.served(self._model)
        return found if self._shares else None

    def _known(self, row: Row, prefix: Prefix | None) -> tuple[Prefix | None, int]:
        """What is known of a prompt, in which a batch's prefix may have been forgotten meanwhile."""
        found, known = self._prefixes.longest(row.prompt)
        return (prefix, len(prefix.ids)) if prefix and known < len(prefix.ids) else (found, known)

    def _computed(self, ids: list[int]) -> Prefix:
        prefix, known = self._prefixes.longest(ids)
        made = cache.begun(self._model, [prefix], [0], known)
        rest, pads = (torch.tensor(of, device=self._device) for of in ([ids[known:]], [0]))
        self._forward(rest, pads, made, known, None)
        return Prefix(ids, [(layer.keys, layer.values) for layer in made.layers])

    def _begin(self, rows: list[Row], prefix: Prefix | None, feed: Feed) -> _Batch | None:
        """Prompts through the model, all after the same prefix if there is one, and the first token of each reply."""
        prefixes, known = zip(*(self._known(row, prefix) for row in rows), strict=True)
        skip = len(prefix.ids) if prefix else 0
        own = [row.prompt[skip:] for row in rows]
        width = max(map(len, own))
        start = width - max(skip + len(rest) - count for rest, count in zip(own, known, strict=True))
        pads = [width - len(ids) for ids in own]
        ids = [[0] * (pad - start) + rest[max(start - pad, 0) :] for rest, pad in zip(own, pads, strict=True)]
        made = cache.begun(self._model, prefixes, pads, start, skip)
        columns = torch.tensor(pads, device=self._device)
        logits = self._forward(torch.tensor(ids, device=self._device), columns, made, start, prefix)
        if bool(logits.isnan().any()):  # the likeliest token of such a row would be any
            raise FloatingPointError("what the model says is no number; if so everywhere, its weights are damaged")
        return self._advance(_Batch(rows, made, columns, width, columns, prefix), logits, feed)

    def _forward(self, ids: Tensor, pads: Tensor, past: DynamicCache, start: int, prefix: Prefix | None) -> Tensor:
        """Logits after the last of the columns `ids`, the first of which is number `start` behind what all share."""
        end = start + ids.shape[1]
        columns = torch.arange(end, device=self._device)
        mask = (columns >= pads[:, None]).long() if bool(pads.any()) else None  # without padding kernels need none
        positions = (columns[start:] - pads[:, None]).clamp(min=0) + (len(prefix.ids) if prefix else 0)
        step = max(1, CHUNK // len(ids)) if self._plain else ids.shape[1]
        for at in range(start, end, step):
            chunk = slice(at - start, at - start + step)
            logits = shared.forward(
                self._model,
                prefix.layers if prefix else None,
                input_ids=ids[:, chunk],
                attention_mask=None if mask is None else mask[:, : at + step],
                position_ids=positions[:, chunk],
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        return logits[:, -1]

    def _advance(self, batch: _Batch, logits: Tensor, feed: Feed) -> _Batch | None:
        """Give every row its next token, and let go of those that are done; None where all are."""
        rows = batch.rows
        chosen = choose(self._allowed(logits, rows), rows)
        write(logits, chosen, rows, self._ends, self._piece)
        for row in rows:
            if row.finish:
                feed.give(row.name, reply(row))
                row.given = True
        alive = [at for at, row in enumerate(rows) if not row.finish]
        if not alive:
            return None
        batch.following = torch.tensor(chosen, device=self._device)
        if len(alive) < len(rows):
            # The last ones take the places of those that are done, so that few are moved.
            movers = [at for at in alive if at >= len(alive)]
            places = [at if not rows[at].finish else movers.pop() for at in range(len(alive))]
            keep = torch.tensor(places, device=self._device)
            batch.rows = [rows[at] for at in places]
            batch.following, batch.pads = batch.following[keep], batch.pads[keep]
            batch.cache.batch_select_indices(keep)
        return batch

    def _allowed(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """The logits of what may come next: rows that are held to a schema can't say all."""
        if not any(row.hold for row in rows):
            return logits
        from preceptor.model.constrain import restrict

        allowed = logits.clone()
        restrict(allowed, [row.hold for row in rows], [row.room - row.spent for row in rows])
        return allowed

    def _guide(self) -> Any:
        if self._held is None:
            from preceptor.model.constrain import Guide

            width = self._model.config.get_text_config().vocab_size
            self._held = Guide(self._loaded.tokenizer, width, self._ends)
        return self._held

    def _told(self, error: Exception, request: Request) -> Exception:
        """The error of a request that failed alone, in words where memory ran out."""
        if not ran_out(error):
            return error
        what = f"{len(request.candidates)} candidates" if request.candidates else "its reply"
        most = request.sampling.max_tokens
        return MemoryError(
            f"a prompt of {length(request)} characters with {what} doesn't fit into the memory of this "
            f"{self._device.type} even alone; shorten it, lower max_tokens ({most}) or free memory"
        )


@contextmanager
def _threads(model: Any) -> Iterator[None]:
    """As many threads as serve a model."""
    usual = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@contextmanager
def _grouped(model: Any) -> Iterator[None]:
    """Heads that share keys and values read them where they are.

    Where there is a mask the library copies them for each head, which GPUs are faster with, and CPUs much slower.
    """
    usual = os.environ.get(_GROUPS)
    if model.device.type == "cpu":
        os.environ[_GROUPS] = "1"
    try:
        yield
    finally:
        if usual is None:
            os.environ.pop(_GROUPS, None)
        else:
            os.environ[_GROUPS] = usual


def _joined(one: _Batch | None, other: _Batch | None) -> _Batch | None:
    """The rows of both as one batch, in which all share what the other's do."""
    if one is None or other is None:
        return one or other
    one.share(other.prefix)
    width = max(one.width - int(one.pads.min()), other.width)
    pads = [batch.pads + (width - batch.width) for batch in (one, other)]
    made = cache.joined(one.cache, other.cache, width)
    following = torch.cat([one.following, other.following])
    return _Batch([*one.rows, *other.rows], made, torch.cat(pads), width, following, one.prefix)


def _ends(loaded: Loaded) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those of the model's own settings."""
    settings = loaded.model.generation_config
    named = settings.eos_token_id if settings is not None else None
    several = named if isinstance(named, list) else [named]
    ends = (tokens.end_of_turn(loaded.tokenizer), loaded.tokenizer.eos_token_id, *several)
    return list(dict.fromkeys(int(token) for token in ends if token is not None))
