"""The one way from messages to tokens, for training, batch prediction and serving alike.

The answer is encoded on its own after the prompt that generation starts from, so the tokens that are learnt
are those that a model would have to generate. A text too long is cut inside the patient's record; what
cannot be cut there is refused. The end of an answer, which teaches a model to stop, is never lost. Whether it
thinks first is a default of the chat template, which is saved with it: whoever serves it asks as it was taught.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.core.records import Message, Row

IGNORED = -100
"""Label of a token that carries no loss."""

_OPEN, _CLOSE = "<record>", "</record>"
_THINK, _THOUGHT_NOTHING = "<think>", "\n</think>\n\n"
"""How thinking begins, and how it ends at once, as Qwen's templates write it."""
_DEFAULTS = {
    on: f"{{%- set enable_thinking = enable_thinking if enable_thinking is defined else {word} %}}"
    for on, word in ((True, "true"), (False, "false"))
}
"""First words of a chat template, which say what it does if nobody says otherwise."""


class TooLongError(ValueError):
    """Messages that don't fit, and whose record can't be cut to make them."""


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of one training row, with labels on the answer and on the end of the turn alone."""

    ids: list[int]
    labels: list[int]
    cut: bool = False
    """The record was cut to fit."""
    weights: list[float] | None = None
    """How much each label counts in the loss; all the same without."""
    places: list[int] | None = None
    """Where a store of a teacher's beliefs has each token's, -1 where nothing is known; without, it has none."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], limit: int | None = None) -> list[int]:
    """Tokens of the messages up to where the answer starts, cut inside the record to `limit` tokens."""
    ids = _render(tokenizer, messages)
    if limit is None or len(ids) <= limit:
        return ids
    at, start, end = _record(messages)
    if at < 0:
        raise TooLongError(f"{len(ids)} tokens where {limit} fit, and no <record> to cut")
    content = messages[at].content
    before, text, after = content[:start], content[start:end], content[end:]
    low, high = 0, len(text)  # characters kept: `low` fits (once it is tried), `high` doesn't
    best: list[int] | None = None
    while low < high:
        kept = (low + high) // 2
        shorter = Message(role="user", content=before + text[:kept] + after)
        trial = _render(tokenizer, [*messages[:at], shorter, *messages[at + 1 :]])
        if len(trial) <= limit:
            low, best = kept + 1, trial
        else:
            high = kept
    if best is None or low <= 1:
        raise TooLongError(f"{len(ids)} tokens where {limit} fit, even with an empty <record>")
    return best


def example(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """The tokens and labels to train on, at most `max_length` of them; `TooLongError` where that can't be."""
    shown = _shown(tokenizer, row.messages)
    answer = _answer(tokenizer, shown, row.answer)
    whole = _encode(tokenizer, shown)
    room = max_length - len(answer)
    if len(whole) <= room:
        return Example(whole + answer, [IGNORED] * len(whole) + answer)
    if room <= 0:
        raise TooLongError(f"the answer alone is {len(answer)} tokens where {max_length} fit")
    prompt = prompt_ids(tokenizer, row.messages, room)
    return Example(prompt + answer, [IGNORED] * len(prompt) + answer, cut=True)


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The tokens of a row's answer, the end of the turn included: the labels of its `example`."""
    return _answer(tokenizer, _shown(tokenizer, row.messages), row.answer)


def learnt(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """The text of a row's answer as it is tokenised: what follows a prompt that may have begun to think."""
    return _following(_shown(tokenizer, row.messages), harmless(tokenizer, row.answer))


def _answer(tokenizer: PreTrainedTokenizerBase, shown: str, answer: str) -> list[int]:
    return [*_encode(tokenizer, _following(shown, harmless(tokenizer, answer))), end_of_turn(tokenizer)]


def opening(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the prompt has already begun of the answer: the mark that opens the thinking, or nothing."""
    shown = _shown(tokenizer, messages)
    bare = shown.rstrip()
    return f"{_THINK}{shown[len(bare) :]}" if bare.endswith(_THINK) else ""


def thinks(rows: Iterable[Row]) -> bool:
    """Whether answers begin with thinking: any, for a prompt that rules it out fits none of these."""
    return any(row.answer.lstrip().startswith(_THINK) for row in rows)


def with_thinking(tokenizer: PreTrainedTokenizerBase, on: bool) -> None:
    """Make thinking, or none, what the chat template asks for by default; it is saved with the tokenizer.

    A template without the switch (`enable_thinking`) stays as it is.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and "enable_thinking" in template:
        for default in _DEFAULTS.values():
            template = template.removeprefix(default)
        tokenizer.chat_template = _DEFAULTS[on] + template


def harmless(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` in which no words end a turn or start another: a patient's record is data."""
    for token in special_tokens(tokenizer):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All tokens that steer and are no text: a tokenizer's named ones and those that its file marks."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    marked = {str(token): at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**marked, **dict(named)}


@lru_cache(maxsize=4)
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an answer: not always the tokenizer's end of text."""
    mark = "preceptor"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    rendered = _template(tokenizer, turns, generation_prompt=False)
    special = set(special_tokens(tokenizer).values())
    after = _encode(tokenizer, rendered.rpartition(mark)[2])
    found = next((token for token in after if token in special), tokenizer.eos_token_id)
    if found is None:
        raise UserError(f"{tokenizer.name_or_path}: neither its chat template nor its tokenizer ends an answer")
    return int(found)


def _record(messages: Sequence[Message]) -> tuple[int, int, int]:
    """The last user message that holds a record, and the offsets between its last marks; -1 without one."""
    for at in range(len(messages) - 1, -1, -1):
        content = messages[at].content
        end = content.rfind(_CLOSE)
        start = content.rfind(_OPEN, 0, max(end, 0))
        if messages[at].role == "user" and start >= 0:
            start += len(_OPEN)
            return at, start + content.startswith("\n", start), max(start, end - (content[end - 1] == "\n"))
    return -1, 0, 0


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    return _encode(tokenizer, _shown(tokenizer, messages))


def _shown(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The prompt as text. Where a template has no system role, its words go before the first user's."""
    turns = [{"role": m.role, "content": harmless(tokenizer, m.content)} for m in messages]
    if [turn["role"] for turn in turns[:2]] == ["system", "user"] and not _takes_system(tokenizer):
        turns[:2] = [{"role": "user", "content": "\n\n".join(turn["content"] for turn in turns[:2])}]
    return _template(tokenizer, turns, generation_prompt=True)


@lru_cache(maxsize=4)
def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template shows what the system says: some refuse it, some leave it out without a word."""
    mark = "preceptor"
    turns = [{"role": "system", "content": mark}, {"role": "user", "content": "?"}]
    try:
        return mark in _template(tokenizer, turns, generation_prompt=True)
    except UserError:
        return False


def _following(prompt: str, answer: str) -> str:
    """The answer as a model goes on from a prompt that may end in the mark that opens its thinking."""
    bare = prompt.rstrip()
    if not bare.endswith(_THINK):
        return answer
    thought = answer.lstrip()
    if not thought.startswith(_THINK):
        return _THOUGHT_NOTHING + answer
    return thought.removeprefix(_THINK).removeprefix(prompt[len(bare) :])


def _template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        where = tokenizer.name_or_path
        raise UserError(f"{where}: no chat template; use an instruct model or put a chat_template.jinja there")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise UserError(f"{tokenizer.name_or_path}: its chat template refuses the messages: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
