"""What stands around a reply's answer, and is taken off before it is read: thinking, a template's tokens, tags."""

import re

_THINK_OPEN = re.compile(
    r"<(?:seed:)?think(?:ing)?>|<\|begin_of_thought\|>|◁think▷|<(?:reasoning|analysis|scratchpad|reflection)>",
    re.IGNORECASE,
)
_THINK_CLOSE = re.compile(
    r"</(?:seed:)?think(?:ing)?>|<\|end_of_thought\|>|◁/think▷|</(?:reasoning|analysis|scratchpad|reflection)>",
    re.IGNORECASE,
)
_FINAL = re.compile(r"<\|channel\|>final(?: ?<\|constrain\|>\w+)?<\|message\|>")
_ROLE = re.compile(
    r"\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)(?:assistant|model)(?:<\|end_header_id\|>)?"
)
_END = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end|return|end_of_text|user)\|>|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>|\[EOS\]"
)
_WRAPPED = re.compile(
    r"<(answer|final_answer|final|output|response|result)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}")

_REFUSAL = re.compile(
    r"\W*(?:i(?:(?:'|’)?m| am) (?:sorry|unable|not (?:able|allowed|a (?:doctor|physician|medical)))"
    r"|sorry|unfortunately,? i|i can(?:not|'t|’t)|as an ai"
    r"|(?:非常|很)?抱歉|对不起|我(?:无法|不能)|作为(?:一个|一名)?(?:ai|人工智能))",
    re.IGNORECASE,
)


def unwrapped(text: str) -> tuple[str, bool]:
    """The answer alone, and whether the reply ends in the midst of thinking."""
    finals = list(_FINAL.finditer(text))
    body = text[finals[-1].end() :] if finals else text
    body, thinking = _without_thinking(body.lstrip("\ufeff"))
    if role := _ROLE.match(body):
        body = body[role.end() :].strip()
    if end := _END.search(body):
        body = body[: end.start()].strip()
    if "{" not in body or "\\boxed" in body:
        if boxed := _BOXED.findall(body):
            body = str(boxed[-1]).strip()
        elif wrapped := _WRAPPED.findall(body):
            body = str(wrapped[-1][1]).strip()
    return body, thinking


def refuses(body: str) -> bool:
    """Whether an answer begins as those do that decline to give one."""
    return _REFUSAL.match(body) is not None


def _without_thinking(text: str) -> tuple[str, bool]:
    """The reply without its thinking, and whether it ends in the midst of it.

    Chat templates that open the thinking themselves leave only the closing tag in the reply.
    """
    opened = _THINK_OPEN.search(text)
    before = text[: opened.start()] if opened else ""
    after = None
    for closed in _THINK_CLOSE.finditer(text):
        after = closed.end()
    if after is None:
        return (before if opened else text).strip(), opened is not None
    rest = text[after:]
    if again := _THINK_OPEN.search(rest):
        return (rest[: again.start()] or before).strip(), True
    return (rest.strip() or before.strip()), False
