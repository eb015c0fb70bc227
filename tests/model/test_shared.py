"""One copy of what prompts begin with: as if each row had its own, wherever a model's attention can be had so."""

from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from preceptor.model import cache, shared
from preceptor.model.generate import Engine, generate
from preceptor.model.load import Loaded
from tests.model import tiny
from tests.model.test_generate import SHOTS, Asked, few_shot, greedy, wide

OTHERS = SHOTS.replace("influenza", "gastritis").replace("Case", "Record")
SHAPE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0}


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.15}
    return Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=1024, bos_token_id=None)).eval()


MODELS = {"qwen2": qwen2, "qwen3": lambda: wide(tiny.qwen()), "llama": lambda: wide(tiny.llama())}


@pytest.fixture(params=list(MODELS))
def loaded(request, tmp_path):
    torch.set_num_threads(1)
    return Loaded(MODELS[request.param](), tiny.tokenizer(), tmp_path)


@pytest.fixture
def done(monkeypatch) -> Counter:
    """Counts the passes after a shared prefix and all others, how often one was copied or cut off, and errors.

    Rows whose batch breaks begin again, which would hide them.
    """
    counted: Counter = Counter()

    def passed(model, beginning, forward=shared.forward, **given):
        past, rows = given.get("past_key_values"), len(given["input_ids"])
        counted["own" if beginning is None else "shared"] += 1
        logits = forward(model, beginning, **given)
        if beginning and past is not None:  # not so where a model is tried
            assert {tensor.shape[0] for pair in beginning for tensor in pair} == {1}
            for layer in past.layers:
                assert layer.keys.shape[0] == layer.values.shape[0] == rows
                assert layer.keys.shape[2] < beginning[0][0].shape[2], "no copy of the prefix in any row"
                assert layer._buffers[0].shape[2] <= layer.keys.shape[2] + cache._BLOCK
        return logits

    def ran(*args, run=Engine._run, **given):
        rows, error = run(*args, **given)
        counted["broken"] += error is not None
        return rows, error

    monkeypatch.setattr(shared, "forward", passed)
    monkeypatch.setattr(Engine, "_run", ran)
    for name in ("cut", "spelt"):
        usual = getattr(cache, name)
        monkeypatch.setattr(cache, name, lambda *args, name=name, usual=usual: counted.update([name]) or usual(*args))
    return counted


@torch.inference_mode()
def test_logits_are_those_of_plain_attention(loaded):
    """Rows of different lengths after one beginning: in chunks, then token by token."""
    torch.manual_seed(1)
    model, begun, steps = loaded.model, torch.randint(3, 400, (70,)), torch.randint(3, 400, (3, 4))
    rows = [torch.randint(3, 400, (length,)) for length in (5, 31, 17)]
    beginning = [(layer.keys, layer.values) for layer in model(begun[None], use_cache=True).past_key_values.layers]
    width = max(map(len, rows))
    pads = torch.tensor([width - len(row) for row in rows])[:, None]
    ids = torch.cat([torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows]), steps], 1)
    columns = torch.arange(ids.shape[1])
    past, said = DynamicCache(config=model.config), []
    for start, end in ((0, 10), (10, width), *((at, at + 1) for at in range(width, ids.shape[1]))):
        said.append(
            shared.forward(
                model,
                beginning,
                input_ids=ids[:, start:end],
                attention_mask=(columns[:end] >= pads).long(),
                position_ids=len(begun) + (columns[start:end] - pads).clamp(min=0),
                past_key_values=past,
            )
        )
    for row, step, pad, logits in zip(rows, steps, pads[:, 0].tolist(), torch.cat(said, 1), strict=True):
        expected = model(torch.cat([begun, row, step])[None]).logits[0, len(begun) :]
        torch.testing.assert_close(logits[pad:], expected, atol=1e-5, rtol=1e-5)
    unpadded = shared.forward(
        model, beginning, input_ids=ids[:, width - 5 : width], position_ids=len(begun) + torch.arange(5)[None]
    )
    expected = model(torch.cat([begun, rows[0]])[None]).logits[0, len(begun) :]
    torch.testing.assert_close(unpadded[0], expected, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_rows_that_share_say_the_same(loaded, done):
    """All at once, of different lengths; what lies in memory of the beginning lies there once."""
    requests = [few_shot(n) for n in range(12)]
    expected = [greedy(loaded, request) for request in requests]
    engine = Engine(loaded)
    engine.serve(feed := Asked(requests[:2]))
    assert not done["shared"], "two rows aren't worth it"
    engine.serve(feed := Asked(requests))
    assert [feed.outcomes[n].text for n in range(12)] == expected
    done.clear()
    assert [reply.text for reply in generate(loaded, requests)] == expected
    assert done["shared"] >= 16
    assert done["own"] == 1, "the beginning itself"
    assert not done["cut"] + done["spelt"] + done["broken"]


@pytest.mark.slow
def test_others_join_and_leave(loaded, done):
    """A few at a time, with this beginning, that one and none: it is copied where it must be, and taken out again."""
    kinds = [SHOTS] * 10 + [""] * 3 + [SHOTS] * 9 + [OTHERS] * 9 + [SHOTS, OTHERS, ""] * 2
    requests = [few_shot(n, kind) for n, kind in enumerate(kinds)]
    expected = [greedy(loaded, request) for request in requests]
    for size in (6, 16):
        engine = Engine(loaded, size)
        for _ in range(2):
            engine.serve(feed := Asked(requests))
            assert [feed.outcomes[n].text for n in range(len(kinds))] == expected
    assert min(done[name] for name in ("shared", "own", "cut", "spelt")) > 1
    assert not done["broken"]


class OneByOne(Asked):
    """Nine requests, of which five come at once, and the others alone."""

    def take(self, most):
        count = 5 if len(self.waiting) == 9 else 1
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


def test_a_beginning_that_was_forgotten_serves_on(loaded, done, monkeypatch):
    """A batch keeps its own, though the engine has room for none."""
    monkeypatch.setattr(cache.Prefixes, "trim", lambda self: self._kept.clear())
    requests = [few_shot(n) for n in range(9)]
    engine, feed = Engine(loaded, 16), OneByOne(requests)
    engine.serve(feed)
    assert [feed.outcomes[n].text for n in range(9)] == [greedy(loaded, request) for request in requests]
    assert done["shared"]
    assert done["own"] == 1
    assert not done["broken"]


def test_half_precision_stays_near():
    """A model's own words in bfloat16 are hardly less likely than with a copy for each row."""
    model = qwen2().bfloat16()
    assert shared.served(model)
    ids = torch.arange(3, 300)[None]
    with torch.inference_mode():
        whole = model(ids).logits[0, -40:].float()
        kept = model(ids[:, :-40], use_cache=True).past_key_values
        layers = [(layer.keys, layer.values) for layer in kept.layers]
        positions = torch.arange(257, 297)[None]
        ours = shared.forward(model, layers, input_ids=ids[:, -40:], position_ids=positions)[0].float()
        exact = qwen2()(ids).logits[0, -40:]
    assert (ours - exact).norm() < 1.2 * (whole - exact).norm()


def falcon() -> PreTrainedModel:
    """Its attention is of its own making, and takes any keyword without a look."""
    shape = {**SHAPE, "max_position_embeddings": 1024, "bos_token_id": None, "initializer_range": 0.15}
    return AutoModelForCausalLM.from_config(FalconConfig(**shape)).eval()


def eager() -> PreTrainedModel:
    model = wide(tiny.qwen())
    model.set_attn_implementation("eager")
    return model


def stubborn() -> PreTrainedModel:
    """Its layers refuse a keyword that they don't know."""
    model = wide(tiny.qwen())
    for layer in model.model.layers:
        usual = layer.self_attn.forward

        def forward(hidden_states, position_embeddings, attention_mask, past_key_values, usual=usual, **given):
            if "beginning" in given:
                raise TypeError("unexpected keyword")
            return usual(hidden_states, position_embeddings, attention_mask, past_key_values)

        layer.self_attn.forward = forward
    return model


@pytest.mark.parametrize("make", [falcon, eager, stubborn])
def test_other_models_go_on_as_before(make, tmp_path, done):
    """Whether they overlook the keyword, refuse it or attend in another way."""
    torch.manual_seed(0)
    loaded = Loaded(make(), tiny.tokenizer(), tmp_path)
    usual = loaded.model.config._attn_implementation
    requests = [few_shot(n) for n in range(8)]
    engine = Engine(loaded)
    engine.serve(feed := Asked(requests))
    assert not engine._shares
    assert engine._shares is not None
    assert done["shared"] <= 1, "the try"
    assert [feed.outcomes[n].text for n in range(8)] == [greedy(loaded, request) for request in requests]
    assert loaded.model.config._attn_implementation == usual


def test_models_of_many_makes_are_served():
    """Learnt positions and other projections make no difference."""
    for model in (AutoModelForCausalLM.from_config(GPT2Config(**SHAPE)).eval(), tiny.qwen(), qwen2()):
        assert shared.served(model)


def test_memory_that_runs_out_over_a_shared_prefix_halves_the_batch(loaded, done):
    """Rows begin again, and so does what they share."""

    def full(_, args, kwargs):
        if len(kwargs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    requests = [few_shot(n) for n in range(10)]
    expected = [greedy(loaded, request) for request in requests]
    loaded.model.register_forward_pre_hook(full, with_kwargs=True)
    assert [reply.text for reply in generate(loaded, requests)] == expected
    assert done["shared"] > 2
    assert done["broken"]
