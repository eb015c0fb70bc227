import base64
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Reply, Token
from preceptor.llm.packing import deflate, inflate, pack, unpack

single = st.floats(width=32, max_value=0, allow_nan=False)
pieces = st.binary(max_size=6) | st.text(max_size=4).map(str.encode)
tokens = st.builds(
    Token,
    utf8=pieces,
    logprob=single | st.none(),
    alternatives=st.lists(st.tuples(pieces, single), max_size=6).map(tuple),
)
replies = st.builds(
    Reply,
    text=st.text(),
    thinking=st.text(),
    finish=st.sampled_from(["stop", "length", "refusal"]),
    model=st.text(max_size=8),
    tokens=st.lists(tokens, max_size=8).map(tuple),
    cut=st.booleans(),
)


@given(replies)
def test_a_reply_comes_back(reply):
    assert unpack(pack(reply)) == reply


@given(st.lists(tokens, min_size=1).map(tuple))
def test_a_reply_that_its_tokens_spell_comes_back(spelt):
    text = b"".join(token.utf8 for token in spelt).decode(errors="ignore")
    words = tuple(Token(utf8=char.encode(), logprob=-0.5) for char in text)
    assert unpack(pack(Reply(text=text, tokens=words))) == Reply(text=text, tokens=words)


@given(st.binary())
def test_bytes_come_back(data):
    assert inflate(deflate(data)) == data


@pytest.mark.parametrize(
    ("logprob", "stored"),
    [
        (-0.1, struct.unpack("<f", struct.pack("<f", -0.1))[0]),
        (-0.0, -0.0),
        (-1e300, -math.inf),
        (-math.inf, -math.inf),
        (-9999.0, -9999.0),
        (None, None),
    ],
)
def test_log_probabilities_are_kept_in_single_precision(logprob, stored):
    reply = Reply(text="a", tokens=(Token(utf8=b"a", logprob=logprob),))
    assert unpack(pack(reply)).tokens[0].logprob == stored


def test_what_was_stored_once_can_always_be_read():
    """The form is on users' disks: a change of it, the dictionary included, needs another version of the file."""
    body = base64.b64decode(STORED)
    chosen = Token(utf8="肺".encode(), logprob=-0.25, alternatives=(("肺".encode(), -0.25), (b" lung", -2.0)))
    reply = Reply(
        text='{"diseases": ["肺炎"], "reason": ["咳嗽"]}',
        thinking="look",
        finish="length",
        model="deepseek-chat",
        tokens=(chosen, Token(utf8=b"\xe7", logprob=None)),
    )
    assert unpack(body) == reply


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ('{"diseases": ["急性支气管炎"], "reason": ["咳嗽、咳痰5天，加重伴发热2天", "双肺呼吸音粗"]}', 80),
        ('{"diseases": ["pneumonia"], "reason": ["productive cough for five days", "crackles on the right"]}', 80),
    ],
)
def test_a_short_reply_takes_few_bytes(text, most):
    assert len(pack(Reply(text=text))) < most


def test_five_alternatives_take_less_than_their_numbers_and_words():
    token = Token(
        utf8="炎".encode(), logprob=-0.25, alternatives=tuple((f" word{n}".encode(), -0.25 - n) for n in range(5))
    )
    assert len(pack(Reply(text="炎" * 60, tokens=(token,) * 60))) < 60 * 5 * 4 / 2


STORED = "Y+Rl0UtJTS0oBuYy3eSMxJKc/Pxs7JrRdEISE9AqJiYGRgZmVkagMoWc0rz05wxg0MBwYN+BegA="
