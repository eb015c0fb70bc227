"""The layouts in which cases are passed around: how a row of each becomes a case, and which one a file is in.

What a row says beyond its layout is kept in `meta`, where no prompt sees it. A row without an id gets
`row-` and a digest of all that it says, so that it keeps its id wherever it stands; `files.read` numbers
rows that are the same in every word (`-2`, `-3`, …).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Language
from preceptor.data.rows import BadRow
from preceptor.data.splits import family_key
from preceptor.tasks import answer

Importer = Callable[[Mapping[str, Any]], Case]

_HAN = re.compile(r"[\u4e00-\u9fff]")
_THINK = re.compile(r"\s*(?:<think(?:ing)?>)?(?P<think>.*)</think(?:ing)?>(?P<answer>.*)", re.DOTALL | re.IGNORECASE)
_ROLES = {"developer": "system", "human": "user"} | dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant")
_MISSING = frozenset(("", "nan", "nat", "null", "<na>", "n/a", "#n/a"))
_NO_DISEASES = frozenset(("待查", "待诊", "待定", "待明确", "未明确", "不详", "unknown", "pending"))
_METAS = ("meta", "metadata")
_ANSWER = ("diseases", "reason")
SAMPLE = 20
"""Rows by which a layout is told."""


def language_of(text: str) -> Language:
    """Chinese if a twentieth of the characters are: records are full of numbers and Latin abbreviations."""
    return "zh" if len(_HAN.findall(text)) * 20 >= len(text) else "en"


def digest_id(row: Mapping[str, Any]) -> str:
    """The id of a row that has none."""
    said = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
    return "row-" + hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]


def case_of(
    row: Mapping[str, Any],
    source: str,
    text: str,
    used: Collection[str],
    gold: Diagnosis | Consultation | None = None,
    **fields: Any,
) -> Case:
    """A case of a row, with its `id`; what isn't `used` goes to `meta`. The text has one kind of line end."""
    identity = row.get("id")
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)  # as spreadsheets have it
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        raise BadRow("id", "neither a text nor a whole number")
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    meta = {key: value for key, value in row.items() if key not in used and key != "id"} | fields.pop("meta", {})
    known = {"language": language_of(text), "group": family_key(text), "gold_source": "file" if gold else None}
    identity = str("" if identity is None else identity).strip() or digest_id(row)
    return Case(id=identity, text=text, source=source, meta=meta, gold=gold, **known | fields)


def diagnosis_of(field: str, diseases: Any, reason: Any = "") -> Diagnosis | None:
    """What a file says of diseases and reasons, taken apart as an answer is; None where it says nothing."""
    if diseases in (None, "", []) or missing(diseases):
        return None
    said = {"diseases": _unescaped(diseases), "reason": _unescaped(reason or "")}
    output = answer.parse(json.dumps(said, ensure_ascii=False)).output
    if output is None:
        raise BadRow(field, "it names diseases in no known form")
    named = tuple(name for name in output.diseases if name.strip("?？ ").casefold() not in _NO_DISEASES)
    return output.model_copy(update={"diseases": named}) if named or not output.diseases else None


def _unescaped(value: Any) -> Any:
    r"""Files of the competition hold line breaks that were escaped twice, as `\` and `n`."""
    return value.replace("\\n", "\n") if isinstance(value, str) else value


def consultation_of(field: str, said: str, think: str = "") -> tuple[Diagnosis | Consultation, dict[str, Any]]:
    """An answer as gold: its thinking apart, a diagnosis where it is JSON of one (then the thinking is meta)."""
    parted = _THINK.fullmatch(said)
    body = parted["answer"].strip() if parted else said.strip()
    think = parted["think"].strip() if parted else think.strip()
    if not body or re.match(r"\s*<think(?:ing)?>", body, re.IGNORECASE):
        raise BadRow(field, "it ends in its thinking" if parted or body else "it is empty")
    if body.startswith(("{", "[", "```")):
        parsed = answer.parse(body)
        if parsed.outcome is answer.Outcome.CLEAN and parsed.output:
            return parsed.output, {"think": think} if think else {}
    return Consultation(think=think, answer=body), {}


def missing(value: Any) -> bool:
    """Whether a value is how programs write that there is none."""
    return isinstance(value, str) and value.strip().casefold() in _MISSING


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(field, "missing, empty or not a text")
    return value


def _healthai(row: Mapping[str, Any], source: str) -> Case:
    """A competition's row needs its id. Where it has diseases, they are the gold, with the reasons beside them."""
    if row.get("id") is None or not str(row["id"]).strip():
        raise BadRow("id", "missing")
    text, used = _text(row, "feature_content"), ["feature_content", *_ANSWER]
    gold = diagnosis_of("diseases", row.get("diseases"), row.get("reason"))
    meta: dict[str, Any] = {}
    if given := row.get("bingli_json"):
        written = answer.parse(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        if written.output:
            gold = Diagnosis(diseases=(gold or written.output).diseases, reason=written.output.reason)
            meta = {"bingli_diseases": list(written.output.diseases)}
            used.append("bingli_json")
        elif gold is None:
            raise BadRow("bingli_json", written.detail.replace("the reply", "it"))
    case = case_of(row, source, text, used, gold, meta=meta)
    return case if case.text == text else case.model_copy(update={"meta": case.meta | {"feature_content": text}})


def _asked(row: Mapping[str, Any], source: str, question: str, think: str, said: str) -> Case:
    """A question, the thinking where it stands apart, and the answer; no answer is no gold."""
    gold: Diagnosis | Consultation | None = None
    meta: dict[str, Any] = {}
    if row.get(said):
        gold, meta = consultation_of(said, _text(row, said), _text(row, think) if row.get(think) else "")
    return case_of(row, source, _text(row, question), (question, think, said), gold, meta=meta)


def _instruction(row: Mapping[str, Any], source: str, *prompts: str) -> Case:
    """Instruction and input are the text, the input alone behind one of the file's `prompts`."""
    instruction, given = row.get("instruction"), row.get("input")
    if not given:
        return _asked(row, source, "instruction", "think", "output")
    if isinstance(instruction, str) and isinstance(given, str) and instruction.strip() and instruction not in prompts:
        row = {key: value for key, value in row.items() if key != "instruction"}
        return _asked(row | {"input": f"{instruction}\n{given}"}, source, "input", "think", "output")
    return _asked(row, source, "input", "think", "output")


def instruction_importer(rows: Iterable[Mapping[str, Any]]) -> Importer:
    """Reads rows of `instruction`. What instructs several of the file's first `rows` is a prompt, and no question."""
    times = Counter(str(row.get("instruction")) for row in rows)
    return _importer("instruction", *(said for said, number in times.items() if number > 1))


def _conversation(row: Mapping[str, Any], source: str, *fields: str) -> Case:
    """The last reply is the gold; all before it is the text, with the roles where there is more than one turn."""
    given = [turn for field in fields for turn in _turns(row, field)]
    turns = [turn for turn in given if turn[0] != "system"]
    system = "\n".join(said for role, said, _ in given if role == "system")
    gold: Diagnosis | Consultation | None = None
    meta: dict[str, Any] = {"system": system} if system else {}
    if turns and turns[-1][0] == "assistant":
        gold, more = consultation_of(fields[-1], *turns.pop()[1:])
        meta |= more
    if not any(role == "user" for role, _, _ in turns):
        raise BadRow(fields[0], "nobody asks anything in it")
    said = [(role, _unthought(said) if role == "assistant" else said) for role, said, _ in turns]
    text = said[0][1] if len(said) == 1 else "\n".join(map(": ".join, said))
    return case_of(row, source, text, fields, gold, meta=meta)


def _unthought(said: str) -> str:
    """What was said of a turn, without the thinking before it."""
    parted = _THINK.fullmatch(said)
    return parted["answer"].strip() if parted else said


def _turns(row: Mapping[str, Any], field: str) -> list[tuple[str, str, str]]:
    """The turns of a conversation as role, what is said, and the thinking where it is kept apart."""
    value = row.get(field)
    if isinstance(value, str) and field in ("prompt", "completion"):
        value = [{"role": "user" if field == "prompt" else "assistant", "content": value}]
    elif isinstance(value, str):  # as tables keep it
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(field, "a text that is no list of messages") from error
    if field == "completion" and (not value or value == [{"role": "assistant", "content": ""}]):
        return []
    if not isinstance(value, list):
        raise BadRow(field, "missing, or no list of messages")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow(field, "a message must be an object with role and content")
        role = str(turn.get("role", turn.get("from"))).strip().lower()
        said = turn.get("content", turn.get("value"))
        if isinstance(said, list):
            said = "\n".join(str(part.get("text", "")) for part in said if isinstance(part, dict))
        role = _ROLES.get(role, role)
        if role not in ("user", "assistant", "system") or not isinstance(said, str):
            raise BadRow(field, f"a message of {role!r} whose content is {type(said).__name__}")
        turns.append((role, said, str(turn.get("reasoning_content") or turn.get("thinking") or "")))
    return turns


def _preceptor(row: Mapping[str, Any], _: str) -> Case:
    try:
        return Case.model_validate_json(json.dumps(row))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRow(".".join(map(str, first["loc"])), first["msg"]) from error


@dataclass(frozen=True)
class _Layout:
    """The fields by which a layout is known, those that it may have besides, and who reads it, with what."""

    known_by: tuple[str, ...]
    others: tuple[str, ...]
    read: Callable[..., Case]
    roles: tuple[str, ...] = ()


_COT, _R1 = ("Question", "Complex_CoT", "Response"), ("question", "think", "answer")
_KNOWN = {
    "preceptor": _Layout(("id", "text", "language", "source", "group"), tuple(Case.model_fields), _preceptor),
    "healthai_labelled": _Layout(("feature_content", "bingli_json"), ("id", *_ANSWER), _healthai),
    "healthai_submission": _Layout(("feature_content", "diseases"), ("id", "reason", "bingli_json"), _healthai),
    "healthai": _Layout(("feature_content",), ("id", *_ANSWER, "bingli_json"), _healthai),
    "complex_cot": _Layout(_COT, ("id",), _asked, _COT),
    "think_answer": _Layout(_R1, ("id",), _asked, _R1),
    "instruction": _Layout(("instruction", "output"), ("id", "input", "think"), _instruction),
    "messages": _Layout(("messages",), ("id",), _conversation, ("messages",)),
    "sharegpt": _Layout(("conversations",), ("id",), _conversation, ("conversations",)),
    "conversation": _Layout(("conversation",), ("id",), _conversation, ("conversation",)),
    "prompt_completion": _Layout(("prompt", "completion"), ("id",), _conversation, ("prompt", "completion")),
}
"""By name, the more particular ones first."""
DDXPLUS = "ddxplus"
"""Known here by its fields; its importer is made from the files beside it."""


def _importer(name: str, *more: str) -> Importer:
    layout = _KNOWN[name]
    fields = (*layout.known_by, *layout.others)

    def read(row: Mapping[str, Any]) -> Case:
        spelled = _spelled(row, fields)
        if name != "preceptor":
            spelled = _flat(spelled, fields)
        return layout.read(spelled, name, *layout.roles, *more)

    return read


LAYOUTS: Mapping[str, Importer] = {name: _importer(name) for name in _KNOWN}


def _flat(row: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The row with what an object of metadata says beside its own fields, where it has no such field."""
    for name in _METAS:
        inner = row.get(name)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):  # as tables keep it
            try:
                inner = json.loads(inner)
            except ValueError:
                continue
        if isinstance(inner, dict):
            own = set(row) | set(fields) - {"id"}
            moved = {key: value for key, value in inner.items() if key not in own}
            left = {key: value for key, value in inner.items() if key not in moved}
            row = {key: value for key, value in row.items() if key != name} | moved | ({name: left} if left else {})
    return row


def _spelled(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The row with its fields in our spelling, wherever just one key is that but for case, spaces and hyphens."""
    if all(field in row for field in fields):
        return dict(row)
    missing = {_folded(field): field for field in fields if field not in row}
    times = Counter(map(_folded, row))
    return {
        (missing[folded] if (folded := _folded(key)) in missing and times[folded] == 1 else key): value
        for key, value in row.items()
    }


@lru_cache(maxsize=4096)
def _folded(key: str) -> str:
    return re.sub(r"[\W_]", "", key.casefold())


def detect(rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of the layout in which the first rows of a file are: the most particular that half of them fit.

    Raises:
        UserError: they are in none that is known.
    """
    known_by = {name: layout.known_by for name, layout in _KNOWN.items()} | {DDXPLUS: ("PATHOLOGY", "EVIDENCES")}
    for name, fields in known_by.items():
        fit = sum(set(fields) <= set(_spelled(row, fields)) for row in rows[:SAMPLE])
        if rows and fit * 2 >= len(rows[:SAMPLE]):
            return name
    seen = ", ".join(dict.fromkeys(key for row in rows[:SAMPLE] for key in row))[:300]
    wanted = "; ".join(f"{name} ({', '.join(fields)})" for name, fields in known_by.items())
    found = f"its rows have {seen}" if seen else "it is empty, or no row of it can be read"
    raise UserError(f"no known layout: {found}. Map its columns, name an importer, or use one of: {wanted}")
