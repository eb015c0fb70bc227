"""What was trained, as other programs take it: adapter, merged model, card and data sheet, data layouts, submission."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Language, Prediction, Record, Row
from preceptor.data import exporters
from preceptor.report.card import card
from preceptor.report.datasheet import datasheet
from preceptor.report.facts import Facts, Stated
from preceptor.stages.base import (
    TRAINING,
    Context,
    Need,
    Stage,
    StageConfig,
    nearest,
    needs_torch,
    read_records,
    replacing,
    write_records,
)
from preceptor.stages.calibrations import carry
from preceptor.stages.facts import facts_of

SUBMISSION, FAILED = "submission.jsonl", "submission_failed.jsonl"
_WATERMARK = {
    "en": "FOR RESEARCH ALONE, not for use with patients. Not measured before this export: {missing}.",
    "zh": "仅供研究，不得用于患者。导出前未测量：{missing}。",
}
_NOTHING = {"en": "nothing of what is asked for", "zh": "无"}


class Config(StageConfig):
    """What goes out, and in what form."""

    language: Language = "en"
    """Of card and data sheet."""
    stated: Stated = Stated()
    """What only people know, for card and data sheet."""
    submission: exporters.SubmissionStyle = exporters.SubmissionStyle()
    submit: str = ""
    """The model, as `predict` calls it, whose answers are submitted; by default the one that is exported."""
    research: bool = False
    """Export although measurements are missing; card and folders then bear a watermark."""
    push: str | None = Field(default=None, pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$")
    """The hub's repository (owner/name) that the whole model is uploaded to; it is private if it is made now."""

    def needs(self) -> tuple[Need, ...]:
        """The student, what it said of the target cases, and how it was measured."""
        return (
            Need("student", files=("adapter", "model"), stages=TRAINING),
            Need("target", files=("target.jsonl",), stages=("prepare",), required=False),
            Need("predictions", files=("predictions.jsonl",), stages=("predict",), required=False),
            Need("scores", files=("scores.jsonl",), stages=("evaluate",), required=False),
        )


class Doubt(Record):
    """A line of a submission to look at."""

    case_id: str
    kind: str
    """failed: it has the fallback; ambiguous: its strings may be read otherwise than they are meant."""
    why: str


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes adapter/ where one was trained, model/, datasheet.md, llamafactory/, ms_swift/, submission.jsonl.

    What is there already is whole, and is left as it is.
    """
    needs_torch(context.section)
    from preceptor.model import export, hub  # torch takes seconds to load

    source = context.input("student")
    trained = source.parent
    facts = facts_of(
        trained.parent.parent, trained.parent.name, trained.name, language=config.language, stated=config.stated
    )
    lacking = _lacking(facts)
    if lacking and not config.research:
        raise UserError(
            f"{context.section}: not measured: {'; '.join(lacking.values())}. See to it, or set research: true, which "
            "exports with a watermark"
        )
    if config.push:
        hub.check_token()
    if config.research:
        missing = ", ".join(lacking) or _NOTHING[config.language]
        facts = replace(facts, watermark=_WATERMARK[config.language].format(missing=missing))
    with context.progress(context.section, None):
        _weights(source, context.folder / "model", facts, export.whole, adapter=False)
        carry(source, context.folder / "model")
        if source.name == "adapter":
            _weights(source, context.folder / "adapter", facts, export.adapter, adapter=True)
            carry(source, context.folder / "adapter")
        with replacing(context.folder / "datasheet.md") as beside:
            beside.write_text(datasheet(facts), "utf-8")
        _layouts(context, trained)
    figures = export.figures(context.folder / "model")
    context.say(f"{context.section}: {context.folder / 'model'}: {_merged(figures, source)}")
    metrics = {**figures, "not_measured": sorted(lacking), **_submission(config, context, facts)}
    if config.push:
        with context.progress(f"{context.section}: pushing", None):
            metrics["pushed"] = hub.push(context.folder / "model", config.push)
        context.say(f"{context.section}: pushed to {metrics['pushed']}")
    return metrics


def _lacking(facts: Facts) -> dict[str, str]:
    """What must be measured before a model leaves and wasn't, each with the way to it."""
    found = {}
    if not facts.learned.held_out:
        found["leak test"] = "a leak test (have `prepare` hold cases out, which training then keeps apart)"
    if facts.learned.about_held_out:
        leaks = facts.learned.about_held_out
        found["leak test"] = f"a leak test that it passes ({leaks} training rows are about held-out cases: train anew)"
    if facts.task == "diagnosis" and "ece" not in facts.figures:  # advice is told without probabilities
        found["calibration"] = (
            "calibration and on how many cases (`evaluate` tells `ece` once `predict` asked this model about the test "
            "cases, with confidences)"
        )
    if facts.task == "consult" and "severe_miss" not in facts.figures:
        found["severe misses"] = (
            "how many urgent cases it misses (`evaluate` its advice on test cases, of which some must be urgent)"
        )
    return found


def _weights(
    source: Path, out: Path, facts: Facts, write: Callable[[Path, Path, Mapping[str, str]], None], *, adapter: bool
) -> None:
    """A folder of weights with its card, and its watermark where it has one."""
    if not out.is_dir():
        mark = {"RESEARCH_ONLY.txt": f"{facts.watermark}\n"} if facts.watermark else {}
        write(source, out, {"README.md": card(replace(facts, adapter=adapter)), **mark})


def _merged(figures: Mapping[str, Any], source: Path) -> str:
    if source.name != "adapter":
        return str(figures["dtype"])
    apart, moved = figures["divergence"], figures["moved"]
    lost = "; rounding takes part of so small a change: adapter/ is nearer" if apart > moved / 10 else ""
    told = f"{apart:.2g} nats a token from its adapter, which is {moved:.2g} from its base"
    return f"{figures['dtype']}, merged: {told}{lost}"


def _layouts(context: Context, trained: Path) -> None:
    """The rows that a section learned, and those apart, as other tools read them."""
    given = json.loads((trained / "config.json").read_text("utf-8"))["inputs"]
    rows, apart = (
        [Path(one["path"]) for one in given.get(need, ())] for need in ("rows.jsonl", "validation_rows.jsonl")
    )
    if gone := [path for path in (*rows, *apart) if not path.exists()]:
        context.say(f"{context.section}: no data for other tools: {gone[0]}, which {trained.name} read, is gone")
        return
    for name, write in (("llamafactory", exporters.llamafactory), ("ms_swift", exporters.ms_swift)):
        write(_rows(rows), _rows(apart), context.folder / name)


def _rows(paths: Iterable[Path]) -> Iterator[Row]:
    return chain.from_iterable(read_records(path, Row) for path in paths)


def _submission(config: Config, context: Context, facts: Facts) -> dict[str, int]:
    """The competition's file, where the student was asked about target cases; how many of its lines are in doubt."""
    target = context.optional("target")
    if not target or facts.task != "diagnosis":
        return {}
    cases = list(read_records(target, Case, config.limit))
    wanted, name = {case.id for case in cases}, config.submit or facts.name
    said: dict[str, Prediction] = {}
    models = set()
    for path in context.inputs.get("predictions", ()):
        for prediction in read_records(path, Prediction):
            models.add(prediction.model)
            if prediction.model == name and prediction.case_id in wanted:
                said.setdefault(prediction.case_id, prediction)
    if config.submit and config.submit not in models:
        raise UserError(f"{context.section}.submit: predictions have no model {name!r}{nearest(name, models)}")
    if not said:
        context.say(f"{context.section}: no submission: {name or 'this model'} was asked about no target case")
        return {}
    report = exporters.submission(cases, said, config.submission, context.folder / SUBMISSION)
    doubts = {"failed": report.failed, "ambiguous": report.ambiguous}
    listed = [Doubt(case_id=case, kind=kind, why=why) for kind, found in doubts.items() for case, why in found]
    write_records(context.folder / FAILED, listed)
    counts = {kind: len(found) for kind, found in doubts.items()}
    see = f" (see {context.folder / FAILED})" if listed else ""
    told = f"{report.cases} cases, {counts['failed']} without an answer, {counts['ambiguous']} ambiguous{see}"
    context.say(f"{context.section}: {context.folder / SUBMISSION}: {told}")
    return {"cases": report.cases, **counts}


STAGE = Stage("export", Config, run, leaves=("model", SUBMISSION))
