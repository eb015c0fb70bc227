"""Sources of confidence in sections: what users write, what is refused, and that a kill loses nothing."""

import json
import logging
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.records import Message, Reply, Row, Token
from preceptor.llm.local import Local
from preceptor.stages import candidates
from preceptor.stages.asking import Answers, AskingConfig, Cases, asking_of
from preceptor.stages.base import Context, write_records
from preceptor.stages.teacher import Answerer
from preceptor.tasks.prompts import act_in
from tests.stages.scripted import scripted
from tests.stages.test_label import cases

SURE = '{"diseases": ["influenza"], "confidence": ["80%"], "reason": ["cough"]}'
UNSURE = '{"diseases": ["influenza"], "reason": ["cough"]}'


def recipe(server, **label):
    Path("r.yaml").write_text(f"teacher: {server.teacher()}\nlabel: {json.dumps({'from': 'train.jsonl', **label})}\n")


def answers():
    return list(api.load_predictions("runs/r/label/predictions.jsonl"))


def test_a_stated_number(command):
    cases(3, "train.jsonl")
    with scripted(lambda body: UNSURE if "number 1" in body["messages"][-1]["content"] else SURE) as server:
        recipe(server, confidence="stated", language="zh")
        code, out, _ = command("run", "r.yaml")
        assert (code, len(server.asked)) == (0, 3)
    assert act_in([Message(role="system", content=server.asked[0]["messages"][0]["content"])]) == "stated"
    assert "概率" in server.asked[0]["messages"][0]["content"]
    assert [one.confidence for one in answers()] == [{"influenza": 0.8}, {}, {"influenza": 0.8}]
    assert "label: teacher: 1 answers name a disease without confidence in it (confidence: stated)" in out


def test_samples_and_their_replay(command):
    cases(2, "train.jsonl")
    drawn = defaultdict(lambda: iter(["Gout", "influenza", "Flu", ""]))

    def answer(body):
        words = next(drawn[body["messages"][-1]["content"]]) if body["temperature"] else "influenza"
        return json.dumps({"diseases": [words] if words else [], "reason": ["cough"]})

    with scripted(answer) as server:
        recipe(server, confidence="samples", votes=4)
        assert command("run", "r.yaml")[0] == 0
        path = Path("runs/r/label/predictions.jsonl")
        whole = path.read_bytes()
        assert [(one.confidence, one.distribution) for one in answers()] == [
            ({"influenza": 0.5}, {"Gout": 0.25, "influenza": 0.5, "": 0.25})
        ] * 2
        path.write_bytes(b"")
        Path("runs/r/label/done.json").unlink()
        assert command("run", "r.yaml")[0] == 0
        assert (len(server.asked), path.read_bytes()) == (10, whole), "all comes from the ledger"


@pytest.mark.parametrize(("confidence", "asked", "known"), [("chain", True, True), (None, False, False)])
def test_the_chain_of_an_endpoint_is_asked_for(command, confidence, asked, known):
    cases(1, "train.jsonl")
    with scripted(lambda _: UNSURE) as server:
        recipe(server, confidence=confidence)
        assert command("run", "r.yaml")[0] == 0
    assert (bool(server.asked[0].get("logprobs")), bool(answers()[0].confidence)) == (asked, known)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"confidence": "votes"}, "'chain', 'candidates', 'samples' or 'stated'"),
        ({"confidence": "chain", "task": "consult"}, "advice names no diseases to be sure of; leave it out"),
        ({"confidence": "samples", "strategy": "self_consistency", "temperature": 1}, "the share of the votes; leave"),
        ({"confidence": "stated", "strategy": "few_shot"}, "the examples of few_shot state none; leave out"),
        ({"candidates": "names.txt"}, "candidates: they are for confidence: candidates; say so, or leave them out"),
        (
            {"confidence": "stated", "prompt": "brief"},
            "brief asks for no confidence; name a `prompt` with a line [act:",
        ),
        ({"confidence": "stated", "strategy": "two_stage"}, "label.confidence: two_stage asks for no confidence"),
        (
            {"confidence": "candidates", "candidates": "names.txt"},
            "scripted answers elsewhere; take samples, or stated",
        ),
        ({"confidence": "candidates"}, "rows.jsonl"),
        ({"confidence": "candidates", "candidates": "empty.txt"}, "empty.txt names no disease; name a file with one"),
        ({"confidence": "candidates", "candidates": "gbk.txt"}, "gbk.txt: not UTF-8 text; name a file with one"),
        ({"confidence": "candidates", "candidates": "no.txt"}, "no.txt"),
        ({"confidence": "candidates", "candidates": "table.txt"}, "table.txt:3: a tab or another control character in"),
        ({"confidence": "candidates", "candidates": "prose.txt"}, "prose.txt:2: 300 characters in what should be a"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(command, fields, why):
    cases(1, "train.jsonl")
    Path("names.txt").write_text("Gout\n")
    Path("empty.txt").write_text("# none yet\n\n")
    Path("gbk.txt").write_bytes("痛风\n".encode("gbk"))
    Path("table.txt").write_text("Gout\n\nAsthma\tJ45\n")
    Path("prose.txt").write_text("Gout\n" + "Man, 70. " * 33 + "Fev\n")
    with scripted(lambda _: UNSURE) as server:
        recipe(server, **fields)
        code, _, err = command("run", "r.yaml")
        assert (code, server.asked) == (2, [])
    assert why in err.splitlines()[-1]


# --- candidates: a model on this machine --------------------------------------------------------------------------


@contextmanager
def nothing(*_):
    yield lambda *_, **__: None


def context(folder, **inputs):
    told = []
    made = Context("r", "predict", folder, folder, inputs, logging.getLogger("test"), nothing, told.append)
    return made, told


def row(*diseases):
    turn = (Message(role="user", content="<record>\ncough\n</record>"),)
    return Row(id="1", messages=turn, answer=json.dumps({"diseases": diseases, "reason": []}), case_id="1")


def test_the_names_in_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("# by hand\nInfluenza \n\n肺炎 # zh\nType 2 diabetes, #1\nC#\nInfluenza\n", "utf-8-sig")
    made, _ = context(tmp_path, candidates=(path,))
    assert candidates.candidates(str(path), made) == ("Influenza", "肺炎", "Type 2 diabetes,", "C#")


def test_the_commonest_names_of_training_rows(tmp_path):
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    many = [row(f"disease {number} x") for number in range(400)]
    write_records(paths[0], [row("Gout"), row("Asthma", "Gout"), row(), *many])
    write_records(paths[1], [row("Flu"), row("Flu"), row("Flu")])
    made, _ = context(tmp_path, candidates=paths)
    found = candidates.candidates("", made)
    assert (found[:3], len(found)) == (("Flu", "Gout", "Asthma"), 300)


def test_candidates_of_a_model_here(tmp_path):
    cases(2, tmp_path / "cases.jsonl")
    (tmp_path / "names.txt").write_text("Influenza\nGout\n")
    asked = []

    def generate(_, requests):
        asked.extend(requests)
        tokens = tuple(Token(utf8=b"?", logprob=share) for share in (-0.5, -2.0, -3.0, -4.0))
        return [Reply(text="" if one.candidates else UNSURE, tokens=tokens * bool(one.candidates)) for one in requests]

    config = AskingConfig(confidence="candidates", candidates=str(tmp_path / "names.txt"))
    assert [(need.name, need.paths) for need in config.own_files()] == [("candidates", (config.candidates,))]
    made, told = context(tmp_path, candidates=(tmp_path / "names.txt",))
    begun = Answers.begun(config, made, Cases([tmp_path / "cases.jsonl"], None))
    begun.ask(Answerer([Local(None, "weights", generate=generate)]), 4, asking_of(config, made, "m", 0, corrects=False))
    begun.finish(["m"])
    first, _ = api.load_predictions(tmp_path / "predictions.jsonl")
    assert first.confidence == pytest.approx({"influenza": 0.6065 + 0.1353}, abs=1e-4), "by both its wordings"
    assert first.distribution == pytest.approx({"Influenza": 0.7419, "Gout": 0.0498, "": 0.0183}, abs=1e-4)
    assert [one.candidates for one in asked if one.candidates] == [('"Influenza"', '"influenza"', '"Gout"', "]")] * 2
    assert (len(asked), told) == (4, [])
