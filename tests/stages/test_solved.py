"""Which solved cases may serve as examples: none that a held-out case is, or is nearly."""

import json
from pathlib import Path

import pytest

from preceptor import api
from preceptor.clinical.textbook.sampler import sample
from tests.stages.scripted import scripted
from tests.stages.test_label import FLU, record

TEXTBOOK = "prepare: {source: textbook, train: 1, validation: 6, test: 6, benchmark: 0}"


def write(texts, reasons=("",)):
    rows = [
        {"id": f"own-{n}", "feature_content": text, "diseases": "influenza", "reason": reasons[n % len(reasons)]}
        for n, text in enumerate(texts)
    ]
    Path("own.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def asked(command, language="en", label="label"):
    """Exit code, what was said, and the records shown as examples."""
    with scripted(lambda _: FLU) as server:
        section = f"{label}: {{strategy: few_shot, examples_from: own.jsonl, shots: 40, limit: 1}}"
        Path("r.yaml").write_text(f"language: {language}\nteacher: {server.teacher()}\n{TEXTBOOK}\n{section}\n")
        code, out, err = command("run", "r.yaml")
        shown = [m for body in server.asked for m in body["messages"][1:-1] if m["role"] == "user"]
    return code, out, err, {record({"messages": [message]}) for message in shown}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_copies_of_held_out_cases_are_no_examples(command, language):
    Path("r.yaml").write_text(f"language: {language}\n{TEXTBOOK}\n")
    assert command("run", "r.yaml")[0] == 0
    held = [case.text for name in ("validation", "test") for case in api.load_cases(f"runs/r/prepare/{name}.jsonl")]
    own = [case.text for case in sample(4, 77, language, "full")]
    write([*own, *(f"{text} OK" for text in held), held[0]])
    code, out, err, shown = asked(command, language)
    assert code == 0, err
    told = "label: 13 solved cases of own.jsonl are held out (12 of them as near copies), and serve as no examples"
    assert told in " ".join(out.split())
    assert shown == set(own)


def test_where_all_that_give_reasons_are_copies_the_others_serve(command):
    Path("r.yaml").write_text(f"language: en\n{TEXTBOOK}\n")
    assert command("run", "r.yaml")[0] == 0
    (copied, *_) = [case.text for case in api.load_cases("runs/r/prepare/test.jsonl")]
    (own,) = [case.text for case in sample(1, 77, "en", "full")]
    write([f"{copied} OK", own], ["cough", ""])
    code, out, err, shown = asked(command)
    assert code == 0, err
    assert "1 solved cases of own.jsonl are held out (1 of them as near copies)" in " ".join(out.split())
    assert shown == {own}
    write([f"{copied} OK"], ["cough"])
    code, out, err, shown = asked(command, label="label_again")
    assert (code, shown) == (2, set())
    assert "1 of them as near copies" in out
    assert "has no solved case that may serve as an example" in err.splitlines()[-1]
