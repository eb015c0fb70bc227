"""Which texts are near copies of held-out ones, by the measure that keeps splits apart."""

from collections.abc import Sequence

from preceptor.data.sections import boilerplate, stripped, variants
from preceptor.data.similar import Groups, families

SHORT = 20
"""Among fewer characters, one that differs may make another patient: such texts are copies only if they are equal."""


def copies(texts: Sequence[str], held: Sequence[str]) -> set[int]:
    """The numbers of the texts that are near copies of one of `held`, or are linked to one by others of the texts."""
    every = [*held, *texts]
    common = boilerplate(every)
    alike, first = Groups(len(every)), dict[int, int]()
    long: list[int] = []
    telling: list[str] = []
    for place, text in enumerate(every):
        if len(told := stripped(text, common)) >= SHORT:
            long.append(place)
            telling.append(told)
        elif len(stripped(text, ())) >= SHORT:
            for key in variants(text):
                alike.merge(first.setdefault(key, place), place)
    for place, family in zip(long, families(telling), strict=True):
        alike.merge(long[family], place)
    marked = {alike.of(place) for place in range(len(held))}
    return {number for number in range(len(texts)) if alike.of(len(held) + number) in marked}
