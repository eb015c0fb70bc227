"""How sure an answer is, by each source: what is asked for it, byte for byte, and what becomes of the replies."""

import json
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import (
    Consultation,
    Failure,
    FailureKind,
    Message,
    Prediction,
    Reply,
    Sampling,
    Token,
    UnansweredError,
    Usage,
)
from preceptor.llm.ledger import request_key
from preceptor.tasks import prompts
from preceptor.tasks.strategies import SCHEMAS, STRATEGIES, Asking, two_stage, zero_shot
from preceptor.tasks.sureness import with_confidence
from tests.tasks.talk import USAGE, case, drive, reply

CONTEXT = case("咳嗽 and fever")
LOST = "it was lost"


def asking(prompt="zero_shot", confidence=None, **more):
    fields = {"sampling": Sampling(max_tokens=64), "confidence": confidence}
    return Asking(prompts.load("diagnosis", prompt, "en"), "m", **{**fields, **more})


def said(*diseases, **more):
    return json.dumps({"diseases": list(diseases), **more, "reason": []}, ensure_ascii=False)


def scores(*shares):
    return reply(tokens=tuple(Token(utf8=b"?", logprob=log(share)) for share in shares))


def sure(strategy, replies, *args, **more):
    return drive(with_confidence(strategy)(CONTEXT, asking(*args, **more)), replies)


def ways(request):
    """How a request for scores has the answer begin, and go on."""
    assert (request.messages[-1].role, request.json_schema, request.logprobs) == ("assistant", "", None)
    return request.messages[-1].content, list(request.candidates)


# --- the token chain, and no source: as ever ----------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [None, "chain"])
def test_the_chain_asks_nothing_more(confidence):
    words = ('{"diseases": ["', "Gout", '"], "reason": []}')
    tokens = tuple(Token(utf8=part.encode(), logprob=-0.25) for part in words)
    made, (request,) = sure(zero_shot, [reply("".join(words), tokens=tokens)], confidence=confidence, logprobs=0)
    assert (made.confidence, made.distribution, made.usage) == ({"Gout": pytest.approx(0.60653, abs=1e-5)}, {}, USAGE)
    assert request == next(zero_shot(CONTEXT, asking(logprobs=0)))


KEYS = {
    ("zero_shot", None): ["5eb1b49144b8"],
    ("zero_shot", 0): ["2284b4baae98"],
    ("two_stage", None): ["e1bcc2a1ed48", "800bb854561f"],
    ("two_stage", 0): ["cb832e6eebe2", "ea481c5d9246"],
}


@pytest.mark.parametrize(("how", "keys"), KEYS.items())
def test_stored_replies_still_serve(how, keys):
    name, logprobs = how
    answer = '{"diseases": ["influenza"], "reason": ["cough and fever"]}'
    talk = with_confidence(STRATEGIES[name])(case(), asking(name, logprobs=logprobs))
    _, asked = drive(talk, [answer] * len(keys))
    assert [request_key("local", "m", request).hex()[:12] for request in asked] == keys


# --- stated ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        (said("Gout", "Asthma", confidence=[0.8, 0.1]), {"Gout": 0.8, "Asthma": 0.1}),
        (said("Gout", "Asthma", confidence=[0.8, 7]), {"Gout": 0.8}),
        (said("Gout"), {}),
        (said(confidence=[]), {}),
        ("诊断：痛风\n置信度：80%", {"痛风": 0.8}),
    ],
)
def test_the_number_that_the_reply_states(text, confidence):
    made, (request,) = sure(zero_shot, [text], "stated", "stated", logprobs=0)
    assert (made.confidence, made.distribution, made.usage) == (confidence, {}, USAGE)
    assert json.loads(request.json_schema)["properties"]["confidence"]["items"] == {"type": "number"}
    assert list(json.loads(SCHEMAS["stated"])["properties"]) == ["diseases", "confidence", "reason"]


# --- samples --------------------------------------------------------------------------------------------------------


def test_shares_of_the_samples():
    answers = [
        said("Gout", "Asthma"),
        said("asthma", "Gout"),  # the same disease by another wording
        said("Gout", "Gout"),  # named twice by one sample
        said(),
        "I see.",
        said("Flu", "Gout"),
    ]
    made, (first, *others) = sure(zero_shot, answers, confidence="samples", logprobs=0)
    assert {request.sampling.temperature for request in others} == {1.0}
    assert others == [first.model_copy(update={"sampling": others[0].sampling, "logprobs": None})] * 5
    assert (first.sampling.temperature, first.logprobs) == (0.0, 0)
    assert made.confidence == {"Gout": 0.6, "Asthma": 0.2}
    assert made.distribution == {"Asthma": 0.2, "Gout": 0.2, "": 0.2, "Flu": 0.2}
    assert (made.text, made.output.diseases) == (answers[0], ("Gout", "Asthma"))
    assert made.usage == sum([USAGE] * 5, USAGE)


def test_samples_of_two_stages_draw_both():
    first, last = '{"diseases": ["Gout"]}', said("Gout")
    made, asked = sure(two_stage, [first, last, first, said("Asthma"), first, last], "two_stage", "samples", votes=2)
    assert [prompts.act_in(request.messages) for request in asked] == ["diseases", "evidence"] * 3
    assert [request.sampling.temperature for request in asked] == [0, 0, 1, 1, 1, 1]
    assert (made.confidence, made.distribution) == ({"Gout": 0.5}, {"Asthma": 0.5, "Gout": 0.5})


def test_a_sample_that_was_lost_names_nothing():
    talk = with_confidence(zero_shot)(CONTEXT, asking(confidence="samples", votes=2))
    next(talk)
    talk.send(reply(said("Gout")))
    talk.throw(UnansweredError(Failure(kind=FailureKind.TIMEOUT, detail=LOST)))
    with pytest.raises(StopIteration) as end:
        talk.send(reply(said("Gout")))
    assert (end.value.value.confidence, end.value.value.distribution) == ({"Gout": 0.5}, {"Gout": 0.5})


# --- candidates -----------------------------------------------------------------------------------------------------


def test_candidates_are_scored_where_the_first_name_stands():
    names = ("Influenza", 'Crohn "x"', "流感", "哮喘")
    made, (asked, scored) = sure(
        zero_shot,
        [said("Influenza"), scores(0.5, 0.1, 0.05, 0.2, 0.05)],
        confidence="candidates",
        candidates=names,
        logprobs=0,
    )
    assert scored.messages[:-1] == asked.messages
    assert scored.sampling == asked.sampling
    assert ways(scored) == ('{"diseases": [', ['"Influenza"', '"流感"', '"Crohn \\"x\\""', '"哮喘"', "]"])
    assert made.distribution == pytest.approx({"Influenza": 0.6, 'Crohn "x"': 0.05, "哮喘": 0.2, "": 0.05})
    assert made.confidence == pytest.approx({"Influenza": 0.6}), "two names of one disease are one"
    assert made.usage == USAGE + USAGE


def test_a_further_disease_stands_behind_those_before_it():
    replies = [said("Gout", "Asthma", "Flu"), scores(0.6, 0.2, 0.05, 0.1), scores(0.5, 0.25), scores(0.5)]
    made, (_, _, second, third) = sure(
        zero_shot, replies, confidence="candidates", candidates=("Gout", "Asthma", "Flu")
    )
    assert ways(second) == ('{"diseases": ["Gout"', [', "Asthma"', ', "Flu"'])
    assert ways(third) == ('{"diseases": ["Gout", "Asthma"', [', "Flu"'])
    #                 first   Gout, then      Gout, Asthma, then
    chances = {"Gout": 0.6, "Asthma": 0.2 + 0.6 * 0.5, "Flu": 0.05 + 0.6 * 0.25 + 0.6 * 0.5 * 0.5}
    assert made.confidence == pytest.approx(chances)
    assert made.distribution == pytest.approx({"Gout": 0.6, "Asthma": 0.2, "Flu": 0.05, "": 0.1})


def test_what_the_answer_names_is_a_candidate_by_its_own_words():
    made, (_, scored) = sure(
        zero_shot, [said("podagra nova"), scores(0.2, 0.3, 0.1)], confidence="candidates", candidates=("Gout",)
    )
    assert ways(scored)[1] == ['"Gout"', '"podagra nova"', "]"]
    assert (made.confidence, list(made.distribution)) == (
        {"podagra nova": pytest.approx(0.3)},
        ["Gout", "podagra nova", ""],
    )


def test_an_abstention_has_a_distribution():
    made, (_, scored) = sure(zero_shot, [said(), scores(0.2, 0.7)], confidence="candidates", candidates=("Gout",))
    assert ways(scored) == ('{"diseases": [', ['"Gout"', "]"])
    assert (made.confidence, made.distribution) == ({}, pytest.approx({"Gout": 0.2, "": 0.7}))


def test_one_disease_named_twice_is_asked_about_once():
    replies = [said("Influenza", "流感", "Asthma"), scores(0.4, 0.2, 0.1, 0.1), scores(0.5)]
    made, (*_, last) = sure(zero_shot, replies, confidence="candidates", candidates=("Influenza", "Asthma"))
    assert ways(last) == ('{"diseases": ["Influenza"', [', "Asthma"'])
    assert made.confidence == pytest.approx({"Influenza": 0.6, "流感": 0.6, "Asthma": 0.1 + 0.6 * 0.5})


@pytest.mark.parametrize("corrected", [False, True])
def test_of_two_stages_the_first_names_the_diseases(corrected):
    turns = ['{"diseases": ["Gout"]}', *(["I see."] if corrected else []), said("Gout")]
    more = {"correction": "Again: {complaint}"} if corrected else {}
    _, (first, *_, scored) = sure(
        two_stage, [*turns, scores(0.4, 0.1)], "two_stage", "candidates", candidates=("Gout",), **more
    )
    assert scored.messages[:-1] == first.messages


def test_a_question_that_was_asked_again_is_asked_so():
    _, (_, again, scored) = sure(
        zero_shot, ["I see.", said("Gout"), scores(0.4, 0.1)], confidence="candidates", candidates=("Gout",),
        correction="Again: {complaint}",
    )  # fmt: skip
    assert scored.messages[:-1] == again.messages


def test_what_was_thought_stands_before_the_answer():
    thought = '<think>\n{"diseases": ["Asthma"]}\n</think>\n\n'
    _, (_, scored) = sure(
        zero_shot, [thought + said("Gout"), scores(0.4, 0.1)], "thinking", "candidates", candidates=("Gout",)
    )
    assert ways(scored)[0] == thought + '{"diseases": ['


@pytest.mark.parametrize("broken", [reply(), scores(0.5), scores(0.5, 0.2, 0.1), "Gout"])
def test_without_scores_there_is_no_confidence(broken):
    made, _ = sure(zero_shot, [said("Gout"), broken], confidence="candidates", candidates=("Gout",))
    assert (made.confidence, made.distribution, made.output.diseases) == ({}, {}, ("Gout",))


def test_a_lost_score_leaves_the_answer_as_it_is():
    talk = with_confidence(zero_shot)(CONTEXT, asking(confidence="candidates", candidates=("Gout",)))
    next(talk)
    talk.send(reply(said("Gout", "Asthma")))
    talk.send(scores(0.5, 0.2, 0.1))
    with pytest.raises(StopIteration) as end:
        talk.throw(UnansweredError(Failure(kind=FailureKind.PROVIDER, detail=LOST)))
    made = end.value.value
    assert (made.confidence, made.output.diseases) == ({}, ("Gout", "Asthma"))
    assert made.distribution == pytest.approx({"Gout": 0.5, "Asthma": 0.2, "": 0.1})


# --- all ------------------------------------------------------------------------------------------------------------

MORE = ["stated", "samples", "candidates"]


@pytest.mark.parametrize("confidence", MORE)
def test_a_failed_answer_has_none_and_nothing_more_is_asked(confidence):
    made, asked = sure(zero_shot, ["I see."], confidence=confidence)
    assert (made.failure.kind, made.confidence, made.distribution, len(asked)) == (FailureKind.UNPARSED, {}, {}, 1)


@pytest.mark.parametrize("confidence", MORE)
def test_an_answer_that_was_lost_stays_lost(confidence):
    talk = with_confidence(zero_shot)(CONTEXT, asking(confidence=confidence))
    next(talk)
    with pytest.raises(UnansweredError, match=LOST):
        talk.throw(UnansweredError(Failure(kind=FailureKind.TIMEOUT, detail=LOST)))


@pytest.mark.parametrize("confidence", MORE)
def test_what_is_no_diagnosis_is_left_alone(confidence):
    def own(case, asking):
        yield next(zero_shot(case, asking))
        return Prediction(case_id="c", model="m", prompt_sha="", output=Consultation(answer="Rest."))

    made, _ = sure(own, ["Rest."], confidence=confidence)
    assert (made.output.answer, made.confidence) == ("Rest.", {})


_NAMES = st.lists(st.sampled_from(["Gout", "Asthma", "痛风", "Flu", "x y"]), max_size=4)


@given(
    st.sampled_from(MORE),
    st.lists(_NAMES, min_size=7, max_size=7),
    st.lists(st.floats(-40, 0), min_size=40, max_size=40),
)
def test_probabilities_are_some_and_a_replay_gives_the_same(confidence, answers, logprobs):
    """Shares may sum to more than 1 in a reply that is rounded, or made up."""

    def run():
        talk = with_confidence(zero_shot)(CONTEXT, asking(confidence=confidence, candidates=("Gout", "哮喘")))
        request, script, asked = next(talk), iter(answers), []
        while True:
            asked.append(request)
            tokens = tuple(Token(utf8=b"", logprob=one) for one in logprobs[: len(request.candidates)])
            words = "" if request.candidates else said(*next(script), confidence=[0.5] * 2)
            try:
                request = talk.send(Reply(text=words, tokens=tokens))
            except StopIteration as end:
                return end.value, asked

    (made, asked), again = run(), run()
    assert (made, asked) == again
    assert set(made.confidence) <= set(made.output.diseases)
    assert all(0 <= share <= 1 for share in (*made.confidence.values(), *made.distribution.values()))
    assert sum(made.distribution.values()) <= 1 + 1e-9
    if confidence != "stated":
        assert set(made.confidence) == set(made.output.diseases)
    if confidence == "candidates" and made.output.diseases:
        assert all(request.messages[-1] == Message(role="assistant", content=ways(request)[0]) for request in asked[1:])
        assert made.usage == Usage()
