"""Where in a reply a teacher decides on the disease that it names first, and which way to go on was right.

A decision is a token with more than one way to go on, as long as what was said before it may still become a right
answer: from the bracket that opens the list of diseases up to the quote that closes the first name. So the observations
of one reply are about the truth given the truth so far, as a teacher's probabilities are.

All is held against bytes, since a character may span several tokens.
"""

import json
import re
from collections.abc import Mapping
from itertools import accumulate
from math import exp

from preceptor.clinical.names import Namer
from preceptor.clinical.textbook.book import load
from preceptor.core.calibration import SINGLE
from preceptor.core.recalibration import Observation
from preceptor.core.records import Case, Diagnosis, Reply
from preceptor.tasks.diagnosis import textbook_namer

_LIST = re.compile(rb'"diseases"\s*:\s*(?P<bracket>\[)\s*')
_CLOSED = re.compile(rb'(?:[^"\\]|\\.)*"', re.DOTALL)
_OPENING = b'"'
_ABSTAINED = b"]"

Rights = Mapping[str, frozenset[bytes]]
"""How an answer may go on behind the opening bracket to be right: by disease, and by "" for abstention."""


def observations(reply: Reply, output: Diagnosis, case: Case, namer: Namer | None = None) -> list[Observation]:
    """The decisions of a reply in JSON that was read as `output`, about a case with gold.

    - Right is each name of a gold disease that is known, and the one that was said if it means one; abstention, where
      the gold names no disease or it is expected. Of several gold diseases the one believed most counts, for a teacher
      names likelier ones first.
    - Tokens that lead on to the same right answer say the same, and so do those that differ only behind the name.
    - Of tokens that begin a right name in more or fewer letters the longest is on the way there: a tokenizer spells a
      word in one way. For the name that was said it is known which one is.
    """
    namer = namer or textbook_namer()
    raw = b"".join(token.utf8 for token in reply.tokens)
    opening = _LIST.search(raw, max(0, raw.rfind(b"</think>")))
    said = _first(raw[opening.end() :]) if opening else None
    if opening is None or said is None or said[0] != (output.diseases[0] if output.diseases else ""):
        return []
    name, length = said
    wrote = raw[opening.end() :][:length].lower()
    rights = _rights(name, case, wrote, namer)
    found = []
    begins = accumulate((len(token.utf8) for token in reply.tokens), initial=0)
    for token, begin in zip(reply.tokens, begins, strict=False):
        if begin + len(token.utf8) <= opening.start("bracket"):
            continue
        if begin >= opening.end() + length or token.logprob is None or not rights:
            break
        lead = raw[begin : max(begin, min(opening.end(), begin + len(token.utf8)))]
        before = raw[opening.end() : begin].lower()
        options = {**dict(token.alternatives), token.utf8: token.logprob}
        texts = {option: before + _behind(option, lead).lower() for option in options}
        there = _leading(texts, token.utf8, rights, wrote)
        right = max(there, key=lambda disease: sum(exp(options[option]) for option in there[disease]), default=None)
        if one := _observed(options, texts, there[right] if right is not None else frozenset(), case.id):
            found.append(one)
        if right is None or token.utf8 not in there[right]:
            break
        rights = {disease: rights[disease] for disease, on in there.items() if token.utf8 in on}
    return found


def _first(behind: bytes) -> tuple[str, int] | None:
    """The first name of a list behind its bracket, and how many bytes that takes; the empty one for an empty list."""
    if behind.startswith(_ABSTAINED):
        return "", 1
    closed = _CLOSED.match(behind, 1) if behind.startswith(_OPENING) else None
    try:
        return (str(json.loads(behind[: closed.end()])), closed.end()) if closed else None
    except ValueError:
        return None


def _rights(said: str, case: Case, wrote: bytes, namer: Namer) -> Rights:
    gold = case.gold.diseases if isinstance(case.gold, Diagnosis) else ()
    found = {}
    for disease in gold:
        known = load().diseases.get(namer.concept(disease) or "")
        names = (disease, *((known.zh, known.en, *known.aliases.zh, *known.aliases.en) if known else ()))
        written = {json.dumps(n, ensure_ascii=plain).encode().lower() for n in names for plain in (False, True)}
        found[disease] = frozenset(written | ({wrote} if said and namer.match((said,), (disease,)) else set()))
    if case.expects_abstention or not gold:
        found[""] = frozenset((_ABSTAINED,))
    return found


def _behind(option: bytes, lead: bytes) -> bytes:
    """What an option for a token says behind the opening bracket, where `lead` is what the token says before that."""
    if not lead:
        return option
    if lead.startswith(option):
        return b""
    if option.startswith(lead):
        return option[len(lead) :].lstrip()
    _, bracket, behind = option.partition(b"[")
    return behind.lstrip() if bracket else option


def _leading(texts: Mapping[bytes, bytes], chosen: bytes, rights: Rights, wrote: bytes) -> dict[str, frozenset[bytes]]:
    """By disease the options that lead on to it, where there are any."""
    found = {}
    for disease, names in rights.items():
        on: set[bytes] = set()
        for name in names:
            begun = [option for option, text in texts.items() if name.startswith(text)]
            longest = max((texts[option] for option in begun), key=len, default=b"")
            if name == wrote and chosen in begun:
                longest = texts[chosen]
            on.update(option for option in begun if texts[option] in (b"", _OPENING, longest))
            on.update(option for option, text in texts.items() if text.startswith(name))
        if on:
            found[disease] = frozenset(on)
    return found


def _observed(
    options: Mapping[bytes, float], texts: Mapping[bytes, bytes], right: frozenset[bytes], group: str
) -> Observation | None:
    """What was believed of the ways to go on; None where there is but one."""
    says = {option: b"" if option in right else _cut(text) or _OPENING for option, text in texts.items()}
    numbers = {way: number for number, way in enumerate(dict.fromkeys(says.values()))}
    rest = max(0.0, 1 - sum(map(exp, options.values())))
    if len(numbers) == 1 and rest < SINGLE:
        return None
    return Observation(
        group=group,
        logprobs=tuple(options.values()),
        ways=tuple(numbers[says[option]] for option in options),
        right=numbers[b""] if right else None,
        rest=rest if right else max(rest, SINGLE),  # what came about had some probability, if none that digits show
    )


def _cut(text: bytes) -> bytes:
    """A text up to the quote that closes its name: what follows is another matter."""
    closed = _CLOSED.match(text, 1) if text.startswith(_OPENING) else None
    return text[: closed.end()] if closed else text
