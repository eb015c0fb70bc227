"""What the textbook teacher replies to each act, in one process."""

import json
from math import log

import pytest

from preceptor.app.teacher_acts import Question, Teacher, question
from preceptor.app.teacher_design import designs
from preceptor.app.teacher_tokens import Tokens
from preceptor.clinical.safety import urgent
from preceptor.clinical.textbook.exact import exact
from preceptor.clinical.textbook.sampler import draw, sample
from preceptor.core.errors import UserError
from preceptor.core.records import Language, Message
from preceptor.tasks import consult, prompts
from preceptor.tasks.diagnosis import canonical


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher("honest", Tokens("mini"))


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def best(teacher: Teacher, *messages: Message) -> str:
    replies = teacher.replies(question(messages))
    return replies.choice.options[replies.choice.best]


def test_the_last_record_the_last_act_and_the_last_lines_count(teacher: Teacher) -> None:
    old, new = (case.text for case in sample(2, 3, "en", "full"))
    shown = [
        user(f"[act: diseases]\n[reasons: 2]\n<record>\n{old}\n</record>"),
        assistant('{"diseases": ["x"]}\n[reasons: 9]'),
        user(f"[act: diagnosis]\n[reasons: 3]\n[characters: 20]\n<record>\n{new}\n[reasons: 7]\n</record>"),
    ]
    assert question(shown) == Question("diagnosis", f"{new}\n[reasons: 7]", reasons=3, characters=20)
    assert best(teacher, *shown[2:]) == best(teacher, *shown)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_number_and_length_of_reasons_are_kept_to(teacher: Teacher, language: Language) -> None:
    fewer = 0
    for case in sample(40, 6, language, "full"):
        free = exact().answer(case.text, language)
        assert best(teacher, user(f"[act: diagnosis]\n<record>{case.text}</record>")) == canonical(free)
        for reasons, characters in ((0, 99), (1, 99), (2, 6), (12, 99), (12, 1)):
            lines = f"[act: diagnosis]\n[reasons: {reasons}]\n[characters: {characters}]\n"
            said = json.loads(best(teacher, user(f"{lines}<record>{case.text}</record>")))
            assert said["diseases"] == list(free.diseases)
            assert len(said["reason"]) <= reasons
            assert all(len(reason) <= characters and reason in case.text for reason in said["reason"])
            fewer += len(said["reason"]) < len(free.reason)
            if reasons == 12 and characters == 99:
                assert set(free.reason) <= set(said["reason"])
    assert fewer > 40


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("confidence", ["honest", "over", "under"])
def test_what_is_stated_is_what_the_reader_believes(confidence, language: Language) -> None:
    reader, teacher = exact(confidence), Teacher(confidence, Tokens("mini"))
    named = abstained = 0
    for case in sample(40, 6, language, "short"):
        replies = teacher.replies(question(prompts.load("diagnosis", "stated", language).render(case.text)))
        plain = teacher.replies(question(prompts.load("diagnosis", "zero_shot", language).render(case.text)))
        believed = reader.posterior(case.text).marginals
        by_name = {reader.book.diseases[key].name(language): share for key, share in believed.items()}
        assert replies.choice.probabilities.tolist() == plain.choice.probabilities.tolist()
        for text, other in zip(replies.choice.options, plain.choice.options, strict=True):
            said, words = json.loads(text), json.loads(other)
            assert said.pop("confidence") == [round(by_name[name], 2) for name in said["diseases"]]
            assert said == words
            named, abstained = named + bool(said["diseases"]), abstained + (not said["diseases"])
    assert named > 40
    assert abstained


@pytest.mark.parametrize("first", ["its own", '{"diseases": ["Gout"]}', "no JSON"])
def test_the_second_turn_corrects_the_first(teacher: Teacher, first: str) -> None:
    for case in sample(20, 5, "en", "short"):
        asked = user(f"[act: diseases]\n<record>\n{case.text}\n</record>")
        own = best(teacher, asked)
        answer = exact().answer(case.text, "en")
        assert json.loads(own) == {"diseases": list(answer.diseases)}
        second = best(teacher, asked, assistant(own if first == "its own" else first), user("[act: evidence]\nWhy?"))
        assert second == canonical(answer)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_advice_is_for_the_answer_that_it_would_give(teacher: Teacher, language: Language) -> None:
    seen = set()
    for case in sample(60, 7, language, "short"):
        parsed = consult.parse(best(teacher, user(f"[act: consult]\n<record>\n{case.text}\n</record>")))
        assert parsed.outcome == consult.Outcome.CLEAN
        answer = exact().answer(case.text, language)
        names = [name if language == "zh" else name[:1].lower() + name[1:] for name in answer.diseases]
        assert all(name in parsed.output.think and name in parsed.output.answer for name in names)
        graded = consult.grade(parsed.output, case.model_copy(update={"gold": parsed.output, "meta": {}}))
        assert graded.value == 1.0
        seen.add((answer.abstained, bool(urgent(parsed.output.answer))))
    assert {(False, True), (False, False)} <= seen


def test_advice_follows_from_the_analysis(teacher: Teacher) -> None:
    """The two turns together are as likely as the whole in one."""
    case = next(c for c in sample(99, 8, "zh", "short") if 0.5 < max(c.differential.values()) < 0.7)
    whole = teacher.replies(Question("consult", case.text))
    analyses = teacher.replies(Question("analysis", case.text))
    said = [consult.parse(text).output for text in whole.choice.options]
    for place, text in enumerate(whole.choice.options):
        if whole.choice.probabilities[place] < 1e-3:
            continue
        think = said[place].think
        first = analyses.choice.options.index(think)
        second = teacher.replies(Question("advice", case.text, analysis=f"{think}\n")).choice
        together = log(analyses.choice.probabilities[first]) + log(second.probabilities[second.options.index(text)])
        assert together == pytest.approx(log(whole.choice.probabilities[place]))
    other = teacher.replies(Question("advice", case.text, analysis="something else")).choice
    assert other.options[other.best] == whole.choice.options[whole.choice.best]


def test_replies_of_a_sample_differ(teacher: Teacher) -> None:
    case = next(c for c in sample(99, 8, "zh", "short") if 0.5 < max(c.differential.values()) < 0.7)
    choice = teacher.replies(Question("consult", case.text)).choice
    assert len({choice.draw(1.0, seed) for seed in range(40)}) > 2
    assert {choice.draw(0.0, seed) for seed in range(5)} == {choice.best}


def solved(language: Language, task: str) -> list[Message]:
    shown = []
    for case in draw(6, 3, language, "short", "consult" if task == "consult" else "diagnosis"):
        answer = consult.canonical(case.gold) if task == "consult" else canonical(case.gold)
        shown += [user(f"<record>\n{case.text}\n</record>"), assistant(answer)]
    return [*shown, user(f'[act: design]\n[task: {task}]\nForm: {{"diseases": ["..."], "reason": ["..."]}}')]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("task", ["diagnosis", "consult"])
def test_a_design_is_true_of_the_examples(teacher: Teacher, language: Language, task) -> None:
    messages = solved(language, task)
    choice = teacher.replies(question(messages)).choice
    assert len(choice.options) == 3
    assert choice.probabilities.tolist() == [1 / 3] * 3
    golds = [case.gold for case in draw(6, 3, language, "short", task)]
    for text in choice.options:
        assert not any(mark in text for mark in ("<record>", "[act", "[task", "{record}", "<think>"))
        assert any("一" <= character <= "鿿" for character in text) == (language == "zh")
        if task == "diagnosis":
            assert str(max(len(gold.diseases) for gold in golds)) in text
        else:
            assert str(sorted(len(gold.answer) for gold in golds)[2]) in text
            assert ("立即求助" in text or "at once" in text) == any(urgent(gold.answer) for gold in golds)
    if task == "diagnosis":
        reasons = sorted(len(gold.reason) for gold in golds)
        assert f"[reasons: {reasons[-1]}]" in choice.options[0]
        assert f"[reasons: {reasons[2]}]" in choice.options[1]
        longest = max(len(reason) for gold in golds for reason in gold.reason)
        assert f"[characters: {longest}]" in choice.options[2]


def test_other_examples_make_another_design() -> None:
    one = [assistant('{"diseases": ["A"], "reason": ["abc"]}')]
    assert designs([*one, assistant('{"diseases": [], "reason": []}')], "diagnosis") != designs(one, "diagnosis")
    assert "leave both lists empty" not in designs(one, "diagnosis")[0]
    for nothing in ([], [user('{"diseases": ["..."], "reason": 3}')], [user("<think>…</think>")]):
        for task in ("diagnosis", "consult"):
            with pytest.raises(UserError, match="the messages show none"):
                designs(nothing, task)


def test_what_is_kept_is_bounded() -> None:
    teacher = Teacher("honest", Tokens("mini"))
    for number in range(140):
        teacher.replies(Question("metadata", f"Woman, {number}."))
    assert teacher.replies.cache_info().currsize == 128
