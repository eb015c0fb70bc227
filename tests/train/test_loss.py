"""The chunked loss: dense cross-entropy in value and gradient, and no work that nobody wants."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from preceptor.train import loss
from preceptor.train.divergence import DIVERGENCES
from preceptor.train.loss import IGNORED, Mix, Soft, chunked_cross_entropy


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


def test_gradients_are_the_same_when_asked_for_again():
    """They are given away without a copy, and computed once more."""
    hidden, head, labels = case()
    value = chunked_cross_entropy(hidden, head, labels, soft=beliefs(labels)[0], mix=Mix(temperature=2.0))
    first = torch.autograd.grad(value * 3, [hidden, head], retain_graph=True)
    for ours, again in zip(first, torch.autograd.grad(value * 3, [hidden, head]), strict=True):
        torch.testing.assert_close(ours, again, atol=0, rtol=0)


def test_autocast_multiplies_in_half_precision(monkeypatch):
    """States that autocast leaves in single precision; what is added up stays in it."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 31 * 4)
    hidden, head, labels = case()
    wanted = torch.autograd.grad(dense(hidden, head, labels), [hidden, head])
    made = []
    kept = loss._of_logits
    monkeypatch.setattr(loss, "_of_logits", lambda scores, *rest: made.append(scores.dtype) or kept(scores, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_cross_entropy(hidden, head, labels)
    for ours, theirs in zip(torch.autograd.grad(value, [hidden, head]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.05)
        assert (ours.dtype, ours.equal(theirs)) == (torch.float32, False)
    assert set(made) == {torch.float32}
    assert len(made) > 1


def beliefs(labels, vocabulary=31, k=4, seed=1):
    """A teacher's top k and the rest, of each position; of every third nothing is known."""
    dice = torch.Generator().manual_seed(seed)
    whole = (2 * torch.randn(*labels.shape, vocabulary, generator=dice, dtype=torch.float64)).softmax(-1)
    top = whole.topk(k, -1)
    logprobs, rest = top.values.log(), 1 - top.values.sum(-1)
    unknown = torch.arange(labels.numel()).reshape(labels.shape) % 3 == 0
    logprobs[unknown], rest[unknown] = -torch.inf, 0.0
    return Soft(top.indices, logprobs, rest), unknown


def long_way(hidden, head, labels, weights, soft, unknown, mix):
    """Logits of everything at once, and autograd through them."""
    logits = (hidden @ head.T)[:, :-1]
    hard = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    student = (logits / mix.temperature).log_softmax(-1).gather(-1, soft.ids[:, 1:])
    p, r = soft.logprobs[:, 1:].exp(), soft.rest[:, 1:]
    out = 1 - student.exp().sum(-1)
    kl = (p * (soft.logprobs[:, 1:] - student)).nan_to_num(0.0).sum(-1) + r * (r.clamp(min=1e-30) / out).log()
    share = mix.share * ~unknown[:, 1:]
    each = (1 - share) * hard.view_as(r) + share * mix.temperature**2 * kl
    counted = weights[:, 1:] * (labels[:, 1:] != IGNORED)
    return (counted * each).sum() / counted.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("elements", [1, 31 * 5, 2**25])
def test_with_a_teacher_value_and_gradients_are_the_dense_ones(monkeypatch, temperature, elements):
    """Whatever the chunk; where nothing is known of the teacher, cross-entropy alone."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", elements)
    hidden, head, labels = case(torch.float64)
    weights = torch.rand(labels.shape, dtype=torch.float64)
    soft, unknown = beliefs(labels)
    mix = Mix(divergence="bucket", share=0.7, temperature=temperature)
    expected = long_way(hidden, head, labels, weights, soft, unknown, mix)
    wanted = torch.autograd.grad(expected, [hidden, head])
    counted = (weights[:, 1:] * (labels[:, 1:] != IGNORED)).sum()
    value = chunked_cross_entropy(hidden, head, labels, counted, weights, soft, mix)
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-7)
    for ours, theirs in zip(torch.autograd.grad(value, [hidden, head]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_mixes_with_the_label_on_one_scale(name):
    """No share is plain cross-entropy; half a share lies half way."""
    hidden, head, labels = case(torch.float64)
    soft, _ = beliefs(labels)
    values = [
        chunked_cross_entropy(hidden, head, labels, soft=soft, mix=Mix(divergence=name, share=share))
        for share in (0, 0.5, 1)
    ]
    torch.testing.assert_close(values[0], chunked_cross_entropy(hidden, head, labels))
    torch.testing.assert_close(values[1], (values[0] + values[2]) / 2)
    assert all(torch.isfinite(torch.autograd.grad(value, hidden)[0]).all() for value in values)
