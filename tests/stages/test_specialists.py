"""Two specialists: rows of each part, two models that answer in turn, and advice whose thinking comes through."""

import asyncio
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from preceptor import api
from preceptor.app import cli
from preceptor.core.records import (
    Case,
    Consultation,
    Diagnosis,
    Message,
    Pair,
    Prediction,
    Reply,
    Request,
    Row,
    Sampling,
)
from preceptor.llm.ledger import Ledger
from preceptor.llm.local import Chain, Local
from preceptor.llm.runner import run
from preceptor.stages.base import read_records, write_records
from preceptor.tasks import prompts, strategies
from preceptor.tasks.prompts import prompt_sha

TEXTS = {"en": "Cough for three days.\nNo fever. Green sputum.", "zh": "患者咳嗽、咳黄痰3天；\n无发热。"}
KNOWN = {
    "en": Diagnosis(diseases=("Pneumonia", 'so-called "flu"'), reason=("Green sputum", "No fever")),
    "zh": Diagnosis(diseases=("肺炎", "2型糖尿病"), reason=("咳黄痰3天", "无发热")),
}
GOLD = {"en": Diagnosis(diseases=("Croup",), reason=("No fever",)), "zh": Diagnosis(diseases=("感冒",))}
NAMED = {"en": r'{"diseases": ["Pneumonia", "so-called \"flu\""]}', "zh": '{"diseases": ["肺炎", "2型糖尿病"]}'}
WHOLE = {
    "en": r'{"diseases": ["Pneumonia", "so-called \"flu\""], "reason": ["Green sputum", "No fever"]}',
    "zh": '{"diseases": ["肺炎", "2型糖尿病"], "reason": ["咳黄痰3天", "无发热"]}',
}


def case(name, text, **fields):
    return Case(id=str(name), text=text, language="en", source="s", group=str(name), **fields)


def label(name, output, **fields):
    return Prediction(case_id=str(name), model="teacher", prompt_sha="", output=output, **fields)


def rows(section, name="rows.jsonl"):
    return list(read_records(Path("runs/r", section, name), Row))


def last(text):
    return text.splitlines()[-1].removeprefix("preceptor: ")


# --- what each is taught ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_rows_of_each_part(command, language):
    text, known, gold = TEXTS[language], KNOWN[language], GOLD[language]
    Path("own").mkdir()
    write_records(Path("own/train.jsonl"), [case(0, text), case(1, text + "."), case(2, text + "。")])
    write_records(
        Path("own/predictions.jsonl"),
        [
            label(0, known),
            label(0, known.model_copy(update={"reason": known.reason[:1]}), sample=1),
            label(0, Diagnosis(diseases=known.diseases[:1], reason=("blood in the urine",)), sample=2),
            label(1, Diagnosis()),
        ],
    )
    write_records(Path("own/validation.jsonl"), [case("v", "Hm.", gold=gold, gold_source="human")])
    Path("r.yaml").write_text(
        f"language: {language}\n"
        "curate_diseases: {from: ./own, prompt: two_stage, part: diseases, samples: all}\n"
        "curate_evidence: {from: ./own, prompt: two_stage, part: evidence, samples: all}\n"
    )
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    prompt = prompts.load("diagnosis", "two_stage", language)
    (_, first, second) = prompt.turns
    nothing = '{"diseases": []}'

    def question(record):
        return (prompt.turns[0], Message(role="user", content=f"<record>\n{record}\n</record>"))

    def given(record, answer):
        return (*question(record), Message(role="assistant", content=answer), second)

    assert [(row.id, row.messages, row.answer) for row in rows("curate_diseases")] == [
        ("0#0", question(text), NAMED[language]),
        ("1#0", question(text + "."), nothing),
    ]
    reason = f'"reason": ["{known.reason[0]}"]}}'
    assert [(row.id, row.messages, row.answer) for row in rows("curate_evidence")] == [
        ("0#0", given(text, NAMED[language]), WHOLE[language]),
        ("0#1", given(text, NAMED[language]), f"{NAMED[language][:-1]}, {reason}"),
        ("1#0", given(text + ".", nothing), '{"diseases": [], "reason": []}'),
    ]
    named = json.dumps({"diseases": gold.diseases}, ensure_ascii=False)
    whole = json.dumps({"diseases": gold.diseases, "reason": gold.reason}, ensure_ascii=False)
    for section, messages, answer in (
        ("curate_diseases", question("Hm."), named),
        ("curate_evidence", given("Hm.", named), whole),
    ):
        (row,) = rows(section, "validation_rows.jsonl")
        assert (row.case_id, row.messages, row.answer) == ("v", messages, answer)
        assert list(read_records(Path("runs/r", section, "pairs.jsonl"), Pair)) == []
    dropped = [json.loads(line) for line in Path("runs/r/curate_diseases/dropped.jsonl").read_text().splitlines()]
    assert [(one["sample"], one["reason"]) for one in dropped] == [(1, "repeated"), (2, "ungrounded")]

    # What is taught is what two_stage asks.
    conversation = strategies.two_stage(case(0, text), strategies.Asking(prompt, "m", Sampling()))
    asked = [next(conversation), conversation.send(strategies.Reply(text=NAMED[language]))]
    assert [request.messages for request in asked] == [question(text), given(text, NAMED[language])]
    assert first.content == "<record>\n{record}\n</record>"


def test_rows_of_a_part_mix(command):
    Path("own").mkdir()
    write_records(Path("own/train.jsonl"), [case(0, TEXTS["en"]), case(1, TEXTS["zh"])])
    write_records(Path("own/predictions.jsonl"), [label(0, KNOWN["en"])])
    write_records(Path("other.jsonl"), [label(1, KNOWN["zh"])])
    Path("r.yaml").write_text(
        "curate: {from: [own/train.jsonl, other.jsonl], prompt: two_stage, part: evidence}\n"
        "curate_more: {from: ./own, prompt: two_stage, part: evidence, mix: runs/r/curate/rows.jsonl}\n"
        "curate_other: {from: ./own, prompt: two_stage, part: diseases, mix: runs/r/curate/rows.jsonl}\n"
    )
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    assert [row.answer for row in rows("curate_more")] == [WHOLE["en"], WHOLE["zh"]]
    mixed = [json.loads(Path(f"runs/r/curate_{name}/metrics.json").read_text())["mixed"] for name in ("more", "other")]
    assert mixed == [{"rows": 1}, {"rows": 1, "with another prompt": 1}]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            "part: diseases",
            "curate.part: diseases: the prompt asks once; name one that asks for the diseases, then for ",
        ),
        (
            "part: evidence, prompt: p.txt",
            "curate.part: evidence: the prompt asks for diseases, then nothing by name; ",
        ),
        ("part: diseases, prompt: two_stage, think: true", "r.yaml: curate: part: only a diagnosis without thinking"),
        ("part: evidence, prompt: two_stage, task: consult", "r.yaml: curate: part: only a diagnosis without thinking"),
        ("part: both", "r.yaml: curate.part: Input should be 'whole', 'diseases' or 'evidence' (got 'both')"),
    ],
)
def test_parts_that_cannot_be(command, fields, told):
    Path("own").mkdir()
    write_records(Path("own/train.jsonl"), [case(0, TEXTS["en"])])
    write_records(Path("own/predictions.jsonl"), [label(0, KNOWN["en"])])
    Path("p.txt").write_text("=== user\n[act: diseases]\n<record>\n{record}\n</record>\n=== user\nAnd why?\n")
    Path("r.yaml").write_text(f"curate: {{from: ./own, {fields}}}\n")
    code, _, err = command("run", "r.yaml")
    assert (code, last(err)[: len(told)]) == (2, told)


# --- the two in turn -------------------------------------------------------------------------------------------------

PROMPT = """=== system
[act: diseases]
Diseases?
=== user
<record>
{record}
</record>
=== user
[act: evidence]
Evidence?
"""
RECIPE = """
student: ./tiny
curate_diseases: {from: ./own, prompt: p.txt, part: diseases}
sft_diseases: {from: curate_diseases, method: full, lr: 3e-3, epochs: 30, batch_size: 2, accumulation: 1}
curate_evidence: {from: ./own, prompt: p.txt, part: evidence}
sft_evidence: {from: curate_evidence, method: full, lr: 3e-3, epochs: 30, batch_size: 2, accumulation: 1}
predict:
  {from: ./own, models: [base, sft_diseases+sft_evidence, base+sft_evidence], strategy: two_stage, prompt: p.txt,
   max_tokens: 60, batch: 2}
evaluate: {from: [predict, ./own, curate_evidence]}
"""
CHAIN = "sft_diseases+sft_evidence"
KINDS = (("cough", "cold"), ("发热", "肺炎"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in it, whose two specialists have learned by heart what little there is."""
    from tests.model import tiny

    folder = tmp_path_factory.mktemp("specialists")
    tiny.save(tiny.qwen(), folder / "tiny")
    (folder / "own").mkdir()
    (folder / "p.txt").write_text(PROMPT, "utf-8")
    (folder / "r.yaml").write_text(RECIPE)
    cases = [(f"{sign} {n}", sign, name) for n in range(4) for sign, name in KINDS]
    write_records(folder / "own/train.jsonl", [case(n, text) for n, (text, _, _) in enumerate(cases)])
    labels = [label(n, Diagnosis(diseases=(name,), reason=(sign,))) for n, (_, sign, name) in enumerate(cases)]
    write_records(folder / "own/predictions.jsonl", labels)
    held = [
        case(f"t{n}", f"{sign} {n}", gold=Diagnosis(diseases=(name,), reason=(sign,)), gold_source="human")
        for n, (sign, name) in enumerate(KINDS * 12, 10)
    ]
    write_records(folder / "own/test.jsonl", held)
    sections = ("curate_diseases", "sft_diseases", "curate_evidence", "sft_evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["preceptor", "run", "r.yaml", *sections])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return folder


@pytest.mark.slow
def test_a_chained_answer_is_that_of_both_asked_by_hand(trained, command):
    from preceptor.model.generate import generate
    from preceptor.model.load import load

    os.chdir(trained)
    code, out, err = command("run", "r.yaml", "predict", "evaluate", "limit=6")
    assert code == 0, err
    predictions = {(p.model, p.case_id): p for p in api.load_predictions("runs/r/predict/predictions.jsonl")}
    assert len(predictions) == 3 * 6
    prompt = prompts.load("diagnosis", "p.txt", "en")
    namer, finder = (load(Path("runs/r", section, "model")) for section in ("sft_diseases", "sft_evidence"))
    sampling, right = Sampling(max_tokens=60), []
    for held in list(read_records(Path("own/test.jsonl"), Case))[:6]:
        first = prompt.render(held.text)
        (said,) = generate(namer, [Request(messages=first, sampling=sampling, logprobs=0)])
        messages = (*first, Message(role="assistant", content=said.text), *prompt.stages[1])
        (answer,) = generate(finder, [Request(messages=messages, sampling=sampling, logprobs=0)])
        found = predictions[CHAIN, held.id]
        assert (found.text, found.prompt_sha) == (answer.text, prompt_sha(messages))
        assert found.usage == said.usage + answer.usage
        assert json.loads(said.text) == {"diseases": list(found.output.diseases)}
        right.append(found.output.diseases == held.gold.diseases)
        # The base names nothing that can be read, so the second is never asked.
        assert predictions["base+sft_evidence", held.id].text == predictions["base", held.id].text
    metrics = json.loads(Path("runs/r/evaluate/metrics.json").read_text())
    assert len({found.output.diseases for (model, _), found in predictions.items() if model == CHAIN}) > 1
    assert metrics[CHAIN]["top1"]["value"] == pytest.approx(sum(right) / 6)
    assert f"{CHAIN}: 6 of 6 answered" in " ".join(out.split())
    code, shown, _ = command("compare", f"r:{CHAIN}", "r:base")
    assert (code, f"r:{CHAIN}" in shown) == (0, True)


KILLED = """
import os, signal
from preceptor.app import cli
from preceptor.llm.local import Chain
complete, asked = Chain.complete, 0
async def dying(self, request):
    global asked
    asked += 1
    if asked > 21:
        os.kill(os.getpid(), signal.SIGKILL)
    return await complete(self, request)
Chain.complete = dying
cli.main()
"""


@pytest.mark.slow
def test_killed_amid_a_chain_it_goes_on_to_the_same_answers(trained, command):
    os.chdir(trained)
    again = ("run", "r.yaml", "predict", f"predict.models=[{CHAIN}]", "predict.called=both", "--runs")
    for name in ("whole", "broken"):
        for section in ("sft_diseases", "sft_evidence"):
            Path(name, "r").mkdir(parents=True, exist_ok=True)
            Path(name, "r", section).symlink_to(trained / "runs/r" / section)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *again, "broken"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert 0 < len(sends("broken")) < 48
    assert not Path("broken/r/predict/done.json").exists()
    for name in ("whole", "broken"):
        code, out, err = command(*again, name)
        assert code == 0, err
        assert "predict: both: 24 of 24 answered" in " ".join(out.split())
    found, wanted = (api.load_predictions(f"{name}/r/predict/predictions.jsonl") for name in ("broken", "whole"))
    for one, other in zip(found, wanted, strict=True):
        same = {"confidence": other.confidence, "reply": other.reply}  # the reply's key counts attempts
        assert one.model_copy(update=same) == other
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4), "its last digits depend on the batch"
    assert {one.model for one in found} == {"both"}
    assert len(sends("broken")) == len(set(sends("broken"))) == 48, "two replies a case, and none twice"
    assert set(sends("broken")) == set(sends("whole")), "the same requests of the same weights"


def sends(runs):
    """The requests that brought a reply."""
    with closing(sqlite3.connect(f"{runs}/ledger.sqlite")) as db:
        return [request for (request,) in db.execute("SELECT request FROM sends WHERE kind = 'reply'")]


def test_stored_replies_serve_the_same_two_weights_alone(tmp_path):
    prompt, asked = prompts.parse(PROMPT, "p"), []

    def local(name):
        def generate(_, requests):
            asked.extend((name, request.messages[-1].content) for request in requests)
            return [Reply(text=f'{{"diseases": ["{name}"], "reason": ["cough"]}}') for _ in requests]

        return Local(None, name, generate=generate)

    def answers(first, second):
        """The diseases that the chain gives to one case, and who was asked meanwhile."""
        found, before = {}, len(asked)
        talk = strategies.two_stage(case(0, "cough"), strategies.Asking(prompt, "m", Sampling()))
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            asyncio.run(run([(0, talk)], [Chain(local(first), local(second))], ledger, 1, found.__setitem__))
        return found[0].output.diseases, asked[before:]

    question = "<record>\ncough\n</record>"
    both = [("a", question), ("b", "[act: evidence]\nEvidence?")]
    assert answers("a", "b") == (("b",), both)
    assert answers("a", "b") == (("b",), [])
    assert answers("b", "a")[1] == [("b", question), ("a", "[act: evidence]\nEvidence?")]
    assert answers("a", "c")[0] == ("c",)


@pytest.mark.slow
def test_the_weights_are_let_go(trained, command):
    os.chdir(trained)
    again = ("run", "r.yaml", "predict", f"predict.models=[{CHAIN}]", "limit=2", "--fresh")
    gc.collect()
    gc.disable()
    try:
        before = weights()
        assert command(*again)[0] == 0
        assert weights() == before, "at once, as the next model may need the memory"
    finally:
        gc.enable()


def weights():
    """How many models live."""
    return sum(type(one).__name__ == "Qwen3ForCausalLM" for one in gc.get_objects())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            "models: [a+b+c], strategy: two_stage",
            "r.yaml: predict: models: a+b+c: write A+B: A names the diseases, and B",
        ),
        (
            "models: [mini+], strategy: two_stage",
            "r.yaml: predict: models: mini+: write A+B: A names the diseases, and",
        ),
        (
            "models: [mini+mini]",
            "r.yaml: predict: models: mini+mini: two models answer in turn; ask them with strategy:",
        ),
        (
            "models: [mini+teacher], strategy: two_stage",
            "r.yaml: predict: models: mini+teacher: the teacher answers else",
        ),
        (
            "models: [base+mini], strategy: two_stage",
            "r.yaml: predict: models: base is the student before training; nam",
        ),
        ("models: [mini+sft], strategy: two_stage", "r.yaml: predict: no earlier section 'sft'"),
        (
            "models: [mini+mini], strategy: two_stage, task: consult",
            "predict.models: mini+mini: the prompt asks for analysis, then advice; name one that asks for the",
        ),
    ],
)
def test_chains_that_cannot_be(command, fields, told):
    Path("own").mkdir()
    write_records(Path("own/test.jsonl"), [case(0, TEXTS["en"])])
    Path("r.yaml").write_text(f"predict: {{from: ./own, {fields}}}\n")
    code, _, err = command("run", "r.yaml")
    assert (code, last(err)[: len(told)]) == (2, told)


# --- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_advice_thinks_comes_through(command):
    from tests.model import tiny

    think, advice = "胸痛半小时，先排除心梗。", "请立即拨打120。"
    tiny.save(tiny.qwen(), Path("tiny"))
    Path("own").mkdir()
    Path("p.txt").write_text("=== user\n[act: consult]\n<record>\n{record}\n</record>\n")
    known = Consultation(think=think, answer=advice)
    write_records(Path("own/train.jsonl"), [case(n, f"胸痛{n}小时。") for n in range(4)])
    write_records(Path("own/predictions.jsonl"), [label(n, known) for n in range(4)])
    write_records(Path("own/test.jsonl"), [case("t", "胸痛7小时。", gold=known, gold_source="human")])
    Path("r.yaml").write_text(
        "task: consult\nlanguage: zh\nstudent: ./tiny\n"
        "curate: {from: ./own, prompt: p.txt}\n"
        "sft: {method: full, lr: 5e-3, epochs: 60, batch_size: 2, accumulation: 1}\n"
        "predict: {from: ./own, models: [student], prompt: p.txt, max_tokens: 200}\n"
        "evaluate: {from: [predict, ./own, curate]}\n"
    )
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    assert rows("curate")[0].answer == f"<think>{think}</think>\n{advice}"
    (found,) = api.load_predictions("runs/r/predict/predictions.jsonl")
    assert found.text == f"<think>{found.output.think}</think>\n{advice}"
    assert (len(found.output.think) > 5, found.output.answer, found.repaired) == (True, advice, False)
