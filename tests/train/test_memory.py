"""The estimate against what training really takes, as the allocator counts it, on models of both architectures."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import preceptor
from preceptor.core.errors import UserError
from preceptor.model import load, tokens
from preceptor.train import batches, beginning, fit, memory, sft
from preceptor.train.blank import furnish, parameters, student
from preceptor.train.config import SftConfig
from preceptor.train.memory import Batch, estimate
from tests.model import tiny

SHAPES = json.loads((Path(preceptor.__file__).parent / "train" / "shapes.json").read_text())
SEVEN, TWO, OURS = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-1.7B", "smollm2"


def shape(kind, hidden, layers, vocabulary):
    heads = {"head_dim": 64} if kind == "qwen3" else {}
    return AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=kind == "qwen3",
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        **heads,
    )


def full_size(name):
    return AutoConfig.for_model(**SHAPES[name])


def peak(work):
    """Bytes that torch's allocator gave out at most while `work` ran."""
    gc.collect()  # what earlier tests left would count as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


def example_rows():
    answer = '{"diseases": ["肺炎"], "reason": ["发热", "咳嗽", "胸痛"]}'
    row = tiny.row(record="主诉：发热咳嗽。" * 12, answer=answer)
    return [row.model_copy(update={"id": f"r{number}"}) for number in range(16)]


def batch_of(rows, folder, how):
    example = tokens.example(load.load_tokenizer(folder), rows[0], how.max_length)
    answers = sum(label != tokens.IGNORED for label in example.labels)
    if not how.packing:
        return Batch(how.batch_size, len(example.ids), answers * how.batch_size)
    packed = batches.pack([example] * len(rows))
    size = batches.Batches(packed, how.batch_size, 0).batch_size
    documents = max(len(row.lengths) for row in packed)
    return Batch(size, max(len(row.ids) for row in packed), answers * size * documents, packed=True)


QUICK = [
    (("qwen3", 256, 4, 20_000), {"method": "full", "accumulation": 2, "dropout": 0.1}, "float32"),
    (("qwen2", 256, 4, 20_000), {"method": "full", "accumulation": 1, "gradient_checkpointing": True}, "bfloat16"),
    (("qwen2", 512, 6, 8_000), {}, "bfloat16"),
    (("qwen2", 512, 4, 8_000), {"method": "qlora", "gradient_checkpointing": True, "accumulation": 2}, "bfloat16"),
]
SLOW = [
    (("qwen3", 384, 4, 60_000), {"method": "full", "optimizer": "adamw_8bit"}, "bfloat16"),
    (("qwen3", 256, 4, 150_000), {"method": "full", "accumulation": 2}, "bfloat16"),
    (("qwen2", 512, 8, 20_000), {"gradient_checkpointing": True}, "float32"),
    (("qwen3", 512, 8, 20_000), {"packing": True, "accumulation": 2}, "float32"),
    (("qwen2", 512, 6, 20_000), {"method": "qlora", "optimizer": "adamw_8bit"}, "bfloat16"),
    (("qwen3", 512, 8, 20_000), {"method": "qlora", "packing": True}, "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "over", "dtype"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_training_takes_what_was_estimated(sizes, over, dtype, tmp_path, monkeypatch):
    if "qlora" in over.values() or "adamw_8bit" in over.values():
        pytest.importorskip("bitsandbytes")
    compute = getattr(torch, dtype)
    # Which precision is the faster one differs by machine.
    monkeypatch.setattr(load, "torch_dtype", lambda _, name="auto": torch.float32 if name == "float32" else compute)
    config = shape(*sizes)
    folder = tiny.save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path / "base")
    how = SftConfig.model_validate({"rank": 16, "batch_size": 4, "epochs": 1, "max_length": 512, **over})
    rows, taken = example_rows(), []
    learn = fit._learn

    def measured(trainer, *args):
        held = sum(tensor.untyped_storage().nbytes() for tensor in memory._own(trainer.model))
        taken.append(held + peak(lambda: learn(trainer, *args)))

    monkeypatch.setattr(fit, "_learn", measured)
    monkeypatch.setattr(beginning, "works", lambda _: False)  # what is estimated is rows that begin differently
    sft.train(str(folder), rows, tmp_path / "out", how)
    found = estimate(config, how, batch_of(rows, folder, how), compute, gpu=False)
    assert found.total == pytest.approx(taken[0], rel=0.15)


@pytest.mark.slow
def test_layers_that_are_added_are_those_that_would_be_gone_through(monkeypatch):
    config, batch = shape("qwen3", 256, 6, 8_000), Batch(2, 128, 30)
    for how in (SftConfig(rank=8), SftConfig(method="full"), SftConfig(rank=8, gradient_checkpointing=True)):
        added = estimate(config, how, batch, torch.bfloat16, gpu=False)
        monkeypatch.setattr(memory, "_FEW", (2, 6))
        whole = estimate(config, how, batch, torch.bfloat16, gpu=False)
        monkeypatch.undo()
        assert added.total == pytest.approx(whole.total, rel=1e-3)
        assert (added.trained, added.state) == (whole.trained, whole.state)


@pytest.mark.slow
def test_gradients_lie_beside_the_next_batch_of_a_step():
    config, batch = shape("qwen2", 256, 4, 8_000), Batch(4, 256, 64)
    one, two = (
        estimate(config, SftConfig(method="full", accumulation=n), batch, torch.float32, gpu=False) for n in (1, 2)
    )
    assert two.parts["weights"] - two.parameters * 4 < 2000  # tables of the rotary positions
    assert two.parts["gradients"] == two.parameters * 4
    assert two.parts["optimizer"] == two.parameters * 8
    assert one.parts["gradients"] - 8_000 * 256 * 4 < one.parameters  # the head's is the first to be there
    assert two.total > one.total + two.parameters * 3


@pytest.mark.parametrize(("name", "expected"), [(SEVEN, 7_615_616_512), (TWO, 1_720_574_976), (OURS, 134_515_008)])
def test_known_shapes_have_their_parameters(name, expected):
    assert parameters(full_size(name)) == expected


@pytest.mark.slow
def test_four_bits_with_their_scales_are_4_127():
    pytest.importorskip("bitsandbytes")
    config = full_size(SEVEN)
    how, batch = SftConfig(method="qlora"), Batch(1, 64, 8)
    found = estimate(config, how, batch, torch.bfloat16, gpu=True)
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    adapters = found.trained * 4
    others = (found.parameters - linear) * 2  # embeddings, head, norms, biases
    bits = (found.parts["weights"] - adapters - others) * 8 / linear
    assert bits == pytest.approx(4.127, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "state"),
    [
        ({"method": "full"}, 8.0),
        ({"method": "full", "optimizer": "adamw_8bit"}, None),
        ({"method": "lora", "optimizer": "adamw_8bit"}, 2 + 8 / 256),
    ],
)
def test_optimizer_state(over, state):
    config = full_size(SEVEN)
    found = estimate(config, SftConfig(**over), Batch(1, 16, 4), torch.bfloat16, gpu=True)
    assert found.parts["optimizer"] == found.state
    if state is None:  # the embeddings and what is small keep 32 bits
        assert found.state > found.trained * (2 + 8 / 256) + 152_064 * 3584 * 5.9
    else:
        assert found.state == pytest.approx(found.trained * state, rel=1e-3)


@pytest.mark.slow
def test_what_leaves_the_gpu_is_not_in_the_sum():
    config, batch = shape("qwen3", 256, 4, 8_000), Batch(2, 64, 10)
    how = SftConfig(method="full", optimizer="paged_adamw_8bit")
    on_gpu = estimate(config, how, batch, torch.bfloat16, gpu=True)
    assert (on_gpu.parts["optimizer"], on_gpu.paged) == (0, on_gpu.state)


@pytest.mark.slow
def test_devices_cost_each_the_buckets_of_its_gradients():
    config, batch = shape("qwen3", 256, 4, 8_000), Batch(2, 64, 10)
    one = estimate(config, SftConfig(rank=8), batch, torch.bfloat16, gpu=False)
    two = estimate(config, SftConfig(rank=8, devices=2), batch, torch.bfloat16, gpu=False)
    assert two.total - one.total == two.parts["buckets"] == one.trained * 4


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UserError, match="vit: no such model can be built"):
        parameters(AutoConfig.for_model("vit"))


RSS = """
import re, torch
from pathlib import Path
from transformers import AutoConfig
from preceptor.train.blank import furnish, student
from preceptor.train.config import SftConfig
from preceptor.train.memory import Batch, estimate, step
from tests.train.test_memory import shape
torch.set_num_threads(1)
config, how, batch = shape("qwen2", 512, 8, 60_000), SftConfig(method="full", accumulation=1), Batch(8, 512, 400)
found = estimate(config, how, batch, torch.float32, gpu=False)
def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = resident("VmRSS")
model = student(config, how, torch.float32)
furnish(model, torch.device("cpu"))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2):
    step(model, batch, torch.float32)
    optimizer.step()
    optimizer.zero_grad()
print(found.total, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_what_was_estimated():
    asked = subprocess.run([sys.executable, "-c", RSS], capture_output=True, text=True, check=True, timeout=600)
    estimated, grown = map(int, asked.stdout.split())
    assert estimated == pytest.approx(grown, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "over",
    [
        {"method": "full"},
        {"method": "full", "gradient_checkpointing": True, "accumulation": 1},
        {},
        {"gradient_checkpointing": True, "accumulation": 2},
    ],
)
def test_a_gpu_takes_what_was_estimated(over):
    config, how, batch = shape("qwen3", 1024, 8, 60_000), SftConfig(**over), Batch(4, 1024, 800)
    found = estimate(config, how, batch, torch.bfloat16, gpu=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = student(config, how, torch.bfloat16)
    furnish(model, torch.device("cuda"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        for _ in range(min(how.accumulation, 2)):
            memory.step(model, batch, torch.bfloat16)
        optimizer.step()
        optimizer.zero_grad()
    assert found.total - found.parts["rest"] == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
