"""Votes of samples, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Consultation, Diagnosis
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.voting import consultations, diagnoses

NAMER = textbook_namer()


def sample(*names, reason="r"):
    return Diagnosis(diseases=names, reason=(reason,) if names else ())


@pytest.mark.parametrize(
    ("samples", "diseases", "chosen", "votes", "counts"),
    [
        ([["flu"]], ["flu"], 0, 1, {"flu": 1}),
        # Names of one disease count together, in either language; the earliest voter's words stand.
        ([["pneumonia"], ["influenza"], ["流感"]], ["influenza"], 1, 2, {"influenza": 2}),
        # Beside the winner: what more than half of its voters name. `gout` is named by one of two.
        ([["flu", "gout"], ["flu", "asthma"], ["gout"]], ["flu"], 0, 2, {"flu": 2}),
        ([["flu", "gout"], ["flu", "gout", "asthma"], ["asthma"]], ["flu", "gout"], 0, 2, {"flu": 2, "gout": 2}),
        # The words are of the voter that says just this, though it is not the first.
        ([["flu", "asthma"], ["flu"], ["flu"]], ["flu"], 1, 3, {"flu": 3}),
        # Confidence counts who names a disease at all, in whichever place.
        ([["flu"], ["flu"], ["gout", "flu"]], ["flu"], 0, 2, {"flu": 3}),
        # Abstention takes part.
        ([[], ["flu"], []], [], 0, 2, {}),
        ([["flu"], [], ["gout"]], ["flu"], 0, 1, {"flu": 1}),
        ([[], ["flu"]], [], 0, 1, {}),
        # One name twice in a sample is one vote.
        ([["flu", "influenza"], ["gout"], ["gout"]], ["gout"], 1, 2, {"gout": 2}),
        # Unknown names are compared by their normal form.
        ([["Foo Syndrome"], ["gout"], ["foo syndrome"]], ["Foo Syndrome"], 0, 2, {"Foo Syndrome": 2}),
    ],
)
def test_diagnoses(samples, diseases, chosen, votes, counts):
    vote = diagnoses([sample(*names) for names in samples], NAMER)
    assert (list(vote.output.diseases), vote.chosen, vote.votes, vote.counts) == (diseases, chosen, votes, counts)


def test_reasons_are_the_chosen_samples():
    vote = diagnoses([sample("gout", reason="toe"), sample("flu", reason="a"), sample("flu", reason="b")], NAMER)
    assert vote.output.reason == ("a",)


@given(st.lists(st.lists(st.sampled_from(["flu", "流感", "gout", "asthma", "?"]), max_size=3), min_size=1, max_size=6))
def test_any_vote_holds_together(samples):
    vote = diagnoses([sample(*names) for names in samples], NAMER)
    assert 1 <= vote.votes <= len(samples)
    assert set(vote.counts) == set(vote.output.diseases)
    assert all(1 <= n <= len(samples) for n in vote.counts.values())
    first = vote.output.diseases[:1]
    own = samples[vote.chosen][:1]
    assert [NAMER.concept(name) for name in first] == [NAMER.concept(name) for name in own]
    assert all(vote.counts[name] >= vote.votes for name in first)


@pytest.mark.parametrize(
    ("answers", "chosen", "votes"),
    [
        (["Rest at home."], 0, 1),
        (["Rest.", "Rest and drink tea.", "Rest and drink water."], 1, 3),
        (["Call 911 now.", "Rest.", "Rest a lot."], 1, 2),
        (["Rest.", "Call 911 now."], 1, 1),  # even: the urgent side
        (["请立即去急诊。", "在家休息，多喝水。", "请立即前往急诊。"], 0, 2),
    ],
)
def test_advice(answers, chosen, votes):
    vote = consultations([Consultation(answer=answer) for answer in answers])
    assert (vote.chosen, vote.votes, vote.output.answer) == (chosen, votes, answers[chosen])
