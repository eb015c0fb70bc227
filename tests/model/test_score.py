"""Scores of candidates: what plain forward passes give, over every token in which a text may end."""

import json
import math
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from preceptor.clinical.textbook.book import load as textbook
from preceptor.core.errors import UserError
from preceptor.core.records import Message, Request, Row, Sampling
from preceptor.model import pieces, score, tokens
from preceptor.model.generate import generate
from preceptor.model.load import Loaded, load
from preceptor.tasks.diagnosis import chain_probability, parse
from preceptor.tasks.lessons import lessons
from tests.model import tiny
from tests.model.test_templates import FAMILIES, taught

BEGUN = '{"diseases": ['
CANDIDATES = ('"肺炎"', '"流行性感冒"', '"Influenza"', '"influenza, type A"', '"gastritis \\"x\\""', "]")
FOLLOWERS = ("", '], "', ', "', "]}")


@pytest.fixture(scope="module")
def mini() -> Loaded:
    torch.set_num_threads(1)
    return load("mini")


@pytest.fixture(scope="module", params=["qwen", "llama", "mini"])
def loaded(request, tmp_path_factory):
    if request.param == "mini":
        return request.getfixturevalue("mini")
    torch.set_num_threads(1)
    return Loaded(getattr(tiny, request.param)(), tiny.tokenizer(), tmp_path_factory.mktemp("model"))


def ask(candidates=CANDIDATES, begun=BEGUN, messages=None, **sampling) -> Request:
    messages = messages or tiny.messages("主诉：发热3天，咳嗽。Fever and cough.")
    return Request(
        messages=(*messages, Message(role="assistant", content=begun)),
        sampling=Sampling(**{"max_tokens": 64, **sampling}),
        candidates=candidates,
    )


def scored(loaded: Loaded, request: Request) -> list[float]:
    (reply,) = score.score(loaded, [request])
    assert (reply.text, reply.finish) == ("", "stop")
    assert [token.utf8.decode() for token in reply.tokens] == list(request.candidates)
    assert reply.usage.completion_tokens == 0
    return [math.exp(token.logprob) for token in reply.tokens]


def reaching(loaded: Loaded, prompt: list[int], shared: int, cuts: list[tuple[list[int], int]]) -> float:
    """A(x) by whole forward passes: `cuts` are token sequences, each with the byte at which x ends in it."""
    piece = pieces.reader(loaded.tokenizer)
    total, seen = 0.0, set()
    for ids, end in cuts:
        last = shared
        while len(b"".join(map(piece, ids[: last + 1]))) < end:
            last += 1
        done = b"".join(map(piece, ids[:last]))
        rest = b"".join(map(piece, ids))[len(done) : end]
        if (*ids[shared:last], rest) in seen:
            continue
        seen.add((*ids[shared:last], rest))
        if not rest:
            return 1.0
        with torch.inference_mode():
            shares = loaded.model(torch.tensor([[*prompt, *ids[:last]]])).logits[0].double().softmax(-1)
        path = math.prod(float(shares[len(prompt) + at - 1, ids[at]]) for at in range(shared, last))
        total += path * float(shares[-1][[piece(token).startswith(rest) for token in range(shares.shape[-1])]].sum())
    return total


def plain(loaded: Loaded, request: Request) -> list[float]:
    """The documented formula, word by word."""
    words, piece = loaded.tokenizer, pieces.reader(loaded.tokenizer)
    *before, last = request.messages
    prompt = tokens.prompt_ids(words, before)

    def cut(text):
        row = Row(id="", messages=tuple(before), answer=text, case_id="")
        return words.encode(tokens.learnt(words, row), add_special_tokens=False)

    def size(text):
        return len(b"".join(map(piece, cut(text))))

    begun = last.content
    whole = {c: [(cut(begun + c + after), size(begun + c)) for after in FOLLOWERS] for c in request.candidates}
    every = [cut(begun), *(ids for cuts in whole.values() for ids, _ in cuts)]
    shared = 0
    while len({tuple(ids[: shared + 1]) for ids in every}) == 1 and shared < min(map(len, every)):
        shared += 1
    beginning = reaching(loaded, prompt, shared, [(ids, size(begun)) for ids in every])
    return [reaching(loaded, prompt, shared, whole[c]) / beginning for c in request.candidates]


@pytest.mark.parametrize("begun", [BEGUN, BEGUN + '"', '{"diseases":', BEGUN + '"肺炎"'])
def test_probabilities_are_those_of_plain_forward_passes(loaded, begun):
    candidates = CANDIDATES if begun == BEGUN else ('肺炎"', '肺结核"', ' ["A', ', "胃炎"', ", ", "]", "{")
    found = scored(loaded, ask(candidates, begun))
    assert found == pytest.approx(plain(loaded, ask(candidates, begun)), rel=1e-4)
    assert all(0 < p < 1 for p in found)


def test_prefix_free_candidates_share_what_there_is(loaded):
    found = scored(loaded, ask())
    assert sum(found) <= 1 + 1e-5
    alone = [scored(loaded, ask((candidate,)))[0] for candidate in CANDIDATES]
    assert all(0 < p <= 1 for p in alone)


def test_it_is_the_same_in_parts_and_in_company(loaded, monkeypatch):
    requests = [ask(), ask(CANDIDATES[::-1]), ask(messages=tiny.messages("腹痛")), ask()]
    whole = score.score(loaded, requests)
    assert whole[0] == whole[3]
    assert whole[0] != whole[2]
    backwards = [token.logprob for token in whole[1].tokens][::-1]
    assert [token.logprob for token in whole[0].tokens] == pytest.approx(backwards, abs=1e-5)
    monkeypatch.setattr(score, "_NUMBERS", 1)
    for one, other in zip(whole, score.score(loaded, requests), strict=True):
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-4)


def letters(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, and of an end."""
    vocabulary = {"</s>": 0} | {word: at for at, word in enumerate(words, 1)}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
    made.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    return made


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama])
@pytest.mark.parametrize("begun", ["", "b", '"a'])
def test_all_ways_on_add_up_to_one(make, begun, tmp_path):
    """All ways on of two characters, and the end, from which nothing goes on."""
    alphabet = 'ab"], }'
    model = make(1)
    model.resize_token_embeddings(1 + len(alphabet))
    loaded = Loaded(model, letters(alphabet), tmp_path)
    (user,) = prompt = (Message(role="user", content="abbab"),)
    found = scored(loaded, ask(tuple(map("".join, product(alphabet, repeat=2))), begun, prompt))

    def ended(text):
        ids = loaded.tokenizer.encode(user.content + begun + text, add_special_tokens=False)
        with torch.inference_mode():
            return float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[0])

    first = scored(loaded, ask(tuple(alphabet), begun, prompt))
    ends = ended("") + sum(p * ended(letter) for p, letter in zip(first, alphabet, strict=True))
    assert sum(found) + ends == pytest.approx(1, abs=1e-5)
    assert sum(first) + ended("") == pytest.approx(1, abs=1e-5)


def test_a_name_that_was_written_is_at_least_as_likely_as_its_tokens(mini):
    """Greedy answers: the chain of tokens up to the quote's own, and the score of all tokens that hold the quote."""
    rows = list(lessons(textbook(), {"write": 1}, 12, seed=7))
    asked = [Request(messages=row.messages, sampling=Sampling(max_tokens=160), logprobs=0) for row in rows]
    compared = 0
    for row, reply in zip(rows, generate(mini, asked), strict=True):
        answer = parse(reply.text, reply.finish).output
        if answer is None or not answer.diseases or not reply.text.startswith(BEGUN):
            continue
        name = answer.diseases[0]
        chain = chain_probability(reply, answer)[name]
        others = ("Nephritis", "荨麻疹", "Influenza A")
        found, *_ = scored(mini, ask((name + '"', *(f'{other}"' for other in others)), BEGUN + '"', row.messages))
        assert chain <= found * (1 + 1e-4)
        assert found == pytest.approx(chain, rel=0.05)  # mini is sure of what follows a name
        compared += 1
    assert compared >= 6


def test_where_one_token_alone_can_end_a_name_it_is_the_chain(tmp_path):
    """Characters as tokens: the score of the written text is the product of its tokens."""
    model = tiny.qwen(3)
    model.resize_token_embeddings(8)
    loaded = Loaded(model, letters('ab"], }'), tmp_path)
    prompt = (Message(role="user", content='ab"'),)
    (reply,) = generate(loaded, [Request(messages=prompt, sampling=Sampling(max_tokens=6), logprobs=0)])
    assert len(reply.tokens) > 2
    (found,) = scored(loaded, ask((reply.text,), "", prompt))
    assert math.log(found) == pytest.approx(sum(token.logprob for token in reply.tokens), abs=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "qwen3-thinking-2507", "qwen3.5-thinking", "gemma2"])
def test_templates_that_begin_to_think_are_asked_as_they_were_taught(name, tmp_path):
    """The answer begins behind the thinking that the template opens, closed at once."""
    words = taught(FAMILIES[name])
    model = tiny.qwen(1)
    model.resize_token_embeddings(len(words))
    loaded = Loaded(model, words, tmp_path)
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].tolist()))
    found = scored(loaded, ask(('肺炎"', '胃炎"'), BEGUN + '"'))
    hook.remove()
    row = Row(id="r", messages=tiny.messages("主诉：发热3天，咳嗽。Fever and cough."), answer=BEGUN + '"', case_id="c")
    assert [seen[0][0]] == seen[0]
    made = tokens.example(words, row, 500)
    assert seen[0][0] == made.ids[: len(seen[0][0])]
    assert len(made.ids) - len(seen[0][0]) <= 2  # the end of the turn, and what may merge with a name
    assert found == pytest.approx(plain(loaded, ask(('肺炎"', '胃炎"'), BEGUN + '"')), rel=1e-4)


def test_what_does_not_fit_ends_by_length(tmp_path):
    loaded = Loaded(tiny.qwen(), tiny.tokenizer(), tmp_path)
    long = "fever, " * 900
    fits, cut, prompt, candidate = score.score(
        loaded,
        [
            ask(),
            ask(messages=tiny.messages(long)),
            ask(messages=(Message(role="user", content=long),)),
            ask((json.dumps(long),)),
        ],
    )
    assert len(fits.tokens) == len(cut.tokens) == len(CANDIDATES)
    assert loaded.context - 64 - 40 < cut.usage.prompt_tokens <= loaded.context
    for reply in (prompt, candidate):
        assert (reply.text, reply.tokens, reply.finish) == ("", (), "length")


def test_what_cannot_be_scored_is_said(tmp_path):
    loaded = Loaded(tiny.qwen(), tiny.tokenizer(), tmp_path)
    request = ask()
    with pytest.raises(UserError, match="last message must be the assistant's"):
        score.score(loaded, [request.model_copy(update={"messages": request.messages[:-1]})])
    with pytest.raises(UserError, match="can't be written"):
        score.score(loaded, [ask(("",))])
    with pytest.raises(UserError, match="'x' can't be written"):
        score.score(
            Loaded(tiny.qwen(), letters('ab"], }'), tmp_path), [ask(("x",), "a", (Message(role="user", content="a"),))]
        )
