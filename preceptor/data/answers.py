"""Predictions that other tools made: what each row's model said, and about which case.

LLaMA-Factory's `generated_predictions.jsonl`, the results of `swift infer`, vLLM's and OpenAI's batches, a
competition's submission, and any rows with a reply or with diseases. A row is joined to its case by id, else by the
record that its prompt holds, else, where prompts were cut, by its place among as many rows as there are cases.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from preceptor.core import text as texts
from preceptor.core.records import Case, Failure, FailureKind, Issue, Prediction
from preceptor.data.layouts import digest_id, language_of, missing
from preceptor.data.rows import BadRow, Row, rows
from preceptor.data.splits import family_key
from preceptor.tasks import consult
from preceptor.tasks.answer import Outcome, Parsed
from preceptor.tasks.answer import parse as parse_diagnosis

Parse = Callable[[str, str], Parsed | consult.Parsed]
"""How a reply to a task is read, from its text and how it ended."""

_ID = ("caseid", "customid", "id", "recordid", "sampleid", "questionid", "qid", "uid", "病例编号", "病例id", "编号")
_REPLY = (
    *("predict", "prediction", "predicted", "pred", "modelprediction", "modeloutput", "modelresponse"),
    *("generatedtext", "generatedtexts", "generation", "generations", "generated", "completion", "completions"),
    *(
        "response",
        "responses",
        "outputs",
        "output",
        "reply",
        "预测",
        "预测结果",
        "模型输出",
        "模型回答",
        "输出",
        "回复",
    ),
)
_DISEASES = (
    *("predicteddiseases", "predicteddisease", "predicteddiagnosis", "diseases", "disease", "diagnoses", "diagnosis"),
    *("疾病", "诊断", "初步诊断", "诊断结果", "疾病名称", "病名"),
)
_REASON = ("reason", "reasons", "evidence", "rationale", "依据", "诊断依据", "理由", "诊断理由")
_BARE_REPLY = ("answer", "content", "回答", "text")
"""What may hold a reply where nothing of the above is there: elsewhere a `text` is the record."""
_LABEL = ("label", "labels", "groundtruth", "reference", "gold")
_SAMPLES = {"generatedtexts", "generations", "completions", "responses", "outputs"}
_WITHIN = (
    *("choices", "body", "message", "content", "text", "generated_text", "outputs", "output", "response", "completion"),
)
"""Where an object that stands for a reply keeps its text."""
_CUT = {"length", "max_tokens", "model_length"}
_REFUSED = {"refusal", "content_filter"}
_DEPTH = 6
PLACED = "prompt"
"""Field of the issue of a row that is joined by its place."""
_ANCHOR, _LEAST, _EDGE = 32, 8, 12
"""Characters by which records are looked up in a prompt; of the shortest that is; of what is left of one cut off."""
_RECORD = re.compile(r"<record>\s*(.*?)\s*</record>", re.DOTALL)
_USER = re.compile(
    r"<\|im_start\|>user\n|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user\n|<\|user\|>|<｜User｜>"
    r"|\[INST\]|### Instruction:|(?:^|\n)(?:user\n|Human: ?|USER: ?)"
)
_ASSISTANT = re.compile(
    r"<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|assistant\|>|<｜Assistant｜>|\[/INST\]|### Response:"
    r"|\n(?:assistant(?:\n|$)|Assistant:|ASSISTANT:)"
)


@dataclass(frozen=True)
class Joined:
    """A prediction, and the label beside it, which is empty where there is none."""

    line: int
    prediction: Prediction
    label: str


@dataclass(frozen=True)
class _Answer:
    """What a row says."""

    replies: tuple[tuple[str, str], ...]
    """Each with how it ended."""
    id: str
    said: str
    """All else: the prompt, and whatever stands beside it."""
    label: str
    error: str
    """Why there is no reply, where the row itself tells."""
    own: Prediction | None = None
    """The row is one of ours."""


class Index:
    """Cases by id, by record and by place."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self.order: list[str] = []
        self._texts: dict[str, str] = {}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for case in cases:
            self.order.append(case.id)
            self._texts[case.id] = case.text
            self._alike[_folded(case.text)].append(case.id)
        # The middle of a record tells more than its ends, which are labels and empty sections.
        self._anchors: dict[int, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
        for text in self._alike:
            size = min(_ANCHOR, len(text))
            start = (len(text) - size) // 2
            if size >= _LEAST:
                self._anchors[size][text[start : start + size]].append((text, start))

    def about(self, answer: _Answer) -> list[str]:
        """The cases that a row may be about: that of its id, else those whose record it holds, the last one of all."""
        return [answer.id] if answer.id in self._texts else self._held(answer.said)

    def _held(self, said: str) -> list[str]:
        folded = _folded(said)
        found = {
            (start - offset + len(text), len(text), text)
            for size, anchors in self._anchors.items()
            for start in range(len(folded) - size + 1)
            for text, offset in anchors.get(folded[start : start + size], ())
            if start >= offset and folded.startswith(text, start - offset)
        }
        if not found:
            return []
        alike = self._alike[max(found)[2]]
        return [identity for identity in alike if self._texts[identity] in said] or alike

    def may_be_cut(self, said: str, place: int) -> bool:
        """Whether a prompt may hold what a cut left of the record in that place, or there is no prompt at all."""
        folded, record = _folded(said), _folded(self._texts[self.order[place]])
        return len(folded) < _ANCHOR or record[:_EDGE] in folded or record[-_EDGE:] in folded


def read(path: Path, model: str, index: Index, parse: Parse = parse_diagnosis) -> Iterator[Joined | Issue]:
    """The predictions of a file under the name `model`; an issue for each row that is about no known case.

    Rows that are joined by their place have an issue too, which says so (`kept`).
    """
    times: Counter[str] = Counter()
    in_order: bool | None = None
    for place, (line, row) in enumerate(rows(path)):
        try:
            answer = _answer(row)
            found = index.about(answer)
            if not found:
                in_order = _in_order(path, index) if in_order is None else in_order
                if answer.id or not in_order or not index.may_be_cut(answer.said, place):
                    raise BadRow(*_stranger(answer, in_order=in_order))
                found = [index.order[place]]
                reason = f"no whole record in it: joined to case {found[0]!r} by its place"
                yield Issue(file=str(path), line=line, field=PLACED, reason=reason, action="kept")
        except BadRow as error:
            yield Issue(file=str(path), line=line, field=error.field, reason=error.reason, action="dropped")
            continue
        identity = min(found, key=lambda one: times[one])
        for prediction in _predictions(answer, model, identity, parse):
            yield Joined(line, prediction.model_copy(update={"sample": times[identity]}), answer.label)
            times[identity] += 1


def asked(path: Path) -> Iterator[Case]:
    """Cases made of what the rows' models were asked, where a label stands beside it: for want of the cases.

    They have no gold: `read` gives the labels.
    """
    for _, row in rows(path):
        try:
            answer = _answer(row)
        except BadRow:
            continue  # `read` tells of it
        if answer.label and (record := _record(row, answer)):
            identity = answer.id or digest_id({"text": record})
            key = family_key(record)
            yield Case(id=identity, text=record, language=language_of(record), source=path.name, group=key)


def predictions(path: Path, model: str) -> Iterator[Prediction | Issue]:
    """The predictions of a file whose rows name their cases by id, whichever cases there are."""
    for line, row in rows(path):
        try:
            answer = _answer(row)
            if not answer.id:
                raise BadRow("id", "missing: without it, give the cases, by whose records rows are joined")
        except BadRow as error:
            yield Issue(file=str(path), line=line, field=error.field, reason=error.reason, action="dropped")
            continue
        yield from _predictions(answer, model, answer.id, parse_diagnosis)


def _stranger(answer: _Answer, *, in_order: bool) -> tuple[str, str]:
    """Field and reason of a row that is about no case."""
    if answer.id:
        return "id", f"no case {answer.id!r}, and none whose record the row holds"
    if not answer.said:
        return "id", "missing, there is no prompt, and there are not as many rows as cases, in one order"
    why = "it holds no part of the record in its place" if in_order else "rows and cases are not as many, in one order"
    return "prompt", f"it holds no case's record, and {why}; give the rows ids"


def _in_order(path: Path, index: Index) -> bool:
    """Whether there are as many rows as cases, and every row that can be joined otherwise stands in its place."""
    count = 0
    for count, (_, row) in enumerate(rows(path), 1):
        if count > len(index.order):
            return False
        try:
            found = index.about(_answer(row))
        except BadRow:
            continue
        if found and index.order[count - 1] not in found:
            return False
    return count == len(index.order)


def _answer(row: Row) -> _Answer:
    if isinstance(row, BadRow):
        raise row
    if "prompt_sha" in row and "case_id" in row:
        try:
            own = Prediction.model_validate_json(json.dumps(row))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise BadRow(".".join(map(str, wrong["loc"])), wrong["msg"]) from error
        return _Answer((), own.case_id, "", "", "", own)
    keys = {re.sub(r"[\W_]", "", texts.normalise(key)): key for key in reversed(list(row))}

    def first(names: tuple[str, ...]) -> str | None:
        return next((keys[name] for name in names if name in keys), None)

    reply, diseases, label, identity = first(_REPLY), first(_DISEASES), first(_LABEL), first(_ID)
    reason = first(_REASON)
    if reply is None and diseases is None:
        reply = first(_BARE_REPLY)
    if reply is not None:
        replies = _replies(row[reply], many=re.sub(r"[\W_]", "", reply.casefold()) in _SAMPLES)
    elif diseases is not None:
        replies = [(_listed(row[diseases], row[reason] if reason else None), "stop")]
    else:
        raise BadRow("", f"no reply and no diseases in it; it has {', '.join(row)[:150]}")
    used = {reply, label, identity} | ({diseases, reason} if reply is None else set())
    ended = row.get("finish_reason")
    if isinstance(ended, str):
        replies = [(text, ended) for text, _ in replies]
    return _Answer(
        replies=tuple(replies),
        id=_identity(row[identity]) if identity else "",
        said="\n".join(_strings([value for key, value in row.items() if key not in used])),
        label=_replies(row[label], many=False)[0][0] if label else "",
        error=str(row.get("error") or "") if not any(text for text, _ in replies) else "",
    )


def _identity(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as spreadsheets have it, and tables that went through one
    identity = "" if value is None or missing(value) else str(value).strip()
    return re.sub(r"(?<=^\d)(\d*)\.0$", r"\1", identity)


def _listed(diseases: Any, reason: Any) -> str:
    """The reply that two columns stand for. A cell without a word is no abstention: that is written out."""
    if diseases is None or diseases == "" or missing(diseases):
        return ""
    said = {"diseases": diseases, "reason": "" if reason is None or missing(reason) else reason}
    # The competition's files hold line breaks that were escaped twice.
    plain = {key: value.replace("\\n", "\n") if isinstance(value, str) else value for key, value in said.items()}
    return json.dumps(plain, ensure_ascii=False)


def _replies(value: Any, *, many: bool, depth: int = 0) -> list[tuple[str, str]]:
    """The replies that a value holds, one or several samples, each with how it ended."""
    if value is None or isinstance(value, str):
        return [(value or "", "stop")]
    if isinstance(value, dict) and depth < _DEPTH:
        inner = next((value[key] for key in _WITHIN if key in value), None)
        if inner is not None:
            found = _replies(inner, many=True, depth=depth + 1)
            ended = value.get("finish_reason")
            return [(text, ended) for text, _ in found] if isinstance(ended, str) else found
    if isinstance(value, list) and value and depth < _DEPTH:
        if all(isinstance(one, dict) and "role" in one for one in value):  # a conversation ends in the reply
            return _replies(value[-1], many=False, depth=depth + 1)
        if many or any(isinstance(one, dict) and any(key in one for key in _WITHIN) for one in value):
            return [reply for one in value for reply in _replies(one, many=False, depth=depth + 1)]
    return [(json.dumps(value, ensure_ascii=False), "stop")]


def _predictions(answer: _Answer, model: str, case_id: str, parse: Parse) -> Iterator[Prediction]:
    if answer.own:
        yield answer.own.model_copy(update={"model": model})
        return
    for sample, (text, ended) in enumerate(answer.replies):
        finish = "length" if ended in _CUT else "refusal" if ended in _REFUSED else "stop"
        parsed = parse(text, finish)
        failure = None
        if parsed.output is None:
            kind = FailureKind.PROVIDER if answer.error else FailureKind(parsed.outcome)
            failure = Failure(kind=kind, detail=answer.error[:500] or parsed.detail)
        yield Prediction(
            case_id=case_id,
            sample=sample,
            model=model,
            prompt_sha="",
            text=text,
            output=parsed.output,
            failure=failure,
            repaired=parsed.outcome is Outcome.REPAIRED,
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _folded(text: str) -> str:
    """A text without spaces, width and case, in which records are found however a tokenizer wrote them back."""
    return "".join(texts.normalise(text).split())


def _record(row: Row, answer: _Answer) -> str:
    """The record that a row's model was asked about: between its marks, else what the user said last."""
    if marked := _RECORD.findall(answer.said):
        return str(marked[-1])
    assert isinstance(row, Mapping)
    messages = row.get("messages")
    if isinstance(messages, list):
        users = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        return "\n".join(_strings(users[-1].get("content"))).strip() if users else ""
    turn = _USER.split(answer.said)[-1]
    return _ASSISTANT.split(turn, maxsplit=1)[0].strip()
