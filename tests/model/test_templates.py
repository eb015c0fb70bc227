"""What is trained is what is served, for the chat templates of the families that students come from."""

import ast
import asyncio
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from preceptor.app import diagnose
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Message, Request, Row, Sampling
from preceptor.data.layouts import language_of
from preceptor.llm.local import Local
from preceptor.model import smollm2, tokens
from preceptor.model.generate import generate
from preceptor.model.load import load, load_tokenizer
from preceptor.tasks import consult, prompts
from preceptor.tasks.answer import Outcome
from preceptor.tasks.answer import parse as parse_diagnosis
from preceptor.tasks.strategies import Asking, zero_shot
from tests import rooms
from tests.model import tiny

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
THINKING = ("<think>", "</think>")
"""Tokens of their own, and no special ones, in Qwen's tokenizers."""


@dataclass(frozen=True)
class Family:
    """A tokenizer's special tokens, the first of which pads, and how prompt and answer read with its template."""

    template: str
    """A file of TRL's, or the template itself."""
    special: tuple[str, ...]
    eos: str
    end: str
    """What ends an answer."""
    prompt: str
    """To a system's S and a user's U."""
    alone: str
    """To a user's U."""
    bos: str | None = None
    added: tuple[str, ...] = ()
    thinks: bool | None = None


_U = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
_SU = f"<|im_start|>system\nS<|im_end|>\n{_U}"
_GU = "<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n"
_GSU = "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n"
_OFF, _ON = "<think>\n\n</think>\n\n", "<think>\n"
_QWEN_SAYS = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOL_SAYS = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _qwen3(template: str, prefix: str, thinks: bool | None) -> Family:
    end = "<|im_end|>"
    return Family(template, CHATML, end, end, _SU + prefix, _U + prefix, added=THINKING, thinks=thinks)


FAMILIES = {
    "qwen2.5": Family(
        "qwen2_5", CHATML, "<|im_end|>", "<|im_end|>", _SU, f"<|im_start|>system\n{_QWEN_SAYS}<|im_end|>\n{_U}"
    ),
    "qwen3": _qwen3("qwen3", _OFF, thinks=False),
    "qwen3-thinking": _qwen3("qwen3", "", thinks=True),
    "qwen3-instruct-2507": _qwen3("qwen3_instruct_2507", "", thinks=None),
    "qwen3-thinking-2507": _qwen3("opens", _ON, thinks=True),
    "qwen3.5": _qwen3("qwen3_5_think", _OFF, thinks=False),
    "qwen3.5-thinking": _qwen3("qwen3_5_nothink", _ON, thinks=True),
    "smollm2": Family(
        *(SMOLLM2, CHATML, "<|im_end|>", "<|im_end|>", _SU, f"<|im_start|>system\n{_SMOL_SAYS}<|im_end|>\n{_U}"),
        bos="<|im_start|>",
    ),
    "gemma3": Family("gemma3", GEMMA, "<eos>", "<end_of_turn>", _GSU, f"<bos>{_GU}", bos="<bos>"),
    "gemma2": Family("gemma", GEMMA, "<eos>", "<end_of_turn>", _GSU, f"<bos>{_GU}", bos="<bos>"),
}
"""Gemma 2 refuses a system's turn. "opens" is Qwen3-Thinking-2507's, which begins the thinking itself, always."""
S, U = Message(role="system", content="S"), Message(role="user", content="U")
RECORD = "主诉：发热3天，咳嗽。现病史：无胸痛。"
JSON = '{"diseases": ["肺炎"], "reason": ["发热3天"]}'
THOUGHT = f"<think>\n发热，咳嗽。\n</think>\n\n{JSON}"

families = pytest.mark.parametrize("name", FAMILIES)


def template_of(name: str) -> str:
    """A template as TRL's package has it; importing that would take seconds."""
    if name == "opens":
        opening = "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
        return template_of("qwen3").rpartition("{{- '<|im_start|>assistant\\n' }}")[0] + opening
    if "{" in name:
        return name
    package = importlib.util.find_spec("trl")
    assert package
    assert package.origin
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens with the family's template and special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 - len(family.added),
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [m.content for m in asking_about(RECORD)]
    bpe.train_from_iterator([*asked, *tiny.TEXTS, JSON] * 3, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    if family.bos == "<bos>":  # as Gemma's does to any text that is encoded by itself
        marks = [(family.bos, bpe.token_to_id(family.bos))]
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=marks)
    words = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=family.bos, eos_token=family.eos, pad_token=family.special[0]
    )
    words.chat_template = template_of(family.template)
    return words


def asking_about(record: str) -> tuple[Message, ...]:
    """What a model is asked about a record by `predict` and `diagnose`, and by the rows that `curate` writes."""
    case = Case(id="c", text=record, language=language_of(record), source="t", group="g")
    asking = Asking(prompts.load("diagnosis", "zero_shot", case.language), "m", Sampling())
    return next(zero_shot(case, asking)).messages


def taught(family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer as training leaves it."""
    words = tokenizer_of(family)
    tokens.with_thinking(words, bool(family.thinks))
    return words


def row(answer: str, messages: tuple[Message, ...] = (S, U)) -> Row:
    return Row(id="r", messages=messages, answer=answer, case_id="c")


def answer_of(family: Family) -> str:
    return THOUGHT if family.thinks else JSON


def prompt_of(example: tokens.Example) -> list[int]:
    return example.ids[: example.labels.count(tokens.IGNORED)]


@families
def test_a_row_reads_as_the_family_writes_it(name: str) -> None:
    """System and default system prompt, merged or not, one BOS, thinking opened once; the answer and its end learnt."""
    family = FAMILIES[name]
    words = taught(family)
    for messages, shown in (((S, U), family.prompt), ((U,), family.alone)):
        made = tokens.example(words, row(answer_of(family), messages), 500)
        rest = answer_of(family).removeprefix("<think>\n" if shown.endswith(_ON) else "")
        assert words.decode(made.ids) == f"{shown}{rest}{family.end}"
        learnt = [label for label in made.labels if label != tokens.IGNORED]
        assert words.decode(learnt) == f"{rest}{family.end}"
        assert prompt_of(made) == tokens.prompt_ids(words, messages)
        assert made.ids[len(prompt_of(made)) :] == learnt
        assert tokens.learnt(words, row(answer_of(family), messages)) == rest
    assert [made.ids.count(words.convert_tokens_to_ids(token)) for token in THINKING if family.thinks] in ([], [1, 1])


@families
def test_other_programs_render_the_same_tokens(name: str, tmp_path: Path) -> None:
    """The saved folder, through the library alone: what vLLM and `transformers serve` do."""
    family = FAMILIES[name]
    words = taught(family)
    words.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == words.chat_template
    saved = load_tokenizer(tmp_path)
    shown = Message(role="assistant", content=answer_of(family))
    chats = [(U,), (U, shown, U)] if name == "gemma2" else [(U,), (S, U), (S, U, shown, U), asking_about(RECORD)]
    for messages in chats:
        ours = tokens.prompt_ids(words, messages)
        turns = [message.model_dump() for message in messages]
        plain = saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert plain == ours == tokens.prompt_ids(saved, messages)
    assert tokens.end_of_turn(saved) == words.convert_tokens_to_ids(family.end)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("qwen3", "qwen3-thinking", "gemma3") else pytest.mark.slow)
        for name in FAMILIES
        if name not in ("qwen3-instruct-2507", "qwen3.5")
    ],
)
def test_one_door_for_training_prediction_and_diagnose(name: str, tmp_path: Path) -> None:
    """A model that learns one row is asked with that row's tokens everywhere, says its answer, and stops.

    The two families left out have other families' tokens.
    """
    family = FAMILIES[name]
    words = taught(family)
    example = tokens.example(words, row(answer_of(family), asking_about(RECORD)), 2000)
    learnt = [label for label in example.labels if label != tokens.IGNORED]
    tiny.save(learned(example, len(words)), tmp_path, words)
    loaded = load(tmp_path, dtype="float32")
    request = Request(messages=asking_about(RECORD), sampling=Sampling(max_tokens=200))
    other = Request(messages=asking_about(RECORD * 3), sampling=Sampling(max_tokens=1))
    with seen() as first:
        alone = generate(loaded, [request])[0]
        beside, _ = generate(loaded, [request, other])
        local = asyncio.run(Local(loaded, "m").complete(request))
        prediction = diagnose.answer(RECORD, str(tmp_path)).prediction
    lengths = [len(batch[0]) for batch in first]
    assert [len(batch) for batch in first] == [1, 2, 1, 1]
    assert lengths[0] == lengths[2] == lengths[3] == len(prompt_of(example))
    assert all(any(asked[-lengths[0] :] == prompt_of(example) for asked in batch) for batch in first)
    said = tokens.opening(words, asking_about(RECORD)) + tokens.learnt(
        words, row(answer_of(family), asking_about(RECORD))
    )
    for reply in (alone, beside, local):
        assert (reply.text, reply.finish) == (said, "stop")
        assert reply.usage.completion_tokens == len(learnt)
    assert prediction.text == said
    assert prediction.output == Diagnosis(diseases=("肺炎",), reason=("发热3天",), evidence=prediction.output.evidence)


class seen:  # noqa: N801  a verb
    """The token ids that models are given first in each generation: what enters an embedding, more than one a row."""

    def __enter__(self) -> list[list[list[int]]]:
        self._batches: list[list[list[int]]] = []
        self._handle = nn.modules.module.register_module_forward_pre_hook(self._look)
        return self._batches

    def _look(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Embedding) and given[0].shape[-1] > 1:
            ids = given[0].tolist()
            if ids != [[0, 0]]:  # by which it is measured what a token takes of memory
                self._batches.append(ids)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def learned(example: tokens.Example, vocabulary: int) -> Qwen3ForCausalLM:
    """A small model that knows one row by heart."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,  # the template's own end must stop it
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids, labels = torch.tensor([example.ids]), torch.tensor([example.labels])
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    return model.eval()


@families
def test_the_end_is_trained_at_every_length(name: str) -> None:
    """However little fits: the record is cut or the row refused, and the end of the turn is the last label."""
    family = FAMILIES[name]
    words = taught(family)
    long = row(answer_of(family), asking_about(RECORD * 2))
    whole = tokens.example(words, long, 10_000)
    end = words.convert_tokens_to_ids(family.end)
    learnt = [label for label in whole.labels if label != tokens.IGNORED]
    made = []
    for limit in range(1, len(whole.ids) + 1):
        try:
            made.append((limit, tokens.example(words, long, limit)))
        except tokens.TooLongError:
            assert not made  # what fits into less fits into more
    assert len(made) > 20
    for limit, example in made:
        assert len(example.ids) <= limit
        assert [label for label in example.labels if label != tokens.IGNORED] == learnt
        assert example.ids[-1] == example.labels[-1] == end


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "qwen3.5-thinking"])
def test_thinking_of_earlier_turns_is_forgotten_in_training_too(name: str) -> None:
    family = FAMILIES[name]
    words = taught(family)
    messages = (S, U, Message(role="assistant", content=THOUGHT), U)
    shown = words.decode(tokens.prompt_ids(words, messages))
    assert "发热，咳嗽。" not in shown
    assert f"<|im_start|>assistant\n{JSON}<|im_end|>\n<|im_start|>user\nU<|im_end|>" in shown


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano", "glm4moe"])
@pytest.mark.parametrize("on", [True, False])
def test_thinking_is_a_default_that_a_caller_may_overrule(template: str, on: bool) -> None:
    """The same prompt as with the switch given; set twice, or otherwise before, it is set once."""
    plain, words = (tokenizer_of(_qwen3(template, "", thinks=on)) for _ in range(2))
    turns = [{"role": "user", "content": "U"}]

    def prompt(which: PreTrainedTokenizerFast, **switch: bool) -> str:
        return str(which.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **switch))

    tokens.with_thinking(words, not on)
    tokens.with_thinking(words, on)
    once = words.chat_template
    tokens.with_thinking(words, on)
    assert words.chat_template == once
    assert once.endswith(plain.chat_template)
    assert once.count("enable_thinking") == plain.chat_template.count("enable_thinking") + 3
    assert prompt(words) == prompt(plain, enable_thinking=on)
    for switch in (True, False):
        assert prompt(words, enable_thinking=switch) == prompt(plain, enable_thinking=switch)
    assert prompt(plain, enable_thinking=on) != prompt(plain, enable_thinking=not on)


@pytest.mark.parametrize("template", ["qwen2_5", "gemma3", "qwen3_instruct_2507"])
def test_a_template_without_the_switch_stays(template: str) -> None:
    words = tokenizer_of(_qwen3(template, "", thinks=None))
    tokens.with_thinking(words, True)
    assert words.chat_template == template_of(template)


def test_a_tokenizer_without_a_template_stays_without() -> None:
    words = tiny.tokenizer()
    words.chat_template = None
    tokens.with_thinking(words, True)
    assert words.chat_template is None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((), False),
        ((JSON,), False),
        ((THOUGHT,), True),
        ((JSON, THOUGHT), True),
        (("\n<think></think>\n多喝水",), True),
        (('{"reason": ["<think>"]}', "</think>"), False),
    ],
)
def test_whether_rows_think(answers: tuple[str, ...], expected: bool) -> None:
    assert tokens.thinks(row(answer) for answer in answers) is expected


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("<think>\n想\n</think>\n\n答", "想\n</think>\n\n答"),
        ("<think>想</think>\n答", "想</think>\n答"),
        ("<think>\n\n想</think>答", "\n想</think>答"),
        (" \n<think>\n想</think>答", "想</think>答"),
        ("<think></think>\n答", "</think>\n答"),
        ("答", "\n</think>\n\n答"),
        ('{"reason": ["<think>"]}', '\n</think>\n\n{"reason": ["<think>"]}'),
    ],
)
def test_thinking_that_the_prompt_opens_is_opened_once(answer: str, learnt: str) -> None:
    """An answer without thinking ends it at once; the prompt is what it is asked with, whatever the answer."""
    words = taught(FAMILIES["qwen3-thinking-2507"])
    made = tokens.example(words, row(answer), 500)
    assert words.decode(made.ids) == f"{_SU}<think>\n{learnt}<|im_end|>"
    assert prompt_of(made) == tokens.prompt_ids(words, (S, U))


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(THOUGHT, Outcome.CLEAN), (f"<think>试{{}}</think>\n{JSON}", Outcome.CLEAN), (JSON, Outcome.CLEAN)],
)
def test_a_reply_after_an_opened_thought_parses(answer: str, outcome: Outcome) -> None:
    """What stands in a reply is what follows the prompt: its thinking has no opening tag."""
    words = taught(FAMILIES["qwen3-thinking-2507"])
    reply = tokens.learnt(words, row(answer))
    assert "<think>" not in reply
    parsed = parse_diagnosis(reply)
    assert (parsed.outcome, parsed.output) == (outcome, Diagnosis(diseases=("肺炎",), reason=("发热3天",)))


def test_advice_after_an_opened_thought_parses() -> None:
    words = taught(FAMILIES["qwen3-thinking-2507"])
    given = consult.Consultation(think="发热3天，先看血常规。", answer="多休息，高热时就诊。")
    reply = tokens.learnt(words, row(consult.canonical(given)))
    assert consult.parse(reply).output == given


def test_a_system_that_a_template_leaves_out_is_said_by_the_user() -> None:
    """Some templates pass over what they don't know, without a word."""
    words = tiny.tokenizer()
    words.chat_template = "{% for turn in messages if turn.role != 'system' %}" + tiny.TEMPLATE.removeprefix(
        "{% for turn in messages %}"
    )
    assert words.decode(tokens.prompt_ids(words, (S, U))) == _U.replace("U", "S\n\nU")
    assert words.decode(tokens.prompt_ids(words, (U,))) == _U


def test_messages_that_a_template_refuses_are_one_line() -> None:
    words = taught(FAMILIES["gemma3"])
    with pytest.raises(UserError, match=r"^[^\n]*its chat template refuses the messages: Conversation roles[^\n]*$"):
        tokens.prompt_ids(words, (S, U, U))


@pytest.mark.slow
def test_smollm2_is_still_as_it_is_here() -> None:
    """The package's own template and marks, which the first use unpacks."""
    real = load_tokenizer(smollm2.folder())
    assert real.chat_template == SMOLLM2
    family = FAMILIES["smollm2"]
    assert (real.eos_token, real.bos_token) == (family.eos, family.bos)
    made = tokens.example(real, row(JSON), 500)
    assert real.decode(made.ids) == f"{family.prompt}{JSON}<|im_end|>"


READERS = {
    "model/tokens.py": "the door",
    "model/fresh.py": "makes a tokenizer",
    "model/merge.py": "a text to compare two models by",
    "model/score.py": "how an answer that was begun goes on, after the door's own prompt",
    "train/weights.py": "where the tokens of an answer stand in it",
    "train/trainer.py": "how long answers are",
    "llm/counting.py": "what a prompt will cost",
    "app/teacher.py": "the simulated endpoint's own, behind HTTP",
    "app/teacher_tokens.py": "as above",
}
"""Who may make tokens of a text, and for what; nobody else of messages, to ask a model or to teach it."""


def doors(source: str) -> Iterator[str]:
    """Calls that make tokens of a text or of messages."""
    names = {"apply_chat_template", "encode_plus", "batch_encode_plus", "encode_batch", "tokenize"}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, method = called.rpartition(".")
        codec = not node.args or (isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str))
        if method in names or method.lstrip("_") == "tokenizer" or (owner and method == "encode" and not codec):
            yield called


def test_nobody_else_makes_tokens_of_messages() -> None:
    """A service or a page goes through the same door, or this fails."""
    found = {path.relative_to(rooms.PACKAGE).as_posix(): set(doors(path.read_text("utf-8"))) for path in rooms.files()}
    assert {path for path, calls in found.items() if any("apply_chat" in one for one in calls)} == {"model/tokens.py"}
    assert {path for path, calls in found.items() if calls} - READERS.keys() == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("words.apply_chat_template(turns)", ["words.apply_chat_template"]),
        ("self.tokenizer(text, return_tensors='pt')", ["self.tokenizer"]),
        ("tokenizer(text)", ["tokenizer"]),
        ("loaded.tokenizer.encode(text)", ["loaded.tokenizer.encode"]),
        ("words.encode(said, add_special_tokens=False)", ["words.encode"]),
        ("words.tokenize(said)", ["words.tokenize"]),
        ("text.encode() + text.encode('utf-8', 'replace')", []),
        ("load_tokenizer", []),
    ],
)
def test_the_rule_sees_what_it_forbids(source: str, expected: list[str]) -> None:
    assert list(doors(source)) == expected
