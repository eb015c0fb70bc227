"""What several samples of one answer say together."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

from rapidfuzz.distance import Indel

from preceptor.clinical.names import Namer
from preceptor.clinical.safety import urgent
from preceptor.core.records import Consultation, Diagnosis
from preceptor.core.text import normalise

_V = TypeVar("_V", bound=Hashable)


class Vote(NamedTuple):
    """The outcome of a vote."""

    output: Diagnosis | Consultation
    chosen: int
    """The sample from which words are taken."""
    votes: int
    """Samples that say the same."""
    counts: dict[str, int]
    """By disease of the output, how many samples name it."""


def diagnoses(samples: Sequence[Diagnosis], namer: Namer) -> Vote:
    """The diagnosis that the samples make. `namer` tells which names mean one disease.

    Each votes for the disease that it names first, or for none. Beside the winner stand the diseases that more than
    half of its voters name. Names and reasons are those of the voter that comes nearest to this, the earliest one.
    """
    named = [list(dict.fromkeys(namer.concept(name) or name for name in sample.diseases)) for sample in samples]
    first = [names[0] if names else None for names in named]
    winner = _most(first)
    voters = [at for at, vote in enumerate(first) if vote == winner]
    if winner is None:
        return Vote(Diagnosis(), voters[0], len(voters), {})
    times = Counter(name for at in voters for name in named[at])
    concepts = [name for name, n in times.most_common() if 2 * n > len(voters)]  # the winner comes first: all name it
    concepts.sort(key=lambda name: name != winner)
    chosen = max(
        voters, key=lambda at: (len(set(concepts) & set(named[at])) - len(set(named[at]) - set(concepts)), -at)
    )
    written: dict[str, str] = {}
    for at in (chosen, *voters):
        for name in samples[at].diseases:
            written.setdefault(namer.concept(name) or name, name)
    everywhere = Counter(name for names in named for name in names)
    output = Diagnosis(diseases=tuple(written[name] for name in concepts), reason=samples[chosen].reason)
    return Vote(output, chosen, len(voters), {written[name]: everywhere[name] for name in concepts})


def consultations(samples: Sequence[Consultation]) -> Vote:
    """The advice most like the others on the side that most samples take on urgency; where they are even, the urgent.

    Likeness is the F of the longest common subsequence of characters (`consult.grade` has the same).
    """
    sides = [bool(urgent(sample.answer)) for sample in samples]
    voters = [at for at, side in enumerate(sides) if side == (2 * sum(sides) >= len(sides))]
    texts = {at: normalise(samples[at].answer) for at in voters}
    likeness = {
        at: sum(Indel.normalized_similarity(texts[at], texts[other]) for other in voters if other != at)
        for at in voters
    }
    chosen = max(voters, key=lambda at: (likeness[at], -at))
    return Vote(samples[chosen], chosen, len(voters), {})


def _most(votes: Sequence[_V]) -> _V:
    """What has most votes; of equals, what was voted for first."""
    return Counter(votes).most_common(1)[0][0]
