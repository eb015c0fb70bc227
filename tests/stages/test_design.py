"""The teacher designs a prompt: what is tried, what is kept, and that another section uses it."""

import json
from pathlib import Path

import pytest

from preceptor.core.records import Consultation, Diagnosis
from preceptor.stages.base import read_records, write_records
from preceptor.stages.design import Candidate
from tests.stages.scripted import scripted
from tests.stages.test_label import case

RIGHT = '{"diseases": ["influenza"], "reason": ["cough number"]}'
WRONG = '{"diseases": ["gout"], "reason": ["cough number"]}'
GOLD = Diagnosis(diseases=("flu",), reason=("cough number",))
RECIPE = """
language: {language}
task: {task}
seed: 1
teacher: {teacher}
design: {{from: [train.jsonl, validation.jsonl], candidates: 3, shots: 2}}
"""


def write(gold=GOLD, validation_gold=None, language="en"):
    for split, first, own in (("train", 0, gold), ("validation", 100, validation_gold)):
        found = [case(first + n, language=language, gold=own) for n in range(4)]
        write_records(Path(f"{split}.jsonl"), found)


def recipe(server, task="diagnosis", language="en", more=""):
    Path("r.yaml").write_text(RECIPE.format(task=task, language=language, teacher=server.teacher()) + more)


class Teacher:
    """Writes the instructions given, and answers each with its own; the zero-shot prompt is answered with `zero`."""

    def __init__(self, zero, **answers):
        self.zero, self.answers, self.texts = zero, answers, iter(answers)

    def __call__(self, body):
        system = body["messages"][0]["content"]
        if system.startswith("[act: design]"):
            return next(self.texts)
        return next((answer for text, answer in self.answers.items() if text in system), self.zero)


BAD, FINE, MUTE = "Always name gout, whatever it says.", "Name what the record says.", "Tell a story about it all."


def candidates():
    return {one.name: one for one in read_records(Path("runs/r/design/candidates.jsonl"), Candidate)}


def test_the_best_on_gold_is_kept_and_used(command):
    write(validation_gold=GOLD)
    with scripted(
        Teacher(WRONG, **{BAD: WRONG, FINE: RIGHT, MUTE: "Once upon a time, there was a cough, it is said."})
    ) as server:
        recipe(server, more="label: {from: train.jsonl, prompt: design}\n")
        code, out, err = command("run", "r.yaml")
        assert code == 0, err
        labelled = [
            body for body in server.asked if body["messages"][-1]["content"].startswith("<record>\ncough number ")
        ]
        shown = server.asked[0]["messages"][1]["content"]
    found = candidates()
    named = {one.text.split("\n")[2]: one for one in found.values()}
    assert {name: one.score for name, one in named.items() if name in (BAD, FINE, MUTE)} == {
        BAD: 0.0,
        FINE: 1.0,
        MUTE: 0.0,
    }
    assert found["zero_shot"].score == 0.0
    assert [one.kept for one in named.values()] == [one is named[FINE] for one in named.values()]
    assert named[MUTE].failures == {"unparsed": 4}
    assert {one.measure for one in found.values()} == {"grade"}
    prompt = Path("runs/r/design/prompt.txt").read_text("utf-8")
    assert prompt == named[FINE].text
    assert shown.count("<record>") == shown.count("<answer>") == 2
    last = labelled[-1]["messages"][0]["content"]
    assert last.startswith(f"[act: diagnosis]\n{FINE}\nReply with JSON alone:")
    assert "is kept, by the grader on 4 cases" in out
    assert json.loads(Path("runs/r/design/metrics.json").read_text())["scores"]["zero_shot"] == 0.0


def test_a_prompt_that_is_no_better_than_zero_shot_is_not_kept(command):
    write(validation_gold=GOLD)
    with scripted(Teacher(RIGHT, **{BAD: WRONG, FINE: RIGHT, "I'm sorry, I can't do that.": RIGHT})) as server:
        recipe(server)
        assert command("run", "r.yaml")[0] == 0
    assert candidates()["zero_shot"].kept
    refused = [one.refused for one in candidates().values() if one.refused]
    assert refused == ["refused: the teacher declines to write an instruction"]


def test_the_same_words_twice_are_tried_once(command):
    write(validation_gold=GOLD)

    def answer(body):
        return FINE if body["messages"][0]["content"].startswith("[act: design]") else RIGHT

    with scripted(answer) as server:
        recipe(server)
        code, out, _ = command("run", "r.yaml")
        assert (code, len(server.asked)) == (0, 3 + 2 * 4)
    assert [one.refused for one in candidates().values()] == ["", "", "it is design_1 again", "it is design_1 again"]
    assert "design: design_3 was not tried: it is design_1 again" in out


def test_without_gold_the_answers_are_held_against_one_another(command):
    write()
    with scripted(Teacher(RIGHT, **{BAD: WRONG, FINE: RIGHT, MUTE: RIGHT})) as server:
        recipe(server)
        code, out, _ = command("run", "r.yaml")
    assert code == 0
    found = {one.text.split("\n")[2]: one for one in candidates().values()}
    assert {one.measure for one in found.values()} == {"agreement"}
    assert (found[BAD].score, found[FINE].score) == (0.0, pytest.approx(2 / 3))
    assert "by agreement with the answers to the other prompts, as no case has gold, on 4 cases" in out


@pytest.mark.parametrize("language", ["en", "zh"])
def test_advice(command, language):
    write(Consultation(answer="See a doctor."), Consultation(answer="See a doctor soon."), language)
    good, bad = "See a doctor soon.", "Rest and drink something hot."
    with scripted(Teacher(bad, **{BAD: bad, FINE: good, MUTE: bad})) as server:
        recipe(server, "consult", language)
        code, _, err = command("run", "r.yaml")
        assert code == 0, err
    kept = next(one for one in candidates().values() if one.kept)
    assert FINE in kept.text


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda _: 400, "design: no prompt was written, the last time: 400"),
        (
            lambda body: FINE if "[act: design]" in body["messages"][0]["content"] else 400,
            "design: no case was answered, the last time: 400",
        ),
    ],
)
def test_a_dead_endpoint_is_told(command, answer, complaint):
    write(validation_gold=GOLD)
    with scripted(answer) as server:
        recipe(server)
        code, _, err = command("run", "r.yaml")
    assert (code, complaint in err.splitlines()[-1]) == (1, True), err


def test_nothing_to_try_or_to_learn_from_is_told(command):
    write()
    Path("validation.jsonl").write_text("")
    with scripted(lambda _: FINE) as server:
        recipe(server)
        code, _, err = command("run", "r.yaml")
        assert (code, "no cases to try prompts on" in err.splitlines()[-1]) == (2, True)
        write(gold=None)
        code, _, err = command("run", "r.yaml")
        assert (code, "has no solved case that may serve" in err.splitlines()[-1]) == (2, True)
