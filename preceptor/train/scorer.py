"""A teacher on this machine reads answers that are written already: what it believes of each of their tokens.

Texts of like length go through it together, once; nothing is generated. Its head meets the answers alone, a chunk of
positions at a time, so that no more than one chunk of logits ever lives.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preceptor.core.errors import UserError, WorkError
from preceptor.model.load import Loaded
from preceptor.model.room import CHUNK, ran_out
from preceptor.model.tokens import IGNORED, Example
from preceptor.train.align import WAY_OUT, fingerprint
from preceptor.train.store import Beliefs

Floats = NDArray[np.float32]
Key = tuple[str, int]
"""Id of a case and number of the sample, as a store knows a reply."""

_NUMBERS = 1 << 24
"""Logits at a time: 64 MB in float32, and four times as much of what is made of them."""

_Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""The fields of `Beliefs`."""


def believe(
    loaded: Loaded,
    examples: Mapping[Key, Example],
    k: int,
    *,
    drawn: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    done: Container[Key] = (),
) -> Iterator[tuple[Key, Beliefs | None]]:
    """What a teacher believes of each answer's tokens, as soon as it is known; None where the text is too long for it.

    Kept are of each token the k likeliest, by the rule of `store.kept`. With `drawn` (Sparse Logit Sampling, arXiv
    2503.16870) k - 1 are drawn from all, with replacement, and the shares of those that came up stand for
    probabilities, whose expectation is the teacher's; there is no rest. The one that was written always has a place: at
    -inf where it was not drawn. Draws depend on `seed` and key alone.

    `temperature` softens all probabilities. A head may be wider than the vocabulary: what it gives to ids that stand
    for nothing is with the rest, and is never drawn.

    Texts that are `done` are left out, and the others go through the model with the same neighbours as if they were
    not, so that what goes on after a kill ends in the same numbers.

    Raises:
        WorkError: one text alone doesn't fit into memory.
    """
    fit = {key: example for key, example in examples.items() if len(example.ids) <= loaded.context}
    yield from ((key, None) for key in examples if key not in fit)
    waiting = list(_batches(fit))[::-1]
    while waiting:
        keys = waiting.pop()
        if all(key in done for key in keys):
            continue
        batch = [fit[key] for key in keys]
        counts = [sum(label != IGNORED for label in example.labels[1:]) for example in batch]
        names = [f"{seed} {sample} {case_id}" for case_id, sample in keys]
        rolls = [_rolls(name, n, k - 1) for name, n in zip(names, counts, strict=True)] if drawn else None
        try:
            found = _read(loaded, batch, k, np.concatenate(rolls) if rolls else None, temperature)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if len(keys) == 1:
                raise WorkError(
                    f"{loaded.folder}: a text of {len(batch[0].ids)} tokens doesn't fit into memory even alone; free "
                    "memory, or take a smaller teacher"
                ) from error
            waiting += [keys[len(keys) // 2 :], keys[: len(keys) // 2]]
            continue
        ends = list(accumulate(counts, initial=0))
        for key, start, end in zip(keys, ends, ends[1:], strict=False):
            if key not in done:
                yield key, Beliefs(*(part[start:end].numpy() for part in found))


def drawn_from(
    found: Beliefs, draws: int, name: str, adjust: Sequence[Callable[[Floats, Floats], tuple[Floats, Floats]]] = ()
) -> Beliefs:
    """Beliefs whose tokens are drawn from the k that are known, as `believe` draws them from all; the rest is left out.

    `adjust` is made of them before. Draws depend on `name` alone.
    """
    known = np.isfinite(found.logprobs).any(axis=1, keepdims=True)
    logprobs, rest = found.logprobs, found.rest
    for each in adjust:
        logprobs, rest = each(logprobs, rest)
    written = np.arange(logprobs.shape[1]) == found.place[:, None]
    sure = np.where(known, logprobs, np.where(written, 0, -np.inf))
    rolls = torch.from_numpy(_rolls(name, len(sure), draws))
    slots, shares, _, place = _drawn(torch.from_numpy(sure.astype(np.float32)), torch.from_numpy(found.place), rolls)
    ids = np.take_along_axis(found.ids, slots.numpy(), axis=1)
    drawn = np.where(known, shares.numpy(), -np.inf).astype(np.float32)
    return Beliefs(ids, drawn, np.zeros_like(found.rest), place.numpy())


def check_tokens(teacher: Loaded, tokenizer: PreTrainedTokenizerBase, student: str | Path) -> None:
    """Refuse a teacher whose ids don't stand for what those of the student's tokenizer do.

    Raises:
        UserError: they don't.
    """
    if fingerprint(teacher.tokenizer) != fingerprint(tokenizer):
        raise UserError(
            f"{teacher.folder}: its tokens are not those of {student}, so its probabilities can't be learned token by "
            f"token; {WAY_OUT}"
        )


def _batches(examples: Mapping[Key, Example]) -> Iterator[list[Key]]:
    """Keys of texts that go through the model together: as many as make up so many tokens, padding included."""
    batch: list[Key] = []
    for key in sorted(examples, key=lambda key: len(examples[key].ids)):
        if batch and (len(batch) + 1) * len(examples[key].ids) > CHUNK:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _rolls(name: str, count: int, draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that belong to a name."""
    dice = np.random.Generator(np.random.PCG64(int.from_bytes(sha256(name.encode("utf-8", "surrogatepass")).digest())))
    return dice.random((count, draws))


@lru_cache(maxsize=4)
def _known(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids from this one on stand for nothing, however wide a head is."""
    return int(max(tokenizer.get_vocab().values())) + 1


@torch.inference_mode()
def _read(
    loaded: Loaded,
    examples: Sequence[Example],
    k: int,
    rolls: NDArray[np.float64] | None,
    temperature: float,
) -> _Found:
    """The beliefs of all answers' tokens, one after the other; with `rolls` they are drawn."""
    model = loaded.model
    width = max(len(example.ids) for example in examples)
    padding = [width - len(example.ids) for example in examples]
    # Padded on the right, where no token that counts looks, so no mask is needed.
    ids = torch.tensor([e.ids + [0] * pad for e, pad in zip(examples, padding, strict=True)], device=model.device)
    labels = torch.tensor([e.labels + [IGNORED] * pad for e, pad in zip(examples, padding, strict=True)])
    targets = labels[:, 1:].to(model.device)
    chosen = targets != IGNORED
    words = targets[chosen]
    known = _known(loaded.tokenizer)
    parts: list[_Found] = []
    start = 0
    for logits in _logits(model, ids, chosen):
        here = slice(start, start + len(logits))
        warm = logits.float() / temperature
        if rolls is None:
            parts.append(_likeliest(warm, words[here], k, known))
        else:
            parts.append(_drawn(warm[:, :known], words[here], torch.from_numpy(rolls[here]).to(model.device)))
        start += len(logits)
    ids, logprobs, rest, place = (torch.cat(of).cpu() for of in zip(*parts, strict=True))
    return ids, logprobs, rest, place


def _logits(model: PreTrainedModel, ids: Tensor, chosen: Tensor) -> Iterator[Tensor]:
    """Of the token after each chosen place, (n, width of the head), a chunk at a time.

    They are the model's own: some scale or cap what leaves the head. So it is called with the states in place of its
    layers, which have been through them.
    """
    base = model.base_model
    told = base(input_ids=ids, use_cache=False)
    states = told.last_hidden_state[:, :-1][chosen]
    own = vars(base).get("forward")
    base.forward = lambda *_, **__: told
    try:
        for part in states.split(max(1, _NUMBERS // model.get_output_embeddings().weight.shape[0])):
            told.last_hidden_state = part[None]
            yield model(input_ids=ids[:1, :1]).logits[0]
    finally:
        if own is None:  # one that the model holds of itself would keep its weights in memory, when all is read
            del base.forward
        else:
            base.forward = own


def _likeliest(logits: Tensor, words: Tensor, k: int, known: int) -> _Found:
    """The k likeliest of the known ids, the written one in the last place where it is none of them."""
    logprobs = logits.log_softmax(-1)
    best = logprobs[:, :known].topk(k, -1)
    same = best.indices == words[:, None]
    place = torch.where(same.any(-1), same.int().argmax(-1), k - 1)[:, None]
    ids = best.indices.scatter(-1, place, words[:, None])
    values = best.values.scatter(-1, place, logprobs.gather(-1, words[:, None]))
    rest = logprobs.scatter_(-1, ids, -torch.inf).logsumexp(-1).exp()  # 1 less the others would be rounding alone
    return ids, values, rest, place[:, 0]


def _drawn(logits: Tensor, words: Tensor, rolls: Tensor) -> _Found:
    """What the rolls draw, the most frequent first, with the logarithms of their shares."""
    count, draws = rolls.shape
    # In float64, so that a batch's rounding all but never moves a draw over the edge of a token.
    sums = logits.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(sums, rolls * sums[:, -1:], right=True).clamp(max=logits.shape[1] - 1).sort(-1).values
    new = torch.cat([torch.ones_like(tokens[:, :1]), (tokens[:, 1:] != tokens[:, :-1]).long()], 1)
    slots = new.cumsum(-1) - 1
    times = torch.zeros((count, draws + 1), device=tokens.device).scatter_add_(1, slots, torch.ones_like(rolls).float())
    times, order = times.sort(dim=-1, descending=True, stable=True)
    ids = torch.zeros_like(order).scatter_(1, slots, tokens).gather(1, order)
    same = (ids == words[:, None]) & (times > 0)
    place = torch.where(same.any(-1), same.int().argmax(-1), new.sum(-1))[:, None]  # else the first free slot
    ids = ids.scatter(1, place, words[:, None])
    return ids, (times / draws).log(), torch.zeros_like(times[:, 0]), place[:, 0]
