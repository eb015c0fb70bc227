"""The store of a teacher's beliefs: what goes in comes out, in so many bytes, whatever happens to the file."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.core.errors import UserError, WorkError
from preceptor.train.store import HEADER, REPLIES, TOKENS, Beliefs, Header, Store, Writer, kept

HEAD = Header(k=5, tokenizer="t", teacher="textbook")


def believed(seed: int, n: int, k: int = 5, vocabulary: int = 151_936) -> Beliefs:
    """Of n tokens, in the precision in which they are kept."""
    dice = np.random.default_rng(seed)
    ids = np.stack([dice.choice(vocabulary, k, replace=False) for _ in range(n)]) if n else np.zeros((0, k), np.int64)
    logprobs = -np.sort(dice.exponential(3, (n, k)).astype(np.float16).astype(np.float32), axis=1)
    rest = dice.random(n).astype(np.float16).astype(np.float32)
    return Beliefs(ids, logprobs, rest, dice.integers(0, k, n))


def same(a: Beliefs, b: Beliefs) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "logprobs", "rest", "place"))


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 40), max_size=8), k=st.integers(1, 20), vocabulary=st.sampled_from([400, 2**24]))
def test_what_goes_in_comes_out(tmp_path_factory, sizes, k, vocabulary):
    """In any order, in two goes, by case and sample."""
    folder = tmp_path_factory.mktemp("store")
    replies = {(f"例 {n // 2}", n % 2): believed(n, size, k, max(vocabulary, k)) for n, size in enumerate(sizes)}
    head = Header(k, "t", "textbook")
    for part in (list(replies.items())[::2], list(replies.items())[1::2]):
        with Writer(folder, head) as writer:
            for (case, sample), found in part:
                assert (case, sample) not in writer
                writer.add(case, sample, found)
                assert (case, sample) in writer
    store = Store(folder)
    assert len(store) == len(replies)
    assert all(same(store[key], found) for key, found in reversed(replies.items()))
    assert ("例 0", 7) not in store
    assert not list(Store(folder).damages())
    with pytest.raises(KeyError):
        store["例 0", 7]


def test_a_token_takes_28_bytes_of_a_vocabulary_past_131072(tmp_path):
    with Writer(tmp_path / "s", HEAD) as writer:
        writer.add("a", 0, believed(1, 1_000, vocabulary=2**24))
    assert (tmp_path / "s" / TOKENS).stat().st_size == 28_000
    assert (tmp_path / "s" / REPLIES).stat().st_size == 36


def test_half_precision_is_near_enough(tmp_path):
    """A log-probability is off by a thousandth of itself at most; impossible stays impossible."""
    logprobs = np.array([[-1e-4, -0.693147, -9.21, -16.0, -np.inf]], np.float32)
    found = Beliefs(np.arange(5)[None], logprobs, np.array([1e-5], np.float32), np.array([0]))
    with Writer(tmp_path / "s", HEAD) as writer:
        writer.add("a", 0, found)
    back = Store(tmp_path / "s")["a", 0]
    assert np.allclose(back.logprobs[0, :4], logprobs[0, :4], rtol=1e-3, atol=0)
    assert back.logprobs[0, 4] == -np.inf
    assert back.rest[0] == pytest.approx(1e-5, rel=1e-2)


def test_the_later_of_two_counts(tmp_path):
    with Writer(tmp_path / "s", HEAD) as writer:
        for seed in (1, 2):
            writer.add("a", 0, believed(seed, 3))
    store = Store(tmp_path / "s")
    assert len(store) == 1
    assert same(store["a", 0], believed(2, 3))


def test_a_crash_at_any_byte_leaves_whole_replies(tmp_path):
    """Cut anywhere: what was whole is read, the rest is written again, and the files end as of an unbroken run."""
    whole = tmp_path / "whole"
    replies = {f"c{n}": believed(n, n + 1) for n in range(3)}
    with Writer(whole, HEAD) as writer:
        for case, found in replies.items():
            writer.add(case, 0, found)
    for name in (TOKENS, REPLIES):
        size = (whole / name).stat().st_size
        for end in range(0, size, 5):
            torn = tmp_path / f"{name} {end}"
            shutil.copytree(whole, torn)
            with (torn / name).open("r+b") as file:
                file.truncate(end)
            if name == TOKENS and end < 28:  # more than the last reply is gone: that is no crash of ours
                continue
            try:
                store = Store(torn)
            except WorkError:
                assert name == TOKENS
                continue
            assert all(same(store[case, 0], found) for case, found in replies.items() if (case, 0) in store)
            with Writer(torn, HEAD) as writer:
                for case, found in replies.items():
                    if (case, 0) not in writer:
                        writer.add(case, 0, found)
            assert [(torn / part).read_bytes() for part in (TOKENS, REPLIES)] == [
                (whole / part).read_bytes() for part in (TOKENS, REPLIES)
            ]


def test_every_flipped_byte_is_found(tmp_path):
    """In a reply when it is read, in an entry when the store is opened; the others are read all the same."""
    folder = tmp_path / "s"
    with Writer(folder, HEAD) as writer:
        for case in ("a", "b"):
            writer.add(case, 0, believed(ord(case), 2))
    good = {name: (folder / name).read_bytes() for name in (TOKENS, REPLIES)}
    for at in range(len(good[TOKENS])):
        flipped = bytearray(good[TOKENS])
        flipped[at] ^= 1
        (folder / TOKENS).write_bytes(flipped)
        store, bad = Store(folder), "ab"[at // 56]
        with pytest.raises(WorkError, match=f"the reply to '{bad}' is damaged; delete"):
            store[bad, 0]
        other = "ba"[at // 56]
        assert same(store[other, 0], believed(ord(other), 2))
        assert list(Store(folder).damages()) == [f"{folder / TOKENS}: reply {1 + at // 56} is damaged"]
    (folder / TOKENS).write_bytes(good[TOKENS])
    for at in range(len(good[REPLIES]) // 2):
        flipped = bytearray(good[REPLIES])
        flipped[at] ^= 1
        (folder / REPLIES).write_bytes(flipped)
        with pytest.raises(WorkError, match="entry 1 is damaged"):
            Store(folder)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Header(4, "t", "textbook"), "another k"),
        (Header(5, "u", "textbook"), "another tokenizer"),
        (Header(5, "u", "me"), "another tokenizer and another teacher"),
    ],
)
def test_another_request_is_refused(tmp_path, other, words):
    with Writer(tmp_path / "s", HEAD):
        pass
    with pytest.raises(UserError, match=words):
        Writer(tmp_path / "s", other)


def test_what_is_no_store_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no store of a teacher's beliefs here"):
        Store(tmp_path)
    with Writer(tmp_path / "s", HEAD):
        pass
    (tmp_path / "s" / HEADER).write_text(json.dumps({"version": 9}))
    with pytest.raises(UserError, match="of version 9, where this program reads 1"):
        Store(tmp_path / "s")
    (tmp_path / "s" / HEADER).write_text("{")
    with pytest.raises(UserError, match=r"here \(JSONDecodeError\); delete the folder, and it is made anew"):
        Writer(tmp_path / "s", HEAD)
    for name in (TOKENS, REPLIES):
        with Writer(tmp_path / name, HEAD) as writer:
            writer.add("a", 0, believed(1, 2))
        (tmp_path / name / name).unlink()
        with pytest.raises(WorkError, match=f"{name}: gone; delete the folder, and it is made anew"):
            Writer(tmp_path / name, HEAD)
    with Writer(tmp_path / "t", HEAD) as writer, pytest.raises(UserError, match="past 16777215"):
        writer.add("a", 0, Beliefs(np.full((1, 5), 2**24), np.zeros((1, 5)), np.zeros(1), np.zeros(1)))


@pytest.mark.parametrize("k", [0, 256])
def test_more_tokens_than_a_byte_counts_are_refused(tmp_path, k):
    with pytest.raises(UserError, match=rf"^k: {k} is not from 1 to 255, [^\n]*$"):
        Writer(tmp_path / "s", Header(k, "t", "textbook"))
    with Writer(tmp_path / "s", Header(255, "t", "textbook")) as writer:
        writer.add("a", 0, believed(1, 2, 255))
    assert same(Store(tmp_path / "s")["a", 0], believed(1, 2, 255))


@pytest.mark.parametrize(
    ("written", "logprob", "others", "wanted"),
    [
        (7, -0.1, {7: -0.1, 3: -2.5}, ([7, 3, 0], [-0.1, -2.5, -np.inf], 0)),
        (9, -8.0, {1: -1.0, 2: -2.0, 3: -3.0}, ([1, 2, 9], [-1.0, -2.0, -8.0], 2)),
        (2, -2.0, {1: -1.0, 3: -3.0, 4: -4.0}, ([1, 2, 3], [-1.0, -2.0, -3.0], 1)),
        (5, -0.5, {}, ([5, 0, 0], [-0.5, -np.inf, -np.inf], 0)),
        (0, -1.0, {4: -0.6}, ([4, 0, 0], [-0.6, -1.0, -np.inf], 1)),
    ],
)
def test_the_written_token_is_always_among_the_kept(written, logprob, others, wanted):
    assert kept(written, logprob, others, 3) == wanted
