"""The task of naming diseases and the evidence for them: what an answer looks like, and what it is worth.

The grader here scores evaluations, curates labels, orders preference pairs and rewards learning. It is
F1-like throughout: naming more diseases or quoting more of the record never pays by itself, and evidence
counts only as far as the diseases are right, so that good quotations can't carry a wrong answer past an
abstention.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import exp

from preceptor.clinical import evidence
from preceptor.clinical.names import Namer
from preceptor.clinical.textbook.book import load
from preceptor.clinical.textbook.exact import SUPPORTS, exact
from preceptor.clinical.textbook.reader import Mention, Reader
from preceptor.core import text as texts
from preceptor.core.records import Case, Diagnosis, Evidence, Polarity, Reply, Score, Token
from preceptor.tasks.answer import Outcome, Parsed, parse

__all__ = [
    "Outcome",
    "Parsed",
    "canonical",
    "chain_probability",
    "fields",
    "grade",
    "ground",
    "parse",
    "textbook_namer",
]

CLOSINGS = 5
"""Alternatives a token by which `chain_probability` knows how a name may be closed."""
_SHARE = 0.5
"""Share of the record that reasons may quote; beyond it they select nothing."""
_LEAST = 20
"""Characters that they may quote of however short a record."""


def canonical(diagnosis: Diagnosis, confidence: Mapping[str, float] | None = None) -> str:
    """The answer as a model should write it; with the confidence in each disease, where it states that.

    Numbers have two decimals, 0.80 too: a form of one length is learned soonest.
    """
    answer = {"diseases": list(diagnosis.diseases), "reason": list(diagnosis.reason)}
    if confidence is None:
        return json.dumps(answer, ensure_ascii=False)
    named, reason = (json.dumps(value, ensure_ascii=False) for value in answer.values())
    numbers = ", ".join(f"{confidence[name]:.2f}" for name in diagnosis.diseases)
    return f'{{"diseases": {named}, "confidence": [{numbers}], "reason": {reason}}}'


def fields(answer: str) -> list[tuple[str, int, int]]:
    """Where the lists of an answer in JSON stand, brackets included: `diseases` and `evidence`, with offsets.

    The confidence that is stated counts as the diseases: in few digits it says as much. What is thought before the
    answer may hold drafts of it, and is no part of it.
    """
    found, start = [], max(0, answer.rfind("</think>"))
    for field, key in (("diseases", "diseases"), ("diseases", "confidence"), ("evidence", "reason")):
        if opening := re.compile(rf'"{key}"\s*:\s*(?=\[)').search(answer, start):
            try:
                _, end = json.JSONDecoder().raw_decode(answer, opening.end())
            except ValueError:
                continue
            found.append((field, opening.end(), end))
    return found


def ground(diagnosis: Diagnosis, case: Case) -> Diagnosis:
    """The same answer with each reason's place in the record, what is said there, and the finding."""
    found = []
    for reason in diagnosis.reason:
        if place := _place(reason, case.text):
            start, end, polarity = place
            finding = next((m.subject for m in _mentions(case.text) if m.start < end and start < m.end), None)
            found.append(Evidence(text=case.text[start:end], start=start, end=end, polarity=polarity, finding=finding))
    return diagnosis.model_copy(update={"evidence": tuple(found)})


def grade(output: Diagnosis | None, case: Case, namer: Namer | None = None) -> Score:
    """What an answer is worth: the mean of `top1`, `disease_f1` and `disease_f1` × `evidence_grounded`.

    `output` is None for a reply that could not be read: zero, told from a wrong answer by `parsed`. Parts
    that need gold are None without it, and the value stands on the evidence alone. `hallucinated` is the share of
    the reasons that stand nowhere in the record, or with another number or unit; `supported` that of the findings
    affirmed in them that speak for a disease named, where the textbook knows both. `namer` knows diseases
    by their names, by default the textbook's; `unmapped` is the share of the answer's names that it doesn't
    know, and counts for nothing.
    """
    namer = namer or textbook_namer()
    gold = case.gold if isinstance(case.gold, Diagnosis) else None
    grounded, hallucinated = _evidence(output, case.text, gold)
    matched = _matched(output, gold, namer, abstaining_is_right=case.expects_abstention)
    named = output.diseases if output else ()
    unmapped = sum(not namer.knows(name) for name in named) / len(named) if named else None
    parts = {"parsed": float(output is not None), **matched, "evidence_grounded": grounded}
    parts |= {"hallucinated": hallucinated, "supported": _supported(output, namer), "unmapped": unmapped}
    if output is None:
        return Score(case_id=case.id, value=0.0, parts=parts)
    if grounded is None and output.diseases:
        # No reasons where reasons are due; but gold that has none doesn't ask for any.
        grounded = float(gold is not None and not gold.reason)
    if gold is None:
        return Score(case_id=case.id, value=grounded, parts=parts)
    top1, f1 = matched["top1"] or 0.0, matched["disease_f1"] or 0.0
    return Score(case_id=case.id, value=(top1 + f1 + f1 * (1.0 if grounded is None else grounded)) / 3, parts=parts)


def chain_probability(reply: Reply, diagnosis: Diagnosis) -> dict[str, float]:
    """Probability of each disease in the reply: of its tokens, from its first byte through its closing quote.

    It is found on the bytes that were generated, since a character may span tokens and a token may hold a
    quote and the beginning of a name. The last token may hold more than the quote: a comma, or the end of the list. So
    where its alternatives are known, all of them count that go on as the name does. A name that the reply does not hold
    as it stands has no probability, nor has one with a token of which none is known.
    """
    raw = b"".join(token.utf8 for token in reply.tokens)
    ends = list(accumulate(len(token.utf8) for token in reply.tokens))
    totals = [0.0, *accumulate(0.0 if token.logprob is None else token.logprob for token in reply.tokens)]
    found = {}
    position = max(0, raw.rfind(b'"diseases"'))
    for name in dict.fromkeys(diagnosis.diseases):
        if span := _written(name, raw, position):
            start, end = span
            position = end
            first, last = bisect_right(ends, start), bisect_right(ends, end - 1)
            if all(token.logprob is not None for token in reply.tokens[first : last + 1]):
                begun = ends[last] - len(reply.tokens[last].utf8)
                closing = _closing(reply.tokens[last], raw[begun:end])
                found[name] = min(1.0, exp(totals[last] - totals[first]) * closing)
    return found


def _closing(token: Token, lacking: bytes) -> float:
    """Probability of what a name lacks, whatever else stands in the same token."""
    quoted = token.alternatives if lacking.endswith(b'"') else ()
    others = {other: logprob for other, logprob in quoted if other.startswith(lacking)}
    return sum(map(exp, {**others, token.utf8: token.logprob or 0.0}.values()))


def _written(name: str, raw: bytes, position: int) -> tuple[int, int] | None:
    """Where a name and what closes it stand: as a JSON string, else within one or in plain text."""
    for escaped in (json.dumps(name, ensure_ascii=False), json.dumps(name)):
        quoted = escaped.encode()
        for literal, opening in ((quoted, 1), (quoted[1:-1], 0)):
            start = raw.find(literal, position)
            if start >= 0:
                return start + opening, start + len(literal)
    return None


def _matched(
    output: Diagnosis | None, gold: Diagnosis | None, namer: Namer, *, abstaining_is_right: bool
) -> dict[str, float | None]:
    """The parts that compare diseases."""
    names = ("top1", "precision", "recall", "disease_f1", "category_f1", "exact_set")
    if gold is None:
        return dict.fromkeys(names)
    if output is None:
        return dict.fromkeys(names, 0.0)
    if output.abstained:
        return dict.fromkeys(names, float(abstaining_is_right or gold.abstained))
    hits = namer.match(output.diseases, gold.diseases)
    right, said, true = len(hits), len(output.diseases), len(gold.diseases)
    alike = len(namer.match(output.diseases, gold.diseases, level="category")) if right < min(said, true) else right
    return {
        "top1": float(bool(namer.match(output.diseases[:1], gold.diseases))),
        "precision": right / said,
        "recall": right / true if true else 0.0,
        "disease_f1": 2 * right / (said + true),
        "category_f1": 2 * alike / (said + true),
        "exact_set": float(right == said == true),
    }


def _evidence(output: Diagnosis | None, record: str, gold: Diagnosis | None) -> tuple[float | None, float | None]:
    """Of the distinct reasons, the share that the record holds in the same sense, and the share that it doesn't hold.

    The first is less if they quote too much. Both are None without reasons.
    """
    reasons = {texts.normalise(reason): reason for reason in output.reason} if output else {}
    if not reasons:
        return None, None
    known = {texts.normalise(reason) for reason in gold.reason} if gold else set()
    places = {key: _place(reason, record) for key, reason in reasons.items() if key not in known}
    lost = sum(place is None for place in places.values())
    turned = sum(p is not None and p[2] is not _own_polarity(reasons[key]) for key, p in places.items())
    allowed = max(len(record) * _SHARE, _LEAST, sum(map(len, known)))
    held = (len(reasons) - lost - turned) / len(reasons)
    return held * min(1.0, allowed / max(1, sum(map(len, reasons)))), lost / len(reasons)


def _supported(output: Diagnosis | None, namer: Namer) -> float | None:
    """Share of the known findings in the reasons that are likelier with a disease named than overall."""
    world = exact().world
    known = [c for name in output.diseases if (c := namer.concept(name)) in world.book.diseases] if output else []
    if output is None or not known:
        return None
    quoted = {m.subject for reason in output.reason for m in _mentions(reason) if m.form != "negated"}
    speaks = [max(world.support(d)[world.index[finding]] for d in known) >= SUPPORTS for finding in quoted]
    return sum(speaks) / len(speaks) if speaks else None


def _own_polarity(reason: str) -> Polarity:
    return evidence.polarity(reason, 0, len(reason))


def _place(reason: str, record: str) -> tuple[int, int, Polarity] | None:
    """Where the record holds a reason, and with what polarity: the first place that agrees, if any does."""
    own, first = _own_polarity(reason), None
    for start, end in evidence.places(reason, record):
        place = start, end, evidence.polarity(record, start, end)
        if place[2] is own:
            return place
        first = first or place
    return first


@cache
def textbook_namer() -> Namer:
    """Knows the textbook's diseases, and no other."""
    return Namer(load())


@cache
def _reader() -> Reader:
    return Reader(load())


@lru_cache(maxsize=4096)
def _mentions(record: str) -> Sequence[Mention]:
    return [mention for mention in _reader().read(record).mentions if mention.form != "blurred"]
