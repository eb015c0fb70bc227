"""How sure an answer is, where that takes more than the tokens it was generated from.

A strategy is wrapped. What it asks is asked as ever, and its own prediction is taken; then follows what the source of
confidence needs. So this is a conversation like any other, and is replayed from stored replies as they are.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import exp
from typing import TypeVar

from preceptor.core.records import Case, Diagnosis, Message, Prediction, Reply, Request, UnansweredError
from preceptor.tasks import diagnosis
from preceptor.tasks.strategies import Asking, Conversation, Strategy

T = TypeVar("T")
_BEGUN = '{"diseases": ['
"""How a canonical answer begins."""
_ABSTAINED = "]"
"""How it goes on where no disease is named."""
_THOUGHT = re.compile(r".*</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class _Answered:
    """An answer whose confidence is wanted, and how it came about."""

    strategy: Strategy
    case: Case
    asking: Asking
    prediction: Prediction
    output: Diagnosis
    turns: Sequence[tuple[Request, Reply]]


_Found = tuple[Mapping[str, float], Mapping[str, float]]
"""Confidence by disease of the answer, and how probable it is that a disease is named first."""


def with_confidence(strategy: Strategy) -> Strategy:
    """The strategy with the confidence from the source that the asking names; failed answers have none.

    What a source asks in vain leaves the answer as it is, and it may then have no confidence.
    """

    def conversation(case: Case, asking: Asking) -> Conversation:
        turns: list[tuple[Request, Reply]] = []
        prediction = yield from _heard(strategy(case, asking), turns)
        source, output = _SOURCES.get(asking.confidence or ""), prediction.output
        if source is None or not isinstance(output, Diagnosis):
            return prediction
        more: list[tuple[Request, Reply]] = []
        found = yield from _heard(source(_Answered(strategy, case, asking, prediction, output, turns)), more)
        usage = sum((reply.usage for _, reply in more), prediction.usage)
        update = {"confidence": dict(found[0]), "distribution": dict(found[1]), "usage": usage}
        return prediction.model_copy(update=update)

    return conversation


def _heard(
    conversation: Generator[Request, Reply, T], turns: list[tuple[Request, Reply]]
) -> Generator[Request, Reply, T]:
    """The same conversation; what was asked and replied is added to `turns`."""
    try:
        request = next(conversation)
        while True:
            try:
                reply = yield request
            except UnansweredError as lost:
                request = conversation.throw(lost)
                continue
            turns.append((request, reply))
            request = conversation.send(reply)
    except StopIteration as end:
        value: T = end.value
        return value


def _stated(answered: _Answered) -> Generator[Request, Reply, _Found]:
    """The numbers in the reply itself; nothing is asked."""
    yield from ()
    stated = diagnosis.parse(answered.prediction.text).stated
    return {name: stated[name] for name in answered.output.diseases if name in stated}, {}


def _samples(answered: _Answered) -> Generator[Request, Reply, _Found]:
    """Shares of further answers, drawn at temperature 1, that name a disease, and that name it first.

    One that failed or can't be read names none, and is no abstention.
    """
    asking = answered.asking
    drawn = replace(asking, sampling=asking.sampling.model_copy(update={"temperature": 1.0}), logprobs=None)
    naming, first = Counter[str](), Counter[str]()
    written = {_concept(name): name for name in reversed(answered.output.diseases)} | {"": ""}
    for _ in range(asking.votes):
        try:
            output = (yield from answered.strategy(answered.case, drawn)).output
        except UnansweredError:
            continue
        if isinstance(output, Diagnosis):
            for name in output.diseases:
                written.setdefault(_concept(name), name)
            naming.update(set(map(_concept, output.diseases)))
            first[_concept(output.diseases[0]) if output.diseases else ""] += 1
    confidence = {name: naming[_concept(name)] / asking.votes for name in answered.output.diseases}
    return confidence, {written[concept]: count / asking.votes for concept, count in first.most_common()}


def _candidates(answered: _Answered) -> Generator[Request, Reply, _Found]:
    """Sequence probabilities of the candidates, and of what the answer names besides, where its first name stands.

    How probable is it that an answer names b, where the one given names a, then b? P(b first) alone would be too low,
    and P(b next | a first), the token chain's, too high. It is the sum over the places that b may have behind the
    diseases named before it, P(b first) + P(a first) P(b next | a), and so on: exact but for answers in which another
    disease comes first, so never too high. Each further disease takes one more request. Names that mean one disease
    are one.
    """
    output, asking = answered.output, answered.asking
    wordings = defaultdict[str, list[str]](list)
    for name in dict.fromkeys((*asking.candidates, *output.diseases)):
        wordings[_concept(name)].append(name)
    named = {_concept(name): name for name in reversed(output.diseases)}
    order = list(dict.fromkeys(map(_concept, output.diseases)))
    total = dict.fromkeys(order, 0.0)
    distribution: dict[str, float] = {}
    path, before = 1.0, list[str]()
    for place in range(max(1, len(order))):
        wanted = wordings if not place else {concept: wordings[concept] for concept in order[place:]}
        begun = _BEGUN + ", ".join(map(_quoted, before))
        ways = [("" if not place else ", ") + _quoted(name) for names in wanted.values() for name in names]
        try:
            known = yield from _scored(answered, begun, ways if place else [*ways, _ABSTAINED])
        except UnansweredError:
            known = []
        if not known:
            return {}, distribution
        shares = iter(known)
        probability = {concept: sum(next(shares) for _ in names) for concept, names in wanted.items()}
        if not place:
            distribution = {wordings[concept][0]: share for concept, share in probability.items()}
            distribution[""] = next(shares)
        for concept in order[place:]:
            total[concept] += path * probability[concept]
        if order:
            path *= probability[order[place]]
            before.append(named[order[place]])
    return {name: min(1.0, total[_concept(name)]) for name in output.diseases}, distribution


def _scored(answered: _Answered, begun: str, ways: Sequence[str]) -> Generator[Request, Reply, list[float]]:
    """The probability of each way in which an answer may go on, together at most 1; none where they aren't told."""
    asked, reply = _naming(answered)
    thought = found[0] if (found := _THOUGHT.match(reply.text)) else ""
    messages = (*asked.messages, Message(role="assistant", content=thought + begun))
    scores = yield Request(messages=messages, sampling=asked.sampling, candidates=tuple(ways))
    known = [exp(token.logprob) for token in scores.tokens if token.logprob is not None]
    if len(known) != len(ways):
        return []
    return [share / max(1.0, sum(known)) for share in known]  # sums of rounded shares may lie above


def _naming(answered: _Answered) -> tuple[Request, Reply]:
    """The last turn that asks for the diseases: of several stages in the first one."""
    stages = answered.asking.prompt.stages
    begins = stages[1] if len(stages) > 1 else None
    first = list(takewhile(lambda turn: not begins or turn[0].messages[-len(begins) :] != begins, answered.turns))
    return (first or answered.turns)[-1]


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _concept(name: str) -> str:
    return diagnosis.textbook_namer().concept(name) or name


_SOURCES: Mapping[str, Callable[[_Answered], Generator[Request, Reply, _Found]]] = {
    "candidates": _candidates,
    "samples": _samples,
    "stated": _stated,
}
