"""The chunked loss: dense cross-entropy in value and gradient, and no work that nobody wants."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from preceptor.train import loss
from preceptor.train.loss import IGNORED, chunked_cross_entropy


def case(dtype=torch.float32, batch=3, length=9, width=8, vocabulary=31):
    """Hidden states, a head and labels of which some are ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (batch, length))
    labels[torch.rand(batch, length) < 0.4] = IGNORED
    return hidden, head, labels


def dense(hidden, head, labels):
    """What the loss should be."""
    logits = (hidden @ head.T)[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("elements", [1, 31 * 4, 2**25])
def test_value_and_gradients_are_the_dense_ones(monkeypatch, elements):
    """Whatever the chunk."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", elements)
    hidden, head, labels = case()
    expected = dense(hidden, head, labels)
    wanted = torch.autograd.grad(expected * 3, [hidden, head])
    value = chunked_cross_entropy(hidden, head, labels)
    got = torch.autograd.grad(value * 3, [hidden, head])
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradcheck(monkeypatch):
    """Against finite differences in double precision, over several chunks."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 31 * 3)
    hidden, head, labels = case(torch.float64, batch=2, length=5, width=4)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, 7.0), (hidden, head))


def test_divisor_makes_accumulated_batches_one():
    """Two halves over the whole's count have the whole's gradient."""
    hidden, head, labels = case(batch=4)
    count = int((labels[:, 1:] != IGNORED).sum())
    whole = torch.autograd.grad(chunked_cross_entropy(hidden, head, labels), head)[0]
    halves = sum(chunked_cross_entropy(hidden[h], head, labels[h], count) for h in (slice(2), slice(2, 4)))
    torch.testing.assert_close(torch.autograd.grad(halves, head)[0], whole, atol=1e-6, rtol=1e-5)


def test_frozen_head_takes_no_gradient(monkeypatch):
    """LoRA's head is frozen: no memory and no work for its gradient."""
    hidden, head, labels = case()
    expected = torch.autograd.grad(dense(hidden, head, labels), hidden)[0]
    head = head.detach()
    made = []
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **kwargs: made.append(args))
    got = torch.autograd.grad(chunked_cross_entropy(hidden, head, labels), hidden)[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert not made


def test_no_answer_is_no_loss():
    """A batch without labels gives zero, not a division by it."""
    hidden, head, labels = case()
    value = chunked_cross_entropy(hidden, head, torch.full_like(labels, IGNORED))
    value.backward()
    assert value == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_half_precision_follows_single():
    """bfloat16 states with a single-precision head, as under autocast."""
    hidden, head, labels = case()
    wanted = torch.autograd.grad(dense(hidden, head, labels), [hidden, head])
    value = chunked_cross_entropy(hidden.bfloat16(), head, labels)
    got = torch.autograd.grad(value, [hidden, head])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.05)
        assert ours.dtype == torch.float32
