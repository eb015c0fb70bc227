"""Batches: documents apart, answers alone, nothing lost, and the same again by seed."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from preceptor.model.tokens import IGNORED, Example, end_of_turn, example
from preceptor.train.batches import Batches, collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.loss import chunked_cross_entropy
from preceptor.train.trainer import learns
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    words = tiny.tokenizer()
    return [example(words, row, 500) for row in ROWS]


def loss_of(model, rows) -> torch.Tensor:
    """Training's loss of a batch, through training's own forward."""
    batch = collate(rows)
    del batch["tokens"]
    return model(**batch)


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama])
def test_packed_documents_do_not_see_each_other(make, examples):
    """Changing document 1 leaves document 2's loss and gradients as they were, packed or alone."""
    model = make()
    learns(model)
    one, two = examples[4], examples[7]
    other = Example([(token * 7 + 3) % 400 for token in one.ids], one.labels)
    mute = [IGNORED] * len(one.ids)
    packed = []
    for first in (one, other):
        (row,) = pack([Example(first.ids, mute), two])
        assert row.lengths == [len(first.ids), len(two.ids)]
        value = loss_of(model, [row])
        packed.append((value.detach(), torch.autograd.grad(value, list(model.parameters()))))
    alone = loss_of(model, unpacked([two]))
    assert torch.equal(packed[0][0], packed[1][0])
    torch.testing.assert_close(packed[0][0], alone, atol=1e-5, rtol=1e-5)
    for before, after in zip(packed[0][1], packed[1][1], strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-5)


def test_batch_is_the_mean_of_its_answers(examples):
    """Padded, packed and one by one, the loss is that of the model's own logits on answer tokens."""
    model = tiny.qwen()
    learns(model)
    total, count = 0.0, 0
    for made in examples:
        logits = model(torch.tensor([made.ids])).logits[0, :-1]
        labels = torch.tensor(made.labels[1:])
        total += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").detach())
        count += int((labels != IGNORED).sum())
    assert loss_of(model, unpacked(examples)).item() == pytest.approx(total / count, rel=1e-4)
    packed = pack(examples)
    assert len(packed) < len(examples)
    assert loss_of(model, packed).item() == pytest.approx(total / count, rel=1e-4)
    assert count == sum(len(tiny.tokenizer()(row.answer)["input_ids"]) + 1 for row in ROWS)


def test_packing_loses_no_token(examples):
    """Every example is in some row, whole."""
    found = []
    for row in pack(examples):
        at = 0
        for length in row.lengths:
            found.append((row.ids[at : at + length], row.labels[at : at + length]))
            at += length
        assert at == len(row.ids)
    key = str
    assert sorted(found, key=key) == sorted(((e.ids, e.labels) for e in examples), key=key)


def test_batches_cover_an_epoch_and_repeat_by_seed(examples):
    """Each row once an epoch; another epoch or seed, another order; packed steps see as many examples."""
    rows = unpacked(examples * 9)
    batches = Batches(rows, 5, seed=1)
    first = list(batches)
    assert sorted(at for batch in first for at in batch) == list(range(len(rows)))
    assert len(first) == len(batches)
    assert first == list(Batches(rows, 5, seed=1))
    batches.set_epoch(1)
    assert first != list(batches)
    assert first != list(Batches(rows, 5, seed=2))
    packed = pack(examples * 9)
    assert abs(len(Batches(packed, 8, seed=0)) - len(rows) / 8) <= 0.25 * len(rows) / 8


def test_loss_reads_labels_as_the_tokens_are_made(examples):
    """The last label of every example is the end of the turn."""
    assert {made.labels[-1] for made in examples} == {end_of_turn(tiny.tokenizer())}
    labels = torch.tensor([[IGNORED, 2]])  # the second token, seen from the first
    assert chunked_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(5, 3), labels) == pytest.approx(math.log(5))
