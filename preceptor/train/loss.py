"""Cross-entropy straight from hidden states, on answer positions alone.

With a vocabulary of 150,000 words the logits of a batch outweigh the model. Here a chunk of positions at a
time meets the head, and its gradients are taken on the spot, so no more than one chunk of logits ever lives.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100

_CHUNK_ELEMENTS = 2**25
"""Logits at a time: 128 MB in single precision."""


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    divisor: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the labels that aren't ignored, each times its weight, over `divisor`.

    `hidden` is (..., width), `head` (vocabulary, width), and `labels` and `weights` (...) stand at the position of
    the token that they speak of: position t is predicted from the hidden state at t - 1. Without weights each label
    counts 1; the divisor is by default the sum of the weights.
    """
    targets = labels[..., 1:]
    kept = targets != IGNORED
    states, words = hidden[..., :-1, :][kept], targets[kept]
    exact = torch.promote_types(states.dtype, torch.float32)
    counts = torch.ones_like(words, dtype=exact) if weights is None else weights[..., 1:][kept].to(exact)
    if divisor is None:
        divisor = counts.sum() if len(words) else 1.0
    total: Tensor = _Chunked.apply(states, head, words, counts)  # type: ignore[no-untyped-call]  # torch's
    return total / divisor


class _Chunked(torch.autograd.Function):
    """Weighted sum of the losses; gradients are computed going forward, since each chunk's logits are there then."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, words: Tensor, weights: Tensor) -> Tensor:
        wants_states, wants_head, *_ = ctx.needs_input_grad
        weight = head.to(states.dtype)
        exact = weights.dtype
        total = torch.zeros((), dtype=exact, device=states.device)
        grad_states = torch.empty_like(states) if wants_states else None
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if wants_head else None
        step = max(1, _CHUNK_ELEMENTS // len(head))
        for start in range(0, len(words), step):
            part, target = states[start : start + step], words[start : start + step, None]
            weighs = weights[start : start + step, None]
            scores = (part @ weight.T).to(exact)
            norm = scores.logsumexp(-1, keepdim=True)
            total += (weighs * (norm - scores.gather(-1, target))).sum()
            if grad_states is None and grad_head is None:
                continue
            grad = scores.sub_(norm).exp_()  # the softmax, in place; less one at the target it is the gradient
            grad.scatter_add_(-1, target, grad.new_full((), -1).expand_as(target))
            grad = grad.mul_(weighs).to(states.dtype)
            if grad_states is not None:
                torch.mm(grad, weight, out=grad_states[start : start + step])
            if grad_head is not None:
                grad_head += grad.T @ part
        ctx.save_for_backward(grad_states, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_head = ctx.saved_tensors
        (scale,) = grads
        return (
            None if grad_states is None else grad_states * scale.to(grad_states.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
            None,
        )
