"""Weights by field: which token gets which, and that they reach the loss and the step."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from preceptor.model.tokens import IGNORED, example
from preceptor.tasks.diagnosis import fields
from preceptor.train import sft
from preceptor.train.batches import collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.config import SftConfig, TokenWeights
from preceptor.train.trainer import learns
from preceptor.train.weights import token_weights
from tests.model import tiny

BY = TokenWeights(diseases=3, evidence=2.5, syntax=0.3)
ANSWERS = {
    '{"diseases": ["肺炎"], "reason": ["发热3天", "咳嗽"]}': ['["肺炎"]', '["发热3天", "咳嗽"]'],
    '{"reason": ["a ] b"], "diseases": []}': ["[]", '["a ] b"]'],
    '{"diseases" : [ "a\\"]" , "b"] }': ['[ "a\\"]" , "b"]'],
    '{"diseases": ["cut off': [],
    '<think>\n"diseases": ["x"]\n</think>\n\n{"diseases": ["a"], "reason": []}': ['["a"]', "[]"],
    "No JSON: diseases are [none].": [],
}


@pytest.mark.parametrize(("answer", "lists"), ANSWERS.items())
def test_fields_are_the_lists(answer, lists):
    """Brackets included; what is no list of JSON is no field."""
    assert [answer[start:end] for _, start, end in fields(answer)] == lists


@pytest.mark.parametrize("answer", ANSWERS)
def test_each_token_has_its_field_s_weight(answer):
    """Read back by characters: the smallest piece that a token shares with a field gives it the field's weight."""
    words = tiny.tokenizer()
    made = example(words, tiny.row(0, answer=answer), 500)
    weights = token_weights(words, tiny.row(0, answer=answer), made, BY)
    assert len(weights) == len(made.ids)
    learnt = [at for at, label in enumerate(made.labels) if label != IGNORED]
    assert not any(weights[: learnt[0]])
    assert weights[-1] == BY.syntax
    values = {"diseases": 3.0, "evidence": 2.5}
    places = words(answer, return_offsets_mapping=True)["offset_mapping"]
    for at, (start, end) in zip(learnt[:-1], places, strict=True):
        inside = [
            values[name] for name, first, last in fields(answer) if set(range(start, end)) & set(range(first, last))
        ]
        assert weights[at] == (inside or [0.3])[0]


def test_without_weights_each_answer_token_counts_one():
    words, row = tiny.tokenizer(), tiny.row(1)
    made = example(words, row, 500)
    assert token_weights(words, row, made, TokenWeights()) == [float(label != IGNORED) for label in made.labels]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_weighted_mean(packing):
    """Against the model's own logits, one example at a time."""
    words, model = tiny.tokenizer(), tiny.qwen()
    examples = sft._examples(words, [tiny.row(n) for n in range(5)], SftConfig(weights=BY), None)
    total = weighed = 0.0
    for made in examples:
        with torch.no_grad():
            losses = cross_entropy(
                model(torch.tensor([made.ids])).logits[0, :-1], torch.tensor(made.labels[1:]), reduction="none"
            )
        weights = torch.tensor(made.weights[1:])
        total, weighed = total + float(weights @ losses), weighed + float(weights.sum())
    batch = collate(pack(examples) if packing else unpacked(examples))
    del batch["tokens"]
    learns(model)
    assert model(**batch).item() == pytest.approx(total / weighed, rel=1e-4)


@pytest.mark.slow
def test_a_step_over_accumulated_batches_is_the_step_over_the_whole(tmp_path):
    """The divisor is what all of a step's batches weigh."""
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    rows = [tiny.row(n) for n in range(4)]
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        config = SftConfig(
            method="full", weights=BY, batch_size=batch_size, accumulation=accumulation, epochs=1, lr=1e-3
        )
        losses.append(sft.train(base, rows, tmp_path / str(batch_size), config)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert math.isfinite(losses[0])
    plain = sft.train(base, rows, tmp_path / "plain", config.model_copy(update={"weights": TokenWeights()}))["loss"]
    assert abs(plain - losses[0]) > 1e-3
