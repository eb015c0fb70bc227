"""A teacher says of what kind the cases are; where it gives no answer, what rules said stands."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from preceptor.core.errors import WorkError
from preceptor.core.records import Case, Failure, Language, Sampling
from preceptor.data.metadata import specialties
from preceptor.data.splits import SPLITS
from preceptor.stages.base import (
    Context,
    How,
    Need,
    Stage,
    StageConfig,
    read_records,
    write_records,
)
from preceptor.stages.teacher import TeacherConfig, converse, teacher
from preceptor.tasks import prompts
from preceptor.tasks.refinement import refine

FILES = tuple(f"{split}.jsonl" for split in (*SPLITS, "benchmark", "target"))


class Config(StageConfig):
    """Who is asked, and how. The splits stay as they are: they were dealt by what rules said."""

    teacher: TeacherConfig
    language: Language = "en"
    prompt: str = "refine"
    """One of the package's, or the path of a text file."""
    max_tokens: int = Field(default=128, gt=0)
    concurrency: Annotated[int, How()] = Field(default=16, gt=0)
    """Requests to the endpoint at once."""

    def needs(self) -> tuple[Need, ...]:
        """The cases of all splits."""
        own = (Need("prompt", paths=(self.prompt,)),) if self.prompt.endswith(".txt") else ()
        return (*(Need(name, required=name == FILES[0]) for name in FILES), *own)


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes the files of the splits anew, with the teacher's word in `meta` and `teacher` in its `sources`."""
    splits = {
        name: list(read_records(path, Case, config.limit))
        for name in FILES
        if (path := context.optional(name)) is not None
    }
    cases = {case.id: case for cases in splits.values() for case in cases}
    prompt = prompts.load("metadata", config.prompt, config.language)
    sampling = Sampling(max_tokens=config.max_tokens)
    said: dict[str, dict[str, Any]] = {}
    failures: dict[str, Failure] = {}
    with (
        teacher(config.teacher, context) as completer,
        context.progress(context.section, len(cases)) as tick,
    ):

        def keep(identity: str, result: dict[str, Any] | Failure) -> None:
            if isinstance(result, Failure):
                failures[identity] = result
            else:
                said[identity] = result
            tick(1, f"{len(failures)} failed" if failures else "")

        conversations = ((name, refine(case, prompt, sampling, specialties())) for name, case in cases.items())
        converse(conversations, completer, context, config.concurrency, keep)
    if cases and not said:
        last = list(failures.values())[-1]
        raise WorkError(f"{context.section}: {completer.name} answered none of {len(cases)} cases: {last.detail}")
    for name, those in splits.items():
        write_records(context.folder / name, [_refined(case, said.get(case.id, {})) for case in those])
    changed = Counter(
        field
        for name, fields in said.items()
        for field, value in fields.items()
        if cases[name].meta.get(field) != value
    )
    context.say(f"{context.section}: {len(said)} of {len(cases)} cases refined, {len(failures)} failed")
    return {
        "cases": len(cases),
        "refined": len(said),
        "changed": dict(changed),
        "failed": len(failures),
        "failures": dict(Counter(failure.kind.value for failure in failures.values())),
    }


def _refined(case: Case, fields: Mapping[str, Any]) -> Case:
    known = case.meta.get("sources")
    sources = {**(known if isinstance(known, dict) else {}), **dict.fromkeys(fields, "teacher")}
    return case.model_copy(update={"meta": {**case.meta, **fields, "sources": sources}}) if fields else case


STAGE = Stage("refine", Config, run, leaves=FILES)
