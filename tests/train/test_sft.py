"""Training: documents apart, answers alone, and the same weights after a kill."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Request, Sampling
from preceptor.model import load
from preceptor.model.generate import generate
from preceptor.train import beginning, sft, student, trainer
from preceptor.train.config import SftConfig
from preceptor.train.dropout import residual_dropout
from preceptor.train.fit import On
from preceptor.train.sft import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]
LORA = SftConfig(batch_size=4, epochs=2, lr=1e-3, dropout=0.1, rank=2, checkpoint_steps=1)
FULL = LORA.model_copy(update={"method": "full", "dropout": 0.0})


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What was learnt."""
    return load_file(next(out.glob("*/*.safetensors")))


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        FULL,
        FULL.model_copy(update={"packing": True, "accumulation": 2}),
        pytest.param(FULL.model_copy(update={"optimizer": "adamw_8bit"}), marks=pytest.mark.slow),
        pytest.param(LORA.model_copy(update={"method": "qlora"}), marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss_and_leaves_a_model(base, tmp_path, config):
    """An adapter or a model that the loader takes; the numbers that a run wants."""
    logged = []
    config = config.model_copy(update={"epochs": 10, "lr": 5e-3, "checkpoint_steps": 50})
    metrics = train(base, ROWS, tmp_path, config, on=On(lambda *args: args[2] and logged.append(args)))
    assert logged[-1][2]["loss"] < 0.7 * logged[0][2]["loss"]
    assert logged[0][2].keys() == {"loss", "lr", "tokens_per_second", "memory"}
    assert metrics["steps"] == logged[-1][1]
    assert (metrics["rows"], metrics["refused"], metrics["cut"]) == (12, 0, 0)
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert curve == [{"step": step, **values} for step, _, values in logged]
    folder = tmp_path / ("model" if config.method == "full" else "adapter")
    assert (folder / "chat_template.jinja").is_file()
    assert not [*tmp_path.glob("*.part"), *folder.glob("*.bin")]
    if config.method == "full":  # others who serve it must know where an answer ends
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    loaded = load.load(folder)
    (reply,) = generate(loaded, [Request(messages=ROWS[0].messages, sampling=Sampling(max_tokens=8))])
    assert reply.usage.completion_tokens


@pytest.mark.slow
def test_activations_computed_twice_change_nothing(base, tmp_path, monkeypatch):
    """The same losses, with or without: what was left out the first time is left out the second."""
    monkeypatch.setattr(beginning, "works", lambda _: False)  # dropout in common with other rows is another
    losses, dropping = [], FULL.model_copy(update={"dropout": 0.2})
    for name, config in (("once", dropping), ("twice", dropping.model_copy(update={"gradient_checkpointing": True}))):
        train(base, ROWS, tmp_path / name, config)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_base_in_four_bits_learns_an_adapter_for_the_whole_one(base, tmp_path):
    """Its linear layers are half-bytes; the adapter names the base as it is on disk, and goes on there."""
    config = LORA.model_copy(update={"method": "qlora"})
    under = student.build(base, base, load.load_tokenizer(base), config, torch.float32).get_base_model()
    layer = under.model.layers[0].mlp.up_proj.base_layer
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.uint8, 32 * 48 // 2)
    assert under.get_output_embeddings().weight.dtype == torch.float32
    train(base, ROWS, tmp_path, config)
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base.resolve())
    train(tmp_path / "adapter", ROWS, tmp_path / "more", LORA)


@pytest.mark.parametrize(
    ("update", "line"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit moves between a GPU's memory"),
        ({"report_to": ("swanlab",)}, "report_to: needs swanlab, which is not installed: pip install swanlab"),
        ({"devices": 2}, "devices: 2 were asked for, and 1 is here; start with: torchrun --nproc_per_node 2"),
    ],
)
def test_what_cannot_be_had_here_is_said_first(base, tmp_path, update, line):
    with pytest.raises(UserError, match=line):
        train(base, ROWS, tmp_path, LORA.model_copy(update=update))


@pytest.mark.slow
def test_a_tracker_that_is_asked_for_is_told_numbers_and_no_text(base, tmp_path):
    train(base, ROWS, tmp_path, LORA.model_copy(update={"report_to": ("tensorboard",)}))
    (events,) = (tmp_path / "tensorboard").glob("events.out.*")
    told = events.read_bytes()
    assert b"train/loss" in told
    assert not any(text.encode() in told for row in ROWS for text in ("咳嗽", "a fever", row.answer))
    train(base, ROWS, tmp_path / "untold", LORA)
    assert not [*(tmp_path / "untold").rglob("events*")]


def test_methods_have_their_own_defaults():
    """As the founding documents train."""
    lora, full = SftConfig(), SftConfig(method="full")
    assert (lora.rank, lora.alpha, lora.dropout, lora.lr, lora.epochs, lora.accumulation) == (64, 128, 0.1, 2e-4, 3, 1)
    assert (full.lr, full.epochs, full.accumulation, full.dropout) == (5e-6, 1, 8, 0)
    assert SftConfig(method="full", lr=1e-3).lr == 1e-3


def test_embeddings_learn_at_a_rate_of_their_own(base, tmp_path):
    """At next to none they stay, and all else moves; at their default they move too."""
    train(base, ROWS, tmp_path / "own", FULL.model_copy(update={"embedding_lr": 1e-12}))
    train(base, ROWS, tmp_path / "default", FULL)
    before, own, default = (
        load_file(base / "model.safetensors"),
        weights(tmp_path / "own"),
        weights(tmp_path / "default"),
    )
    name = "model.embed_tokens.weight"
    assert torch.allclose(own[name], before[name], atol=1e-9)
    assert not torch.allclose(default[name], before[name], atol=1e-4)
    moved = [key for key in before if not torch.allclose(own[key], before[key], atol=1e-5)]
    assert len(moved) > len(before) / 2
    with pytest.raises(ValueError, match="embedding_lr: an adapter leaves the embeddings as they are"):
        SftConfig(method="lora", embedding_lr=1e-3)


def test_adapter_names_its_base_as_it_was_called(base, tmp_path, monkeypatch):
    """A name stays a name, so the folder can move; a folder becomes absolute."""
    real = sft.resolve
    monkeypatch.setattr(sft, "resolve", lambda name: base if name == "mini" else real(name))
    train("mini", ROWS, tmp_path / "a", LORA.model_copy(update={"epochs": 0.1}))
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mini"


@pytest.mark.slow
def test_an_adapter_goes_on_learning(base, tmp_path):
    """A second round starts from the first one's adapter, over the same base."""
    train(base, ROWS, tmp_path / "one", LORA)
    said = []
    more = LORA.model_copy(update={"lr": 1e-9, "rank": 8})
    metrics = train(tmp_path / "one" / "adapter", ROWS, tmp_path / "two", more, on=On(note=said.append))
    assert (metrics["rank"], metrics["alpha"], metrics["dropout"]) == (2, 128, 0.1)
    assert said == ["the adapter that goes on learning keeps its own rank 2, alpha 128, dropout 0.1"]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert load.load(tmp_path / "two" / "adapter").folder == tmp_path / "two" / "adapter"


@pytest.mark.slow
def test_all_weights_learn_from_an_adapter(base, tmp_path):
    """It is merged first."""
    train(base, ROWS, tmp_path / "one", LORA)
    train(tmp_path / "one" / "adapter", ROWS, tmp_path / "two", FULL)
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "two")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], value) for key, value in after.items() if "proj" in key)


def test_rows_that_do_not_fit_are_named(base, tmp_path):
    """A row too long stops nothing and is counted; nothing but such rows is a wrong request."""
    refused = []
    rows = [*ROWS[:4], tiny.row(1, answer="咳嗽" * 300), tiny.row(2, record="发热，" * 300)]
    config = LORA.model_copy(update={"epochs": 1, "max_length": 250})
    metrics = train(base, rows, tmp_path, config, on=On(refused=lambda row, why: refused.append((row.id, why))))
    assert (metrics["rows"], metrics["refused"], metrics["cut"]) == (5, 1, 1)
    assert refused[0][0] == "r1"
    with pytest.raises(UserError, match="none of 6 rows fits 20 tokens"):
        train(base, rows, tmp_path, LORA.model_copy(update={"max_length": 20}))


def test_a_loss_that_is_no_number_stops_the_work(tmp_path):
    """One line, and no checkpoint of broken weights."""
    broken = tiny.qwen()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    folder = tiny.save(broken, tmp_path / "base")
    with pytest.raises(WorkError, match=r"the loss is nan and .* at step 1: lower the learning rate") as caught:
        train(folder, ROWS, tmp_path / "out", FULL)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_of_all_weights_dropout_is_of_what_the_layers_add(base, tmp_path):
    model = tiny.qwen().eval()
    half = model.model.layers[1].mlp.down_proj
    given = torch.randn(500, half.in_features)
    whole = half(given).detach()
    residual_dropout(model, 0.3)
    assert torch.equal(half(given), whole)
    model.train()
    found = half(given)
    kept = found != 0
    assert torch.allclose(found, whole * kept / 0.7)
    assert 0.27 < 1 - kept.float().mean() < 0.33
    dropping = FULL.model_copy(update={"dropout": 0.5})
    lost = [train(base, ROWS, tmp_path / str(n), one)["loss"] for n, one in enumerate((FULL, FULL, dropping))]
    assert lost[0] == lost[1] != lost[2]
    with pytest.raises(UserError, match="dropout: the layers of a gpt2 are built otherwise; leave it out"):
        residual_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=24)), 0.1)


def test_models_that_change_their_logits_are_refused():
    """Our loss reads the head's weight alone."""
    model = tiny.qwen()
    trainer._check_head(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: torch.tanh(plain(states) / 30) * 30
    with pytest.raises(UserError, match="changes its logits"):
        trainer._check_head(model)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt2"])
def test_a_model_that_tells_more_than_states_learns(kind):
    """Experts tell of their routers, others of images; the head is asked without."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {
        "vocab_size": 400,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **experts)).eval()
    trainer.learns(model)
    ids = torch.arange(24).reshape(2, 12)
    logits = model(ids).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids=ids, labels=ids), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_model_in_which_packed_rows_meet_is_not_packed(tmp_path):
    """Its convolutions look back over the border; unpacked it learns."""
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    base = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "base")
    with pytest.raises(UserError, match="packing: in a lfm2 packed rows would see one another; leave packing out"):
        train(base, ROWS, tmp_path, FULL.model_copy(update={"packing": True}))
    train(base, ROWS, tmp_path, FULL.model_copy(update={"epochs": 1}))


def test_end_is_learnt(base, tmp_path):
    """A model that has learnt its rows ends them: finish is stop, and the text the answer itself."""
    row = tiny.row(1)
    train(
        base,
        [row] * 8,
        tmp_path,
        FULL.model_copy(update={"epochs": 40, "lr": 1e-2, "checkpoint_steps": 1000}),
    )
    (reply,) = generate(load.load(tmp_path / "model"), [Request(messages=row.messages)])
    assert (reply.text, reply.finish) == (row.answer, "stop")
