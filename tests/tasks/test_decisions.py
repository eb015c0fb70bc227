"""Where a reply decides, and what was right there: by hand, in both languages, and on the textbook's teacher."""

from collections.abc import Mapping
from math import exp, log

import pytest

from preceptor.app.teacher_acts import Teacher, question
from preceptor.app.teacher_tokens import Tokens
from preceptor.clinical.textbook.sampler import sample
from preceptor.core.calibration import SINGLE
from preceptor.core.recalibration import Observation
from preceptor.core.records import Case, Diagnosis, Language, Reply, Token
from preceptor.tasks import prompts
from preceptor.tasks.decisions import observations
from preceptor.tasks.diagnosis import parse

Part = str | bytes | tuple[str | bytes, Mapping[str | bytes, float]]
"""A token that was certain, or one with the probabilities of all that are told."""


def raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def reply(*parts: Part) -> Reply:
    tokens = []
    for part in parts:
        said, told = part if isinstance(part, tuple) else (part, {part: 1.0})
        options = tuple((raw(option), log(p)) for option, p in told.items())
        tokens.append(Token(utf8=raw(said), logprob=log(told[said]), alternatives=options))
    return Reply(text=b"".join(token.utf8 for token in tokens).decode(), tokens=tuple(tokens))


def case(*diseases: str, abstain: bool = False) -> Case:
    gold = Diagnosis(diseases=diseases)
    fields = {"id": "c", "text": "t", "language": "en", "source": "s", "group": "c", "gold": gold}
    return Case(**fields, expects_abstention=abstain)


def seen(said: Reply, about: Case) -> list[Observation]:
    output = parse(said.text).output
    assert output is not None
    return observations(said, output, about)


def belief(one: Observation) -> tuple[dict[int, float], float]:
    """The mass of each way, the right one's number being 0, and of the rest."""
    found: dict[int, float] = {}
    order = [*([one.right] if one.right is not None else [-1]), *(w for w in dict.fromkeys(one.ways) if w != one.right)]
    for logprob, way in zip(one.logprobs, one.ways, strict=True):
        found[order.index(way)] = round(found.get(order.index(way), 0.0) + exp(logprob), 6)
    return found, round(one.rest, 6)


BEGUN, ENDED = '{"diseases": ["', ', "reason": []}'
GOUT = reply(BEGUN, ("Gout", {"Gout": 0.7, "Osteo": 0.2, "G": 0.06}), ('"]', {'"]': 0.5, '", "': 0.4, "y": 0.1}), ENDED)
OSTEO = reply(BEGUN, ("Osteo", {"Osteo": 0.6, "G": 0.2, "Go": 0.1}), ("porosis", {"porosis": 0.6}), '"]', ENDED)
ALIAS = reply(
    BEGUN,
    ("pneu", {"pneu": 0.5, "Comm": 0.3, "肺": 0.1, "asthma": 0.1}),
    ("monia", {"monia": 0.8, "mo": 0.2}),
    '"]',
    ENDED,
)
ABSTAINED = reply('{"diseases":', (" []", {" []": 0.8, ' ["': 0.15, " [": 0.05}), ENDED)
SPLIT = reply('{"diseases": ', "[", ('"', {'"': 0.7, "]": 0.3}), ("Gout", {"Gout": 0.9, "X": 0.1}), '"]', ENDED)
PRETTY = reply(
    '{"diseases"', (": [", {": [": 0.9, ":": 0.1}), "\n  ", '"', ("gout", {"gout": 0.8, "flu": 0.2}), '"\n]}'
)
GALL = reply(BEGUN, ("胆", {"胆": 0.9, "肾": 0.1}), ("石", {"石": 0.6, "囊": 0.4}), "症", '"]', ENDED)
HALVES = reply(
    BEGUN, (b"\xe8\x82", {b"\xe8\x82": 0.9, "胃": 0.1}), (b"\xba", {b"\xba": 0.6, b"\x9d": 0.4}), "炎", '"]', ENDED
)  # of 肺 the first two bytes, which begin 肝 too


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        # The name that was said is right: its own tokens are, whatever else begins it; then what closes it.
        (GOUT, case("Gout"), [({0: 0.7, 1: 0.2, 2: 0.06}, 0.04), ({0: 0.9, 1: 0.1}, 0)]),
        # Whatever name of the disease, in either language.
        (ALIAS, case("Community-acquired pneumonia"), [({0: 0.9, 1: 0.1}, 0), ({0: 0.8, 1: 0.2}, 0)]),
        (ALIAS, case("肺炎"), [({0: 0.9, 1: 0.1}, 0), ({0: 0.8, 1: 0.2}, 0)]),
        # It is wrong: of what begins the right one the longest is on its way.
        (OSTEO, case("Gout"), [({1: 0.6, 2: 0.2, 0: 0.1}, 0.1)]),
        (OSTEO, case("Osteoporosis"), [({0: 0.6, 1: 0.2, 2: 0.1}, 0.1), ({0: 0.6}, 0.4)]),
        (OSTEO, case("Osteoarthritis of knee"), [({0: 0.6, 1: 0.2, 2: 0.1}, 0.1), ({1: 0.6}, 0.4)]),
        # Right in the rest, which is at least what digits don't show.
        (SPLIT, case("Sciatica"), [({0: 0.7, 1: 0.3}, 0), ({1: 0.9, 2: 0.1}, round(SINGLE, 6))]),
        # Of two gold diseases the one believed more, and then no other.
        (GOUT, case("Osteoporosis", "Gout"), [({0: 0.7, 1: 0.2, 2: 0.06}, 0.04), ({0: 0.9, 1: 0.1}, 0)]),
        (OSTEO, case("Gout", "Osteoporosis"), [({0: 0.6, 1: 0.2, 2: 0.1}, 0.1), ({0: 0.6}, 0.4)]),
        # Abstention is right where no disease is, or where it is expected; white space decides nothing.
        (ABSTAINED, case(), [({0: 0.85, 1: 0.15}, 0)]),
        (ABSTAINED, case("Gout"), [({1: 0.8, 0: 0.2}, 0)]),
        (ABSTAINED, case("Gout", abstain=True), [({0: 0.85, 1: 0.15}, 0)]),
        (SPLIT, case(), [({1: 0.7, 0: 0.3}, 0)]),
        (SPLIT, case("Gout", abstain=True), [({0: 0.7, 1: 0.3}, 0), ({0: 0.9, 1: 0.1}, 0)]),
        (PRETTY, case("Gout"), [({0: 0.8, 1: 0.2}, 0)]),
        (PRETTY, case("Sciatica"), [({1: 0.8, 2: 0.2}, 0)]),
        # Chinese: characters, and bytes of them.
        (GALL, case("胆石症"), [({0: 0.9, 1: 0.1}, 0), ({0: 0.6, 1: 0.4}, 0)]),
        (GALL, case("胆囊炎"), [({0: 0.9, 1: 0.1}, 0), ({1: 0.6, 0: 0.4}, 0)]),
        (GALL, case("肾结石"), [({1: 0.9, 0: 0.1}, 0)]),
        (HALVES, case("肺炎"), [({0: 0.9, 1: 0.1}, 0), ({0: 0.6, 1: 0.4}, 0)]),
        (HALVES, case("肝炎"), [({0: 0.9, 1: 0.1}, 0), ({1: 0.6, 0: 0.4}, 0)]),
        (HALVES, case("胃炎"), [({1: 0.9, 0: 0.1}, 0)]),
    ],
)
def test_by_hand(said: Reply, gold: Case, expected: list[tuple[dict[int, float], float]]) -> None:
    assert [belief(one) for one in seen(said, gold)] == [(dict(sorted(ways.items())), rest) for ways, rest in expected]


@pytest.mark.parametrize(
    "said",
    [
        reply('{"diseases": ["Gout"', ("]", {"]": 0.5, ",": 0.5}), ENDED),  # the name itself was certain
        reply("Diagnosis: ", ("Gout", {"Gout": 0.5, "Flu": 0.5})),
        reply('{"diseases": ["', ("1. Gout", {"1. Gout": 0.5, "1. Flu": 0.5}), '"]', ENDED),
        reply('{"diseases": "', ("Gout", {"Gout": 0.5, "Flu": 0.5}), '"', ENDED),
        Reply(text=GOUT.text),
        Reply(text=GOUT.text, tokens=(Token(utf8=b"token_id:7", logprob=-0.5, alternatives=((b"token_id:8", -1.0),)),)),
        Reply(text=GOUT.text, tokens=tuple(token.model_copy(update={"logprob": None}) for token in GOUT.tokens)),
    ],
)
def test_nothing_is_decided(said: Reply) -> None:
    assert seen(said, case("Gout")) == []


def test_a_draft_in_the_thinking_decides_nothing() -> None:
    thought = '<think>{"diseases": ["Flu"]}</think>'
    assert seen(reply(thought, *[(t.utf8, dict.fromkeys([t.utf8], 1.0)) for t in GOUT.tokens]), case("Gout")) == []
    tokens = (Token(utf8=thought.encode(), logprob=-0.5), *GOUT.tokens)
    assert seen(Reply(text=thought + GOUT.text, tokens=tokens), case("Gout")) == seen(GOUT, case("Gout"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_honest_teacher_is_right_as_often_as_it_says(language: Language) -> None:
    teacher, prompt = Teacher("honest", Tokens("mini")), prompts.load("diagnosis", "zero_shot", language)
    sure, right, abstained = 0.0, 0, 0
    cases = sample(80, 3, language, "short")
    for one in cases:
        replies = teacher.replies(question(prompt.render(one.text)))
        steps = replies.steps(replies.choice.best, 5)
        said = Reply(
            text=replies.choice.options[replies.choice.best],
            tokens=tuple(Token(utf8=s.utf8, logprob=s.logprob, alternatives=s.alternatives) for s in steps),
        )
        found = seen(said, one)
        abstained += not found
        assert len(found) <= 1  # the tokenizer of mini has whole names
        for decision in found:
            best = max(range(len(decision.ways)), key=lambda at: decision.logprobs[at])
            sure += exp(decision.logprobs[best])
            right += decision.ways[best] == decision.right
    assert abstained < len(cases) / 5
    assert sure == pytest.approx(right, abs=2 * (len(cases) * 0.1) ** 0.5)
