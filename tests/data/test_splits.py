import random
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis
from preceptor.data.similar import families
from preceptor.data.splits import SPLITS, assign, benchmark, crossings, family_key, joined, member

SHARES = {"train": 8, "validation": 1, "test": 1}
EMPTY = "主诉: 咳嗽3天\n现病史: \n既往史: "
RECORD = "主诉: 咳嗽3天\n现病史: 无发热。"


def record(name, text=None, group=None, gold=None, **meta):
    text = f"text {name}" if text is None else text
    group = family_key(text) if group is None else group
    return Case(id=str(name), text=text, language="zh", source="t", group=group, gold=gold, meta=meta)


def case(*args, **fields):
    return member(record(*args, **fields))


def dated(day, **fields):
    return case(day, date=(date(2024, 1, 1) + timedelta(days=day)).isoformat(), **fields)


@st.composite
def lists_of_cases(draw):
    number = draw(st.integers(1, 60))
    some = st.lists(st.integers(0, 30), min_size=number, max_size=number)
    return [
        case(f"c{place}", text=f"text {text}", group=f"g{group}", specialty=f"s{group % 3}", risk_level=f"r{text % 2}")
        for place, (text, group) in enumerate(zip(draw(some), draw(some), strict=True))
    ]


weights = st.fixed_dictionaries(dict.fromkeys(SPLITS, st.sampled_from([0, 0.1, 1, 8])))


def split_up(cases, splits):
    return {name: [case for case, split in zip(cases, splits, strict=True) if split == name] for name in SPLITS}


def units(cases):
    return Counter(case.group for case in joined(cases, range(len(cases))))


@given(st.text(), st.text(alphabet=" \n\t"))
def test_texts_that_differ_in_space_alone_share_a_key(text, space):
    assert family_key(space + text + space) == family_key(text)
    assert family_key("ＡＢＣ，x") == family_key("abc,X")
    assert family_key("发热") != family_key("无发热")


@pytest.mark.parametrize(
    ("cases", "numbers", "expected"),
    [
        ([], [], []),
        ([case(1, group="b"), case(2, group="a")], [0, 1], ["b", "a"]),
        ([case(1, group="b"), case(2, group="a")], [0, 0], ["a", "a"]),
        ([case(1, "x", "b"), case(2, " X", "a"), case(3, group="c")], [0, 1, 2], ["a", "a", "c"]),
        # 1 and 2 have a family in common, 2 and 3 a patient, 3 and 4 a text.
        ([case(1, group="d"), case(2, group="c"), case(3, "x", "c"), case(4, "x", "b")], [0, 0, 2, 3], ["b"] * 4),
        # A patient's name goes before that of a text, wherever it is in the alphabet.
        ([case(1), case(2, group="zoe")], [0, 0], ["zoe", "zoe"]),
    ],
)
def test_joined(cases, numbers, expected):
    found = joined(cases, numbers)
    assert [case.group for case in found] == expected
    assert [replace(case, group="") for case in found] == [replace(case, group="") for case in cases]


@given(lists_of_cases(), weights, st.integers(0, 9), st.randoms(use_true_random=False))
def test_no_unit_crosses_and_order_changes_nothing(cases, shares, seed, rng):
    if not any(shares.values()):
        with pytest.raises(UserError, match="leaves no case a place"):
            assign(cases, shares, "family", seed)
        return
    splits = assign(cases, shares, "family", seed)
    assert crossings(split_up(cases, splits)) == []
    shuffled = rng.sample(cases, len(cases))
    again = assign(shuffled, shares, "family", seed)
    assert {case.id: split for case, split in zip(shuffled, again, strict=True)} == {
        case.id: split for case, split in zip(cases, splits, strict=True)
    }


@given(lists_of_cases(), weights.filter(lambda shares: any(shares.values())))
def test_shares_are_met_within_the_largest_unit(cases, shares):
    counts, largest = Counter(assign(cases, shares)), max(units(cases).values())
    for split, share in shares.items():
        wanted = share / sum(shares.values()) * len(cases)
        assert -1.5 * largest < counts[split] - wanted < largest
        assert share or not counts[split]


def test_strata_are_shared_out_alike():
    rng = random.Random(0)
    cases = [
        case(number, specialty=rng.choice(["急诊", "儿科", "内科"]), risk_level=rng.choice(["low", "high"]))
        for number in range(3000)
    ]
    strata = defaultdict(Counter)
    for item, split in zip(cases, assign(cases, SHARES), strict=True):
        strata[item.stratum][split] += 1
    assert len(strata) == 6
    for counts in strata.values():
        assert abs(counts["train"] - 0.8 * counts.total()) < 2
        assert abs(counts["test"] - 0.1 * counts.total()) < 2


def test_a_unit_counts_as_what_most_of_its_cases_are():
    cases = [case(0, group="g", specialty="b"), case(1, group="g", specialty="a"), case(2, group="g", specialty="b")]
    others = [case(f"o{number}", specialty="b") for number in range(40)]
    alone = [case(3, group="g", specialty="b"), case(4, group="g", specialty="b"), case(5, group="g", specialty="b")]
    assert assign(cases + others, SHARES)[3:] == assign(alone + others, SHARES)[3:]


def test_another_seed_is_another_draw():
    cases = [case(number) for number in range(200)]
    draws = {tuple(assign(cases, SHARES, seed=seed)) for seed in range(5)}
    assert len(draws) == 5
    assert assign(cases, SHARES, seed=3) == assign(cases, SHARES, seed=3)


def test_near_copies_stay_together_once_joined():
    texts = [f"咳嗽咳痰{number}天，伴发热，体温38.{number}度，无胸痛" for number in range(9)]
    texts += [chr(0x4E00 + 20 * number) * 9 for number in range(40)]
    cases = joined([case(number, text) for number, text in enumerate(texts)], families(texts))
    splits = assign(cases, SHARES)
    assert len(set(splits[:9])) == 1
    assert len({case.group for case in cases}) == 41
    assert crossings(split_up(cases, splits)) == []


def test_by_patient_every_case_needs_one():
    known = [case(number, group=f"p{number // 3}") for number in range(30)]
    splits = assign(known, SHARES, "patient")
    assert all(len(set(splits[start : start + 3])) == 1 for start in range(0, 30, 3))
    with pytest.raises(
        UserError, match=r"split by patient: 5 of 35 cases have none \(a0, a1, a2 and 2 more\); give them one"
    ):
        assign(known + [case(f"a{number}") for number in range(5)], SHARES, "patient")
    mixed = joined([*known, case("a0"), case("a1", "text b"), case("a2", "text c")], [*range(30), 0, 50, 50])
    with pytest.raises(UserError, match=r"2 of 33 cases have none \(a1, a2\)"):
        assign(mixed, SHARES, "patient")


def test_by_date_the_earliest_train_and_the_latest_test():
    cases = [dated(day) for day in range(100)]
    random.Random(0).shuffle(cases)
    parts = split_up(cases, assign(cases, SHARES, "date"))
    days = {split: sorted(int(case.id) for case in part) for split, part in parts.items()}
    assert days == {"train": list(range(80)), "validation": list(range(80, 90)), "test": list(range(90, 100))}
    assert set(assign(cases, {"train": 1, "validation": 0, "test": 1}, "date")) == {"train", "test"}
    assert set(assign(cases, {"train": 0, "validation": 0, "test": 1}, "date")) == {"test"}


def test_by_date_a_family_on_the_border_goes_where_its_middle_is():
    for copies, expected in ((3, "train"), (5, "test")):
        cases = [*(dated(day) for day in range(3)), *(dated(3 + n, group="g") for n in range(copies)), dated(9)]
        assert assign(cases, {"train": 5, "validation": 0, "test": copies - 1}, "date")[3] == expected


def test_by_date_a_family_goes_with_its_latest_case():
    cases = [dated(day, group="returns" if day in (0, 50, 99) else None) for day in range(100)]
    splits = assign(cases, SHARES, "date")
    assert [splits[day] for day in (0, 50, 99)] == ["test"] * 3
    train = max(case.day for case, split in zip(cases, splits, strict=True) if split == "train")
    later = [case for case, split in zip(cases, splits, strict=True) if split != "train" and case.group != "returns"]
    assert all(case.day > train for case in later)


@pytest.mark.parametrize("value", [None, "", "yesterday", "2024-13-01", 7])
def test_by_date_every_case_needs_one(value):
    cases = [dated(1), case("a", date=value), case("b")]
    with pytest.raises(UserError, match=r"split by date: 2 of 3 cases have none \(a, b\)"):
        assign(cases, SHARES, "date")
    assert len(assign([dated(1), case("a", date="2024-02-03T10:00:00")], SHARES, "date")) == 2


@pytest.mark.parametrize("shares", [{}, {"train": 0}, {"train": -1, "test": 3}])
def test_shares_that_leave_no_place(shares):
    with pytest.raises(UserError, match="give train, validation or test a number above 0"):
        assign([case(1)], shares)


REASONED = Diagnosis(diseases=("感冒",), reason=("咳嗽",))
THOUGHT = Consultation(think="y", answer="x")
NAMED = Diagnosis(diseases=("感冒",))


@pytest.mark.parametrize(
    ("cases", "number", "expected"),
    [
        ([], 3, ""),
        ([record("a"), record("b")], 0, ""),
        ([record("a", gold=NAMED), record("b", gold=REASONED), record("c")], 1, "b"),
        ([record("a", gold=NAMED), record("b"), record("c")], 1, "a"),
        ([record("a", gold=REASONED, leaks=["辅助检查"]), record("b"), record("c", leaks=[])], 3, "bc"),
        ([record("a", RECORD, gold=NAMED), record("b", gold=NAMED), record("c", gold=NAMED), record("d")], 1, "a"),
        (
            [record("b", EMPTY), record("c", EMPTY.replace("3", "4")), record("d", RECORD), record("e", EMPTY + "\n")],
            1,
            "d",
        ),
        ([record("a", group="g", gold=NAMED), record("b", group="g", gold=REASONED), record("c")], 3, "bc"),
        ([*(record(name, gold=Consultation(answer="x")) for name in "abde"), record("c", gold=THOUGHT)], 1, "c"),
        # In turn from each specialty, its best first.
        (
            [
                record("a", specialty="x", gold=REASONED),
                record("b", specialty="x", gold=REASONED),
                record("c", specialty="y", gold=NAMED),
                record("d", specialty="y", gold=REASONED),
                record("e", specialty="z"),
            ],
            3,
            "ade",
        ),
    ],
)
def test_benchmark(cases, number, expected):
    def ids(cases):
        return "".join(benchmark(cases, number))

    if expected == "ade":  # a and b are as good as each other
        assert ids(cases) in ("ade", "bde")
    else:
        assert ids(cases) == expected
    assert ids(cases[::-1]) == ids(cases)


@pytest.mark.parametrize(
    ("splits", "lines"),
    [
        ({}, []),
        ({"train": [case(1), case(2)], "test": [case(3)]}, []),
        ({"train": [case(1, group="g"), case(2, group="g")]}, []),
        ({"train": [case(1, group="g")], "test": [case(2, group="g")]}, ["g: train (1), test (2)"]),
        ({"train": [case(1, "A b", "g")], "target": [case(2, "a  b", "f")]}, ["f: train (1), target (2)"]),
        # 1 and 3 have nothing in common but 2.
        (
            {"train": [case(1, group="g"), case(2, "x", "g")], "test": [case(3, "x", "h")]},
            ["g: train (1, 2), test (3)"],
        ),
        (
            {"train": [case(n, group="g") for n in range(5)], "validation": [case(9, group="g")]},
            ["g: train (0, 1, 2 and 2 more), validation (9)"],
        ),
        ({"test": [case(1)], "validation": [case(2)], "benchmark": [case(1), case(2)]}, []),
        ({"train": [case(1, group="g")], "benchmark": [case(1, group="g")]}, ["g: train (1), benchmark (1)"]),
        (
            {"train": [case(1, group="g")], "test": [case(2, group="g")], "benchmark": [case(2, group="g")]},
            ["g: train (1), test (2), benchmark (2)"],
        ),
    ],
)
def test_crossings(splits, lines):
    assert crossings(splits) == lines
