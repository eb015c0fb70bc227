"""What the stages that train share: who learns, from which rows, what a checkpoint is worth, and what is told."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from preceptor.core.records import Case, Reply, Row, Task
from preceptor.report.card import short_card
from preceptor.stages import fences
from preceptor.stages.base import Context, How, Need, StageConfig, folder, needs_torch, read_records
from preceptor.tasks import consult, diagnosis, prompts
from preceptor.train import world
from preceptor.train.config import SETTLED, SftConfig, Tracker

if TYPE_CHECKING:
    from preceptor.train.fit import On

Grade = Callable[[Row, Reply], float]
Validation = tuple[Sequence[Row], Grade]
Train = Callable[[Validation | None, "On"], dict[str, float]]
"""Trains into the section's folder, with rows to validate on and their grade; returns what is told of it."""
VALIDATION = "validation_rows.jsonl"
METRICS = "metrics.jsonl"
LEAVES = ("adapter", "model", METRICS)


class TrainingConfig(StageConfig, SftConfig):
    """Who learns, and how."""

    task: Task = "diagnosis"
    student: str
    """A section that leaves a model or an adapter, which goes on learning; `mini`, `smollm2`, a folder, or a name on
    the hub."""
    include_target: bool = False
    """Rows about target cases may be learned: the student is then transductive, and said to be."""
    devices: Annotated[int | None, How()] = Field(default=None, gt=0)
    gradient_checkpointing: Annotated[bool, How()] = False
    compile: Annotated[bool, How()] = False
    checkpoints: Annotated[int | None, How()] = Field(default=2, ge=2)
    report_to: Annotated[tuple[Tracker, ...], How()] = ()

    def needs(self) -> tuple[Need, ...]:
        """The rows, the student where it is a section's or a folder, and what the rows are held against."""
        made = Need("student", files=LEAVES[:2], section=self.student, paths=folder(self.student), required=False)
        return (Need("rows.jsonl"), Need(VALIDATION, required=False), made, *fences.needs())


def rows_of(config: TrainingConfig, context: Context) -> tuple[list[Row], int]:
    """The rows to learn, proven to be none of those that are tested on, and how many are about target cases."""
    rows = list(read_records(context.input("rows.jsonl"), Row, config.limit))
    return rows, fences.check(context, rows, include_target=config.include_target)


def learn(
    config: TrainingConfig, how: SftConfig, context: Context, transductive: int, train: Train
) -> Mapping[str, Any]:
    """Have the student learn by `train`, write its card, and tell how it went."""
    apart = list(read_records(path, Row)) if (path := context.optional(VALIDATION)) else []
    gold = _gold(context, apart)
    with context.progress(context.section, None) as tick:
        needs_torch(context.section)
        from preceptor.train.fit import On  # torch takes seconds to load

        on = On(
            _watch(context, tick),
            refused=lambda row, why: context.log.warning("row %s is not learned: %s", row.id, why),
            note=lambda line: context.say(f"{context.section}: {line}"),
        )
        metrics = train((apart, _grader(config.task, gold)) if apart else None, on)
    adapter = config.method != "full"
    told_of = short_card(
        f"{context.recipe}: {context.section}",
        config.student,
        how.model_dump(mode="json") | {name: metrics[name] for name in SETTLED if name in metrics},
        adapter=adapter,
        rows=int(metrics["rows"]),
        transductive=transductive,
    )
    if world.rank() == 0:
        (context.folder / ("adapter" if adapter else "model") / "README.md").write_text(told_of, "utf-8")
    told = f"{metrics['rows']:.0f} rows learned, loss {metrics['loss']:.3f}"
    see = f": raise max_length, or see {context.folder / 'log.txt'}"
    refused = f", {metrics['refused']:.0f} refused as too long{see}" if metrics["refused"] else ""
    context.say(f"{context.section}: {told}{refused}")
    if "chosen_grade" in metrics:
        by = (
            "graded" if all(row.case_id in gold for row in apart) else "agreement with the teacher, as gold is lacking:"
        )
        context.say(
            f"{context.section}: step {metrics['chosen_step']:.0f} of {metrics['steps']:.0f} is chosen: {by} "
            f"{metrics['chosen_grade']:.3f} on {len(apart)} validation rows (the last {metrics['last_grade']:.3f})"
        )
        if metrics["steps"] < metrics["planned_steps"]:
            context.say(
                f"{context.section}: stopped early, of {metrics['planned_steps']:.0f} steps: {config.patience} "
                "checkpoints in a row were no better"
            )
    if transductive:
        context.say(f"{context.section}: transductive: {transductive} rows are about target cases")
    return {**metrics, "validation_rows": len(apart), "transductive_rows": transductive}


def _watch(context: Context, tick: Callable[..., None]) -> Callable[[int, int, Mapping[str, float]], None]:
    """Shows how it goes: after each step how many are done, and beside it what was last measured."""
    latest: dict[str, float] = {}
    before = 0

    def watch(step: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal before
        if values:
            context.log.info("step %d of %d: %s", step, total, dict(values))
        latest.update(values)
        notes = [f"{name} {latest[name]:.3f}" for name in ("loss", "grade") if name in latest]
        if "memory" in latest:
            notes += [f"{latest['tokens_per_second']:,.0f} tokens/s", f"{latest['memory']:.1f} GiB"]
        tick(step - before, ", ".join(notes), total)
        before = step

    return watch


def _gold(context: Context, rows: Iterable[Row]) -> dict[str, Case]:
    """The cases of validation rows whose answer is known; where labels are kept apart they are training cases."""
    wanted = {row.case_id for row in rows}
    paths = [path for name in ("validation", "train") if (path := context.optional(name))]
    cases = (case for path in paths for case in read_records(path, Case))
    return {case.id: case for case in cases if case.id in wanted and case.gold}


def _grader(task: Task, gold: Mapping[str, Case]) -> Callable[[Row, Reply], float]:
    """What a reply to a validation row is worth by the grader: against gold, or where there is none the row's label."""
    parse: Callable[[str, str], Any] = diagnosis.parse if task == "diagnosis" else consult.parse
    value: Callable[[Any, Case], Any] = diagnosis.grade if task == "diagnosis" else consult.grade

    def grade(row: Row, reply: Reply) -> float:
        return (
            value(parse(reply.text, reply.finish).output, gold.get(row.case_id) or _labelled(row, parse)).value or 0.0
        )

    return grade


def _labelled(row: Row, parse: Callable[[str, str], Any]) -> Case:
    """The case of a row, as if its label were gold."""
    text = prompts.record_in(row.messages) or row.messages[-1].content
    return Case(
        id=row.case_id, text=text, language="en", source="", group=row.case_id, gold=parse(row.answer, "stop").output
    )
