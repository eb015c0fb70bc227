"""Labels become training rows: each is graded, the best of a case is learned, and what is in doubt goes to a person."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Diagnosis, Language, Pair, Prediction, Record, Row
from preceptor.data.splits import family_key
from preceptor.stages.base import Context, Need, Stage, StageConfig, read_records, replacing, write_records
from preceptor.stages.fences import HELD_OUT, TARGET
from preceptor.stages.portions import APART, VALIDATION, Labels, check_parts, golden, kept_apart
from preceptor.stages.review_file import REVIEWER, Verdicts, Writer
from preceptor.tasks import diagnosis, prompts
from preceptor.tasks.curation import (
    FLAGS,
    KEYS,
    OUTDONE,
    REPEATED,
    Choice,
    Dropped,
    Graded,
    Rules,
    asked,
    choose,
    graded,
    paired,
    row,
)

FILES: dict[type[Record], str] = {Row: "rows.jsonl", Pair: "pairs.jsonl", Dropped: "dropped.jsonl"}
SHEET, ISSUES, REVIEW, MIX = "review.csv", "issues.jsonl", "review", "mix"


class Config(StageConfig, Rules):
    """What a label must be to be learned, and what else is learned with it."""

    language: Language = "en"
    prompt: str = "zero_shot"
    """What the student will be asked with."""
    review: tuple[str, ...] = ()
    """Files of review.csv with a person's verdicts (keep, drop, edit; 保留, 删除, 修改), as CSV or XLSX. Of two
    verdicts on one label the later file's counts."""
    mix: tuple[str, ...] = ()
    """Row files of earlier rounds. A case that this round decides takes none of theirs, else the last file's."""
    gold: bool = False
    """The answers that came with the cases are learned, and nobody's labels."""
    include_target: bool = False
    """Labels of target cases are learned too: what is trained so is transductive."""
    validation: int = Field(default=100, ge=0)
    """Most cases to validate the training on: validation cases with gold or, where there are none, labelled cases
    that are then not learned, at most a tenth of them."""

    @field_validator("review", "mix", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    def needs(self) -> tuple[Need, ...]:
        """Labels, the cases that they are about, those that may not be learned, and the user's own files."""
        return (
            *([] if self.gold else [Need("predictions.jsonl", stages=("label",))]),
            Need("train.jsonl"),
            Need(TARGET, files=("target.jsonl",), required=False),
            *(Need(name, files=(f"{name}.jsonl",), stages=("prepare",), required=False) for name in HELD_OUT),
            *([Need("prompt", paths=(self.prompt,))] if self.prompt.endswith(".txt") else []),
            *([Need(REVIEW, paths=self.review)] if self.review else []),
            *([Need(MIX, paths=self.mix)] if self.mix else []),
        )


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes rows.jsonl, pairs.jsonl, dropped.jsonl, review.csv, and issues.jsonl of what a reviewed file has wrong.

    Each label is counted once: as a row, as kept apart (in validation_rows.jsonl, where no gold is), as dropped for a
    reason, or as sent to review. Of a case's labels in several files the better by the grader wins, ties the later
    file's, whose samples are counted on.
    """
    prompt = prompts.load(config.task, config.prompt, config.language)
    config = _settled(config, prompt)
    if config.part != "whole":
        check_parts(prompt, f"{context.section}.part: {config.part}")
    verdicts = Verdicts(config)
    _check_files(context)
    for reviewed in context.inputs.get(REVIEW, ()):
        verdicts.read(reviewed)
    held = _held_out(config, context)
    labels = Labels(context.inputs["train.jsonl"], Case) if config.gold else Labels(context.inputs["predictions.jsonl"])
    if config.agreement and labels.answered and not labels.voted:
        files = ", ".join(map(str, context.inputs["train.jsonl" if config.gold else "predictions.jsonl"]))
        raise UserError(
            f"{context.section}.agreement: {config.agreement:g} can be held against no label, as none in {files} says"
            " how far samples agree: leave it out, or label with a strategy that draws several samples,"
            " strategy: self_consistency"
        )
    tally, most = _Tally(), min(config.validation, config.limit or config.validation)
    known = (case for path in context.inputs.get(VALIDATION, ()) for case in read_records(path, Case))
    validation = list(golden(known, held, most, prompt, config))
    tally.golden = len(validation)
    apart = {} if validation else kept_apart(_answered(config, context, labels, held), most)
    held |= dict.fromkeys((*apart, *apart.values()), APART)
    with ExitStack() as stack:
        sinks = {
            kind: stack.enter_context(stack.enter_context(replacing(context.folder / name)).open("wb"))
            for kind, name in FILES.items()
        }

        def put(records: Iterable[Record]) -> None:
            for record in records:
                sinks[type(record)].write(record.model_dump_json().encode() + b"\n")

        sheet = stack.enter_context(Writer(stack.enter_context(replacing(context.folder / SHEET)), config))
        tick = stack.enter_context(context.progress(context.section, labels.count))
        for case, choice, pairs in _curated(config, context, prompt, labels, held, verdicts, tally):
            tick(sum(map(len, (choice.learned, choice.apart, choice.review, choice.dropped))))
            put(row(one.label, one.answer, case.text, prompt, config) for one in choice.learned)
            validation += [row(one.label, one.answer, case.text, prompt, config) for one in choice.apart]
            put(pairs)
            put(choice.dropped)
            for one in choice.review:
                sheet.write(case, one, verdicts.written(one))
        put(_strangers(labels, held, tally))
        put(_mixed(context.inputs.get(MIX, ()), config, prompt, held, tally))
    write_records(context.folder / f"{APART}.jsonl", validation)
    verdicts.tell_unmet()
    write_records(context.folder / ISSUES, verdicts.issues)
    for line in tally.told(config, context, verdicts):
        context.say(line)
    if not tally.of["rows"]:
        raise WorkError(tally.nothing(config, context))
    return {
        **tally.of,
        "validation": {"gold": tally.golden, "labels": tally.apart},
        "pairs": {"n": tally.pairs.total(), **tally.pairs},
        "dropped": dict(tally.dropped),
        "reviewed": {**verdicts.counts, "issues": len(verdicts.issues)},
        "mixed": dict(tally.mixed),
    }


@dataclass
class _Tally:
    """What became of the labels."""

    of: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    golden: int = 0
    """Validation cases with gold."""
    apart: int = 0
    """Labels that are kept to validate on."""
    decided: set[str] = field(default_factory=set)
    """Cases of this round: they have a row, or a person would not have their label."""

    def add(self, case: Case, own: Sequence[tuple[int, Prediction]], choice: Choice, pairs: Sequence[Pair]) -> None:
        """Count the labels of a case."""
        self.of.update(cases=1, labels=len(own), rows=len(choice.learned), review=len(choice.review))
        self.apart += len(choice.apart)
        self.pairs["by_gold" if case.gold else "by_record"] += len(pairs)
        self.of["labelled_again"] += len({source for source, _ in own}) > 1
        self.dropped.update(one.reason for one in choice.dropped)
        self.doubts.update(doubt.split()[0] for one in choice.review for doubt in one.doubts)
        if choice.learned or any(one.reason == REVIEWER for one in choice.dropped):
            self.decided.add(case.id)
        for one in choice.learned:
            if isinstance(one.answer, Diagnosis):
                self.of["abstained" if one.answer.abstained else "named"] += 1
            self.of["trimmed"] += one.trimmed
            for flag in FLAGS:
                self.of[flag] += getattr(one.label, flag)

    def told(self, config: Config, context: Context, verdicts: Verdicts) -> Iterator[str]:
        """The lines for the terminal."""
        kept = ", ".join(f"{self.of[name]} {name}" for name in ("trimmed", *FLAGS) if self.of[name])
        lost = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common()) or "none"
        line = f"{context.section}: {self.of['rows']} rows kept{f' ({kept})' if kept else ''}; dropped: {lost}"
        line += f"; to review: {self.of['review']} ({context.folder / SHEET})" if self.of["review"] else ""
        if count := self.pairs.total():
            line += f"; {count} pairs, {self.pairs['by_gold']} of them ordered by gold, the others by the record alone"
        yield line
        if self.golden:
            yield f"{context.section}: to validate on: {self.golden} cases with gold"
        elif self.apart:
            why = "no validation case has gold that is not tested on too: their labels are kept apart, and not learned"
            yield f"{context.section}: to validate on: {self.apart} training cases ({why})"
        if again := self.of["labelled_again"]:
            yield f"{context.section}: {again} cases are labelled in several files; the better label by the grader wins"
        if verdicts.files:
            came = ", ".join(f"{count} {what}" for what, count in verdicts.counts.items()) or "no verdict"
            yield f"{context.section}: {', '.join(verdicts.files)}: {came}"
        if issues := verdicts.issues:
            first = f"{issues[0].file}:{issues[0].line}: {issues[0].problem}"
            wrong = len({(issue.file, issue.line) for issue in issues})
            yield f"{context.section}: {wrong} reviewed rows need mending ({context.folder / ISSUES}): {first}"
        if config.mix:
            told = ", ".join(f"{count} {what}" for what, count in self.mixed.items()) or "no rows"
            yield f"{context.section}: of earlier rounds: {told}"

    def nothing(self, config: Config, context: Context) -> str:
        """Why there is no row, and the way on."""
        line = f"{context.section}: no label is left to learn"
        if config.gold and not self.of["labels"]:
            line += "; no training case came with an answer: leave gold out, and label them"
        causes = self.dropped + self.doubts
        for follows in (OUTDONE, REPEATED):  # from what became of the case's other labels
            del causes[follows]
        for word, count in causes.most_common(1):
            key = f", by {context.section}.{KEYS[word]}" if word in KEYS else ""
            line += f"; the commonest reason is {word} ({count} of {self.of['labels']} labels{key})"
        if self.dropped:
            line += f"; see {context.folder / FILES[Dropped]}"
        if waiting := self.of["review"]:
            key, copy = f"{context.section}.review=", "COPY.csv"
            named = f"'{key}[{','.join((*config.review, copy))}]'" if config.review else f"{key}{copy}"
            line += f"; {waiting} wait for a person: write the verdicts into a copy of {context.folder / SHEET}"
            line += f" and name it: {named}"
        return line


def _settled(config: Config, prompt: prompts.Prompt) -> Config:
    """What the prompt decides where the recipe doesn't: whether the confidence is stated."""
    if config.states is not None:
        return config
    return config.model_copy(update={"states": "stated" in map(prompts.act_in, prompt.stages)})


def _cases(config: Config, context: Context) -> Iterator[Case]:
    target = context.inputs.get(TARGET, ()) if config.include_target else ()
    for path in (*context.inputs["train.jsonl"], *target):
        yield from read_records(path, Case)


def _held_out(config: Config, context: Context) -> dict[str, str]:
    """Where every case stands that may not be learned, by its id and by its text's family."""
    names = HELD_OUT if config.include_target else (*HELD_OUT, TARGET)
    held = {}
    for name in names:
        for path in context.inputs.get(name, ()):
            for case in read_records(path, Case):
                held[case.id] = held[family_key(case.text)] = name
    return held


def _curated(
    config: Config,
    context: Context,
    prompt: prompts.Prompt,
    labels: Labels,
    held: Mapping[str, str],
    verdicts: Verdicts,
    tally: _Tally,
) -> Iterator[tuple[Case, Choice, list[Pair]]]:
    """The cases that have labels, with what becomes of them."""
    for case in _cases(config, context):
        own, pairs = labels.take(case.id), list[Pair]()
        if not own or (config.limit is not None and tally.of["cases"] >= config.limit):
            continue
        if (split := _split(case, held)) and split != APART:
            choice = Choice(dropped=tuple(_held(label, split) for _, label in own))
        else:
            answers = [_answer(label, source, case, config, verdicts) for source, label in own]
            choice = choose(answers, config)
            pairs = paired(answers, case, prompt.render(case.text), config)
            if split:
                choice, pairs = choice.held_back(), []
        tally.add(case, own, choice, pairs)
        yield case, choice, pairs


def _answered(config: Config, context: Context, labels: Labels, held: Mapping[str, str]) -> Iterator[Case]:
    """The cases that may be learned and have an answer, of those within the limit."""
    labelled = islice((case for case in _cases(config, context) if case.id in labels), config.limit)
    return (case for case in labelled if case.id in labels.answered and not _split(case, held))


def _split(case: Case, held: Mapping[str, str]) -> str | None:
    """Where a case stands that may not be learned; None for all others."""
    return held.get(case.id) or held.get(family_key(case.text))


def _answer(label: Prediction, source: int, case: Case, config: Config, verdicts: Verdicts) -> Graded | Dropped:
    """A label by the rules, or by a person's word."""
    one = graded(label, case, config)
    return verdicts.follow(replace(one, source=source), case) if isinstance(one, Graded) else one


def _strangers(labels: Labels, held: Mapping[str, str], tally: _Tally) -> Iterator[Dropped]:
    """The labels of no case that may be learned."""
    for label in labels.rest():
        split = held.get(label.case_id)
        lost = _held(label, split) if split else _dropped(label, "unknown_case", "no training case has this id")
        tally.of["labels"] += 1
        tally.dropped[lost.reason] += 1
        yield lost


def _mixed(
    paths: Sequence[Path], config: Config, prompt: prompts.Prompt, held: Mapping[str, str], tally: _Tally
) -> Iterator[Row | Dropped]:
    """The rows of earlier rounds, the last file's first, but for those of held-out cases and of cases decided since."""
    decided = set(tally.decided)
    for path in reversed(paths):
        own = set()
        for old in read_records(path, Row):
            record = prompts.record_in(old.messages)
            split = held.get(old.case_id) or (held.get(family_key(record)) if record else None)
            lost = f"it stands in {split}.jsonl" if split else "a later round decides" if old.case_id in decided else ""
            if lost:
                reason = "held_out" if split else "superseded"
                tally.mixed[reason] += 1
                yield Dropped(case_id=old.case_id, sample=old.sample, reason=reason, detail=f"{path}: {lost}")
                continue
            own.add(old.case_id)
            tally.of["rows"] += 1
            tally.mixed["rows"] += 1
            answer = diagnosis.parse(old.answer).output or Diagnosis()
            if record is None or asked(prompt, record, answer, config) != old.messages:
                tally.mixed["with another prompt"] += 1
            yield old
        decided |= own


def _check_files(context: Context) -> None:
    """Refuse what is not there, and what this very section writes anew."""
    for name in (REVIEW, MIX):
        for path in context.inputs.get(name, ()):
            if context.folder.resolve() in path.resolve().parents:
                raise UserError(
                    f"{context.section}.{name}: this section writes {path} anew: copy it elsewhere and name that, or "
                    f"name it in a section of its own, such as {context.section}_reviewed (what --fresh puts aside "
                    f"lies in {context.section}.1 and so on)"
                )
            if not path.is_file():
                raise UserError(f"{context.section}.{name}: no file {path}")


def _held(label: Prediction, split: str) -> Dropped:
    return _dropped(label, "held_out", f"it stands in {split}.jsonl")


def _dropped(label: Prediction, reason: str, detail: str) -> Dropped:
    return Dropped(case_id=label.case_id, sample=label.sample, reason=reason, detail=detail)


STAGE = Stage("curate", Config, run, leaves=(*FILES.values(), f"{APART}.jsonl", SHEET), anew=True)
