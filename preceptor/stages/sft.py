"""A student learns the labels: an adapter, or all its weights."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from preceptor.core.records import Row
from preceptor.report.card import card
from preceptor.stages import fences
from preceptor.stages.base import Context, How, Need, Stage, StageConfig, folder, needs_torch, read_records
from preceptor.train.config import SftConfig


class Config(StageConfig, SftConfig):
    """Who learns, and how."""

    student: str
    """A section that leaves a model, `mini`, `smollm2`, a folder, or a name on the hub."""
    include_target: bool = False
    """Rows about target cases may be learned: the student is then transductive, and said to be."""
    gradient_checkpointing: Annotated[bool, How()] = False
    compile: Annotated[bool, How()] = False
    checkpoint_steps: Annotated[int, How()] = Field(default=200, gt=0)

    def needs(self) -> tuple[Need, ...]:
        """The rows, the student where it is a section's or a folder, and what the rows are held against."""
        left = ("model", "adapter")
        made = Need("student", files=left, section=self.student, paths=folder(self.student), required=False)
        return (Need("rows.jsonl"), made, *fences.needs())


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes adapter/ or model/, curve.jsonl, and checkpoints/ on the way."""
    rows = list(read_records(context.input("rows.jsonl"), Row, config.limit))
    transductive = fences.check(context, rows, include_target=config.include_target)
    how = SftConfig.model_validate(config.model_dump(include=set(SftConfig.model_fields)))
    with context.progress(context.section, None) as tick:
        needs_torch(context.section)
        from preceptor.train.sft import train  # torch takes seconds to load

        before = 0

        def log(step: int, total: int, values: Mapping[str, float]) -> None:
            nonlocal before
            note = f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
            context.log.info("step %d of %d: %s", step, total, dict(values))
            tick(step - before, note, total)
            before = step

        def refuse(row: Row, why: str) -> None:
            context.log.warning("row %s is not learned: %s", row.id, why)

        base = context.optional("student") or config.student
        metrics = train(base, rows, context.folder, how, on_log=log, on_refused=refuse)
    adapter = config.method == "lora"
    told_of = card(
        f"{context.recipe}: {context.section}",
        config.student,
        how.model_dump(mode="json"),
        adapter=adapter,
        rows=int(metrics["rows"]),
        transductive=transductive,
    )
    (context.folder / ("adapter" if adapter else "model") / "README.md").write_text(told_of, "utf-8")
    told = f"{metrics['rows']:.0f} rows learned, loss {metrics['loss']:.3f}"
    refused = f", {metrics['refused']:.0f} refused as too long" if metrics["refused"] else ""
    context.say(f"{context.section}: {told}{refused}")
    if transductive:
        context.say(f"{context.section}: transductive: {transductive} rows are about target cases")
    return {**metrics, "transductive_rows": transductive}


STAGE = Stage("sft", Config, run, leaves=("adapter", "model", "curve.jsonl"), grows=False)
