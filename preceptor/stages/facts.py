"""Gathers from the folders of a run what the card and the data sheet tell of the model that a section trained."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from preceptor.clinical.textbook import reader
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Language, Row
from preceptor.core.statistics import Estimate
from preceptor.data.splits import family_key
from preceptor.model.resolve import resolve
from preceptor.report.facts import NOTHING_STATED, Asked, Facts, Judgement, Labelled, Learned, Stated
from preceptor.report.groups import BANDS
from preceptor.report.metrics import ModelScore
from preceptor.report.prepared import Summary
from preceptor.stages.base import digests, read_records, sha256, total
from preceptor.stages.fences import HELD_OUT
from preceptor.tasks.diagnosis import parse
from preceptor.tasks.prompts import record_in
from preceptor.train.config import SETTLED

TEXTBOOK = "textbook"
_WEIGHTS = ("adapter", "model")
_ROWS = ("rows.jsonl", "validation_rows.jsonl")
_KINDS = ("specialty", "risk_level")
"""Of a case, in `meta`."""
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_WORDS = 6
"""Of a licence's text that name it."""
_Digests = Mapping[str, str]


def facts_of(
    runs: Path, recipe: str, section: str, *, language: Language, stated: Stated = NOTHING_STATED, watermark: str = ""
) -> Facts:
    """The facts of the model that a section trained.

    What it learned from is found by what each section says that it read; figures are those of sections that asked
    these very weights.

    Raises:
        UserError: the section is not done or trained nothing, or what it learned from was made anew since.
    """
    run = _Run(runs / recipe)
    made = run.parts.get(section)
    where = next((made.folder / name for name in _WEIGHTS if (made.folder / name).is_dir()), None) if made else None
    if made is None or where is None:
        raise UserError(f"{runs / recipe / section}: no trained model here; run the section first, or name another")
    line = run.lineage(made)
    weights = digests(where)
    run.known[where] = total(weights)  # large weights are read once
    before = [part for part in line if part is not made and any((part.folder / name).is_dir() for name in _WEIGHTS)]
    base = str((before[-1] if before else made).settings.get("student", (before or [made])[-1].name))
    prepares, curates = ([part for part in line if part.stage == stage] for stage in ("prepare", "curate"))
    predicts = dict(_predicts(run, where))
    evaluated = next((part for part in run.newest("evaluate") if run.reads(part, "predictions", predicts)), None)
    asks = next((part for part in predicts if evaluated and run.reads(evaluated, "predictions", [part])), None)
    asks = asks or next(iter(predicts), None)
    name, model = predicts[asks] if asks else ("", "")
    learned = _learned(run, made, curates, evaluated)
    return Facts(
        recipe=recipe,
        section=section,
        language=language,
        task=next((part.settings["task"] for part in (*curates, *predicts) if "task" in part.settings), "diagnosis"),
        adapter=where.name == "adapter",
        base=base,
        earlier=tuple(part.name for part in before),
        license=_license(made if not before else before[-1], base),
        base_digest=_json(where / "base.json")["digest"] if (where / "base.json").exists() else "",
        weights={f"{where.name}/{file}": sha for file, sha in weights.items() if file.endswith(".safetensors")},
        data=tuple(dict.fromkeys(_data(run, line, evaluated))),
        raw=dict(chain.from_iterable(part.given(need) for part in prepares for need in ("source", "target"))),
        seed=made.config["seed"],
        code=made.config["code"],
        settings={name: value for name, value in made.settings.items() if name not in ("from", "limit")}
        | {name: made.metrics[name] for name in SETTLED if name in made.metrics},
        trained=made.metrics,
        validation=_validation(run, made, curates),
        asked=tuple(_asked(line)),
        prepared=_summary(prepares[0]) if prepares else None,
        textbook=any(TEXTBOOK in part.settings["source"] for part in prepares) or TEXTBOOK in learned.sources,
        labelled=tuple(
            Labelled(part.name, how["teacher"]["model"], how["strategy"], how["samples"], part.metrics)
            for part in line
            if part.stage == "label" and (how := part.settings)
        ),
        curated=curates[0].metrics if curates else {},
        learned=learned,
        name=name,
        together=model if "+" in model else "",
        metrics=_figures(evaluated) if evaluated else {},
        answers=asks.metrics.get(name, {}) if asks else {},
        severe=_severe(run, evaluated, name) if evaluated else {},
        judged=tuple(
            Judgement(part.metrics["judge"], part.metrics["models"][name])
            for part in run.newest("judge")
            if run.reads(part, "predictions", predicts) and name in part.metrics["models"]
        ),
        stated=stated,
        watermark=watermark,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A section that is done, or at least begun."""

    folder: Path
    config: Mapping[str, Any]
    """config.json."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def stage(self) -> str:
        return str(self.config["stage"])

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.config["config"]
        return settings

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        return _json(self.folder / "metrics.json")

    def given(self, need: str) -> list[tuple[str, str]]:
        """Paths and digests of what it read for a need."""
        return [(one["path"], one["sha256"]) for one in self.config["inputs"].get(need, ())]


class _Run:
    """The sections of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, _Part] = {}
        self.known: dict[Path, str] = {}
        for file in sorted(folder.glob("*/config.json")):
            part = _Part(file.parent, _json(file))
            if part.config["section"] == part.name and (part.folder / "done.json").exists():  # not one put aside
                self.parts[part.name] = part

    def newest(self, stage: str) -> list[_Part]:
        """The sections of a stage, the latest first."""
        found = [part for part in self.parts.values() if part.stage == stage]
        return sorted(found, key=lambda part: str(part.config["started"]), reverse=True)

    def place(self, path: str) -> tuple[Path, _Part | None]:
        """Where a file that a section read lies now, and the section that left it: a run may have been moved."""
        parts = Path(path).parts
        for at in range(len(parts) - 2, 0, -1):
            if parts[at - 1] == self.folder.name and parts[at] in self.parts:
                return self.folder.joinpath(*parts[at:]), self.parts[parts[at]]
        return Path(path), None

    def holds(self, file: Path, sha: str) -> bool:
        """Whether a file or folder is the one of that digest."""
        if file not in self.known and file.exists():
            self.known[file] = sha256(file)
        return self.known.get(file) == sha

    def lineage(self, made: _Part) -> list[_Part]:
        """The section, and all that it came from, the nearest first.

        Raises:
            UserError: one of them left something else since.
        """
        found = [made]
        for part in found:
            for path, sha in chain.from_iterable(map(part.given, part.config["inputs"])):
                file, source = self.place(path)
                if source is None:
                    continue
                if not self.holds(file, sha):
                    raise UserError(
                        f"{part.folder} was made from another {source.name}/{file.relative_to(source.folder)} than "
                        f"lies there now; run {part.name}, and what follows it, again with --fresh"
                    )
                if source not in found:
                    found.append(source)
        return found

    def reads(self, part: _Part, need: str, sources: Iterable[_Part]) -> bool:
        """Whether a section read what one of the others left, as it lies there now."""
        wanted = set(sources)
        files = ((*self.place(path), sha) for path, sha in part.given(need))
        return any(source in wanted and self.holds(file, sha) for file, source, sha in files)

    def files(self, part: _Part, *needs: str) -> Iterator[Path]:
        """What a section read for some needs, where it still lies there."""
        for path, _ in chain.from_iterable(map(part.given, needs)):
            file, _ = self.place(path)
            if file.exists():
                yield file


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it can't be read ({error}); run its section again with --fresh") from error
    return loaded


def _predicts(run: _Run, weights: Path) -> Iterator[tuple[_Part, tuple[str, str]]]:
    """The sections that asked these very weights, the latest first, what they call the model, and what was asked.

    `A+B` are two that answer in turn; a model that was asked alone comes before.
    """
    for part in run.newest("predict"):
        for model in sorted(part.settings["models"], key=lambda model: model.count("+")):
            given = chain.from_iterable(map(part.given, (model, *model.split("+"))))
            if any(run.place(path)[0] == weights and run.holds(weights, sha) for path, sha in given):
                yield part, (part.settings["called"] or model, model)
                break


def _license(first: _Part, base: str) -> str:
    """What the base's own card says, or the first words of its licence; empty where neither is at hand."""
    folder = Path(str(next(iter(first.given("student")), (base, ""))[0])).expanduser()
    if base == "mini":
        folder = resolve(base)
    for file in (folder / "README.md", _cached(base)):
        front = _FRONT.match(file.read_text("utf-8", "replace")) if file and file.is_file() else None
        with suppress(yaml.YAMLError):
            head = yaml.safe_load(front[1]) if front else None
            if isinstance(head, dict) and isinstance(said := head.get("license"), str) and said:
                return str(head.get("license_name") or said) if said == "other" else said
    for file in sorted(folder.glob("LICEN[CS]E*")) if folder.is_dir() else ():
        if words := file.read_text("utf-8", "replace").split():
            return " ".join(words[:_WORDS])
    return ""


def _cached(name: str) -> Path | None:
    """A model's card in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        found = try_to_load_from_cache(name, "README.md")
        return Path(found) if isinstance(found, str) else None
    return None


def _data(run: _Run, line: Iterable[_Part], evaluated: _Part | None) -> Iterator[tuple[str, str]]:
    """The files from outside, the rows, and the cases that the figures are about; of folders the names are left out."""
    for part in (*line, *([evaluated] if evaluated else [])):
        for need in part.config["inputs"]:
            for path, sha in part.given(need):
                _, source = run.place(path)
                if source is None:
                    yield f"{part.name}: {Path(path).name}", sha
                elif need in _ROWS or (part is evaluated and need == "cases"):
                    yield f"{source.name}/{Path(path).name}", sha


def _asked(line: Iterable[_Part]) -> Iterator[Asked]:
    for part in line:
        if teacher := part.settings.get("teacher"):
            endpoints = teacher["endpoint"]
            allowed = {one["distillation"] for one in endpoints}
            yield Asked(
                section=part.name,
                stage=part.stage,
                model=teacher["model"],
                services=tuple(dict.fromkeys(one["preset"] for one in endpoints if one["preset"])),
                distillation=False if False in allowed else None if None in allowed else True,
                served=tuple(part.metrics.get("models", ())),
            )


def _summary(prepare: _Part) -> Summary:
    try:
        return Summary.model_validate(prepare.metrics)
    except ValidationError as error:
        raise UserError(f"{prepare.folder / 'metrics.json'}: not what prepare writes; run it with --fresh") from error


def _figures(evaluated: _Part) -> dict[str, dict[str, Estimate]]:
    try:
        return {
            model: {name: Estimate.model_validate(figure) for name, figure in row.items()}
            for model, row in evaluated.metrics.items()
        }
    except ValidationError as error:
        raise UserError(
            f"{evaluated.folder / 'metrics.json'}: not what evaluate writes; run it with --fresh"
        ) from error


def _validation(run: _Run, made: _Part, curates: Iterable[_Part]) -> tuple[int, Literal["gold", "labels"]] | None:
    """How many rows the checkpoints answered, and whether all of their answers are gold."""
    asked = [row.case_id for path in run.files(made, "validation_rows.jsonl") for row in read_records(path, Row)]
    known = chain.from_iterable(run.files(part, "validation") for part in curates)
    gold = {case.id for path in known for case in read_records(path, Case) if case.gold is not None}
    return (len(asked), "gold" if gold.issuperset(asked) else "labels") if asked else None


def _learned(run: _Run, made: _Part, curates: Iterable[_Part], evaluated: _Part | None) -> Learned:
    cases = {
        case.id: case
        for part in curates
        for path in run.files(part, "train.jsonl", "target")
        for case in read_records(path, Case)
    }
    held = [path for part in curates for path in run.files(part, *HELD_OUT)]
    held += [path for path in run.files(evaluated, "cases") if path.stem in HELD_OUT] if evaluated else []
    out = {case.id: family_key(case.text) for path in dict.fromkeys(held) for case in read_records(path, Case)}
    families = set(out.values())
    diseases, sources, sexes, ages = (Counter[str]() for _ in range(4))
    counts = Counter[str]()
    limit = made.settings["limit"]
    for row in chain.from_iterable(read_records(path, Row, limit) for path in run.files(made, "rows.jsonl")):
        output, record, case = parse(row.answer).output, record_in(row.messages), cases.get(row.case_id)
        diseases.update(set(output.diseases) if output else ())
        text = record if record is not None else case.text if case else ""
        sources[case.source if case else ""] += 1
        sexes[reader.sex(str(case.meta.get("sex", "")) if case else "") or reader.sex(text) or ""] += 1
        ages[_band(case, text)] += 1
        counts.update(
            rows=1,
            abstained=output is not None and output.abstained,
            unread=output is None,
            about_held_out=row.case_id in out or family_key(text) in families,
        )
    return Learned(
        rows=counts["rows"],
        diseases=dict(sorted(diseases.items(), key=lambda item: (-item[1], item[0]))),
        abstained=counts["abstained"],
        unread=counts["unread"],
        sources=dict(sources.most_common()),
        sexes=dict(sorted(sexes.items(), reverse=True)),
        ages=dict(sorted(ages.items(), key=lambda item: (not item[0], item[0]))),
        held_out=len(out),
        about_held_out=counts["about_held_out"],
    )


def _band(case: Case | None, text: str) -> str:
    """The patient's age in bands of years; empty where it is not told."""
    stated = case.meta.get("age") if case else None
    age = stated if isinstance(stated, int) else reader.age(text)
    if age is None:
        return ""
    low, high = max(edge for edge in (0, *BANDS) if edge <= age), next((edge for edge in BANDS if edge > age), None)
    return f"{low}–{high - 1}" if high else f"{low}+"


def _severe(run: _Run, evaluated: _Part, name: str) -> Counter[str]:
    """The model's severe misses by what kind of case it is: ids may be patients' numbers."""
    cases = {case.id: case for path in run.files(evaluated, "cases") for case in read_records(path, Case)}
    scores = read_records(evaluated.folder / "scores.jsonl", ModelScore)
    missed = (cases.get(one.case_id) for one in scores if one.model == name and one.parts.get("severe_miss") == 1)
    return Counter(
        " · ".join(filter(None, (str(case.meta.get(key, "")) for key in _KINDS))) if case else "" for case in missed
    )
