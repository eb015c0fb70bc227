"""Generation: every row comes out as if it were alone, and its bytes and probabilities add up."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from preceptor.core.records import Message, Request, Sampling
from preceptor.model import generate as generating
from preceptor.model import pieces, tokens
from preceptor.model.generate import Engine, generate
from preceptor.model.load import Loaded
from preceptor.tasks.strategies import SCHEMAS
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
    assert together == generate(loaded, requests, batch=1)
    assert together == generate(loaded, requests, batch=3)
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
    assert [reply.cut for reply in (usual, cut, refused, endless)] == [False, True, False, False]
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


SHOTS = "".join(f"Case {n}: fever for {n} days, no cough. Answer: influenza.\n" for n in range(12))


def sliding(kind: str):
    """Models that keep only a window of some layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = tiny.qwen().config.to_dict()
    shape = {name: shape[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    shape |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24, "eos_token_id": 0}
    shape |= {"initializer_range": 0.15, "bos_token_id": None, "max_position_embeddings": 1024}
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**shape)).eval()
    types = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, layer_types=types)).eval()


def seen(model) -> Counter:
    """Counts the tokens, padding included, that go through a model, by how many rows at once."""
    tokens_seen: Counter = Counter()
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: tokens_seen.update({len(args[0]): args[0].numel()}))
    return tokens_seen


def wide(model):
    model.config.max_position_embeddings = 1024  # positions are rotary: nothing is learnt of them
    return model


class Asked:
    """A feed that is filled as the engine takes from it, a few at a time."""

    def __init__(self, requests):
        self.waiting, self.outcomes, self.closed = list(enumerate(requests)), {}, False

    def take(self, most):
        taken, self.waiting = self.waiting[: min(most, 3)], self.waiting[min(most, 3) :]
        return taken

    def give(self, name, outcome):
        assert name not in self.outcomes
        self.outcomes[name] = outcome


def few_shot(number: int, system: str = SHOTS, **sampling) -> Request:
    (said, asked) = tiny.messages("fever and cough, " * (1 + number % 7) + str(number))
    return Request(
        messages=(Message(role="system", content=said.content + system), asked),
        sampling=Sampling(**{"max_tokens": 8 + number % 9, **sampling}),
    )


def greedy(loaded: Loaded, request: Request) -> str:
    """The text of plain whole forward passes."""
    piece = pieces.reader(loaded.tokenizer)
    expected = reference(loaded, request)
    ends = [at for at, token in enumerate(expected) if token in (0, 2)]
    return b"".join(map(piece, expected[: ends[0]] if ends else expected)).decode(errors="replace")


@pytest.mark.parametrize(
    "make",
    [lambda: wide(tiny.qwen()), lambda: wide(tiny.llama()), lambda: sliding("gemma3"), lambda: sliding("mistral")],
)
def test_a_shared_prefix_changes_no_token(make, tmp_path):
    """Few-shot beside zero-shot, filled up as rows end, in several calls: as plain forward passes say."""
    loaded = Loaded(make(), tiny.tokenizer(), tmp_path)
    engine = Engine(loaded, 6)
    requests = [few_shot(n, SHOTS if n % 3 else "") for n in range(22)]
    expected = [greedy(loaded, request) for request in requests]
    for few in (requests[:14], requests[14:], requests[3:9]):
        engine.serve(feed := Asked(few))
        start = requests.index(few[0])
        assert [feed.outcomes[n].text for n in range(len(few))] == expected[start : start + len(few)]
    assert len(set(expected)) > 6


def test_a_shared_prefix_is_computed_once(loaded):
    """The shots go through the model at batch 1 the first time, and never again in that engine."""
    fresh = Loaded(wide(type(loaded.model)(loaded.model.config).eval()), loaded.tokenizer, loaded.folder)
    engine, counted = Engine(fresh, 8), seen(fresh.model)
    requests = [few_shot(n, max_tokens=1) for n in range(16)]
    shared = len(tokens.prompt_ids(fresh.tokenizer, few_shot(0).messages[:1]))
    engine.serve(feed := Asked(requests))
    assert len(feed.outcomes) == 16
    assert shared - 20 < counted.pop(1) < shared + 300
    again = counted.total()
    assert again < 16 * 200
    counted.clear()
    engine.serve(Asked(requests))
    assert counted.total() <= again
    assert not counted[1]


def test_short_prefixes_are_left_alone(loaded):
    """Two prompts that begin alike save less than a pass of their own costs."""
    counted = seen(loaded.model)
    generate(loaded, [ask(0, max_tokens=1), ask(1, max_tokens=1)])
    assert not {rows for rows in counted if rows == 1} - {1}
    assert counted[2] == 2 * max(len(tokens.prompt_ids(loaded.tokenizer, ask(n).messages)) for n in (0, 1))


def test_keys_and_values_are_not_copied_for_each_head(loaded, monkeypatch):
    """Padded rows over a long beginning: on a CPU the copies would take longer than all else."""

    def copied(*_):
        raise AssertionError

    expected = generate(loaded, [ask(0), ask(3)])
    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", copied)
    assert generate(loaded, [ask(0), ask(3)]) == expected
    assert generating._GROUPS not in os.environ


def test_rows_that_end_make_place_for_others(loaded):
    """Rows with replies of any length share a batch, and a long one holds nobody up."""
    steps = []
    hook = loaded.model.register_forward_pre_hook(lambda *_: steps.append(1))
    requests = [ask(n % 6, max_tokens=100 if not n else 4, stop=("never",)) for n in range(24)]
    alone = [generate(loaded, [request])[0] for request in requests]
    steps.clear()
    engine = Engine(loaded, 4)
    engine.serve(feed := Asked(requests))
    hook.remove()
    assert [feed.outcomes[n] for n in range(24)] == alone
    assert len(steps) < alone[0].usage.completion_tokens + 40
    assert list(feed.outcomes)[-1] == 0 or alone[0].usage.completion_tokens < 30


def test_memory_that_runs_out_halves_the_batch(loaded):
    """Above three rows the device has no room: all are answered, by fewer at once, and that is remembered."""
    tried = []

    def full(_, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    requests = [ask(n % 5, max_tokens=6) for n in range(16)]
    expected = generate(loaded, requests)
    engine = Engine(loaded, 16)
    hook = loaded.model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        engine.serve(feed := Asked(requests))
        assert [feed.outcomes[n] for n in range(16)] == expected
        tried.clear()
        engine.serve(feed := Asked(requests))
        assert [feed.outcomes[n] for n in range(16)] == expected
        assert sum(rows > 3 for rows in tried) <= 1
    finally:
        hook.remove()


def test_one_row_that_never_fits_fails_in_words(loaded):
    """A prompt too long for the memory there is ends alone; so does one over which the model stumbles."""

    def full(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 150:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
        if kwargs["input_ids"].shape[1] > 1 and (kwargs["input_ids"] == mark).any():
            raise ValueError("stumbled")

    (mark,) = loaded.tokenizer.encode("~")
    requests = [*(ask(n) for n in range(4)), ask(30), Request(messages=tiny.messages("~"), sampling=Sampling())]
    expected = generate(loaded, requests[:4])
    engine = Engine(loaded)
    hook = loaded.model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        engine.serve(feed := Asked(requests))
    finally:
        hook.remove()
    assert [feed.outcomes[n] for n in range(4)] == expected
    assert isinstance(feed.outcomes[4], MemoryError)
    assert "lower max_tokens (24)" in str(feed.outcomes[4])
    assert str(feed.outcomes[5]) == "stumbled"


def test_what_is_no_number_fails_alone(loaded):
    """Damaged weights, or a prompt that overflows: never the token that happens to come first."""
    (mark,) = loaded.tokenizer.encode("~")

    def broken(_, args, kwargs, output):
        output.logits[(kwargs["input_ids"] == mark).any(1)] = float("nan")

    requests = [ask(0), Request(messages=tiny.messages("~"), sampling=Sampling()), *(ask(n) for n in range(1, 5))]
    expected = [generate(loaded, [request])[0] for request in requests if request != requests[1]]
    hook = loaded.model.register_forward_hook(broken, with_kwargs=True)
    try:
        Engine(loaded).serve(feed := Asked(requests))
    finally:
        hook.remove()
    assert "no number" in str(feed.outcomes.pop(1))
    assert [feed.outcomes[n] for n in sorted(feed.outcomes)] == expected


STARVED = """
import resource, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from preceptor.model.generate import Engine
from preceptor.model.load import Loaded
from preceptor.model import room
from tests.model import tiny
from tests.model.test_generate import Asked, ask, wide
model = tiny.qwen(hidden=256)
model.config.max_position_embeddings = 100_000
loaded = Loaded(model, tiny.tokenizer(), Path("."))
requests = [ask(n, max_tokens=4) for n in range(12)] + [ask(8000, max_tokens=4)]
engine = Engine(loaded)
engine.serve(Asked(requests[:12]))
room.free = lambda device: 1 << 40  # it thinks that there is plenty
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)
engine.serve(feed := Asked(requests))
print(*(getattr(feed.outcomes[n], "finish", type(feed.outcomes[n]).__name__) for n in range(13)))
"""


@pytest.mark.slow
def test_a_process_whose_memory_runs_out_goes_on():
    """Real allocations that fail: the long prompt fails alone, and those before and after it are answered."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", STARVED], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.split()
    assert said[12] == "MemoryError"
    assert set(said[:12]) <= {"stop", "length"}


def test_a_schema_holds_its_row_alone(loaded):
    """Held and free rows in one batch: the held parse, the free are as ever; log-probabilities are the model's own."""
    free = [ask(n, temperature=1.5, seed=n, logprobs=2, max_tokens=30) for n in range(4)]
    held = [
        one.model_copy(update={"json_schema": SCHEMAS["diagnosis"], "sampling": Sampling(max_tokens=60, seed=1)})
        for one in free
    ]
    mixed = generate(loaded, [request for pair in zip(free, held, strict=True) for request in pair])
    for reply, alone in zip(mixed[::2], generate(loaded, free), strict=True):
        assert reply.text == alone.text
    for reply, request in zip(mixed[1::2], held, strict=True):
        assert set(json.loads(reply.text)) == {"diseases", "reason"}
        ids = torch.tensor([tokens.prompt_ids(loaded.tokenizer, request.messages)])
        with torch.inference_mode():
            first = loaded.model(ids).logits[0, -1].log_softmax(-1)
        values = [value for _, value in reply.tokens[0].alternatives]
        assert values == pytest.approx(first.topk(2).values.tolist(), abs=1e-4)
        assert any(torch.isclose(first, torch.tensor(reply.tokens[0].logprob), atol=1e-4))


def test_free_replies_pay_nothing_for_schemas(loaded, monkeypatch):
    """What holds replies to a schema isn't even loaded."""
    monkeypatch.setitem(sys.modules, "preceptor.model.constrain", None)
    Engine(loaded).serve(feed := Asked([ask(1), ask(2).model_copy(update={"json_schema": SCHEMAS["diagnosis"]})]))
    assert feed.outcomes[0] == generate(loaded, [ask(1)])[0]
    assert isinstance(feed.outcomes[1], ImportError)


def test_candidates_are_scored_beside_replies(loaded):
    """Requests with candidates come back with their probabilities, and one that can't be read fails alone."""
    begun = Message(role="assistant", content='{"diseases": ["')
    asked = ask(1).model_copy(update={"messages": (*ask(1).messages, begun), "candidates": ('flu"', 'gout"')})
    wrong = asked.model_copy(update={"messages": ask(1).messages})
    Engine(loaded).serve(feed := Asked([asked, ask(2), wrong]))
    assert [token.utf8 for token in feed.outcomes[0].tokens] == [b'flu"', b'gout"']
    assert feed.outcomes[1] == generate(loaded, [ask(2)])[0]
    assert isinstance(feed.outcomes[2], ValueError)
