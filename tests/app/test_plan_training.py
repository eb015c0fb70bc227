"""`preceptor plan` on what trains."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from preceptor.stages.base import write_records
from preceptor.train.memory import GIB
from tests.model import tiny
from tests.train.test_memory import shape

CASES = "prepare: {source: textbook, style: short, train: 40, validation: 2, test: 2}\n"
KNOWN = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture
def plan(command):
    """Plans a recipe with such a training section on a card; what is shown, with each table's figures by part."""

    def run(section, *words, student=KNOWN, cases=CASES):
        Path("r.yaml").write_text(f"language: en\nstudent: {student}\n{cases}sft: {section}\n")
        code, out, err = command("plan", "r.yaml", *words)
        assert code == 0, err
        figures = re.findall(r"^ ?(\S.*?) {2,}(\d+\.\d\d) *$", out, re.MULTILINE)
        return " ".join(out.split()), {name: float(size) for name, size in figures}

    return run


@pytest.mark.slow
def test_what_a_model_is_and_takes(plan):
    out, figures = plan("{batch_size: 1, gradient_checkpointing: true}", "--card", "24")
    assert "qwen2, 28 layers of width 3584, vocabulary 152,064, 7,615,616,512 parameters" in out
    assert "no rows yet: 40 cases to be prepared" in out
    assert figures["weights"] == pytest.approx((7_615_616_512 * 2 + 161_480_704 * 4) / GIB, abs=0.01)
    assert figures["optimizer's state"] == pytest.approx(161_480_704 * 8 / GIB, abs=0.01)
    *parts, total = figures.values()
    assert sum(parts) == pytest.approx(total, abs=0.05)
    assert re.search(r"fits a card of 24 GiB: 4\.\d GiB of 24\.0 GiB are left", out)
    assert "2 checkpoints" not in out  # 40 rows are 120 steps, at the end of which is one
    assert re.search(r"disk: 2\.4 GiB, 1 checkpoints of 1\.8 GiB kept", out)


@pytest.mark.slow
def test_a_teacher_on_this_machine_takes_memory_too(command, plan):
    """Beside the student where it reads what that writes; else before."""
    gib = 7_615_616_512 * 2 / GIB
    recipe = f"language: en\nstudent: mini\n{CASES}distill: {{local_teacher: {KNOWN}, %s}}\n"
    Path("r.yaml").write_text(recipe % "on_policy: true, max_tokens: 100, max_length: 300")
    code, out, err = command("plan", "r.yaml", "--card", "16")
    assert code == 0, err
    told = " ".join(out.split())
    assert f"its teacher {KNOWN}, 7,615,616,512 parameters, takes {gib:.1f} GiB all the time beside the student" in told
    assert re.search(rf"the teacher's weights +{gib:.2f} ", told)
    assert re.search(r"does not fit a card of 16 GiB \(16\.0 GiB\)", told)
    assert "answers of at most 100 are written to them" in told
    Path("r.yaml").write_text(recipe % "max_length: 300")
    code, out, err = command("plan", "r.yaml", "--card", "12")
    told = " ".join(out.split())
    assert "while it reads the rows, before the student is there; it does not fit a card of 12 GiB" in told
    assert "the teacher's weights" not in told
    assert "distill: fits a card of 12 GiB" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "card", "told"),
    [
        (
            "{batch_size: 2, gradient_checkpointing: true}",
            "21",
            "does not fit a card of 21 GiB (21.0 GiB): set batch_size: 1, accumulation: 2; that fits",
        ),
        pytest.param("{batch_size: 1}", "24", "set gradient_checkpointing: true; that fits", marks=pytest.mark.slow),
        pytest.param(
            "{batch_size: 1, gradient_checkpointing: true}",
            "12",
            "set method: qlora; that fits",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{method: full, batch_size: 1, gradient_checkpointing: true}",
            "24",
            "set method: lora; that fits",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{batch_size: 1}", "4", "nothing here makes it fit; choose a smaller model", marks=pytest.mark.slow
        ),
    ],
)
def test_what_would_fit_is_said_and_true(plan, section, card, told):
    pytest.importorskip("bitsandbytes")
    out, _ = plan(section, "--card", card)
    assert told in out
    if "that fits" not in told:
        return
    change = re.search(r"set ((?:\w+: \w+(?:, )?)+)", told)[1]
    changes = [f"sft.{key}={value}" for key, value in re.findall(r"(\w+): (\w+)", change)]
    assert "sft: fits a card" in plan(section, *changes, "--card", card)[0]


@pytest.mark.slow
def test_rows_that_are_there_are_counted_and_their_step_is_timed(plan):
    tiny.save(AutoModelForCausalLM.from_config(shape("qwen3", 128, 3, 400)), Path("base"))
    write_records(Path("rows.jsonl"), [tiny.row(number) for number in range(30)])
    out, _ = plan(
        "{from: rows.jsonl, method: full, batch_size: 4, accumulation: 2, epochs: 2}", student="base", cases=""
    )
    assert re.search(r"30 rows, the longest of \d+ tokens, about \d+ on average", out)
    assert "fits this machine's memory" in out
    # 8 batches are 4 steps, twice.
    assert re.search(
        r"about 1 min for 8 steps, \S+ s a batch of 4 × \d+ tokens, [\d,]+ tokens/s \(from one and two", out
    )


@pytest.mark.slow
def test_a_model_that_another_section_trains_has_its_shape(plan):
    out, _ = plan("{}\nsft_more: {student: sft}", "--card", "80")
    assert f"sft_more: {KNOWN}: qwen2, 28 layers" in out


@pytest.mark.slow
def test_devices_each_take_all(plan):
    out, figures = plan("{batch_size: 1, devices: 2, gradient_checkpointing: true}", "--card", "24")
    assert "each of 2 devices takes all of it" in out
    assert figures["gradients on their way between devices"] == pytest.approx(161_480_704 * 4 / GIB, abs=0.01)


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ("someone/unknown-model", "someone/unknown-model: its shape is not known here; fetch the model, or name"),
        ("./nowhere/at/all", "./nowhere/at/all: no such folder"),
    ],
)
def test_a_model_that_is_not_known_is_said(plan, student, told):
    out, figures = plan("{}", "--card", "24", student=student)
    assert told in out
    assert figures == {}


def test_nothing_to_plan(command):
    Path("r.yaml").write_text(CASES)
    code, _, err = command("plan", "r.yaml")
    assert code == 2
    assert err == "preceptor: r.yaml: no section asks a teacher or trains; there is nothing to plan\n"
