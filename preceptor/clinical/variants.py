"""How well names of diseases are normalised: measured on labelled variants of the textbook's names."""

from functools import cache
from importlib.resources import files

import yaml

from preceptor.clinical.names import Namer
from preceptor.core.statistics import Estimate, estimate

_NOTHING = "nothing"


@cache
def variants() -> tuple[tuple[str, str, str | None], ...]:
    """What varies, a name, and the id of the textbook's disease that it means: None if it means none of them."""
    table = yaml.safe_load(files(__package__).joinpath("name_variants.yaml").read_text("utf-8"))
    return tuple(
        (kind, name, None if identity == _NOTHING else identity)
        for kind, identities in table.items()
        for identity, written in identities.items()
        for name in written
    )


def mistakes(namer: Namer) -> list[tuple[str, str, str | None, str | None]]:
    """The variants that a namer takes for another disease, or for none: kind, name, what it means, what was said."""
    said = ((*one, namer.concept(one[1]) if namer.knows(one[1]) else None) for one in variants())
    return [one for one in said if one[2] != one[3]]


def accuracy(namer: Namer) -> Estimate:
    """Share of the variants that a namer of the textbook gets right, with its interval over variants."""
    wrong = {one[1] for one in mistakes(namer)}
    return estimate([name not in wrong for _, name, _ in variants()])
