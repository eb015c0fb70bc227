"""How likely a model is to go on in given ways: the probability of a text, not of one way to cut it into tokens.

Given are the beginning b of an answer and candidates c, and a model p over tokens. What is told is

    P(c | b) = A(b + c) / A(b),   A(x) = Σ_s p(s | prompt, o) · Σ_t p(t | prompt, o, s)

where o are the tokens that b and all b + c have in common; s runs over the token sequences that go on from o as far as
the last token that ends before x does, as b + c is cut where one of `_FOLLOWERS` comes after it; and t over all tokens
whose bytes begin with what x then lacks, whatever else they hold. So a closing quote counts in whichever token the
model would write it (`"`, `"]`, `",`). Every sequence through b + c goes through b, and none through two candidates of
which neither begins the other: the probabilities of such candidates are at most 1 together.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from itertools import accumulate
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.core.records import Reply, Request, Row, Token, Usage
from preceptor.model import pieces, tokens
from preceptor.model.load import Loaded

_FOLLOWERS = ("", '], "', ', "', "]}")
"""What may come after a candidate and change how its end is cut into tokens."""
_NUMBERS = 1 << 25
"""Logits at a time, and numbers in the copies of keys and values at a time: 128 MB of each in float32."""

_reader = lru_cache(maxsize=4)(pieces.reader)  # it reads the whole tokenizer

_Stem = tuple[int, ...]
_Ways = list[set[tuple[_Stem, bytes]]]
"""For the beginning, then for each candidate: the tokens that end before it does, and its bytes that are lacking then;
nothing where nothing is."""


def score(loaded: Loaded, requests: Sequence[Request]) -> list[Reply]:
    """The log-probabilities of each request's candidates, in order: one token of the reply each, and no text.

    The last message is the beginning of the answer. Where prompt and candidates don't fit the model, even with the
    record cut, the reply has no tokens and ended by length.

    Raises:
        UserError: the last message isn't the assistant's, or this model's tokens can't write a candidate.
    """
    return [_score(loaded, request) for request in requests]


@torch.inference_mode()
def _score(loaded: Loaded, request: Request) -> Reply:
    *before, begun = request.messages
    if begun.role != "assistant":
        raise UserError("candidates: the last message must be the assistant's, which they go on from")
    limit = max(loaded.context - request.sampling.max_tokens, loaded.context // 2)  # as where the answer is generated
    try:
        prompt = tokens.prompt_ids(loaded.tokenizer, before, limit)
    except tokens.TooLongError:
        return Reply(text="", finish="length")
    row = Row(id="", messages=tuple(before), answer=begun.content, case_id="")
    shared, ways = _ways(loaded.tokenizer, tokens.learnt(loaded.tokenizer, row), request.candidates)
    stems = sorted({stem for several in ways for stem, _ in several}, key=len)
    usage = Usage(prompt_tokens=len(prompt) + len(shared))
    if usage.prompt_tokens + len(stems[-1]) > loaded.context:
        return Reply(text="", finish="length")
    wanted: dict[_Stem, set[bytes]] = {stem: set() for stem in stems}
    for stem, rest in (way for several in ways for way in several):
        wanted[stem].add(rest)
    vocabulary = _vocabulary(loaded.tokenizer, loaded.model.config.get_text_config().vocab_size)
    known = {}
    for stem, own, following in _followed(loaded, [*prompt, *shared], stems):
        for rest in wanted[stem]:
            known[stem, rest] = own + following[vocabulary.beginning(rest)].logsumexp(0)
    nothing = torch.zeros((), device=loaded.model.device)
    totals = [torch.stack([known[way] for way in several]).logsumexp(0) if several else nothing for several in ways]
    logprobs = (torch.stack(totals[1:]) - totals[0]).clamp(max=0).tolist()
    return Reply(
        text="",
        usage=usage,
        tokens=tuple(
            Token(utf8=candidate.encode(), logprob=logprob)
            for candidate, logprob in zip(request.candidates, logprobs, strict=True)
        ),
    )


@lru_cache(maxsize=8)
def _ways(tokenizer: PreTrainedTokenizerBase, begun: str, candidates: tuple[str, ...]) -> tuple[list[int], _Ways]:
    """The tokens that all have in common, and the ways on from there. Cases differ in the record, and share these."""
    piece = _reader(tokenizer)
    texts = [(tokens.harmless(tokenizer, candidate), after) for candidate in candidates for after in _FOLLOWERS]
    whole = [begun + candidate + after for candidate, after in texts]
    cut = tokenizer([begun, *whole], add_special_tokens=False)["input_ids"]
    shared = commonprefix(cut)  # noqa: RUF071 - of lists of tokens, which are no paths
    ways: _Ways = [set() for _ in range(1 + len(candidates))]
    for number, (ids, (candidate, after)) in enumerate(zip(cut[1:], texts, strict=True)):
        raw = b"".join(map(piece, ids))
        if not raw.endswith((candidate + after).encode()) or not candidate:
            raise UserError(f"candidates: {candidate!r} can't be written in this model's tokens")
        ends = list(accumulate(len(piece(token)) for token in ids))
        after_candidate = len(raw) - len(after.encode())
        after_begun = after_candidate - len(candidate.encode())
        for at, end in ((0, after_begun), (1 + number // len(_FOLLOWERS), after_candidate)):
            last = max(bisect_left(ends, end), len(shared))  # the token that reaches the end
            if (done := ends[last - 1] if last else 0) < end:
                ways[at].add((tuple(ids[len(shared) : last]), raw[done:end]))
    return shared, ways


def _followed(loaded: Loaded, ids: list[int], stems: Sequence[_Stem]) -> Iterator[tuple[_Stem, Tensor, Tensor]]:
    """After `ids`, each stem's log-probability and those of all tokens behind it. Shorter stems come first."""
    model = loaded.model
    cache = DynamicCache(config=model.config)
    prompt = torch.tensor([ids], device=model.device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    first = logits[0, -1].float().log_softmax(-1)
    if not stems[0]:
        yield (), first.new_zeros(()), first
    waiting = [stem for stem in stems if stem]
    copied = sum(kept.numel() for layer in cache.layers for kept in (layer.keys, layer.values) if kept is not None)
    while waiting:
        longest = min(len(waiting), max(1, _NUMBERS // max(copied, len(first))))
        count = next(n for n in range(longest, 0, -1) if n == 1 or n * len(waiting[n - 1]) * len(first) <= _NUMBERS)
        taken, waiting = waiting[:count], waiting[count:]
        width = len(taken[-1])
        copy = deepcopy(cache)
        copy.batch_repeat_interleave(count)
        # Padded on the right, where no token that counts looks.
        rows = torch.tensor([[*stem, *[0] * (width - len(stem))] for stem in taken], device=model.device)
        logits = model(input_ids=rows, past_key_values=copy, use_cache=True).logits.float()
        own = first[rows[:, :1]]
        if width > 1:
            before = logits[:, :-1]
            later = before.gather(-1, rows[:, 1:, None])[..., 0] - before.logsumexp(-1)
            own = torch.cat([own, later], 1)
        totals = own.cumsum(1)
        for at, stem in enumerate(taken):
            yield stem, totals[at, len(stem) - 1], logits[at, len(stem) - 1].log_softmax(-1)


class _Vocabulary:
    """The tokens of a model by their bytes, in order: those that begin alike stand together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        piece = _reader(tokenizer)
        self._words, self._ids = zip(*sorted((piece(token), token) for token in range(size)), strict=True)

    def beginning(self, text: bytes) -> list[int]:
        """Those whose bytes begin with a text."""
        # No byte of UTF-8 is 0xFF.
        return list(self._ids[bisect_left(self._words, text) : bisect_left(self._words, text + b"\xff")])


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> _Vocabulary:
    return _Vocabulary(tokenizer, size)
