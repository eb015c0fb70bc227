"""Solved cases that are shown before a question: the same for all, drawn by lot for each, or those most like it.

An example is never the case itself, nor one of its group or of its very words.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from preceptor.core.records import Case, Consultation, Diagnosis
from preceptor.core.text import normalise
from preceptor.tasks import consult, diagnosis

Choice = Literal["fixed", "random", "nearest"]
_GRAMS = (1, 3)
"""Characters of what texts are compared by: Chinese words have two, most stems of English ones begin with three."""


class Examples:
    """Chooses examples for a case. It is a pure function of the solved cases, the seed and the case."""

    def __init__(self, solved: Sequence[Case], choice: Choice, shots: int, seed: int = 0) -> None:
        """`solved` are cases with gold, at least one; `shots` is how many are shown, or fewer where there are fewer."""
        self._solved = solved
        self._choice = choice
        self._shots = shots
        self._seed = seed
        self._keys = [normalise(case.text) for case in solved]
        self._fixed = list(_lots(len(solved), f"{seed}"))

    def of(self, case: Case) -> list[tuple[str, str]]:
        """Records with their answers, one of a group; of the nearest the likest comes last, next to the question."""
        if self._choice == "nearest":
            return [self._shown(at) for at in reversed(self._apart(self._like(case), case))]
        order = iter(self._fixed) if self._choice == "fixed" else _lots(len(self._solved), f"{self._seed}:{case.id}")
        return [self._shown(at) for at in self._apart(order, case)]

    def _apart(self, order: Iterable[int], case: Case) -> list[int]:
        """The first so many that have nothing to do with the case or with one another."""
        ids, groups, texts = {case.id}, {case.group}, {normalise(case.text)}
        found: list[int] = []
        for at in order:
            if len(found) == self._shots:
                break
            other = self._solved[at]
            if other.id not in ids and other.group not in groups and self._keys[at] not in texts:
                found.append(at)
                groups.add(other.group)
                texts.add(self._keys[at])
        return found

    def _like(self, case: Case) -> Iterator[int]:
        """The likest first, by the cosine of their character n-grams' weights; of equals the earlier."""
        vectors, matrix = self._index
        likeness = (matrix @ vectors.transform([normalise(case.text)]).T).toarray()[:, 0]
        yield from (-likeness).argsort(kind="stable").tolist()

    @cached_property
    def _index(self) -> tuple[Any, Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer  # it takes a second to load

        vectors = TfidfVectorizer(analyzer="char", ngram_range=_GRAMS, sublinear_tf=True, lowercase=False)
        return vectors, vectors.fit_transform([key or " " for key in self._keys])

    def _shown(self, at: int) -> tuple[str, str]:
        return self._solved[at].text, solution(self._solved[at])


def _lots(number: int, seed: str) -> Iterator[int]:
    """The numbers below `number` in an order drawn by lot, each drawn as it is asked for."""
    draw, drawn = random.Random(seed), set[int]()
    while len(drawn) < number:
        if (at := draw.randrange(number)) not in drawn:
            drawn.add(at)
            yield at


def solution(case: Case) -> str:
    """The answer that a solved case should get, as a model should write it."""
    if isinstance(case.gold, Consultation):
        return consult.canonical(case.gold) if case.gold.think else case.gold.answer
    assert isinstance(case.gold, Diagnosis)
    return diagnosis.canonical(Diagnosis() if case.expects_abstention else case.gold)
