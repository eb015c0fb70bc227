"""What a student loses against a teacher of whom only the likeliest tokens are known, and the rest's mass together.

All work on a chunk of positions. `student` are the student's log-probabilities of the teacher's k tokens, shape (n, k),
under its whole vocabulary; `teacher` the teacher's, of the same shape; `rest` is the teacher's mass beyond them, (n,).
A token that isn't there has the teacher's log-probability -inf, and counts for nothing: 0 · log 0 = 0.

Each returns the loss (n,), and the gradient by the student's logits in the one form that all of them have, so that
nothing as wide as the vocabulary is ever made twice: `dense` (n,) times the student's probabilities everywhere, plus
`sparse` (n, k) at the teacher's tokens. With q the student's probabilities and p the teacher's:

- `renormalised` (FIRST, arXiv 2408.12168): KL(p̃ || q̃), both divided by their sums over the k tokens. What the student
  believes of all other tokens is left as it is. Where one token alone is known there is nothing to divide it by: it
  takes cross-entropy.
- `bucket`: KL over k + 1 outcomes, the last of which is any other token.
- `decoupled` (after arXiv 2602.20816): KL of the two masses, head and tail, plus KL(p̃ || q̃) at its full weight, however
  little mass the head has. What lies within the tail is not known from a top-k alone.
- `reverse`: KL(q || p) over the same k + 1 outcomes. A teacher's mass below `LEAST` counts as that, or it would be
  infinite.
- `sampled` (arXiv 2503.16870): cross-entropy against tokens drawn from the teacher with their weights, which sum to 1
  (their logarithms stand in `teacher`). Over the draws its gradient is that of full distillation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from preceptor.core.errors import UserError
from preceptor.train.config import DivergenceName

Loss = tuple[Tensor, Tensor, Tensor]
Divergence = Callable[[Tensor, Tensor, Tensor], Loss]
LEAST = 1e-6
"""Mass that an outcome has at least, where its logarithm would be infinite."""


def renormalised(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """See the module."""
    loss, dense, sparse = _within(student, teacher, rest)
    here = teacher.isfinite()
    alone = (here.sum(-1) == 1).to(student.dtype)  # divided by itself it would be certain for every student
    surprise = -_sum(here.to(student.dtype), student)
    return loss + alone * surprise, dense + alone, sparse - alone[:, None] * here


def _within(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """KL of the two heads, each divided by its sum."""
    here = teacher.isfinite()
    theirs = teacher - teacher.logsumexp(-1, keepdim=True)
    ours = student.masked_fill(~here, -torch.inf)
    ours = ours - ours.logsumexp(-1, keepdim=True)
    p = theirs.exp()
    loss = _sum(p, theirs - ours)
    return loss, torch.zeros_like(rest), ours.exp() - p


def bucket(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """See the module."""
    p, out = teacher.exp(), _beyond(student, teacher)
    loss = _sum(p, teacher - student) + torch.xlogy(rest, rest) - rest * out.log()
    dense = 1 - rest / out
    return loss, dense, (1 - dense)[:, None] * _at(student, teacher) - p


def decoupled(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """See the module."""
    head, _, within = _within(student, teacher, rest)
    out = _beyond(student, teacher)
    mass = 1 - rest
    split = torch.xlogy(rest, rest) - rest * out.log() + torch.xlogy(mass, mass) - mass * torch.log1p(-out)
    # By a logit of the head q·out·(out - rest) / (out · (1 - out)), by one of the tail the same of the other sign.
    dense = 1 - rest / out
    inside = mass / (1 - out).clamp(min=LEAST)
    return head + split, dense, within + (1 - dense - inside)[:, None] * _at(student, teacher)


def reverse(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """See the module."""
    q, out = _at(student, teacher), _beyond(student, teacher)
    gap = torch.where(teacher.isfinite(), student - teacher, 0.0)
    beyond = out.log() - rest.clamp(min=LEAST).log()
    loss = _sum(q, gap) + out * beyond
    return loss, beyond - loss, q * (gap - beyond[:, None])


def sampled(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
    """See the module."""
    p = teacher.exp()
    return -_sum(p, student), torch.ones_like(rest), -p


DIVERGENCES: Mapping[DivergenceName, Divergence] = {
    "renormalised": renormalised,
    "bucket": bucket,
    "decoupled": decoupled,
    "reverse": reverse,
    "sampled": sampled,
}


def of_a_user(own: Callable[..., Any], name: str) -> Divergence:
    """A user's function, held to the shapes: others would be spread without a word, and give wrong gradients."""

    def divergence(student: Tensor, teacher: Tensor, rest: Tensor) -> Loss:
        told = own(student, teacher, rest)
        parts = told if isinstance(told, (tuple, list)) else (told,)
        if [getattr(part, "shape", None) for part in parts] != [rest.shape, rest.shape, student.shape]:
            raise UserError(
                f"divergence {name!r}: it must return three tensors, the loss (n,), `dense` (n,) and `sparse` (n, k), "
                "as those of preceptor.train.divergence do"
            )
        loss, dense, sparse = parts
        return loss, dense, sparse

    return divergence


def _at(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's probabilities of the tokens that are there."""
    return student.exp().masked_fill(~teacher.isfinite(), 0.0)


def _beyond(student: Tensor, teacher: Tensor) -> Tensor:
    """What the student gives to all other tokens, more than nothing."""
    return (1 - _at(student, teacher).sum(-1)).clamp(LEAST, 1 - LEAST)


def _sum(mass: Tensor, terms: Tensor) -> Tensor:
    """Of what has any mass: 0 · (-∞) is 0."""
    return torch.where(mass > 0, mass * terms, 0.0).sum(-1)
