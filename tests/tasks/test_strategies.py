"""Strategies, driven by hand: what each asks, byte for byte, and what it makes of the replies."""

import json

import pytest

from preceptor.core.errors import UserError
from preceptor.core.records import (
    Consultation,
    Diagnosis,
    Failure,
    FailureKind,
    Message,
    Reply,
    Sampling,
    Token,
    UnansweredError,
    Usage,
)
from preceptor.tasks import diagnosis, prompts
from preceptor.tasks.examples import Examples
from preceptor.tasks.strategies import (
    SCHEMAS,
    STRATEGIES,
    Asking,
    failed,
    few_shot,
    self_consistency,
    two_stage,
    zero_shot,
)
from tests.tasks.talk import USAGE, case, drive, reply

FLU = '{"diseases": ["influenza"], "reason": ["cough and fever"]}'
GOOD = Diagnosis(diseases=("influenza",), reason=("cough and fever",))
ADVICE = "<think>\nfever for 3 days\n</think>\n\nRest, and see a doctor if it lasts."


def asking(prompt="zero_shot", task="diagnosis", language="en", **more):
    correction = prompts.words(task, "correction", language)
    fields = {"sampling": Sampling(max_tokens=64), "task": task, "correction": correction}
    return Asking(prompts.load(task, prompt, language), "teacher", **{**fields, **more})


def bare(output):
    return output.model_copy(update={"evidence": ()}) if isinstance(output, Diagnosis) else output


def system(*messages):
    return [(m.role, m.content) for m in messages]


def test_zero_shot_asks_once():
    made, (request,) = drive(zero_shot(case(), asking()), [FLU])
    assert system(*request.messages) == [
        (
            "system",
            (
                "[act: diagnosis]\n"
                "Read the patient's record and name the diseases that it supports, the likeliest first.\n"
                'Reply with JSON alone: {"diseases": ["..."], "reason": ["..."]}\n'
                "Each reason quotes the record's own words. If the record does not say enough, leave both lists empty."
            ),
        ),
        ("user", "<record>\ncough and fever for 3 days\n</record>"),
    ]
    assert (bare(made.output), made.text, made.reply, made.usage) == (GOOD, FLU, "k0", USAGE)
    assert (made.output.evidence[0].start, made.output.evidence[0].end) == (0, 15)
    assert (made.corrected, made.repaired, made.revised, made.agreement) == (False, False, False, None)
    assert made.prompt_sha == prompts.prompt_sha(request.messages)


@pytest.mark.parametrize(("text", "closed"), [(FLU, True), (FLU + "\n\nThe patient", False)])
def test_json_that_was_closed_for_want_of_tokens_is_marked(text, closed):
    """A name may be cut in it; one who went on talking after whole JSON was merely cut."""
    made, _ = drive(zero_shot(case(), asking()), [Reply(text=text, finish="length", usage=USAGE, key="k0")])
    assert (bare(made.output), made.repaired, made.failure) == (GOOD, closed, None)


@pytest.mark.parametrize(
    ("prompt", "task", "act", "wanted"),
    [
        ("zero_shot", "diagnosis", "diagnosis", {"diseases", "reason"}),
        ("brief", "diagnosis", "diagnosis", {"diseases", "reason"}),
        ("stated", "diagnosis", "stated", {"diseases", "confidence", "reason"}),
        ("thinking", "diagnosis", "thinking", set()),
        ("zero_shot", "consult", "consult", set()),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_schema_goes_along_where_the_whole_reply_is_json(prompt, task, act, wanted, language):
    request = next(zero_shot(case(), asking(prompt, task, language)))
    assert prompts.act_in(request.messages) == act
    schema = json.loads(request.json_schema or "{}")
    assert set(schema.get("properties", {})) == set(schema.get("required", ())) == wanted
    assert schema.get("additionalProperties", False) is False
    written = diagnosis.canonical(GOOD, {"influenza": 0.5} if "confidence" in wanted else None)
    assert list(schema.get("properties", {})) == (list(json.loads(written)) if wanted else [])


def test_log_probabilities_are_asked_for_and_make_the_confidence():
    tokens = tuple(
        Token(utf8=part.encode(), logprob=-0.5) for part in ('{"diseases": ["', "influenza", '"], "reason": []}')
    )
    text = '{"diseases": ["influenza"], "reason": []}'
    made, (request,) = drive(zero_shot(case(), asking(logprobs=5)), [reply(text, tokens=tokens)])
    assert (request.logprobs, made.confidence) == (5, {"influenza": pytest.approx(0.36788, abs=1e-5)})
    assert next(zero_shot(case(), asking())).logprobs is None


def test_tokens_that_are_ids_make_no_confidence():
    """Whatever a disease is called: no name is looked for in the ids' own letters."""
    tokens = tuple(Token(utf8=b"token_id:%d" % number, logprob=-0.5) for number in (1, 2))
    made, _ = drive(zero_shot(case(), asking(logprobs=5)), [reply('{"diseases": ["token"]}', tokens=tokens)])
    assert (made.output.diseases, made.confidence) == (("token",), {})


# --- one corrective turn ---------------------------------------------------------------------------------------------


UNREAD = "the reply names diseases in no known form"
COMPLAINTS = {
    "en": f"Your reply can't be used: {UNREAD}. Reply again in the form that was asked for, and write nothing else.",
    "zh": f"你的回复无法使用（{UNREAD}）。请严格按要求的格式重新回复，不要写其他内容。",
}


@pytest.mark.parametrize(("language", "said"), COMPLAINTS.items())
def test_a_reply_that_cannot_be_read_is_told_why_once(language, said):
    bad = "The patient should rest and drink. It might be anything, we would need to see more."
    made, (first, second) = drive(zero_shot(case(), asking(language=language)), [bad, FLU])
    assert second.messages == (
        *first.messages,
        Message(role="assistant", content=bad),
        Message(role="user", content=said),
    )
    assert (second.sampling, second.json_schema) == (first.sampling, first.json_schema)
    assert (bare(made.output), made.corrected, made.reply, made.text) == (GOOD, True, "k1", FLU)
    assert made.usage == Usage(prompt_tokens=20, cached_tokens=8, completion_tokens=6, thinking_tokens=2)
    assert made.prompt_sha == prompts.prompt_sha(second.messages)


CUT = '{"diseases": ["influ'
PROSE = "The patient should rest and drink. It might be anything, we would need to see more."


@pytest.mark.parametrize(
    ("replies", "kind", "detail", "corrected"),
    [
        ([PROSE, PROSE], "unparsed", "the reply names diseases in no known form, after a correction too", True),
        ([PROSE, ""], "empty", "the reply is empty, after a correction too", True),
        ([PROSE, "I'm sorry, I can't."], "refused", "the reply declines to answer, after a correction too", True),
        # The limit cut it: the same request would be cut again, and the mend is named.
        (
            [reply(CUT, finish="length")],
            "truncated",
            "the reply ends before its JSON does: it has all of max_tokens=64; raise that",
            False,
        ),
        (
            [reply("", finish="length", usage=Usage())],
            "truncated",
            "the reply is empty: its prompt leaves no room in the model's context; shorten it, or show fewer examples",
            False,
        ),
        (
            [reply("", finish="length", thinking="hm", usage=Usage())],
            "truncated",
            "the reply is empty: it has all of max_tokens=64; raise that",
            False,
        ),
        # The model itself left off: that can be told.
        ([CUT, CUT], "truncated", "the reply ends before its JSON does, after a correction too", True),
        (["I'm sorry, but I can't help."], "refused", "the reply declines to answer", False),
        ([reply("", finish="refusal")], "refused", "the endpoint says that the model refused", False),
        ([""], "empty", "the reply is empty", False),
        (["```json\n```", ""], "empty", "the reply is empty, after a correction too", True),
    ],
)
def test_what_is_corrected_and_what_is_not(replies, kind, detail, corrected):
    made, _ = drive(zero_shot(case(), asking()), replies)
    assert made.failure == Failure(kind=FailureKind(kind), detail=detail)
    assert (made.output, made.corrected) == (None, corrected)


def test_without_a_correction_there_is_one_turn():
    made, _ = drive(zero_shot(case(), asking(correction="")), [PROSE])
    assert (made.failure.kind, made.corrected) == (FailureKind.UNPARSED, False)


def test_advice_is_corrected_too():
    thought = "<think>\nfever\n</think>"
    made, (_, second) = drive(zero_shot(case(), asking(task="consult")), [thought, ADVICE])
    assert second.messages[-1].content.startswith("Your reply can't be used: no advice follows the thinking. ")
    assert made.output == Consultation(think="fever for 3 days", answer="Rest, and see a doctor if it lasts.")
    assert made.corrected


def test_a_reply_cannot_change_what_it_is_about():
    bad = f"{PROSE}\n<record>\nother\n</record>\n"
    _, (_, second) = drive(zero_shot(case(), asking()), [bad, FLU])
    assert prompts.act_in(second.messages) == "diagnosis"
    assert prompts.record_in(second.messages) == case().text


# --- few-shot --------------------------------------------------------------------------------------------------------


def solved(n, **more):
    return case(
        f"record {n}", id=f"s{n}", group=f"g{n}", gold=Diagnosis(diseases=(f"d{n}",), reason=(f"r{n}",)), **more
    )


def test_few_shot_shows_solved_cases_as_turns():
    examples = Examples([solved(1), solved(2)], "fixed", 2)
    made, (request,) = drive(few_shot(case(), asking(examples=examples)), [FLU])
    head, *shown, question = request.messages
    assert (head.role, question.content) == ("system", "<record>\ncough and fever for 3 days\n</record>")
    pairs = {(shown[n].content, shown[n + 1].content) for n in (0, 2)}
    assert pairs == {
        (f"<record>\nrecord {n}\n</record>", f'{{"diseases": ["d{n}"], "reason": ["r{n}"]}}') for n in (1, 2)
    }
    assert [m.role for m in shown] == ["user", "assistant"] * 2
    assert bare(made.output) == GOOD


def test_what_all_cases_share_comes_first_byte_for_byte():
    examples = Examples([solved(n) for n in range(5)], "fixed", 3)
    heads = {next(few_shot(case(f"text {n}", id=f"{n}"), asking(examples=examples))).messages[:-1] for n in range(20)}
    assert len(heads) == 1
    assert len(next(iter(heads))) == 7


def test_few_shot_without_examples_is_refused():
    with pytest.raises(UserError, match="no examples were given"):
        next(few_shot(case(), asking()))


# --- two stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_two_stages_of_a_diagnosis(language):
    talk = two_stage(case(), asking("two_stage", language=language))
    made, (first, second) = drive(talk, ['{"diseases": ["flu"]}', FLU])
    assert [prompts.act_in(request.messages) for request in (first, second)] == ["diseases", "evidence"]
    assert (first.json_schema, second.json_schema) == (SCHEMAS["diseases"], SCHEMAS["evidence"])
    assert second.messages[:2] == first.messages
    assert second.messages[2] == Message(role="assistant", content='{"diseases": ["flu"]}')
    assert prompts.record_in(second.messages) == case().text
    assert (bare(made.output), made.reply, made.usage) == (GOOD, "k1", USAGE + USAGE)
    assert not made.revised, "flu and influenza are one disease"


@pytest.mark.parametrize(
    ("first", "second", "revised"),
    [
        (["pneumonia"], ["pneumonia"], False),
        (["肺炎"], ["pneumonia"], False),
        (["pneumonia"], ["influenza"], True),
        (["pneumonia", "influenza"], ["influenza", "pneumonia"], True),
        ([], ["influenza"], True),
        (["influenza"], [], True),
        ([], [], False),
    ],
)
def test_the_second_stage_may_correct_the_first(first, second, revised):
    replies = [json.dumps({"diseases": first}), json.dumps({"diseases": second, "reason": []})]
    made, _ = drive(two_stage(case(), asking("two_stage")), replies)
    assert (list(made.output.diseases), made.revised) == (second, revised)


def test_each_stage_is_corrected_on_its_own():
    replies = [PROSE, '{"diseases": ["flu"]}', PROSE, FLU]
    made, requests = drive(two_stage(case(), asking("two_stage")), replies)
    acts = ["diseases", "diseases", "evidence", "evidence"]
    assert [prompts.act_in(request.messages) for request in requests] == acts
    assert (made.corrected, bare(made.output)) == (True, GOOD)
    made, _ = drive(two_stage(case(), asking("two_stage")), [*replies[:2], FLU])
    assert made.corrected, "of the first stage"


@pytest.mark.parametrize("replies", [[PROSE, PROSE], ['{"diseases": ["flu"]}', PROSE, PROSE]])
def test_a_stage_that_fails_ends_it(replies):
    made, _ = drive(two_stage(case(), asking("two_stage")), replies)
    assert (made.failure.kind, made.output, made.revised) == (FailureKind.UNPARSED, None, False)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("analysis", ["three days of fever", "<think>\nthree days of fever\n</think>"])
def test_two_stages_of_advice(language, analysis):
    talk = two_stage(case(), asking("two_stage", "consult", language))
    made, (first, second) = drive(talk, [analysis, ADVICE])
    assert [prompts.act_in(request.messages) for request in (first, second)] == ["analysis", "advice"]
    assert (first.json_schema, second.json_schema) == ("", "")
    assert made.output == Consultation(think="fever for 3 days", answer="Rest, and see a doctor if it lasts.")
    assert not made.revised
    made, _ = drive(two_stage(case(), asking("two_stage", "consult", language)), [analysis, "Rest."])
    assert made.output == Consultation(think="three days of fever", answer="Rest.")


def test_two_stages_need_a_prompt_of_two():
    with pytest.raises(UserError, match="the prompt asks once"):
        next(two_stage(case(), asking()))


# --- self-consistency ------------------------------------------------------------------------------------------------


def test_samples_vote():
    texts = [
        '{"diseases": ["pneumonia"], "reason": ["cough"]}',
        '{"diseases": ["flu", "sinusitis"], "reason": ["fever"]}',
        FLU,
        '{"diseases": ["influenza"], "reason": ["3 days"]}',
    ]
    made, requests = drive(self_consistency(case(), asking(votes=4, sampling=Sampling(temperature=1))), texts)
    assert len(set(requests)) == 1, "the same is asked each time; the ledger numbers the draws"
    assert (bare(made.output), made.agreement) == (GOOD, 0.75)
    assert (made.confidence, made.text, made.reply) == ({"influenza": 0.75}, FLU, "k2")
    assert made.usage == Usage(prompt_tokens=40, cached_tokens=16, completion_tokens=12, thinking_tokens=4)


def test_samples_that_fail_have_no_vote_but_count():
    none = '{"diseases": [], "reason": []}'
    made, _ = drive(self_consistency(case(), asking(votes=5, correction="")), [PROSE, none, FLU, none, ""])
    assert (made.abstained, made.agreement, made.confidence) == (True, 0.4, {})
    made, _ = drive(self_consistency(case(), asking(votes=2, correction="")), [PROSE, ""])
    assert made.failure == Failure(kind=FailureKind.EMPTY, detail="the reply is empty")
    assert (made.agreement, made.usage) == (None, USAGE + USAGE)


def test_advice_is_chosen_on_the_side_of_the_majority():
    home = "Rest at home and drink a lot."
    urgent = ["Call 911 now and lie down.", "Call 911 now and lie down please.", "Call 911 now."]
    made, _ = drive(self_consistency(case(), asking(task="consult", votes=5)), [home, *urgent, home])
    assert (made.output.answer, made.agreement) == ("Call 911 now and lie down.", 0.6)


# --- both tasks, both languages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("task", "text"), [("diagnosis", FLU), ("consult", ADVICE)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_strategy_serves(strategy, task, text, language):
    gold = GOOD if task == "diagnosis" else Consultation(answer="See a doctor.")
    examples = Examples([case("other", id="o", group="o", gold=gold)], "nearest", 1)
    how = asking("two_stage" if strategy == "two_stage" else "zero_shot", task, language, examples=examples, votes=2)
    talk = STRATEGIES[strategy](case(), how)
    made, requests = drive(talk, [text] * (2 if strategy in ("two_stage", "self_consistency") else 1))
    assert made.failure is None
    assert type(made.output) is type(gold)
    assert all(prompts.record_in(request.messages) == case().text for request in requests)


def test_thinking_told_apart_is_the_advices_own():
    made, _ = drive(zero_shot(case(), asking(task="consult")), [reply("Rest.", thinking="no red flag")])
    assert made.output == Consultation(think="no red flag", answer="Rest.")
    made, _ = drive(zero_shot(case(), asking(task="consult")), [reply(ADVICE, thinking="elsewhere")])
    assert (made.output.think, made.thinking) == ("fever for 3 days", "elsewhere")


def test_a_conversation_that_a_failure_ends_tells_what_was_sent():
    failure = Failure(kind=FailureKind.TIMEOUT, detail="60 s")
    sent = (Message(role="user", content="x"),)
    made = failed(case(), asking(sample=3), failure, sent)
    assert (made.failure, made.prompt_sha, made.sample) == (failure, prompts.prompt_sha(sent), 3)


def test_a_lost_sample_costs_a_vote_and_no_case():
    talk = self_consistency(case(), asking(votes=3, sampling=Sampling(temperature=1.0)))
    next(talk)
    talk.send(reply(FLU))
    talk.throw(UnansweredError(Failure(kind=FailureKind.PROVIDER, detail="500")))
    with pytest.raises(StopIteration) as end:
        talk.send(reply(FLU))
    prediction = end.value.value
    assert bare(prediction.output) == GOOD
    assert prediction.agreement == pytest.approx(2 / 3)
    assert prediction.usage == USAGE + USAGE


def test_where_all_samples_are_lost_the_last_failure_is_the_answers():
    talk = self_consistency(case(), asking(votes=2, sampling=Sampling(temperature=1.0)))
    next(talk)
    talk.throw(UnansweredError(Failure(kind=FailureKind.PROVIDER, detail="500")))
    with pytest.raises(StopIteration) as end:
        talk.throw(UnansweredError(Failure(kind=FailureKind.TIMEOUT, detail="gone")))
    assert end.value.value.failure == Failure(kind=FailureKind.TIMEOUT, detail="gone")
