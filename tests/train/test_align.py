"""A teacher's tokens as a student's: nothing is matched by position, every mismatch is counted."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from preceptor.core.errors import UserError
from preceptor.core.records import Reply, Token
from preceptor.model import pieces, tokens
from preceptor.model.load import load_tokenizer
from preceptor.model.resolve import resolve
from preceptor.train.align import Tally, aligned, fingerprint, spells
from tests.model import tiny

TEXT = '{"diseases": ["肺炎"], "reason": ["发热3天", "a dry cough"]}'


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def ids_of(words, text: str = TEXT) -> list[int]:
    return [*words.encode(text, add_special_tokens=False), tokens.end_of_turn(words)]


def said(words, ids: list[int], **changed: Token) -> list[Token]:
    """Each token as a teacher that is sure of it; `changed` by number, as t3=…"""
    piece = pieces.reader(words)
    plain = [Token(utf8=piece(token), logprob=-0.1, alternatives=((piece(token), -0.1),)) for token in ids[:-1]]
    return [changed.get(f"t{n}", token) for n, token in enumerate(plain)]


def test_every_token_is_matched_but_the_end_of_the_turn(words):
    ids, tally = ids_of(words), Tally()
    piece = pieces.reader(words)
    other = next(token for token in range(200, 400) if token != ids[2])
    three = Token(
        utf8=piece(ids[2]),
        logprob=-2.0,
        alternatives=((piece(other), -0.3), (piece(ids[2]), -2.0), (b"no such token of theirs", -3.0)),
    )
    found = aligned(words, ids, said(words, ids, t2=three), 3, tally)
    assert found.written.tolist() == ids
    assert found.ids[2].tolist() == [other, ids[2], 0]
    assert np.allclose(found.logprobs[2], [-0.3, -2.0, -np.inf])
    assert found.place[2] == 1
    assert found.rest[2] == pytest.approx(1 - math.exp(-0.3) - math.exp(-2.0))
    assert np.isneginf(found.logprobs[-1]).all()
    assert found.rest[-1] == 0
    assert (tally.tokens, tally.believed, tally.silent, tally.apart) == (len(ids), len(ids) - 1, 1, 0)
    assert tally.foreign == {b"no such token of theirs": 1}
    tally.check("it", "this")


@pytest.mark.parametrize("around", ["{} \n", "\n{}", "```json\n{}\n```", "<think>\nHm.\n</think>\n\n```\n{}\n```\n"])
def test_blanks_and_marks_around_a_reply_are_passed_over(words, around):
    """As most models write them: the tokens within stand where they stood, the one at the end may have grown."""
    ids, tally = ids_of(words), Tally()
    found = aligned(words, ids, said(words, ids_of(words, around.format(TEXT))), 3, tally)
    assert found.written.tolist() == ids
    assert tally.believed >= len(ids) - 3
    assert (tally.believed + tally.silent, tally.apart) == (len(ids), 0)
    assert np.isfinite(found.logprobs[:, 0]).sum() == tally.believed


def test_bytes_that_two_tokens_stand_for_are_those_of_the_word():
    """As SentencePiece has them: `<0x7B>` is for a byte without a word, and `{` is the word."""
    known = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    known |= {word: 259 + at for at, word in enumerate(["▁", "{", "}", "a", "b", "ab"])}
    bpe = Tokenizer(models.BPE(known, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    tally = Tally()
    theirs = [
        Token(utf8=b"{", logprob=-0.4, alternatives=((b"{", -0.4), (b"}", -1.5))),
        Token(utf8=b"ab", logprob=-0.1, alternatives=((b"ab", -0.1), (b"a", -3.0), (b"!", -4.0))),
    ]
    found = aligned(words, [known["{"], known["ab"], 2], theirs, 3, tally)
    assert found.ids[:2].tolist() == [[known["{"], known["}"], 0], [known["ab"], known["a"], known["<0x21>"]]]
    assert found.rest[0] == pytest.approx(1 - math.exp(-0.4) - math.exp(-1.5))
    assert not tally.foreign


def test_a_token_cut_otherwise_is_left_out_and_what_follows_is_not_shifted(words):
    """The teacher writes one of the tokens in two: those after it stand where they stood."""
    ids, tally = ids_of(words), Tally()
    theirs = said(words, ids)
    long = next(n for n, token in enumerate(theirs) if len(token.utf8) > 2)
    first, second = theirs[long].utf8[:1], theirs[long].utf8[1:]
    theirs[long : long + 1] = [Token(utf8=first, logprob=-1.0), Token(utf8=second, logprob=-1.0)]
    found = aligned(words, ids, theirs, 5, tally)
    assert found.written.tolist() == ids
    assert np.isneginf(found.logprobs[:, 0]).nonzero()[0].tolist() == [long, len(ids) - 1]
    assert (tally.apart, tally.silent, tally.believed) == (1, 1, len(ids) - 2)


def test_tokens_without_a_log_probability_are_silent(words):
    ids, tally = ids_of(words), Tally()
    found = aligned(words, ids, said(words, ids, t1=Token(utf8=pieces.reader(words)(ids[1]), logprob=None)), 5, tally)
    assert np.isneginf(found.logprobs[1]).all()
    assert (tally.silent, tally.apart) == (2, 0)


def test_another_text_serves_nothing(words):
    tally = Tally()
    assert aligned(words, ids_of(words), said(words, ids_of(words, TEXT + ".")), 5, tally) is None
    assert tally == Tally()


def by_ids(ids: list[int], others: tuple[tuple[int, float], ...] = ()) -> list[Token]:
    """Each token as a teacher gives it that tells ids."""
    named = tuple((b"token_id:%d" % other, logprob) for other, logprob in others)
    return [Token(utf8=b"token_id:%d" % token, logprob=-0.1, alternatives=named) for token in ids]


def test_ids_match_halves_of_characters_and_the_end_of_the_turn(words):
    """Bytes of no whole character are exact, special tokens are alternatives, what is past the vocabulary is not."""
    ids, tally = ids_of(words, '{"diseases": ["鼻炎"]}'), Tally()
    end, outside = ids[-1], max(words.get_vocab().values()) + 1
    assert any("�" in pieces.reader(words)(token).decode(errors="replace") for token in ids), "no half characters"
    found = aligned(words, ids, by_ids(ids, ((end, -2.5), (outside, -3.0))), 3, tally)
    assert found.written.tolist() == ids
    assert found.ids[0].tolist() == [ids[0], end, 0]
    assert np.allclose(found.logprobs[0], [-0.1, -2.5, -np.inf])
    assert found.logprobs[-1, 0] == np.float32(-0.1)
    assert (tally.tokens, tally.believed, tally.silent, tally.apart) == (len(ids), len(ids), 0, 0)
    assert tally.foreign == {b"token_id:%d" % outside: len(ids)}


def test_ids_without_the_end_of_the_turn_leave_it_silent(words):
    ids, tally = ids_of(words), Tally()
    assert aligned(words, ids, by_ids(ids[:-1]), 3, tally).written.tolist() == ids
    assert (tally.believed, tally.silent, tally.apart) == (len(ids) - 1, 1, 0)


def test_ids_of_the_same_bytes_cut_otherwise_are_apart(words):
    """A token in two, by their ids; what follows stands where it stood."""
    ids, tally = ids_of(words), Tally()
    piece = pieces.reader(words)
    long = next(n for n, token in enumerate(ids) if len(piece(token)) > 1)
    halves = [words.convert_tokens_to_ids(part) for part in words.convert_ids_to_tokens(ids[long])]
    assert b"".join(map(piece, halves)) == piece(ids[long])
    found = aligned(words, ids, by_ids([*ids[:long], *halves, *ids[long + 1 :]]), 3, tally)
    assert np.isneginf(found.logprobs[:, 0]).nonzero()[0].tolist() == [long]
    assert (tally.apart, tally.silent) == (1, 0)


def test_thinking_that_only_the_reply_has_is_passed_over(words):
    """A reply by ids holds all that was written; what is before the answer must be thinking, and nothing else."""
    ids, tally = ids_of(words), Tally()
    thought = words.encode("<think>咳嗽</think>\n\n", add_special_tokens=False)
    assert aligned(words, ids, by_ids([*thought, *ids]), 3, tally).written.tolist() == ids
    assert (tally.tokens, tally.believed, tally.apart) == (len(ids), len(ids), 0)
    assert aligned(words, ids, by_ids([ids[0], *ids]), 3, tally) is None


def test_ids_of_another_tokenizer_say_another_text(words):
    mini, ids = load_tokenizer(resolve("mini")), ids_of(words)
    reply = Reply(text=TEXT, tokens=tuple(by_ids(ids)))
    assert spells(words, reply)
    assert not spells(mini, reply)
    assert aligned(mini, ids_of(mini), reply.tokens, 3, Tally()) is None
    assert not spells(words, Reply(text=TEXT, tokens=tuple(by_ids([*ids[:3], 10**8]))))


def test_another_tokenizer_is_refused_with_the_way_out(words):
    """Bytes that fall together now and then hide nothing: most of the text is cut otherwise."""
    mini = load_tokenizer(resolve("mini"))
    ids, tally = ids_of(mini), Tally()
    aligned(mini, ids, said(words, ids_of(words)), 5, tally)
    with pytest.raises(UserError, match=r"another tokenizer, .*; distil on text .*student's family"):
        tally.check("theirs", "mini")


def test_a_fingerprint_is_of_what_ids_mean(words):
    assert fingerprint(words) == fingerprint(tiny.tokenizer())
    assert fingerprint(words) != fingerprint(load_tokenizer(resolve("mini")))
    shifted = json.loads(words.backend_tokenizer.to_str())
    vocabulary = shifted["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    shifted["model"]["vocab"] = {name: (at + 1) % len(names) for at, name in enumerate(names)}

    class Shifted:
        def get_vocab(self):
            return shifted["model"]["vocab"]

    assert fingerprint(Shifted()) != fingerprint(words)
