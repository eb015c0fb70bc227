"""Replies as few bytes: their words by a dictionary of what replies look like, their tokens by columns.

Log-probabilities are kept in single precision (seven digits), all else exactly.
"""

import math
import struct
import zlib
from collections.abc import Iterable, Sequence

from preceptor.core.records import Reply, Token

_FINISH = ("stop", "length", "refusal")
_JOINED = 0x80
"""The text is what the tokens say."""
_CUT = 0x40
"""The record was cut."""
_SEVEN_BITS = 0x7F
_SINGLE = 3.4028234663852886e38
"""The largest finite number in single precision."""

# Part of the format: another dictionary reads nothing that this one wrote. The commonest stands last.
_DICTIONARY = (
    "hypertension diabetes mellitus pneumonia asthma bronchitis gastritis appendicitis influenza infection anaemia "
    "migraine heart failure myocardial infarction stroke chronic obstructive pulmonary disease urinary tract "
    "shortness of breath chest pain abdominal pain headache nausea and vomiting diarrhoea fatigue weight loss "
    "cough with sputum sore throat runny nose fever and chills The patient reports no history of which "
    "is consistent with suggests for days weeks on examination The record says "
    "高血压病糖尿病冠心病脑梗死支气管炎哮喘慢性阻塞性肺疾病胃炎胃溃疡阑尾炎胆囊炎肝炎肾炎贫血甲状腺功能亢进症"
    "上呼吸道感染尿路感染心力衰竭心律失常骨折肿瘤患者主诉现病史既往史体格检查辅助检查诊断建议治疗"
    "咳嗽咳痰发热头痛头晕胸闷胸痛气短腹痛腹泻恶心呕吐乏力水肿伴无明显诱因出现天小时月余年因反复加重"
    "综上所述，考虑根据符合提示支持表现为。建议尽快到医院就诊，进一步完善相关检查；注意休息，避免。"
    '<think>\n\n</think>\n\n```json\n{\n  "diseases": [\n    "急性慢性\n  ],\n  "reason": [\n    "1. 2. 3. '
    '"confidence": {"diseases": ["感染", "炎"], "reason": ["患者", "1. '
    '"]}\n```{"diseases":["","],"reason":["","]}{"diseases": ["肺炎", "], "reason": ["'
).encode()


def deflate(data: bytes) -> bytes:
    """`data` in fewer bytes, where it looks like a reply."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=_DICTIONARY)
    return packer.compress(data) + packer.flush()


def inflate(body: bytes) -> bytes:
    """What `deflate` was given."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS, zdict=_DICTIONARY)
    return unpacker.decompress(body) + unpacker.flush()


def pack(reply: Reply) -> bytes:
    """All of a reply but its usage and key, which the ledger keeps beside it."""
    text = reply.text.encode()
    joined = bool(reply.tokens) and b"".join(token.utf8 for token in reply.tokens) == text
    words = (reply.model.encode(), reply.thinking.encode(), b"" if joined else text)
    marks = _JOINED * joined | _CUT * reply.cut
    head = bytes([_FINISH.index(reply.finish) | marks]) + _varints(map(len, words))
    return deflate(head + b"".join(words) + (_tokens(reply.tokens) if reply.tokens else b""))


def unpack(body: bytes) -> Reply:
    """What `pack` was given."""
    data = _Reader(inflate(body))
    first = data.take(1)[0]
    model, thinking, text = (data.take(size) for size in data.varints(3))
    tokens = _read_tokens(data) if data.left else ()
    return Reply(
        text=(b"".join(token.utf8 for token in tokens) if first & _JOINED else text).decode(),
        thinking=thinking.decode(),
        finish=_FINISH[first & ~(_JOINED | _CUT)],
        model=model.decode(),
        tokens=tokens,
        cut=bool(first & _CUT),
    )


def _tokens(tokens: Sequence[Token]) -> bytes:
    """Columns: alternatives a token, the chosen one among them (0: it is not), lengths, bytes, log-probabilities."""
    chosen: list[int] = []
    pieces: list[tuple[bytes, float | None]] = []
    for token in tokens:
        own = (token.utf8, token.logprob)
        place = next((n for n, other in enumerate(token.alternatives, 1) if other == own), 0)
        chosen.append(place)
        pieces += token.alternatives if place else (own, *token.alternatives)
    numbers = struct.pack(f"<{len(pieces)}f", *(_single(logprob) for _, logprob in pieces))
    counts = (len(token.alternatives) for token in tokens)
    return b"".join((
        _varints([len(tokens)]),
        _varints(counts),
        _varints(chosen),
        _varints(len(utf8) for utf8, _ in pieces),
        *(utf8 for utf8, _ in pieces),
        *(numbers[byte::4] for byte in range(4)),  # signs and exponents are alike; beside each other they shrink
    ))  # fmt: skip


def _read_tokens(data: "_Reader") -> tuple[Token, ...]:
    count = data.varints(1)[0]
    counts, chosen = data.varints(count), data.varints(count)
    sizes = data.varints(sum(n + (place == 0) for n, place in zip(counts, chosen, strict=True)))
    strings = [data.take(size) for size in sizes]
    numbers = bytearray(4 * len(sizes))
    for byte in range(4):
        numbers[byte::4] = data.take(len(sizes))
    pieces = zip(strings, struct.unpack(f"<{len(sizes)}f", numbers), strict=True)
    tokens = []
    for n, place in zip(counts, chosen, strict=True):
        own = None if place else next(pieces)
        alternatives = tuple(next(pieces) for _ in range(n))
        utf8, logprob = own or alternatives[place - 1]
        known = None if math.isnan(logprob) else logprob
        tokens.append(Token(utf8=utf8, logprob=known, alternatives=alternatives))
    return tuple(tokens)


def _single(logprob: float | None) -> float:
    if logprob is None:
        return math.nan
    return logprob if abs(logprob) <= _SINGLE else math.copysign(math.inf, logprob)


def _varints(numbers: Iterable[int]) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    out = bytearray()
    for number in numbers:
        left = number
        while left > _SEVEN_BITS:
            out.append(left & _SEVEN_BITS | 0x80)
            left >>= 7
        out.append(left)
    return bytes(out)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def varints(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            number, shift = 0, 0
            while (byte := self.take(1)[0]) > _SEVEN_BITS:
                number |= (byte & _SEVEN_BITS) << shift
                shift += 7
            found.append(number | byte << shift)
        return found
