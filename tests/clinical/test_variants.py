"""The list of variants is a fair measure, and the normaliser stays as good on it as it is."""

from collections import Counter

from preceptor.clinical.names import Entry, Namer
from preceptor.clinical.textbook.book import load
from preceptor.clinical.variants import accuracy, mistakes, variants


def test_the_list_is_long_and_covers_the_textbook() -> None:
    listed = variants()
    assert len({name for _, name, _ in listed}) == len(listed) >= 300
    assert {identity for _, _, identity in listed} == {*load().diseases, None}
    names = [name for _, name, _ in listed]
    assert min(sum(name.isascii() for name in names), sum(not name.isascii() for name in names)) > 100
    assert min(Counter(kind for kind, _, _ in listed).values()) >= 5


def test_the_normaliser_is_good_and_never_takes_one_disease_for_another() -> None:
    namer = Namer(load())
    wrong = mistakes(namer)
    assert [one for one in wrong if one[3] is not None] == []
    figure = accuracy(namer)
    assert (figure.n, figure.value) == (len(variants()), 1 - len(wrong) / len(variants()))
    assert figure.value >= 0.92
    assert figure.low < figure.value < figure.high


def test_a_table_mends_what_the_textbook_lacks() -> None:
    table = [Entry("肺结核", "A16", ("TB", "PTB")), Entry("Pulmonary embolism", "", ("PE", "PTE"))]
    left = {name for _, name, _, _ in mistakes(Namer(load(), table))}
    assert {"TB", "PTB", "TB suspected", "PE", "suspected PE"} <= {name for _, name, _, _ in mistakes(Namer(load()))}
    assert not {"TB", "PTB", "TB suspected", "PE", "suspected PE"} & left
