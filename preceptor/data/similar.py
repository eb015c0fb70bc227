"""How alike texts are, character by character, and which of many are nearly the same.

Both searches are exact: they find what comparing every pair would find. Most pairs are ruled out by a bound
that is ten times cheaper than the comparison. The alphabet is dealt into parts; a common subsequence of two
texts, seen through one part, is a common subsequence of what the texts have of that part; so the sum of the
parts' longest ones is never less than the longest one of the whole. Short strings are compared at once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

NEAR = 0.8
"""Similarity from which two texts are of one family: unrelated records of the textbook reach .75."""

_ROWS, _COLUMNS = 128, 4096
"""Pairs are compared in tiles of this size, so that memory doesn't grow with their number."""
_BLOCK = 512
"""Texts of the filter that are settled together."""
_PARTS, _LEFT, _SAMPLE = (8, 6, 4, 3, 2, 1), 0.05, 100
"""Numbers of parts to try, until no more than this share of a sample's pairs is left to be compared."""
_CODES, _ALPHABET = 256, 0x110000
_SLACK = 1e-6
"""What rounding may take from a bound, which must not rule out a pair that is just similar enough."""

Numbers = npt.NDArray[np.int64]
Strings = npt.NDArray[np.object_]


def similarity(left: str, right: str) -> float:
    """Character ROUGE-L F in [0, 1]: 2 × longest common subsequence / sum of lengths. Two empty texts are equal: 1."""
    return Indel.normalized_similarity(left, right)


class Groups:
    """The numbers below `size` in groups that only ever merge; a group goes by its least number."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def of(self, number: int) -> int:
        """The least number of the group that `number` is in."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    def merge(self, left: int, right: int) -> None:
        """Makes one group of the groups of two numbers."""
        low, high = sorted((self.of(left), self.of(right)))
        self._parents[high] = low


def kept(texts: Sequence[str], threshold: float) -> list[int]:
    """The numbers of the texts that are less similar than `threshold` to every text kept before them, ascending."""
    if not texts or threshold <= 0:
        return [0] if texts else []
    if threshold > 1:
        return list(range(len(texts)))
    numbers: dict[str, int] = {}
    for number, text in enumerate(texts):  # an equal text is like whatever the first one is like
        numbers.setdefault(text, number)
    search, chosen = _Search(list(numbers), threshold), np.empty(0, np.int64)
    for start in range(0, len(numbers), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(numbers)))
        for rows, _ in search.pairs(block, chosen):
            block = np.setdiff1d(block, rows)
        before: dict[int, set[int]] = {number: set() for number in block.tolist()}
        for rows, columns in search.pairs(block, block):
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                before[row].add(column)
        good: list[int] = []
        for number, near in before.items():
            if near.isdisjoint(good):
                good.append(number)
        chosen = np.concatenate([chosen, np.array(good, np.int64)])
    first = list(numbers.values())
    return [first[number] for number in chosen.tolist()]


def families(texts: Sequence[str], threshold: float = NEAR) -> list[int]:
    """The family of each text: equal texts and those `threshold` alike are of one, and so are those that others link.

    A family goes by the number of its first text. The texts come without what stands in all of them, such as
    labels and boilerplate, or families of strangers are found.
    """
    if not texts or threshold <= 0:
        return [0] * len(texts)
    numbers: dict[str, int] = {}
    unique = [numbers.setdefault(text, len(numbers)) for text in texts]
    groups = Groups(len(numbers))
    search = _Search(list(numbers), min(threshold, 1.0))
    order = np.argsort(search.lengths, kind="stable")
    for start in range(0, len(order), _ROWS):
        for rows, columns in search.pairs(order[start : start + _ROWS], order[start:], groups):
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                groups.merge(row, column)
    first: dict[int, int] = {}
    return [first.setdefault(groups.of(number), place) for place, number in enumerate(unique)]


class _Search:
    """Texts made ready to be compared with one another at one threshold."""

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self.lengths: Numbers = np.array([len(text) for text in texts], np.int64)
        self._texts, self._threshold = np.array(texts, np.object_), threshold
        # More parts are faster and rule out less, the less the more alike unrelated texts are: a sample tells.
        sample = np.linspace(0, len(texts) - 1, min(len(texts), _SAMPLE), dtype=np.int64)
        few = self._texts[sample].tolist()
        for number in _PARTS:
            parts = _parts(few, number)
            if self._possible(parts, parts, sample, sample).mean() <= _LEFT:
                break
        self._parts = _parts(texts, number)

    def pairs(self, rows: Numbers, columns: Numbers, groups: Groups | None = None) -> Iterator[tuple[Numbers, Numbers]]:
        """Every similar pair of a row and a column, tile by tile; pairs already in one of the groups are left out."""
        rows, columns = (numbers[np.argsort(self.lengths[numbers], kind="stable")] for numbers in (rows, columns))
        lengths = self.lengths[columns]
        ratio = self._threshold / (2 - self._threshold)  # of the lengths of two texts that can be so similar
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            shortest, longest = self.lengths[some[0]], self.lengths[some[-1]]
            first = int(np.searchsorted(lengths, shortest * ratio - _SLACK))
            last = int(np.searchsorted(lengths * ratio, longest + _SLACK, "right"))
            for place in range(first, last, _COLUMNS):
                yield self._tile(some, columns[place : min(place + _COLUMNS, last)], groups)

    def _tile(self, rows: Numbers, columns: Numbers, groups: Groups | None) -> tuple[Numbers, Numbers]:
        possible = np.ones((len(rows), len(columns)), np.bool_)
        if groups is not None:
            names, others = (np.array([groups.of(number) for number in side.tolist()]) for side in (rows, columns))
            possible = names[:, None] != others
            if not possible.any():
                return rows[:0], columns[:0]
        left, right = ([part[side] for part in self._parts] for side in (rows, columns))
        possible &= self._possible(left, right, rows, columns)
        row, column = np.nonzero(possible)
        rows, columns = rows[row], columns[column]
        exact = process.cpdist(
            self._texts[rows],
            self._texts[columns],
            scorer=Indel.normalized_similarity,
            score_cutoff=max(0.0, self._threshold - _SLACK),  # as a cutoff, the threshold itself misses some equals
            dtype=np.float64,
            workers=-1,
        )
        near = exact >= self._threshold
        return rows[near], columns[near]

    def _possible(
        self, left: Sequence[Strings], right: Sequence[Strings], rows: Numbers, columns: Numbers
    ) -> npt.NDArray[np.bool_]:
        """Which pairs of rows and columns the bound doesn't rule out, given their parts."""
        total = self.lengths[rows][:, None] + self.lengths[columns]
        common = np.zeros_like(total)
        for one, other in zip(left, right, strict=True):
            common += process.cdist(one, other, scorer=LCSseq.similarity, workers=-1)
        return 2 * common >= self._threshold * total - _SLACK


def _parts(texts: Sequence[str], number: int) -> list[Strings]:
    """Each text's characters of each part of the alphabet, coded in one byte; rare ones may share a code."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    sizes, loads = [0] * number, [0] * number
    part_of, code_of = np.zeros(_ALPHABET, np.uint8), np.zeros(_ALPHABET, np.uint8)
    for character, count in counts.most_common():
        part = loads.index(min(loads))
        part_of[ord(character)], code_of[ord(character)] = part, sizes[part] % _CODES
        sizes[part] += 1
        loads[part] += count
    parts: list[list[str]] = [[] for _ in range(number)]
    for text in texts:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        place, codes = part_of[points], code_of[points]
        for part, coded in enumerate(parts):
            coded.append(codes[place == part].tobytes().decode("latin-1"))
    return [np.array(coded, np.object_) for coded in parts]
