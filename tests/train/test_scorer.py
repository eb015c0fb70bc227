"""What a teacher on this machine believes, against a dense reference in double precision."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from preceptor.core.errors import UserError, WorkError
from preceptor.model import tokens
from preceptor.model.load import Loaded
from preceptor.train import align, scorer
from preceptor.train.scorer import believe, check_tokens
from preceptor.train.store import Header, Store, Writer
from tests.model import tiny

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
WORDS = tiny.tokenizer()


def gemma() -> Gemma2ForCausalLM:
    """Caps its logits, here where it is felt."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_logit_softcapping=1.0)).eval()


def experts() -> Qwen3MoeForCausalLM:
    """What leaves its layers holds more than states."""
    torch.manual_seed(0)
    sizes = SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()


def wide() -> torch.nn.Module:
    """A head padded past the vocabulary, to which it gives the most."""
    model = tiny.qwen(tied=False)
    model.resize_token_embeddings(416, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[400:] = 3 * model.lm_head.weight[:16]
    return model


def loaded(model) -> Loaded:
    return Loaded(model, WORDS, "teacher")


def texts(count: int = 9) -> dict[scorer.Key, tokens.Example]:
    return {(f"c{at}", 0): tokens.example(WORDS, tiny.row(at), 400) for at in range(count)}


def dense(model, example: tokens.Example, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of each token of an answer, (n, width of the head), from the model alone in double precision."""
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    if model.config.model_type == "qwen3_moe":  # the fast way knows no double precision
        exact.set_experts_implementation("eager")
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([example.ids])).logits[0] / temperature
    at = [place - 1 for place, label in enumerate(example.labels) if label != tokens.IGNORED]
    return logits.softmax(-1)[at].numpy()


def learnt(example: tokens.Example) -> list[int]:
    return [label for label in example.labels if label != tokens.IGNORED]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama, gemma, experts, wide])
def test_it_is_what_the_model_believes(make, temperature, monkeypatch):
    """Every id's probability, whatever the model does to its logits, and the mass of all others, in chunks."""
    monkeypatch.setattr(scorer, "_NUMBERS", 5 * 400)
    model, examples = make(), texts()
    for key, found in believe(loaded(model), examples, 5, temperature=temperature):
        p = dense(model, examples[key], temperature)
        assert found.written.tolist() == learnt(examples[key])
        assert found.ids.shape == found.logprobs.shape == (len(p), 5)
        assert found.ids.max() < 400
        own = np.take_along_axis(p, found.ids, 1)
        assert np.allclose(np.exp(found.logprobs), own, rtol=2e-5, atol=0)
        assert np.allclose(found.rest, 1 - own.sum(1), rtol=2e-5)
        for row, place, kept in zip(p[:, :400], found.place, own, strict=True):
            best = np.sort(row)[::-1][:5]
            assert np.allclose(kept[:4], best[:4], rtol=1e-4)
            assert place == 4 or np.isclose(kept[4], best[4], rtol=1e-4)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()  # it is itself again


def test_a_small_rest_is_exact():
    """Where nearly all mass is one token's, 1 less the others would be rounding alone."""
    logits = torch.tensor([[30.0, 8.0, 1.0, 0.0, -1.0]])
    exact = logits.double().softmax(-1)[0]
    ids, logprobs, rest, place = scorer._likeliest(logits, torch.tensor([4]), 2, 5)
    assert (ids.tolist(), place.tolist()) == ([[0, 4]], [1])
    assert rest.item() == pytest.approx(exact[1:4].sum().item(), rel=1e-5)
    assert logprobs[0, 1].item() == pytest.approx(exact[4].log().item())
    assert scorer._likeliest(logits, torch.tensor([0]), 5, 5)[2].item() == 0


@pytest.mark.parametrize("drawn", [False, True])
def test_neighbours_and_padding_change_nothing(drawn, monkeypatch):
    model, examples = tiny.qwen(), texts()
    together = dict(believe(loaded(model), examples, 6, drawn=drawn))
    monkeypatch.setattr(scorer, "CHUNK", 1)
    alone = dict(believe(loaded(model), examples, 6, drawn=drawn))
    assert len({len(example.ids) for example in examples.values()}) > 4
    assert together.keys() == alone.keys() == examples.keys()
    for key in examples:
        assert np.allclose(together[key].logprobs, alone[key].logprobs, atol=1e-5)
        assert np.allclose(together[key].rest, alone[key].rest, atol=1e-5)
        assert np.array_equal(together[key].ids, alone[key].ids)


def test_draws_are_in_the_mean_what_the_teacher_believes():
    """Over many seeds, so that the gradient that they give is in the mean that of all probabilities."""
    model = wide()
    examples = texts(1)
    p = dense(model, examples["c0", 0])[:, :400]
    p /= p.sum(1, keepdims=True)
    total, runs, draws = np.zeros_like(p), 400, 8
    for seed in range(runs):
        found = next(believe(loaded(model), examples, draws + 1, drawn=True, seed=seed))[1]
        shares = np.exp(found.logprobs)
        assert np.allclose(shares.sum(1), 1, atol=1e-5)
        assert not found.rest.any()
        np.add.at(total, (np.arange(len(p))[:, None], found.ids), shares)
    error = (total / runs - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / (runs * draws))
    assert np.abs(error[p > 1e-3]).max() < 5
    assert (error[p > 1e-3] ** 2).mean() == pytest.approx(1, abs=0.1)


def test_what_was_written_has_a_place_though_it_was_not_drawn(tmp_path):
    examples = texts()
    missed = 0
    with Writer(tmp_path, Header(k=3, tokenizer="t", teacher="t")) as writer:
        for key, found in believe(loaded(tiny.qwen()), examples, 3, drawn=True):
            assert found.written.tolist() == learnt(examples[key])
            own = np.take_along_axis(found.logprobs, found.place[:, None], 1)
            missed += int(np.isneginf(own).sum())
            assert np.isfinite(found.logprobs).any(1).all()
            assert (found.logprobs[:, 1:] <= found.logprobs[:, :-1]).all()
            writer.add(*key, found)
    assert missed
    store = Store(tmp_path)
    assert all(store[key].written.tolist() == learnt(examples[key]) for key in examples)


def test_what_goes_on_after_a_kill_is_what_would_have_been():
    """To the last bit, for the same texts go together; and draws are those of seed and key."""
    teacher, examples = loaded(tiny.qwen()), texts(20)
    whole = dict(believe(teacher, examples, 6, drawn=True, seed=3))
    order = list(whole)
    rest = dict(believe(teacher, examples, 6, drawn=True, seed=3, done=set(order[:7])))
    assert list(rest) == order[7:]
    for key, found in rest.items():
        assert all(np.array_equal(getattr(found, name), getattr(whole[key], name)) for name in vars(found))
    other = dict(believe(teacher, examples, 6, drawn=True, seed=4))
    assert not np.array_equal(other[order[0]].ids, whole[order[0]].ids)


def test_when_all_is_read_nothing_holds_its_weights():
    """Without the collector, which may come late: on a GPU the student needs their room."""
    teacher = loaded(tiny.qwen())
    weights = weakref.ref(teacher.model.base_model)
    gc.collect()
    gc.disable()
    try:
        assert dict(believe(teacher, texts(2), 5))
        assert teacher.model.base_model(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 32)
        del teacher
        assert weights() is None
    finally:
        gc.enable()


def test_a_text_past_the_context_is_told_and_stops_nothing():
    examples = texts(3)
    long = next(iter(examples.values()))
    examples["long", 1] = replace(long, ids=long.ids * 9, labels=long.labels * 9)
    found = dict(believe(loaded(tiny.qwen()), examples, 5))
    assert found.pop(("long", 1)) is None
    assert all(found.values())
    assert len(found) == 3


def test_where_memory_ends_fewer_go_together(monkeypatch):
    examples, real = texts(), scorer._read
    monkeypatch.setattr(
        scorer, "_read", lambda loaded, batch, *rest: real(loaded, batch, *rest) if len(batch) < 3 else _out()
    )
    assert dict(believe(loaded(tiny.qwen()), examples, 5)).keys() == examples.keys()
    monkeypatch.setattr(scorer, "_read", lambda *_: _out())
    with pytest.raises(WorkError, match=r"teacher: a text of \d+ tokens doesn't fit into memory even alone"):
        dict(believe(loaded(tiny.qwen()), examples, 5))


def _out():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_another_tokenizer_is_refused_with_the_way_out():
    check_tokens(loaded(tiny.qwen()), tiny.tokenizer(), "student")
    foreign = tiny.tokenizer()
    foreign.add_tokens(["发热"])
    with pytest.raises(UserError, match="teacher: its tokens are not those of student") as told:
        check_tokens(loaded(tiny.qwen()), foreign, "student")
    assert align.WAY_OUT in str(told.value)
