"""Which examples are shown to which case."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Consultation, Diagnosis
from preceptor.tasks.examples import Examples, solution
from tests.tasks.talk import case

TEXTS = {
    "a": "cough and fever for three days",
    "b": "pain in the big toe at night",
    "c": "cough and fever for a week",
    "d": "咳嗽、发热三天",
    "e": "夜间大脚趾疼痛",
    "f": "咳嗽咳痰一周，发热",
}


def solved(identity, text=None, group=None, **more):
    gold = Diagnosis(diseases=(identity,), reason=("r",))
    return case(text or TEXTS[identity], id=identity, group=group or identity, **{"gold": gold, **more})


ALL = [solved(identity) for identity in TEXTS]


@pytest.mark.parametrize(
    ("text", "shots", "shown"),
    [
        ("fever and cough since yesterday, three days", 2, ["c", "a"]),
        ("toe pain", 1, ["b"]),
        ("发热伴咳嗽三天", 2, ["f", "d"]),
        ("大脚趾痛", 1, ["e"]),
    ],
)
def test_the_nearest_stand_next_to_the_question(text, shots, shown):
    found = Examples(ALL, "nearest", shots).of(case(text, id="x", group="x"))
    assert [text for text, _ in found] == [TEXTS[identity] for identity in shown]


@pytest.mark.parametrize("choice", ["fixed", "random", "nearest"])
def test_neither_the_case_nor_its_group_nor_its_words_nor_two_of_one_group(choice):
    pool = [
        solved("me", "cough"),
        solved("kin", "cough again", "mine"),
        solved("twin", "  Cough ", "other"),
        solved("p1", "cough b", "p"),
        solved("p2", "cough c", "p"),
        solved("q", "cough d", "q"),
    ]
    for seed in range(20):
        shown = Examples(pool, choice, 5, seed).of(case("cough", id="me", group="mine"))
        texts = {text for text, _ in shown}
        assert len(shown) == len(texts) == 2
        assert "cough d" in texts
        assert texts < {"cough b", "cough c", "cough d"}


def test_random_is_a_function_of_seed_and_case():
    pool = [solved(f"s{n}", f"text {n}") for n in range(50)]
    one = [Examples(pool, "random", 3, seed=1).of(case("x", id=f"{n}")) for n in range(20)]
    shuffled = list(range(20))
    random.Random(0).shuffle(shuffled)
    examples = Examples(pool, "random", 3, seed=1)
    assert {n: examples.of(case("x", id=f"{n}")) for n in shuffled} == dict(enumerate(one))
    assert len({tuple(shown) for shown in one}) == 20
    assert Examples(pool, "random", 3, seed=2).of(case("x", id="0")) != one[0]


def test_fixed_ones_are_the_same_for_all_but_those_who_are_among_them():
    pool = [solved(f"s{n}", f"text {n}") for n in range(10)]
    examples = Examples(pool, "fixed", 3, seed=1)
    shown = examples.of(case("x", id="x"))
    assert all(examples.of(case("x", id=f"x{n}")) == shown for n in range(10))
    own = next(one for one in pool if one.text == shown[0][0])
    assert examples.of(own)[:2] == shown[1:]
    assert len(examples.of(own)) == 3


@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=8),
    st.text(max_size=6),
    st.sampled_from(["fixed", "random", "nearest"]),
)
def test_any_text_can_be_compared(texts, text, choice):
    pool = [solved(f"s{n}", one or " ") for n, one in enumerate(texts)]
    shown = Examples(pool, choice, 3).of(case(text, id="x", group="x"))
    assert len(shown) <= min(3, len(pool))


@pytest.mark.parametrize(
    ("more", "written"),
    [
        ({}, '{"diseases": ["a"], "reason": ["r"]}'),
        ({"expects_abstention": True}, '{"diseases": [], "reason": []}'),
        ({"gold": Consultation(answer="Rest.")}, "Rest."),
        ({"gold": Consultation(think="hm", answer="Rest.")}, "<think>hm</think>\nRest."),
    ],
)
def test_the_answer_that_a_case_should_get(more, written):
    assert solution(solved("a", **more)) == written
