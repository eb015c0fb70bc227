import json
from pathlib import Path

import pytest
import tokenizers

from preceptor.clinical.textbook.sampler import draw
from preceptor.core.errors import UserError
from preceptor.core.records import Message
from preceptor.llm.config import EndpointConfig
from preceptor.llm.counting import Counting, counting
from preceptor.model.resolve import resolve

HERE = EndpointConfig(url="http://127.0.0.1:1/v1")
TURNS = (
    Message(role="system", content="Read the record. 读病历。"),
    Message(role="user", content="<record>\n咳嗽3天, fever 39℃\n</record>"),
    Message(role="assistant", content="{}"),
    Message(role="user", content="Again."),
)


@pytest.fixture
def folder(tmp_path):
    """A folder with mini's tokenizer alone."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_bytes((resolve("mini") / "tokenizer.json").read_bytes())
    return tmp_path / "m"


def tokens(text):
    return len(tokenizers.Tokenizer.from_file(str(resolve("mini") / "tokenizer.json")).encode(text).ids)


def test_the_models_own_template_is_counted():
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(resolve("mini"))
    for turns in (TURNS, TURNS[1:2], TURNS[:2]):
        expected = own.apply_chat_template([turn.model_dump() for turn in turns], add_generation_prompt=True)
        assert counting(str(resolve("mini")), HERE).prompt(turns) == len(expected["input_ids"])
        assert counting("any", HERE, "mini").most(turns) == len(expected["input_ids"])


def test_the_textbook_counts_what_messages_say_alone():
    count = counting("textbook", EndpointConfig.model_validate("textbook"))
    assert (count.told, count.estimated) == ("the tokenizer of textbook", False)
    assert count.prompt(TURNS) == count.most(TURNS) == sum(tokens(turn.content) for turn in TURNS)
    assert count.of("<|im_end|>") > 1, "words of a record are text"


@pytest.mark.parametrize("where", ["{}", "{}/tokenizer.json"])
def test_another_tokenizer_of_the_textbook(folder, where):
    small = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    small.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    small.save(str(folder / "tokenizer.json"))
    start = f"{{python}} -m preceptor teacher --port {{port}} --tokenizer {where.format(folder)}"
    assert counting("textbook", EndpointConfig(start=start)).of("one two three") == 3


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system here') }}", "{% bad"])
def test_an_unknown_template_is_a_fixed_few_tokens(folder, template):
    if template:
        (folder / "chat_template.jinja").write_text(template)
    count = counting(str(folder), HERE)
    bare = sum(tokens(turn.content) for turn in TURNS)
    assert count.prompt(TURNS) == bare + 4 * 4
    assert count.most(TURNS) == bare + 16 * 4


def test_special_tokens_of_the_template(folder):
    config = {"bos_token": {"content": "<|im_start|>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert counting(str(folder), HERE).prompt(TURNS[1:2]) == 1 + tokens(TURNS[1].content)


def test_a_tokenizer_that_cuts_is_not_believed(folder):
    cutting = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    cutting.enable_truncation(2)
    cutting.enable_padding(length=64)
    cutting.save(str(folder / "tokenizer.json"))
    assert counting(str(folder), HERE).of(TURNS[0].content) == tokens(TURNS[0].content) != 2


@pytest.mark.parametrize(("language", "low", "high"), [("en", 1.0, 2.2), ("zh", 0.8, 1.6)])
@pytest.mark.parametrize("style", ["short", "full"])
def test_the_estimate_is_of_the_right_size(language, low, high, style):
    """mini's tokens were made for this very language, so that it takes few of them."""
    texts = [case.text for case in draw(40, 7, language, style)]
    assert low < sum(map(Counting().of, texts)) / sum(map(tokens, texts)) < high


@pytest.mark.parametrize(("text", "expected"), [("", 0), ("abcdefghij", 3), ("咳嗽发热两天，", 5), ("咳 a", 2)])
def test_the_rule_of_the_estimate(text, expected):
    count = counting("nobody/has-it", HERE)
    message = Message(role="user", content=text)
    assert count.estimated
    assert (count.of(text), count.prompt([message])) == (expected, expected + 4)
    assert count.most([message]) == len(text.encode()) + 16


@pytest.mark.parametrize("name", ["./none", "nobody/has-it", "no name at all", ".."])
def test_a_tokenizer_that_is_named_and_not_there(name):
    with pytest.raises(UserError, match=r"teacher\.tokenizer: no tokenizer\.json at"):
        counting("m", HERE, name)


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer can be read from it"):
        counting("m", HERE, str(tmp_path))


def test_the_hubs_cache_is_looked_into_and_the_network_is_not(folder, monkeypatch):
    cache = folder.parent / "hub"
    snapshot = cache / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "models--org--m" / "refs").mkdir()
    (cache / "models--org--m" / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert counting("org/m", HERE).of(TURNS[0].content) == tokens(TURNS[0].content)
    assert counting("org/other", HERE).estimated
    assert Path(cache / "models--org--other").exists() is False
