import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from preceptor.clinical.textbook.sampler import sample
from preceptor.data import similar
from preceptor.data.similar import Groups, families, kept, similarity

THRESHOLDS = (0, 0.1, 0.2, 0.3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1)


class Characters:
    def tokenize(self, text):
        return list(text)


ROUGE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Characters())


def naive_kept(texts, threshold):
    found = []
    for number, text in enumerate(texts):
        if all(similarity(text, texts[other]) < threshold for other in found):
            found.append(number)
    return found


def naive_families(texts, threshold):
    labels = list(range(len(texts)))
    for right in range(len(texts)):
        for left in range(right):
            if similarity(texts[left], texts[right]) >= threshold:
                low, high = sorted((labels[left], labels[right]))
                labels = [low if label == high else label for label in labels]
    return labels


def altered(rng, text, alphabet, changes):
    characters = list(text)
    for _ in range(changes):
        place = rng.randrange(len(characters) + 1)
        characters[place : place + rng.randint(0, 2)] = rng.choices(alphabet, k=rng.randint(0, 2))
    return "".join(characters)


@st.composite
def lists_of_like_texts(draw):
    alphabet = draw(st.sampled_from(["ab", "etaoins rhdl.,", "发热咳嗽头痛天无。ab"]))
    originals = draw(st.lists(st.text(alphabet, max_size=40), min_size=1, max_size=6))
    rng = random.Random(draw(st.integers(0, 2**32)))
    changes = draw(st.integers(0, 12))
    number = draw(st.integers(0, 25))
    return [altered(rng, rng.choice(originals), alphabet, rng.randint(0, changes)) for _ in range(number)]


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ("", "", 1),
        ("", "a", 0),
        ("发热三天", "发热三天", 1),
        ("发热三天", "咳嗽五年", 0),
        ("发热三天", "发热五天", 0.75),
        ("abc", "cba", 1 / 3),
        ("fever", "Fever", 0.8),
        ("咳嗽", "咳嗽咳痰咳血", 0.5),
    ],
)
def test_similarity(left, right, value):
    assert similarity(left, right) == similarity(right, left) == pytest.approx(value)


@given(st.text(min_size=1), st.text(min_size=1))
def test_it_is_rouge_l_of_characters(left, right):
    assert similarity(left, right) == pytest.approx(ROUGE.score(left, right)["rougeL"].fmeasure)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_it_is_rouge_l_of_records(language):
    cases = sample(8, 3, language, "full")
    for left, right in pairwise(cases):
        assert similarity(left.text, right.text) == pytest.approx(ROUGE.score(left.text, right.text)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("texts", "threshold", "expected"),
    [
        ([], 0.7, []),
        (["", ""], 0.7, [0]),
        (["", "a"], 0.7, [0, 1]),
        (["a", "a"], 1, [0]),
        (["a", "a"], 1.5, [0, 1]),
        (["a", "b"], 0, [0]),
        (["abcdefghij", "abcdefgxyz", "abcdefghij"], 0.7, [0]),
        (["abcdefghij", "abcdefgxyz", "abcdefghij"], 0.71, [0, 1]),
        # The second is like the first, the third only like the second, which isn't there to be compared.
        (["abcdefghij", "abcdefghxy", "abcdefxyzw"], 0.8, [0, 2]),
        (["\ud800\ud800\ud800x", "\ud800\ud800\ud800y"], 0.7, [0]),
    ],
)
def test_kept(texts, threshold, expected):
    assert kept(texts, threshold) == expected


@given(lists_of_like_texts(), st.sampled_from(THRESHOLDS))
def test_the_filter_keeps_what_the_definition_keeps(texts, threshold):
    assert kept(texts, threshold) == naive_kept(texts, threshold)


@pytest.mark.slow
@given(st.lists(st.text(max_size=12), max_size=12), st.floats(0, 1))
def test_the_filter_on_any_text_at_any_threshold(texts, threshold):
    assert kept(texts, threshold) == naive_kept(texts, threshold)


@pytest.mark.slow
@pytest.mark.parametrize("number", [8, 3, 1])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_on_records_whatever_the_number_of_parts_and_tiles(monkeypatch, language, number):
    monkeypatch.setattr(similar, "_PARTS", (number,))
    for name, size in (("_ROWS", 7), ("_COLUMNS", 11), ("_BLOCK", 17), ("_CODES", 5)):
        monkeypatch.setattr(similar, name, size)
    rng = random.Random(number)
    records = [case.text for case in sample(40, 5, language, "full")]
    texts = records + [altered(rng, rng.choice(records), "".join(records), rng.randint(0, 60)) for _ in range(30)]
    rng.shuffle(texts)
    for threshold in (0.6, 0.75):
        assert kept(texts, threshold) == naive_kept(texts, threshold)
        assert families(texts, threshold) == naive_families(texts, threshold)


@given(st.lists(st.text("abcdefg发热咳嗽", max_size=30), min_size=2, max_size=8), st.integers(1, 9))
def test_the_bound_is_never_less_than_the_truth(texts, number):
    parts = similar._parts(texts, number)
    for left in range(len(texts)):
        for right in range(left):
            bound = sum(similar.LCSseq.similarity(part[left], part[right]) for part in parts)
            assert bound >= similar.LCSseq.similarity(texts[left], texts[right])
    assert [sum(len(part[place]) for part in parts) for place in range(len(texts))] == list(map(len, texts))


@pytest.mark.parametrize(
    ("texts", "threshold", "expected"),
    [
        ([], 0.8, []),
        (["", "x", ""], 0.8, [0, 1, 0]),
        (["a", "b", "c"], 0, [0, 0, 0]),
        (["a", "b", "a"], 2, [0, 1, 0]),
        # The first and the last have a relative in common, and nothing else.
        (["abcdefghij", "zzz", "abcdefghxy", "abcdefwvxy"], 0.8, [0, 1, 0, 0]),
        (["abcdefghij", "zzz", "abcdefghxy", "abcdefwvxy"], 0.81, [0, 1, 2, 3]),
    ],
)
def test_families(texts, threshold, expected):
    assert families(texts, threshold) == expected


@given(lists_of_like_texts(), st.sampled_from(THRESHOLDS))
def test_families_are_what_their_definition_finds(texts, threshold):
    assert families(texts, threshold) == naive_families(texts, threshold)


@pytest.mark.slow
@given(lists_of_like_texts(), st.randoms(use_true_random=False))
def test_families_do_not_depend_on_the_order(texts, rng):
    order = list(range(len(texts)))
    rng.shuffle(order)
    labels, others = families(texts), families([texts[place] for place in order])
    together = {frozenset(np.flatnonzero(np.array(labels) == label).tolist()) for label in set(labels)}
    again = {frozenset(order[place] for place in np.flatnonzero(np.array(others) == label)) for label in set(others)}
    assert together == again


def test_many_copies_are_one_family():
    assert families(["发热咳嗽三天，无头痛" + "。" * (number % 3) for number in range(3000)]) == [0] * 3000


@settings(max_examples=50)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups_merge_and_never_part(size, pairs):
    groups, labels = Groups(size), list(range(size))
    for left, right in pairs:
        if left < size and right < size:
            groups.merge(left, right)
            low, high = sorted((labels[left], labels[right]))
            labels = [low if label == high else label for label in labels]
    assert [groups.of(number) for number in range(size)] == labels
