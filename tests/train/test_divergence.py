"""Every divergence and its gradient against a dense reference in double precision, and what each misses of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preceptor.core.errors import UserError
from preceptor.train.divergence import DIVERGENCES, bucket, of_a_user

V, N = 17, 6
SUMMED = ("renormalised", "bucket", "decoupled", "reverse")


def drawn(seed: int, k: int, sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """A student's logits, a teacher's distribution, and its k likeliest tokens."""
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=dice, dtype=torch.float64)
    teacher = (sharp * torch.randn(N, V, generator=dice, dtype=torch.float64)).softmax(-1)
    return logits, teacher, teacher.topk(k, -1).indices


def dense(name: str, logits: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """The same losses the long way, on whole distributions."""
    p, q = teacher.gather(-1, ids), logits.softmax(-1).gather(-1, ids)
    r, out = 1 - p.sum(-1), 1 - q.sum(-1)
    inner = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    head = (inner[0] * (inner[0].log() - inner[1].log())).sum(-1)
    split = r * (r / out).log() + (1 - r) * ((1 - r) / (1 - out)).log()
    return {
        "renormalised": head if ids.shape[1] > 1 else -q[:, 0].log(),
        "bucket": (p * (p.log() - q.log())).sum(-1) + r * (r / out).log(),
        "decoupled": head + split,
        "reverse": (q * (q.log() - p.log())).sum(-1) + out * (out / r).log(),
    }[name]


def ours(name: str, logits: Tensor, teacher: Tensor, ids: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the logits, put together as the trainer does."""
    student = logits.log_softmax(-1)
    loss, everywhere, there = DIVERGENCES[name](student.gather(-1, ids), teacher, rest)
    return loss, (everywhere[:, None] * student.exp()).scatter_add(-1, ids, there)


@pytest.mark.parametrize("name", SUMMED)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(1, V - 2), sharp=st.floats(0.1, 4))
def test_loss_and_gradient_are_the_dense_ones(name, seed, k, sharp):
    logits, teacher, ids = drawn(seed, k, sharp)
    logits.requires_grad_()
    wanted = dense(name, logits, teacher, ids)
    (slope,) = torch.autograd.grad(wanted.sum(), logits)
    p = teacher.gather(-1, ids)
    with torch.no_grad():
        loss, grad = ours(name, logits, p.log(), ids, 1 - p.sum(-1))
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SUMMED)
def test_a_student_like_the_teacher_has_nothing_to_learn(name):
    _, teacher, ids = drawn(1, 5)
    p = teacher.gather(-1, ids)
    loss, grad = ours(name, teacher.log(), p.log(), ids, 1 - p.sum(-1))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*SUMMED, "sampled"])
def test_one_continuation_is_cross_entropy(name):
    """Most tokens have one: 0 · (-∞) is met at once, in the places that a shorter top-k leaves empty too."""
    logits, _, ids = drawn(2, 3)
    teacher = torch.full((N, 3), -torch.inf, dtype=torch.float64)
    teacher[:, 0] = 0.0
    loss, grad = ours(name, logits, teacher, ids, torch.zeros(N, dtype=torch.float64))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()
    surprise = -logits.log_softmax(-1).gather(-1, ids[:, :1])[:, 0]
    slope = logits.softmax(-1).scatter_add(-1, ids[:, :1], -torch.ones(N, 1, dtype=torch.float64))
    if name != "reverse":
        torch.testing.assert_close(loss, surprise)
        torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)


def test_the_expected_gradient_of_sampling_is_full_distillations():
    """Exactly, by taking every token as often as the teacher does; single draws scatter about it."""
    logits, teacher, _ = drawn(3, 1)
    full = logits.softmax(-1) - teacher
    mean = torch.zeros_like(full)
    for token in range(V):
        ids = torch.full((N, 1), token)
        _, grad = ours("sampled", logits, torch.zeros(N, 1, dtype=torch.float64), ids, torch.zeros(N))
        mean += teacher[:, token, None] * grad
    torch.testing.assert_close(mean, full)


def test_how_far_each_misses_full_distillation():
    """Of the norm of the full gradient, at k = 3: what is known beyond the head brings a loss nearer to it."""
    logits, teacher, ids = drawn(4, 3)
    full = logits.softmax(-1) - teacher
    p = teacher.gather(-1, ids)
    missed = {}
    for name in ("renormalised", "bucket", "decoupled"):
        _, grad = ours(name, logits, p.log(), ids, 1 - p.sum(-1))
        missed[name] = float((grad - full).norm() / full.norm())
    assert missed["bucket"] < 0.25 < missed["decoupled"] < missed["renormalised"]
    everything = teacher.topk(V - 1, -1).indices
    p = teacher.gather(-1, everything)
    _, grad = ours("bucket", logits, p.log(), everything, 1 - p.sum(-1))
    torch.testing.assert_close(grad, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "own",
    [lambda s, t, r: r, lambda s, t, r: (r, r), lambda s, t, r: (r, r, r), lambda s, t, r: (r.mean(), r, s)],
)
def test_a_user_s_divergence_of_other_shapes_is_refused(own):
    _, teacher, ids = drawn(0, 3)
    p = teacher.gather(-1, ids)
    told = p.log(), p.log(), 1 - p.sum(-1)
    with pytest.raises(UserError, match=r"divergence 'own.py:f': it must return three tensors, the loss \(n,\)"):
        of_a_user(own, "own.py:f")(*told)
    assert all(torch.equal(*pair) for pair in zip(of_a_user(bucket, "")(*told), bucket(*told), strict=True))
