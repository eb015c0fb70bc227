"""Constrained replies: whatever a model would write, it writes JSON under the schema, also when room runs out."""

import json
import re
from dataclasses import dataclass, field
from functools import cache

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from preceptor.core.errors import UserError
from preceptor.model import tokens
from preceptor.model.constrain import Guide, Hold, restrict
from preceptor.model.load import load_tokenizer
from preceptor.model.resolve import resolve
from preceptor.tasks.answer import Outcome, parse
from preceptor.tasks.strategies import SCHEMAS
from tests.model import tiny

ANSWER = SCHEMAS["diagnosis"]
PRETTY = json.dumps({"diseases": ["肺炎", 'say "a"\n\\'], "reason": []}, ensure_ascii=False, indent=4)


def closed(**properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, NUMBER = {"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}
OTHERS = {
    "numbers": closed(diseases={"type": "array", "items": TEXT}, confidence={"type": "array", "items": NUMBER}),
    "objects": closed(
        diseases={"type": "array", "items": closed(name=TEXT, confidence=NUMBER, sure={"type": "boolean"})}
    ),
    "enum": closed(names={"type": "array", "items": {"type": "string", "enum": ["肺炎", "肺结核", "胃炎", "Zoster"]}}),
    "choice": closed(why={"anyOf": [{"type": "null"}, closed(finding=TEXT, where=TEXT)]}, end={"const": "done"}),
    "optional": closed(a=TEXT) | {"properties": {"a": TEXT, "b": {"type": "array", "items": {"type": "integer"}}}},
    "least": closed(a={"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 2}),
    "nested": closed(
        a={"type": "array", "items": {"type": "array", "items": closed(b={"type": "array", "items": TEXT})}}
    ),
}


def sentencepiece() -> PreTrainedTokenizerFast:
    """A space mark, single bytes as `<0x..>`, and two ends."""
    words = ["</s>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [
        "▁",
        "▁[",
        '▁["',
        '["',
        '"]',
        '"],',
        '"]}',
        "肺炎",
        "▁fever",
        '{"',
        "diseases",
        "reason",
        '":',
        "\n▁",
        "▁▁",
    ]
    bpe = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=["<end>"])


TOKENIZERS = {
    "bytes": (tiny.tokenizer, 416, [2, 0]),  # the head is padded
    "mini": (lambda: load_tokenizer(resolve("mini")), 7187, [2]),
    "sentencepiece": (sentencepiece, 280, [1, 0]),
}


@cache
def guide(name: str) -> Guide:
    make, vocabulary, ends = TOKENIZERS[name]
    return Guide(make(), vocabulary, ends)


@dataclass
class Row:
    """A reply in the making."""

    hold: Hold
    room: int
    written: list[int] = field(default_factory=list)
    finish: str = ""


def write(guide: Guide, rows: list[Row], logits) -> list[tuple[str, str]]:
    """Texts, each with how it ended, drawn from `logits(rows)` as restricted."""
    while live := [row for row in rows if not row.finish]:
        scores = logits(live)
        restrict(scores, [row.hold for row in live], [row.room - len(row.written) for row in live])
        assert (scores > -torch.inf).any(-1).all()
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()
        for row, token in zip(live, chosen, strict=True):
            row.hold.write(token)
            row.written.append(token)
            if token in guide.ends:
                row.finish = "length" if row.hold.closed else "stop"
            elif len(row.written) == row.room:
                row.finish = "length"
    return [(b"".join(guide.words[token] for token in row.written).decode(), row.finish) for row in rows]


KINDS = {
    "any": rb".*",
    "marks": rb'.*["\\\[\]{},:].*',
    "halves": rb"[\x80-\xff]|.*[\xc2-\xf4]",
    "spaces": rb"\s+",
    "ends": rb"",
}
"""What a model that writes garbage may like best."""


@cache
def liking(name: str, kind: str) -> torch.Tensor:
    found = [re.fullmatch(KINDS[kind], word, re.DOTALL) is not None for word in guide(name).words]
    return torch.tensor(found, dtype=torch.float32)


def valid(text: str, schema: str) -> dict:
    value = json.loads(text)
    jsonschema.validate(value, json.loads(schema))
    return value


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    st.sampled_from(list(KINDS)),
    st.floats(0, 8),
    st.floats(0.1, 3),
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_whatever_is_drawn_is_json(name, kind, strength, temperature, rooms, seed):
    held, dice = guide(name), torch.Generator().manual_seed(seed)

    def logits(rows):
        noise = torch.randn(len(rows), len(held.words), generator=dice)
        return (noise + strength * liking(name, kind)) / temperature

    torch.manual_seed(seed)
    rows = [Row(held.hold(ANSWER), room) for room in rooms]
    for row, (text, finish) in zip(rows, write(held, rows, logits), strict=True):
        if not text:
            assert finish == "length"
            assert row.room < 40
            assert parse(text, finish).outcome is Outcome.TRUNCATED
            continue
        names = valid(text, ANSWER)["diseases"]
        parsed = parse(text, finish)
        if not names or any(re.search(r"[^\W\d_]{3}", name) for name in names):
            assert parsed.outcome is Outcome.CLEAN, parsed


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", pytest.param("mini", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", OTHERS)
def test_other_schemas_hold_too(form, name):
    """Nested, chosen, optional, bounded: whatever is drawn, in rooms from what is too little on."""
    held, schema = guide(name), json.dumps(OTHERS[form])
    torch.manual_seed(len(form))
    for kind in ("any", "marks", "halves"):
        rows = [Row(held.hold(schema), room) for room in (3, 30, 45, 60, 63, 100)]
        bias = 4 * liking(name, kind)
        said = write(held, rows, lambda live, bias=bias: torch.randn(len(live), len(held.words)) + bias)
        assert said[0] == ("", "length")
        assert said[-1][0]
        for text, finish in said:
            assert valid(text, schema) is not None if text else finish == "length"


@pytest.mark.parametrize(
    ("written", "ending"),
    [
        (b"", b'{"diseases":[],"reason":[]}'),
        (b'{"dis', b'eases":[],"reason":[]}'),
        (b'{\n "diseases"', b':[],"reason":[]}'),
        (b'{"diseases": ["', b'"],"reason":[]}'),
        (b'{"diseases": ["a", ', b'""],"reason":[]}'),
        ('{"diseases": ["肺'.encode(), b'"],"reason":[]}'),
        ('{"diseases": ["肺'.encode()[:-1], b'\xa0"],"reason":[]}'),
        ('{"diseases": ["肺'.encode()[:-2], b'\xa0\xa0"],"reason":[]}'),
        (b'{"diseases": ["\xf0', b'\xa0\xa0\xa0"],"reason":[]}'),
        (b'{"diseases": ["\xed', b'\x80\xa0"],"reason":[]}'),  # \xa0 would make half a character
        (b'{"diseases": ["a\\', b'""],"reason":[]}'),
        (b'{"diseases": ["a\\\\', b'"],"reason":[]}'),
        (b'{"diseases": ["a"', b'],"reason":[]}'),
        (b'{"diseases": ["a"],\n\t', b'"reason":[]}'),
        (b'{"diseases": ["a"], "reason": ["b"]', b"}"),
        (b'{"diseases": ["a"], "reason": ["b"]}', b""),
    ],
)
def test_endings(written, ending):
    held = guide("mini")
    hold = held.hold(ANSWER)
    while written:
        token = held.first(written)
        hold.write(token)
        written = written[len(held.words[token]) :]
    assert held.ending(hold.matcher) == ending


def test_a_reply_is_closed_as_late_as_is_safe():
    """Room left over when a string is closed: what one token can add, and one byte a token."""
    held = guide("bytes")
    letter = held.first(b"x")
    hold = held.hold(ANSWER)
    for byte in b'{"diseases":["':
        hold.write(held.first(bytes([byte])))
    assert hold.forced(1000) == ()
    ending = b'"],"reason":[]}'
    for room in range(60, 0, -1):
        if forced := hold.forced(room):
            break
        hold.write(letter)
    assert (forced, room, hold.closed) == ((held.first(ending),), len(ending) + 6, True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_too_little_room_is_an_empty_reply(name):
    """Never an answer that was made up: `{"diseases": [], …}` would be an abstention."""
    held = guide(name)
    for room in range(1, 34):
        scores = torch.zeros(1, len(held.words))
        hold = held.hold(ANSWER)
        restrict(scores, [hold], [room])
        assert hold.closed
        assert set(scores.isfinite().nonzero()[:, 1].tolist()) == set(held.ends)
        hold.write(held.ends[0])
    assert held.hold(ANSWER).forced(34) == ()


def test_spaces_without_end_come_to_an_end():
    """A model that wants nothing but whitespace, and one that wants nothing but to stop."""
    for name, kind in (("mini", "spaces"), ("bytes", "spaces"), ("sentencepiece", "spaces"), ("bytes", "ends")):
        held = guide(name)
        bias = 50 * liking(name, kind) + 10 * liking(name, "ends")
        ((text, _),) = write(held, [Row(held.hold(ANSWER), 400)], lambda _, bias=bias: bias[None].clone())
        assert valid(text, ANSWER).keys() == {"diseases", "reason"}
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
        assert max(map(len, re.findall(r"\s+", bare)), default=0) <= 10


@pytest.mark.parametrize("text", [PRETTY, json.dumps(json.loads(PRETTY)), PRETTY.replace("    ", "\t")])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_usual_may_be_written(name, text):
    """Pretty-printed, compact, in any tokens; then the ends, all of them and alone."""
    text = json.dumps(json.loads(text), ensure_ascii=False) if "\\u" in text else text
    held, raw = guide(name), text.encode()
    hold = held.hold(ANSWER)
    while raw:
        scores = torch.zeros(1, len(held.words))
        restrict(scores, [hold], [1000])
        token = held.first(raw)
        assert scores[0, token] == 0
        assert not scores[0, list(held.ends)].isfinite().any()
        hold.write(token)
        raw = raw[len(held.words[token]) :]
    scores = torch.zeros(1, len(held.words))
    restrict(scores, [hold], [1000])
    assert set(scores.isfinite().nonzero()[:, 1].tolist()) == set(held.ends)
    assert not hold.closed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_free_rows_are_left_alone(dtype):
    """Rows without a schema keep their logits, others those of what is allowed; what heads are padded with is not."""
    held = guide("bytes")
    before = torch.randn(3, len(held.words)).to(dtype)
    after = before.clone()
    restrict(after, [None, held.hold(ANSWER), None], [1, 100, 1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    allowed = [token for token, word in enumerate(held.words) if word and b'{"diseases"'.startswith(word)]
    assert after[1].isfinite().nonzero()[:, 0].tolist() == allowed
    assert torch.equal(after[1, allowed], before[1, allowed])
    restrict(after, [None, None, None], [1, 1, 1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_a_random_model_under_a_schema():
    """Whole forward passes of tiny models, warm: what a request with a schema meets."""
    held, words = guide("bytes"), tiny.tokenizer()
    prompt = tokens.prompt_ids(words, tiny.messages("fever"))
    for make, temperature in ((tiny.qwen, 3.0), (tiny.llama, 1.0)):
        model = make(5)

        def logits(live, model=model, temperature=temperature):
            width = max(len(row.written) for row in live)
            ids = torch.tensor([[*prompt, *row.written, *[0] * (width - len(row.written))] for row in live])
            with torch.inference_mode():
                found = model(ids).logits
            last = found[range(len(live)), [len(prompt) + len(row.written) - 1 for row in live]]
            return torch.nn.functional.pad(last / temperature, (0, 16))  # a padded head

        torch.manual_seed(0)
        for text, _ in write(held, [Row(held.hold(ANSWER), room) for room in (50, 70, 90)], logits):
            valid(text, ANSWER)


def test_marks_that_are_tokens_are_no_words():
    """`<think>` within a string would hide the answer from whoever reads it."""
    words = tiny.tokenizer()
    words.add_tokens(["<think>", "肺结核"])
    held = Guide(words, 402, [2])
    hold = held.hold(ANSWER)
    for byte in b'{"diseases":["':
        hold.write(held.first(bytes([byte])))
    scores = torch.zeros(1, 402)
    restrict(scores, [hold], [500])
    assert scores[0, 400] == -torch.inf
    assert scores[0, 401] == 0


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not JSON"),
        ("[]", "json_schema"),
        ('{"type": "object"}', "additionalProperties"),
        ('{"type": "array"}', "items"),
        ("{}", "each value a type"),
        (json.dumps(closed(a={"type": "string", "pattern": "a+b"})), "pattern: a model on this machine"),
        (json.dumps(closed(a={"$ref": "#"})), r"\$ref: a model on this machine"),
        (json.dumps(closed(a={"type": "strong"})), "strong"),
        (json.dumps(closed(a={"type": "string", "minLength": 2000})), "can't be brought to an end"),
    ],
)
def test_what_cannot_be_held_to_is_refused_in_one_line(schema, message):
    with pytest.raises(UserError, match=message) as caught:
        guide("mini").hold(schema)
    assert "\n" not in str(caught.value)


def test_a_schema_is_prepared_once():
    held = Guide(tiny.tokenizer(), 400, [2])
    one, other = held.hold(ANSWER), held.hold(ANSWER)
    assert one.form is other.form
    one.write(held.first(b"{"))
    assert held.ending(other.matcher) == b'{"diseases":[],"reason":[]}'


def test_a_token_that_was_ruled_out_is_an_error():
    with pytest.raises(RuntimeError, match="astray"):
        guide("bytes").hold(ANSWER).write(guide("bytes").first(b"x"))
