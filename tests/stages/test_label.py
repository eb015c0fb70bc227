"""Labelling through a real server: what is asked, what is written, what is asked again."""

import json
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.records import Case, Consultation, Diagnosis
from preceptor.llm.ledger import Ledger
from preceptor.stages.base import write_records
from tests.stages.scripted import scripted

FLU = '{"diseases": ["influenza"], "reason": ["cough"]}'
PROSE = "The patient should rest and drink. It might be anything, we would need to see more."


def case(n, text="", **more):
    fields = {"id": f"c{n}", "text": text or f"cough number {n}", "language": "en", "source": "t", "group": f"g{n}"}
    return Case(**{**fields, **more})


def cases(count, path="runs/r/prepare/train.jsonl", **more):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_records(Path(path), [case(n, **more) for n in range(count)])
    return path


def recipe(server, label, head=""):
    Path("r.yaml").write_text(f"{head}\nteacher: {server.teacher()}\nlabel: {json.dumps(label)}\n")


def record(body):
    return body["messages"][-1]["content"].removeprefix("<record>\n").removesuffix("\n</record>")


def metrics(section="label"):
    return json.loads(Path(f"runs/r/{section}/metrics.json").read_text())


def test_the_account_counts_all_turns(command):
    def answer(body):
        text = body["messages"][1]["content"]
        if "number 1" in text:
            return PROSE if len(body["messages"]) == 2 else FLU  # corrected
        if "number 2" in text:
            return {"content": FLU, "reasoning_content": "a cough", "model": "m-0731"}
        if "number 3" in text:
            return {"content": FLU[:20], "finish": "length"}
        if "number 4" in text:
            return '{"diseases": [], "reason": []}'
        return "I'm sorry, I can't." if "number 5" in text else f"```\n{FLU[:-1]}\n```" if "number 6" in text else FLU

    cases(8, "train.jsonl")
    with scripted(answer) as server:
        Path("r.yaml").write_text(
            f"teacher: {server.teacher(answers_as='m-0731')}\nlabel: {{from: train.jsonl, max_tokens: 99}}\n"
        )
        code, out, err = command("run", "r.yaml")
        assert code == 0, err
        assert len(server.asked) == 9
    assert metrics() == {
        "cases": 8,
        "answered": 6,
        "abstained": 1,
        "withheld": 0,
        "corrected": 1,
        "revised": 0,
        "repaired": 1,
        "cut": 0,
        "failed": 2,
        "failures": {"truncated": 1, "refused": 1},
        "agreement": None,
        "prompt_tokens": 63,
        "cached_tokens": 0,
        "completion_tokens": 27,
        "thinking_tokens": 2,
        "models": metrics()["models"],
    }
    assert sorted(metrics()["models"]) == ["m", "m-0731"]
    told = "6 of 8 answered, 1 abstained, 2 failed (1 truncated, 1 refused); 1 corrected, 1 repaired; "
    assert f"label: {told}tokens 63 in, 27 out, 2 of them thinking\n" in out
    assert "label: the endpoint said it was m" in out
    failures = {
        p.case_id: p.failure.detail for p in api.load_predictions("runs/r/label/predictions.jsonl") if p.failure
    }
    assert failures == {
        "c3": "the reply ends before its JSON does: it has all of max_tokens=99; raise that",
        "c5": "the reply declines to answer",
    }


def test_the_json_schema_and_what_is_asked_of_reasons(command):
    cases(1, "train.jsonl")
    with scripted(lambda _: FLU) as server:
        Path("r.yaml").write_text(
            f"teacher: {server.teacher(json_mode='schema')}\n"
            "label: {from: train.jsonl, reasons: 2, reason_characters: 30}\n"
        )
        assert command("run", "r.yaml")[0] == 0
        (body,) = server.asked
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["diseases", "reason"]
    assert body["messages"][0]["content"].endswith(
        "[reasons: 2]\nGive at most 2 reasons, those that decide.\n"
        "[characters: 30]\nQuote at most 30 characters for each reason."
    )


def test_samples_are_conversations_of_their_own(command):
    cases(3, "train.jsonl")
    with scripted(lambda _: FLU) as server:
        recipe(server, {"from": "train.jsonl", "samples": 4, "temperature": 0.8})
        assert command("run", "r.yaml")[0] == 0
        assert len(server.asked) == 12
        path = Path("runs/r/label/predictions.jsonl")
        whole = path.read_bytes()
        keys = [(p.case_id, p.sample) for p in api.load_predictions(path)]
        assert keys == [(f"c{n}", sample) for n in range(3) for sample in range(4)]
        assert len({p.reply for p in api.load_predictions(path)}) == 12

        # Cut as a kill cuts: what is whole is kept, in whatever order it came; the rest comes from the ledger.
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join([lines[7], lines[2], lines[11][:30]]))
        Path("runs/r/label/done.json").unlink()
        code, out, _ = command("run", "r.yaml")
        assert (code, len(server.asked), path.read_bytes()) == (0, 12, whole)
    assert "12 of 12 answered" in out


def test_what_failed_for_the_moment_is_asked_again(command):
    broken = {"c1"}

    def answer(body):
        return 400 if broken and "number 1" in body["messages"][-1]["content"] else FLU

    cases(3, "train.jsonl")
    with scripted(answer) as server:
        recipe(server, {"from": "train.jsonl"})
        assert command("run", "r.yaml")[0] == 0
        assert metrics()["failures"] == {"provider": 1}
        broken.clear()
        Path("runs/r/label/done.json").unlink()
        assert command("run", "r.yaml")[0] == 0
    assert (metrics()["failures"], metrics()["answered"]) == ({}, 3)
    assert [p.case_id for p in api.load_predictions("runs/r/label/predictions.jsonl")] == ["c0", "c1", "c2"]


def test_who_answers_nothing_is_told(command):
    cases(2, "train.jsonl")
    with scripted(lambda _: 400) as server:
        recipe(server, {"from": "train.jsonl"})
        code, _, err = command("run", "r.yaml")
    assert (code, "label: scripted answered none of 2 cases, the last one: 400" in err.splitlines()[-1]) == (1, True)


def test_log_probabilities_are_kept_with_the_reply(command):
    cases(1, "train.jsonl")
    with scripted(lambda _: FLU) as server:
        recipe(server, {"from": "train.jsonl", "logprobs": 3})
        assert command("run", "r.yaml")[0] == 0
        assert (server.asked[0]["logprobs"], server.asked[0]["top_logprobs"]) == (True, 3)
    (label,) = api.load_predictions("runs/r/label/predictions.jsonl")
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        reply = ledger.find(label.reply)
    assert [len(token.alternatives) for token in reply.tokens] == [3] * 12
    assert b"".join(token.utf8 for token in reply.tokens).decode() == FLU
    assert set(label.confidence) == {"influenza"}


def test_advice_with_thinking_told_apart(command):
    cases(1, "train.jsonl", text="我发烧三天了", language="zh")
    with scripted(lambda _: {"content": "多休息。", "reasoning_content": "发烧三天"}) as server:
        recipe(server, {"from": "train.jsonl"}, "task: consult\nlanguage: zh")
        assert command("run", "r.yaml")[0] == 0
        assert server.asked[0]["messages"][0]["content"].startswith("[act: consult]\n你为患者提供咨询。")
    (label,) = api.load_predictions("runs/r/label/predictions.jsonl")
    assert label.output == Consultation(think="发烧三天", answer="多休息。")


# --- examples --------------------------------------------------------------------------------------------------------

GOLD = {"gold": Diagnosis(diseases=("flu",), reason=("cough",)), "gold_source": "human"}
SPLITS = "prepare: {source: all.jsonl, train: 8, validation: 1, test: 3}"


def split_cases(command):
    """Twelve solved cases in splits; the texts of each."""
    cases(12, "all.jsonl", **GOLD)
    Path("r.yaml").write_text(SPLITS)
    assert command("run", "r.yaml")[0] == 0
    return {
        name: {one.text for one in api.load_cases(f"runs/r/prepare/{name}.jsonl")}
        for name in ("train", "validation", "test")
    }


@pytest.mark.parametrize("choice", ["fixed", "random", "nearest"])
def test_examples_are_solved_training_cases_and_never_the_case_itself(command, choice):
    splits = split_cases(command)
    with scripted(lambda _: FLU) as server:
        Path("r.yaml").write_text(
            f"teacher: {server.teacher()}\n{SPLITS}\n"
            f"label: {{strategy: few_shot, examples: {choice}, shots: 2}}\n"
            f"predict: {{models: [teacher], strategy: few_shot, examples: {choice}, shots: 2}}\n"
        )
        code, _, err = command("run", "r.yaml")
        assert code == 0, err
        assert len(server.asked) == sum(map(len, (splits["train"], splits["test"])))
    heads = []
    for body in server.asked:
        *shown, own = [record({"messages": [m]}) for m in body["messages"][1:] if m["role"] == "user"]
        assert own in splits["train"] | splits["test"]
        assert len(set(shown) & (splits["train"] - {own})) == 2
        heads += [json.dumps(body["messages"][:-1])] if own in splits["test"] else []
    if choice == "fixed":
        assert len(set(heads)) == 1, "what the cases share comes first, byte for byte"


def test_examples_of_the_users_own_file(command):
    splits = split_cases(command)
    row = {"id": "x", "feature_content": "主诉：发热三天", "diseases": "流感", "reason": "发热三天"}
    held = {**row, "id": "y", "feature_content": min(splits["test"])}
    Path("own.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (row, held)), "utf-8")
    with scripted(lambda _: FLU) as server:
        label = "label: {strategy: few_shot, examples_from: own.jsonl, limit: 1}"
        Path("r.yaml").write_text(f"teacher: {server.teacher()}\n{SPLITS}\n{label}\n")
        code, out, err = command("run", "r.yaml")
        assert code == 0, err
        ((_, shown, answer, _),) = [body["messages"] for body in server.asked]
    assert "label: 1 solved cases of own.jsonl are held out, and serve as no examples\n" in out
    assert (record({"messages": [shown]}), json.loads(answer["content"])["diseases"]) == ("主诉：发热三天", ["流感"])


def test_a_teachers_labels_may_be_the_examples(command):
    cases(4, "all.jsonl")
    with scripted(lambda body: 400 if "number 2" in body["messages"][-1]["content"] else FLU) as server:
        Path("r.yaml").write_text(
            f"teacher: {server.teacher()}\nprepare: {{source: all.jsonl, train: 1, validation: 0, test: 0}}\n"
            "label: {}\nlabel_again: {strategy: few_shot, examples_from: label, shots: 9}\n"
        )
        code, _, err = command("run", "r.yaml")
        assert code == 0, err
        last = [body for body in server.asked if len(body["messages"]) > 2]
    assert {len(body["messages"]) for body in last} == {2 + 4, 2 + 6}, "a failure is no example; nor is the case itself"
    assert all("number 2" not in message["content"] for body in last for message in body["messages"][:-1])


def test_without_a_solved_case_it_says_how_to_mend_it(command):
    cases(3, "all.jsonl")
    with scripted(lambda _: FLU) as server:
        Path("r.yaml").write_text(f"teacher: {server.teacher()}\n{SPLITS}\nlabel: {{strategy: few_shot}}\n")
        code, _, err = command("run", "r.yaml")
        assert not server.asked
    assert code == 2
    assert "has no solved case that may serve as an example; name in `examples_from` a file" in err.splitlines()[-1]


# --- what a recipe may say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("strategy: self_consistency", "temperature: at 0 all samples of a vote are the same; give one above 0"),
        ("samples: 2", "temperature: at 0 all samples are the same; give one above 0"),
        ("logprobs: 21", "label.logprobs: Input should be less than or equal to 20 (got 21)"),
        ("task: consult, reasons: 3", "reasons: advice has none"),
        ("strategy: two_shot", "no strategy 'two_shot'; did you mean 'few_shot'?"),
        ("strategy: two_stage, prompt: zero_shot", "two_stage: the prompt asks once"),
        ("prompt: two_stage", "label: two_stage asks in stages and zero_shot once; choose two_stage"),
        ("prompt: design", "no prompt 'design' for diagnosis in 'en'"),
        ("strategy: few_shot, examples_from: prepar", "no earlier section 'prepar'"),
    ],
)
def test_what_makes_no_sense_is_one_line(command, label, complaint):
    cases(1, "train.jsonl", **GOLD)
    with scripted(lambda _: FLU) as server:
        Path("r.yaml").write_text(f"teacher: {server.teacher()}\nlabel: {{from: train.jsonl, {label}}}\n")
        code, _, err = command("run", "r.yaml")
        assert not server.asked
    assert (code, complaint in err.splitlines()[-1]) == (2, True), err
