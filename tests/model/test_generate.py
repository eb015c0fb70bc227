"""Generation: every row comes out as if it were alone, and its bytes and probabilities add up."""

import math

import pytest
import torch

from preceptor.core.records import Message, Request, Sampling
from preceptor.model import pieces, tokens
from preceptor.model.generate import generate
from preceptor.model.load import Loaded
from tests.model import tiny


@pytest.fixture(scope="module", params=["qwen", "llama"])
def loaded(request, tmp_path_factory):
    torch.set_num_threads(1)
    return Loaded(getattr(tiny, request.param)(), tiny.tokenizer(), tmp_path_factory.mktemp("model"))


def ask(number: int, *, logprobs: int | None = None, **sampling) -> Request:
    """A request; its length differs by `number`."""
    return Request(
        messages=tiny.row(number, record="fever and cough, " * (number + 1)).messages,
        sampling=Sampling(**{"max_tokens": 24, **sampling}),
        logprobs=logprobs,
    )


def reference(loaded: Loaded, request: Request) -> list[int]:
    """Greedy tokens from whole forward passes, with neither cache nor batch."""
    ids = tokens.prompt_ids(loaded.tokenizer, request.messages)
    start = len(ids)
    while len(ids) - start < request.sampling.max_tokens:
        with torch.inference_mode():
            ids = [*ids, int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


def test_batch_and_single_and_plain_forward_agree(loaded):
    """The same greedy tokens in one batch, in many, alone, and without a cache."""
    requests = [ask(number, max_tokens=10 + number % 4) for number in (5, 0, 3, 1, 4, 2)]
    together = generate(loaded, requests)
    assert together == generate(loaded, requests, batch_tokens=1)
    assert together == generate(loaded, requests, batch_tokens=400)
    piece = pieces.reader(loaded.tokenizer)
    for request, reply in zip(requests, together, strict=True):
        expected = reference(loaded, request)
        ends = [at for at, token in enumerate(expected) if token in (0, 2)]
        expected = expected[: ends[0]] if ends else expected
        assert reply.text == b"".join(map(piece, expected)).decode(errors="replace")
        assert reply.finish == ("stop" if ends else "length")


def test_sampling_is_the_seeds_alone(loaded):
    """A request with a seed says the same in any batch and place; another seed says something else."""
    requests = [ask(number, temperature=1.2, top_p=p, seed=number) for number, p in enumerate((1, 0.9, 0.5, 1))]
    together = generate(loaded, requests)
    assert together == generate(loaded, requests)
    assert together[::-1] == generate(loaded, requests[::-1])
    assert together == [generate(loaded, [request])[0] for request in requests]
    others = [request.model_copy(update={"sampling": Sampling(temperature=1.2, seed=9)}) for request in requests]
    assert together != generate(loaded, others)


def test_sampling_follows_the_distribution(loaded):
    """Many draws of one token fall as the tempered softmax says, and top_p cuts the tail."""
    temperature, count = 0.7, 600
    base = ask(0, max_tokens=1, temperature=temperature, logprobs=0)
    ids = tokens.prompt_ids(loaded.tokenizer, base.messages)
    with torch.inference_mode():
        shares = (loaded.model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)

    def drawn(top_p):
        samplings = [base.sampling.model_copy(update={"seed": seed, "top_p": top_p}) for seed in range(count)]
        return generate(loaded, [base.model_copy(update={"sampling": sampling}) for sampling in samplings])

    piece = pieces.reader(loaded.tokenizer)
    shown = [pieces.readable([piece(token)])[0].decode() for token in range(len(shares))]
    best = shown[int(shares.argmax())]
    share = sum(reply.text == best for reply in drawn(1.0)) / count
    expected = float(shares[[text == best for text in shown]].sum())
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 0.01
    ordered = shares.sort(descending=True)
    nucleus = int((ordered.values.cumsum(-1) - ordered.values < 0.3).sum())
    assert {reply.text for reply in drawn(0.3)} <= {shown[token] for token in ordered.indices[:nucleus].tolist()}


def test_logprobs_are_the_models_own(loaded):
    """Log-probabilities stand under the untempered distribution, alternatives in falling order."""
    request = ask(2, temperature=2.0, seed=3, logprobs=3, max_tokens=6)
    (reply,) = generate(loaded, [request])
    ids = tokens.prompt_ids(loaded.tokenizer, request.messages)
    piece = pieces.reader(loaded.tokenizer)
    for token in reply.tokens:
        with torch.inference_mode():
            logprobs = loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        own = int((logprobs - token.logprob).abs().argmin())
        assert logprobs[own] == pytest.approx(token.logprob, abs=1e-4)
        top = logprobs.topk(3)
        assert [value for _, value in token.alternatives] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert [text for text, _ in token.alternatives] == [piece(at) for at in top.indices.tolist()]
        ids = [*ids, own]


def test_bytes_joined_are_the_text(loaded):
    """A random model writes broken UTF-8; bytes and text agree all the same."""
    requests = [ask(number, temperature=3.0, seed=number, logprobs=0, max_tokens=40) for number in range(6)]
    replies = generate(loaded, requests)
    assert any("\ufffd" in reply.text for reply in replies)
    for reply in replies:
        assert b"".join(token.utf8 for token in reply.tokens) == reply.text.encode()
        assert reply.usage.completion_tokens - len(reply.tokens) == (reply.finish == "stop")


def test_stop_strings_end_and_are_left_out(loaded):
    """The text ends before the stop string, even inside a token, and the bytes follow."""
    (whole,) = generate(loaded, [ask(1, logprobs=0)])
    stop = next(c for c in whole.text[3:] if c != "\ufffd")
    (cut,) = generate(loaded, [ask(1, logprobs=0, stop=(stop, "never"))])
    assert cut.text == whole.text.split(stop)[0]
    assert cut.finish == "stop"
    assert b"".join(token.utf8 for token in cut.tokens) == cut.text.encode()
    assert not generate(loaded, [ask(1, stop=(stop,))])[0].tokens


def test_long_prompts_are_cut_or_end_by_length(loaded):
    """One prompt that doesn't fit stops no other."""
    requests = [
        ask(0),
        Request(messages=tiny.messages("fever, " * 900), sampling=Sampling(max_tokens=20)),
        Request(messages=(Message(role="user", content="fever, " * 900),), sampling=Sampling(max_tokens=20)),
        ask(0, max_tokens=100_000),
    ]
    usual, cut, refused, endless = generate(loaded, requests)
    assert usual == generate(loaded, requests[:1])[0]
    assert loaded.context - 40 < cut.usage.prompt_tokens <= loaded.context - 20
    assert (refused.text, refused.finish, refused.usage.completion_tokens) == ("", "length", 0)
    assert endless.finish == "stop" or sum(endless.usage.model_dump().values()) == loaded.context


def test_readable_keeps_what_is_good():
    """Each stretch that isn't UTF-8 becomes one mark, in the piece where it starts."""
    fever = "发".encode()
    assert pieces.readable([fever[:1], fever[1:]]) == [fever[:1], fever[1:]]
    mark = "\ufffd".encode()
    assert pieces.readable([b"a", fever[:2], b"b\xff", fever[:1]]) == [b"a", mark, b"b" + mark, mark]
    assert pieces.readable([]) == []
    broken = [fever[:2], b"\xff\xfe", fever]
    assert b"".join(pieces.readable(broken)) == b"".join(broken).decode(errors="replace").encode()


def test_pieces_of_other_tokenizers():
    """Tokenizers with a space mark and byte tokens, as sentencepiece makes them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE({"<0xE5>": 0, "▁fever": 1, "热": 2, "</s>": 3}, [], byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    piece = pieces.reader(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>"))
    assert [piece(token) for token in range(5)] == [b"\xe5", b" fever", "热".encode(), b"", b""]
