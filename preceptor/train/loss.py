"""The loss straight from hidden states, on answer positions alone: cross-entropy, and a teacher's beliefs beside it.

With a vocabulary of 150,000 words the logits of a batch outweigh the model. Here a chunk of positions at a
time meets the head, and its gradients are taken on the spot, so no more than one chunk of logits ever lives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from preceptor.train.config import Mix
from preceptor.train.divergence import DIVERGENCES

IGNORED = -100

_CHUNK_ELEMENTS = 2**25
"""Logits at a time: 128 MB in single precision."""


class Soft(NamedTuple):
    """What a teacher believes of each position's token; -inf alone where nothing of it is known."""

    ids: Tensor
    """Of its likeliest tokens, (..., k)."""
    logprobs: Tensor
    """Of those, (..., k); -inf for one that isn't there."""
    rest: Tensor
    """Mass of all others, (...)."""


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    divisor: Tensor | float | None = None,
    weights: Tensor | None = None,
    soft: Soft | None = None,
    mix: Mix = Mix(),
) -> Tensor:
    """Loss of the labels that aren't ignored, each times its weight, over `divisor`.

    It is the negative log-likelihood, or with `soft` the mixture with a divergence from the teacher. `hidden` is (...,
    width), `head` (vocabulary, width), and `labels`, `weights` and `soft` (...) stand at the position of the token
    that they speak of: position t is predicted from the hidden state at t - 1. Without weights each label counts 1; the
    divisor is by default the sum of the weights. The teacher's log-probabilities come softened by the mixture's
    temperature already.
    """
    targets = labels[..., 1:]
    kept = targets != IGNORED
    states, words = hidden[..., :-1, :][kept], targets[kept]
    exact = torch.promote_types(states.dtype, torch.float32)
    counts = torch.ones_like(words, dtype=exact) if weights is None else weights[..., 1:][kept].to(exact)
    if divisor is None:
        divisor = counts.sum() if len(words) else 1.0
    known = None if soft is None else Soft(*(part[:, 1:][kept] for part in soft))
    total: Tensor = _Chunked.apply(states, head, words, counts, known, mix)  # type: ignore[no-untyped-call]  # torch's
    return total / divisor


class _Chunked(torch.autograd.Function):
    """Weighted sum of the losses; gradients are computed going forward, since each chunk's logits are there then."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, words: Tensor, weights: Tensor, soft: Soft | None, mix: Mix
    ) -> Tensor:
        ctx.save_for_backward(states, head, words, weights, *(soft or ()))
        ctx.mix, ctx.head_dtype = mix, head.dtype
        total, ctx.grads = _through(states, head, words, weights, soft, mix, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, which are given away as they are: whoever asks once more has them computed once more."""
        if ctx.grads is None:
            states, head, words, weights, *soft = ctx.saved_tensors
            known = Soft(*soft) if soft else None
            _, ctx.grads = _through(states, head, words, weights, known, ctx.mix, ctx.needs_input_grad[:2])
        (scale,) = grads
        of_states, of_head = (None if grad is None else grad.mul_(scale) for grad in ctx.grads)
        ctx.grads = None
        return of_states, None if of_head is None else of_head.to(ctx.head_dtype), None, None, None, None


def _through(
    states: Tensor,
    head: Tensor,
    words: Tensor,
    weights: Tensor,
    soft: Soft | None,
    mix: Mix,
    wanted: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The loss, and the gradients by states and head, if wanted. All chunks use the same memory."""
    exact, kind = weights.dtype, states.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    within, weight = states.to(compute), head.to(compute)
    total = torch.zeros((), dtype=exact, device=states.device)
    grad_states = torch.empty_like(states) if wanted[0] else None
    grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if wanted[1] else None
    step = max(1, min(_CHUNK_ELEMENTS // len(head), len(words)))
    logits = within.new_empty(step, len(head))
    precise = logits if compute == exact else logits.new_empty(logits.shape, dtype=exact)
    warm = torch.empty_like(precise) if soft is not None and mix.temperature != 1 else None
    for start in range(0, len(words), step):
        rows = slice(start, start + step)
        part = within[rows]
        here = slice(len(part))
        low = torch.mm(part, weight.T, out=logits[here])
        scores = precise[here] if precise is logits else precise[here].copy_(low)
        believed = None if soft is None else Soft(*(each[rows] for each in soft))
        room = None if warm is None else warm[here]
        loss, grad = _of_logits(scores, words[rows, None], weights[rows, None], believed, mix, room)
        total += loss
        grad = grad if precise is logits else low.copy_(grad)
        if grad_states is not None:
            grad_states[rows] = grad @ weight
        if grad_head is not None:
            _add(grad_head, grad, part)
    return total, (grad_states, grad_head)


def _add(total: Tensor, grad: Tensor, part: Tensor) -> None:
    """Add what a chunk gives to the head's gradient."""
    if total.dtype == part.dtype:
        total.addmm_(grad.T, part)
        return
    step = _CHUNK_ELEMENTS // part.shape[1] + 1
    for some, of_words in zip(torch.split(total, step), torch.split(grad.T, step), strict=True):
        some.add_(of_words @ part)


def _of_logits(
    scores: Tensor, words: Tensor, weights: Tensor, soft: Soft | None, mix: Mix, room: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weighted loss of a chunk, and its gradient by the logits, which takes their place in memory.

    `room` is as much again, for the probabilities at another temperature.
    """
    heat = mix.temperature
    target = scores.gather(-1, words)
    told = None if soft is None else scores.gather(-1, soft.ids) / heat
    peak = scores.amax(-1, keepdim=True)
    if room is not None:
        torch.add(peak / -heat, scores, alpha=1 / heat, out=room).exp_()
    mass = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    norm = peak + mass.log()
    surprise = norm - target
    if soft is None or told is None:
        loss, hard = (weights * surprise).sum(), weights
        grad = scores.mul_(hard / mass)  # the softmax; less one at the target it is the gradient
        return loss, grad.scatter_add_(-1, words, -hard)
    known = soft.logprobs.isfinite().any(-1)
    nothing = torch.full_like(soft.logprobs, -torch.inf)
    nothing[:, 0] = 0.0
    teacher = torch.where(known[:, None], soft.logprobs, nothing).to(scores.dtype)
    softly = weights * (mix.share * known[:, None])
    hard = weights - softly
    warm_mass = mass if room is None else room.sum(-1, keepdim=True)
    student = told - (peak / heat + warm_mass.log())
    diverge = mix.divergence if callable(mix.divergence) else DIVERGENCES[mix.divergence]
    apart, dense, sparse = diverge(student, teacher, soft.rest.to(scores.dtype) * known)
    loss = (hard * surprise).sum() + heat**2 * (softly[:, 0] * apart).sum()
    dense = heat * softly * dense[:, None]
    if room is None:
        grad = scores.mul_((hard + dense) / mass)
    else:
        grad = scores.mul_(hard / mass).addcmul_(room, dense / warm_mass)
    grad.scatter_add_(-1, words, -hard)
    return loss, grad.scatter_add_(-1, soft.ids, heat * softly * sparse)
