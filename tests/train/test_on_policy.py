"""A student learns from a teacher's view of what it writes itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from preceptor.core.errors import UserError
from preceptor.core.records import Request, Sampling
from preceptor.model import load, tokens
from preceptor.model.generate import generate
from preceptor.train import align, on_policy
from preceptor.train.config import OnPolicyConfig
from preceptor.train.fit import On
from preceptor.train.on_policy import train
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(12)]
CONFIG = OnPolicyConfig(
    method="full", lr=4e-3, epochs=8, batch_size=6, accumulation=1, max_tokens=12, checkpoint_steps=50
)
LORA = CONFIG.model_copy(update={"method": "lora", "lr": 1e-2, "rank": 8})
SHORT = CONFIG.model_copy(update={"epochs": 2, "batch_size": 2, "accumulation": 2, "checkpoint_steps": 1})


@pytest.fixture(scope="module")
def teacher(base):
    return load.load(base)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The teacher's weights with noise."""
    model = tiny.qwen()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return tiny.save(model, tmp_path_factory.mktemp("student"))


def apart(folder, teacher) -> float:
    """KL(student || teacher) a token of what the student writes to prompts that it was not trained on."""
    loaded, total, count = load.load(folder), 0.0, 0
    for number in range(20, 30):
        prompt = tokens.prompt_ids(loaded.tokenizer, tiny.row(number).messages)
        torch.manual_seed(number)
        ids = loaded.model.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=12, pad_token_id=0)
        with torch.no_grad():
            q, p = (of.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for of in (loaded, teacher))
        total, count = total + (q.exp() * (q - p)).sum().item(), count + len(q)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "share"),
    [
        (CONFIG, 0.5),
        pytest.param(LORA, 0.75, marks=pytest.mark.slow),
        pytest.param(CONFIG.model_copy(update={"beta": 0.5}), 0.6, marks=pytest.mark.slow),
    ],
)
def test_it_draws_nearer_to_the_teacher_and_leaves_a_model(student, teacher, tmp_path, capfd, config, share):
    before = apart(student, teacher)
    logged = []
    metrics = train(student, teacher, ROWS, tmp_path, config, on=On(lambda *args: args[2] and logged.append(args)))
    folder = tmp_path / ("model" if config.method == "full" else "adapter")
    assert apart(folder, teacher) < share * before
    assert (metrics["rows"], metrics["refused"], metrics["steps"], metrics["planned_steps"]) == (12, 0, 16, 16)
    assert metrics["tokens"] > 16 * 6 * 90
    assert logged[0][2].keys() == {"loss", "lr", "tokens_per_second", "memory"}
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert curve == [{"step": step, **values} for step, _, values in logged]
    assert not (tmp_path / "checkpoints" / "README.md").exists()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json*"))
    assert b"fever for" not in written  # no record
    told = "".join(capfd.readouterr())
    assert not any(word in told for word in ("record", "fever", "咳嗽", "loss"))
    (reply,) = generate(load.load(folder), [Request(messages=ROWS[0].messages, sampling=Sampling(max_tokens=4))])
    assert reply.usage.completion_tokens


class _KillError(Exception):
    """Stands for a kill that leaves checkpoints behind."""


@pytest.mark.slow
def test_resumed_is_exactly_unbroken(student, teacher, tmp_path):
    """Amid the second pass, with two batches a step: the same answers are drawn, to the last bit of the weights."""

    def stop(step, total, values):
        if step == 5:
            raise _KillError

    train(student, teacher, ROWS, tmp_path / "unbroken", SHORT)
    with pytest.raises(_KillError):
        train(student, teacher, ROWS, tmp_path / "broken", SHORT, on=On(stop))
    steps = []
    train(student, teacher, ROWS, tmp_path / "broken", SHORT, on=On(lambda step, *_: steps.append(step)))
    assert (steps[0], steps[-1]) == (5, 6)
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("unbroken", "broken"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    curves = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("unbroken", "broken")]
    losses = [[json.loads(line)["loss"] for line in curve] for curve in curves]
    assert losses[0] == losses[1]


def test_the_best_graded_checkpoint_is_written(student, teacher, tmp_path):
    grades = iter([0.2, 0.9, 0.4, 0.3, 0.1, 0.0])
    metrics = train(
        student, teacher, ROWS, tmp_path, SHORT, (ROWS[:1], lambda row, reply: next(grades)), On(lambda *_: None)
    )
    assert (metrics["chosen_step"], metrics["chosen_grade"], metrics["last_grade"]) == (2, 0.9, 0.0)


def test_prompts_are_those_that_the_student_is_asked_with(student, teacher, tmp_path, monkeypatch):
    """Cut inside the record where they are too long; each pass has all of them."""
    seen = []
    real = on_policy.OnPolicyTrainer._tokenize_prompts
    monkeypatch.setattr(
        on_policy.OnPolicyTrainer,
        "_tokenize_prompts",
        lambda self, prompts: (seen.extend(prompts), real(self, prompts))[1],
    )
    long = tiny.row(99, record="The patient has a fever. " * 200)
    hopeless = tiny.row(98).model_copy(
        update={"messages": (tiny.messages("")[1].model_copy(update={"content": "x" * 999}),)}
    )
    refused = []
    config = SHORT.model_copy(update={"max_length": 150, "checkpoint_steps": 50})
    metrics = train(
        student,
        teacher,
        [*ROWS[:3], long, hopeless],
        tmp_path,
        config,
        on=On(refused=lambda row, why: refused.append(row.id)),
    )
    assert (refused, metrics["refused"]) == (["r98"], 1)
    wanted = [tokens.prompt_ids(teacher.tokenizer, row.messages, 150 - 12) for row in (*ROWS[:3], long)]
    assert sorted(seen) == sorted(2 * wanted)


def test_a_head_that_is_padded_further_is_cut(student, tmp_path):
    wide = tiny.qwen()
    wide.resize_token_embeddings(416, mean_resizing=False)
    folder = tiny.save(wide, tmp_path / "wide")
    train(student, load.load(folder), ROWS, tmp_path / "out", SHORT.model_copy(update={"epochs": 0.3}))
    with pytest.raises(UserError, match="a head of 400 tokens, where the student's has 416"):
        train(folder, load.load(student), ROWS, tmp_path / "no", SHORT)


def test_another_tokenizer_is_refused_with_the_way_out(student, tmp_path):
    foreign = tiny.tokenizer()
    foreign.add_tokens(["发热"])
    other = load.load(tiny.save(tiny.qwen(), tmp_path / "other", foreign))
    with pytest.raises(UserError, match="its tokens are not those of") as told:
        train(student, other, ROWS, tmp_path / "out", SHORT)
    assert align.WAY_OUT in str(told.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"packing": True}, "packing: doesn't go with answers that are written while training"),
        ({"weights": {"diseases": 2}}, "weights: doesn't go with"),
        ({"max_tokens": 2048}, "max_tokens: 2048 leave a prompt no room in max_length 2048"),
    ],
)
def test_what_does_not_go_with_it_is_refused(values, line):
    with pytest.raises(ValueError, match=line):
        OnPolicyConfig(**values)
