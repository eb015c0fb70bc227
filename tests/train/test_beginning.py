"""What all rows of a batch begin with goes through the model once, and nothing else about training changes."""

import pytest
import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from preceptor.model.tokens import IGNORED, Example
from preceptor.train import beginning
from preceptor.train.batches import collate
from preceptor.train.batches import rows as unpacked
from preceptor.train.trainer import learns
from tests.model import tiny

SHAPE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def seeded(made):
    torch.manual_seed(0)
    return made().eval()


def mistral():
    """Its attention sees eight tokens back, fewer than rows have in common."""
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.15}
    return seeded(lambda: MistralForCausalLM(MistralConfig(**shape, sliding_window=8)))


def lfm2():
    """Convolutions beside attention."""
    kinds = ["conv", "full_attention"]
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
    return seeded(lambda: Lfm2ForCausalLM(Lfm2Config(**shape, layer_types=kinds)))


def dynamic():
    """Past 48 tokens a call is turned by other frequencies."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 48}
    shape = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 48}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)))


def mamba():
    return seeded(lambda: MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2)))


def batch(lengths=(9, 14, 5), common=21):
    """Rows of one prompt of `common` tokens; the second half of what follows is learned, unevenly weighed."""
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(400, (common,), generator=draw).tolist()
    made = []
    for number, length in enumerate(lengths):
        own = [number, *torch.randint(400, (length - 1,), generator=draw).tolist()]
        mute = common + length // 2
        labels = [IGNORED] * mute + own[length // 2 :]
        made.append(Example(prompt + own, labels, weights=[1.0 + at % 3 for at in range(common + length)]))
    given = collate(unpacked(made))
    del given["tokens"]
    return given


def learnt(model, given):
    """The loss, and its gradients by every weight."""
    loss = model(**given)
    return loss.detach(), torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])


def passed(model, monkeypatch):
    """Counts what goes through the model."""
    seen = []
    plain = model.base_model.forward

    def forward(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return plain(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", forward)
    return seen


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama, mistral])
def test_loss_and_gradients_are_those_of_rows_by_themselves(make, monkeypatch):
    apart, together = make(), make()
    assert beginning.works(together.base_model)
    learns(apart)
    learns(together, share=True)
    seen = passed(together, monkeypatch)
    given = batch()
    loss, gradients = learnt(apart, given)
    ours, found = learnt(together, given)
    assert seen == [(1, 21), (3, 14)]
    torch.testing.assert_close(ours, loss, atol=1e-6, rtol=1e-6)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_a_teachers_beliefs_stay_at_their_tokens(monkeypatch):
    """Of what follows the beginning, each label meets the beliefs about it."""
    given = batch()
    shape = given["labels"].shape
    ids = torch.arange(shape.numel() * 2).reshape(*shape, 2) % 400
    logprobs = torch.log_softmax(torch.arange(shape.numel() * 3).reshape(*shape, 3).sin(), -1)
    given["soft"] = (ids, logprobs[..., :2], logprobs[..., 2].exp())
    apart, together = tiny.qwen(), tiny.qwen()
    learns(apart)
    learns(together, share=True)
    seen = passed(together, monkeypatch)
    torch.testing.assert_close(learnt(together, given)[0], learnt(apart, given)[0], atol=1e-6, rtol=1e-6)
    assert len(seen) == 2


@pytest.mark.parametrize("make", [lfm2, mamba, dynamic])
def test_a_model_with_a_running_state_or_another_way_to_count_is_not_used_so(make):
    assert not beginning.works(make().base_model)


def test_a_model_is_left_as_it_was_when_tried():
    model = tiny.qwen().train()
    before = [weight.clone() for weight in model.parameters()]
    assert beginning.works(model.base_model)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("ids", "labels", "shared"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [[-100] * 4] * 2, 3),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [[-100, -100, -100, 4]] * 2, 2),  # the third token says the fourth
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [[-100] * 4, [-100, -100, 3, 5]], 1),
        ([[1, 2, 3, 4], [9, 2, 3, 4]], [[-100] * 4] * 2, 0),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [[-100] * 4] * 2, 3),  # something is left to each
        ([[1, 2, 3, 4]], [[-100] * 4], 0),  # one row has nothing in common with itself
        ([[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 2, [[-100, -100, *range(7)]] * 2, 0),  # 1 token of 18 is less than an eighth
    ],
)
def test_what_rows_have_in_common(ids, labels, shared):
    assert beginning.common(torch.tensor(ids), torch.tensor(labels)) == shared


@pytest.mark.parametrize(("length", "common", "shared"), [(1024, 300, 300), (4096, 1200, 0), (4096, 2200, 2200)])
def test_long_rows_must_have_more_in_common(length, common, shared):
    """The second pass attends under a mask, which is dear where rows are long."""
    ids = torch.zeros(16, length, dtype=torch.long)
    ids[:, common:] = torch.arange(16)[:, None] + 1
    assert beginning.common(ids, torch.full_like(ids, IGNORED)) == shared
