"""Labels become training rows: failures go out, and answers that stand on nothing in the record."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from preceptor.core.errors import WorkError
from preceptor.core.records import Case, Diagnosis, Language, Prediction, Record, Row
from preceptor.stages.base import Context, Need, Stage, StageConfig, read_records, write_records
from preceptor.stages.fences import TARGET
from preceptor.tasks import diagnosis, prompts

UNGROUNDED = "ungrounded"
UNTHOUGHT = "unthought"


class Config(StageConfig):
    """What a label must be to be learned."""

    language: Language = "en"
    prompt: str = "zero_shot"
    """What the student will be asked with."""
    grounded: float = Field(default=0.5, ge=0, le=1)
    """Least share of an answer's reasons that must stand in the record; the others are taken out."""
    think: bool = False
    """The teacher's thinking is learned before the answer; a label without any is dropped."""
    include_target: bool = False
    """Labels of target cases are learned too: what is trained so is transductive."""

    def needs(self) -> tuple[Need, ...]:
        """Labels, and the cases that they are about."""
        own = (Need("prompt", paths=(self.prompt,)),) if self.prompt.endswith(".txt") else ()
        target = (Need(TARGET, files=("target.jsonl",), required=False),) if self.include_target else ()
        return (Need("predictions.jsonl", stages=("label",)), Need("train.jsonl"), *target, *own)


class Dropped(Record):
    """A label that is not learned, and why."""

    case_id: str
    sample: int
    reason: str
    detail: str = ""


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes rows.jsonl and dropped.jsonl."""
    paths = (context.input("train.jsonl"), *context.inputs.get(TARGET, ()))
    cases = {case.id: case for path in paths for case in read_records(path, Case)}
    prompt = prompts.load("diagnosis", config.prompt, config.language)
    dropped: list[Dropped] = []
    kept: Counter[str] = Counter()

    def rows() -> Iterator[Row]:
        for label in read_records(context.input("predictions.jsonl"), Prediction, config.limit):
            tick()
            case = cases.get(label.case_id)
            answer = _drop(label, case, config) if case else _dropped(label, "unknown_case")
            if isinstance(answer, Dropped):
                dropped.append(answer)
                continue
            assert case is not None
            kept["abstained" if answer.abstained else "named"] += 1
            yield Row(
                id=f"{case.id}#{label.sample}",
                messages=prompt.render(case.text),
                answer=(_thought(label) if config.think else "") + diagnosis.canonical(answer),
                case_id=case.id,
                sample=label.sample,
            )

    with context.progress(context.section, None) as tick:
        write_records(context.folder / "rows.jsonl", rows())
    write_records(context.folder / "dropped.jsonl", dropped)
    why = Counter(label.reason for label in dropped)
    told = ", ".join(f"{reason} {count}" for reason, count in why.most_common()) or "none"
    context.say(f"{context.section}: {kept.total()} rows kept; dropped: {told}")
    if not kept.total():
        raise WorkError(f"{context.section}: no label is left to learn; see {context.folder / 'dropped.jsonl'}")
    return {"rows": kept.total(), **kept, "dropped": dict(why)}


def _drop(label: Prediction, case: Case, config: Config) -> Diagnosis | Dropped:
    """What of a label can be learned."""
    if label.failure:
        return _dropped(label, label.failure.kind.value, label.failure.detail)
    if not isinstance(label.output, Diagnosis):
        return _dropped(label, "not_a_diagnosis")
    if config.think and not label.thinking:
        return _dropped(label, UNTHOUGHT, "the teacher's thinking is not told; ask with a prompt that wants it")
    answer = label.output
    if answer.abstained:
        return Diagnosis()
    blind = case.model_copy(update={"gold": None})  # the record alone decides what stands in it
    reasons = tuple(reason for reason in answer.reason if _stands(reason, blind))
    if not reasons or len(reasons) < config.grounded * len(answer.reason):
        return _dropped(label, UNGROUNDED, f"{len(reasons)} of {len(answer.reason)} reasons stand in the record")
    return Diagnosis(diseases=answer.diseases, reason=reasons)


def _thought(label: Prediction) -> str:
    return f"<think>\n{label.thinking}\n</think>\n\n"


def _stands(reason: str, case: Case) -> bool:
    return bool(diagnosis.grade(Diagnosis(reason=(reason,)), case).parts["evidence_grounded"])


def _dropped(label: Prediction, reason: str, detail: str = "") -> Dropped:
    return Dropped(case_id=label.case_id, sample=label.sample, reason=reason, detail=detail)


STAGE = Stage("curate", Config, run, leaves=("rows.jsonl", "dropped.jsonl"))
