"""A teacher's tokens as a student's: by their bytes, at the same places of the same text, and never by position."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.core.records import Reply, Token
from preceptor.core.text import token_id
from preceptor.model import pieces
from preceptor.model.tokens import special_tokens
from preceptor.train.store import Beliefs, kept

WAY_OUT = (
    "distil on text (sft: the labels alone), or take a teacher of the student's family, over an API or on this machine"
)
_THOUGHT = b"</think>"
_FENCE = b"```"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of SentencePiece's that stands for a byte where no other does: a text of such letters never has it."""
_MOST_APART = 0.05
"""Share of the tokens that a teacher of the same family may cut otherwise: a reply isn't always cut as its text is."""


@dataclass
class Tally:
    """What became of the tokens of all replies."""

    tokens: int = 0
    """That the student learns."""
    believed: int = 0
    """Of which the teacher's probabilities are known."""
    silent: int = 0
    """Of which the teacher gave none: the end of a turn, and what an endpoint leaves out."""
    apart: int = 0
    """Which the teacher cut otherwise out of the text."""
    foreign: "Counter[bytes]" = field(default_factory=Counter)
    """Alternatives that are no token of the student's; their mass is with the rest."""
    texts: int = 0
    """Replies whose text is not what the student learns: nothing of theirs can serve."""

    def check(self, teacher: str, student: str) -> None:
        """Refuse a teacher whose tokens are not the student's.

        Raises:
            UserError: it is another tokenizer's.
        """
        if self.apart > _MOST_APART * max(1, self.tokens - self.silent):
            raise UserError(
                f"{teacher} cuts {self.apart} of {self.tokens - self.silent} tokens otherwise than {student}: another "
                f"tokenizer, whose probabilities can't be learned token by token; {WAY_OUT}"
            )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what each id stands for, as hex: equal where the ids mean the same, however far a head is padded."""
    total = sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        total.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def spells(tokenizer: PreTrainedTokenizerBase, reply: Reply) -> bool:
    """Whether a reply's text is what its tokens say: ids of another tokenizer say something else."""
    return reply.text.encode() in b"".join(_spelt(tokenizer, token.utf8) for token in reply.tokens)


def aligned(
    tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], reply: Iterable[Token], k: int, tally: Tally
) -> Beliefs | None:
    """What is believed of each token of an answer, the end of the turn included; None where the texts differ.

    A token is matched where it begins and ends in the text as the teacher's does; where the teacher gives ids, by its
    id at that place, and the end of the turn too. Where it isn't, nothing is known of it (-inf alone, and no rest); nor
    of the thinking before an answer, where that is not the teacher's or no endpoint gives its tokens. Blanks and the
    marks of a code block around a reply are passed over.
    """
    piece, theirs = _pieces(tokenizer), [token for token in reply if token.utf8]
    own = [piece(token) for token in answer]
    numbered = bool(theirs) and token_id(theirs[0].utf8) is not None
    names = [b"token_id:%d" % token for token in answer] if numbered else own
    spelt = [_spelt(tokenizer, token.utf8) for token in theirs]
    whole, said = b"".join(own), b"".join(spelt)
    for bare in (said, said.strip(), _unfenced(said)):
        if bare and (ahead := _ahead(whole, bare)) is not None:
            break
    else:
        return None
    starts = accumulate(map(len, spelt), initial=ahead - said.rfind(bare))
    end = len(whole) - (bare != said)  # the last token may be one with a blank behind it
    at = {(start, token.utf8): token for start, token in zip(starts, theirs, strict=False)}
    found = np.zeros((len(answer), k), np.int64), np.full((len(answer), k), -np.inf, np.float32)
    rest, place = np.zeros(len(answer), np.float32), np.zeros(len(answer), np.int64)
    tally.tokens += len(answer)
    for row, (start, text) in enumerate(zip(accumulate(map(len, own), initial=0), own, strict=False)):
        token = at.get((start, names[row]))
        if token is None or token.logprob is None:
            apart = token is None and bool(text) and ahead <= start <= end - len(text)
            tally.apart, tally.silent = tally.apart + apart, tally.silent + (not apart)
            found[0][row, 0] = answer[row]
            continue
        others: dict[int, float] = {}
        for other, logprob in token.alternatives:
            if other == token.utf8:  # its own number is known, and others may have its bytes too
                continue
            if (known := _number(tokenizer, other)) is None:
                tally.foreign[other] += 1
            else:
                others.setdefault(known, logprob)
        ids, logprobs, place[row] = kept(answer[row], token.logprob, others, k)
        found[0][row], found[1][row] = ids, logprobs
        rest[row] = max(0.0, 1 - math.fsum(map(math.exp, logprobs)))
        tally.believed += 1
    return Beliefs(*found, rest, place)


def _unfenced(said: bytes) -> bytes:
    """What a reply says behind its thinking, without the marks of a code block."""
    answer = said.rpartition(_THOUGHT)[2].strip()
    if answer.startswith(_FENCE):
        answer = answer.partition(b"\n")[2].removesuffix(_FENCE).strip()
    return answer


def _ahead(whole: bytes, said: bytes) -> int | None:
    """Bytes of thinking that the answer alone has; below 0 those of the reply alone; None where others differ."""
    ahead = len(whole) - len(said)
    longer, shorter = (whole, said) if ahead >= 0 else (said, whole)
    thought, answered = longer[: abs(ahead)], longer[abs(ahead) :]
    return None if answered != shorter or (thought and not thought.rstrip().endswith(_THOUGHT)) else ahead


_pieces = lru_cache(maxsize=4)(pieces.reader)


def _spelt(tokenizer: PreTrainedTokenizerBase, utf8: bytes) -> bytes:
    """The bytes of a token, of which an endpoint may have given the id; one past the vocabulary has none."""
    number = token_id(utf8)
    if number is None:
        return utf8
    return _pieces(tokenizer)(number) if number in _vocabulary(tokenizer) else b""


def _number(tokenizer: PreTrainedTokenizerBase, utf8: bytes) -> int | None:
    """The student's token of these bytes, or of this id; None where there is none."""
    number = token_id(utf8)
    if number is None:
        return _numbers(tokenizer).get(utf8)
    return number if number in _vocabulary(tokenizer) else None


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that stand for something."""
    return frozenset(tokenizer.get_vocab().values())


@lru_cache(maxsize=4)
def _numbers(tokenizer: PreTrainedTokenizerBase) -> Mapping[bytes, int]:
    """The ordinary token of each sequence of bytes; of several the first that isn't for a byte without another."""
    piece: Callable[[int], bytes] = _pieces(tokenizer)
    special = set(special_tokens(tokenizer).values())
    bytes_alone = {number for token, number in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)}
    found: dict[bytes, int] = {}
    for number in sorted(_vocabulary(tokenizer), key=lambda number: (number in bytes_alone, number)):
        if number not in special and (text := piece(number)):
            found.setdefault(text, number)
    return found
