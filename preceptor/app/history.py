"""The table of versions and scores: what each run was, how it scored here, and how it scored elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr

from preceptor.app.run import read_json
from preceptor.core.errors import UserError
from preceptor.core.records import Diagnosis, Prediction, Record
from preceptor.data.files import Imported, importer_of, read, sniff
from preceptor.report.summary import UNKNOWN, find_student, percent
from preceptor.stages.base import TRAINING, Lines, read_records

FILE = "history.jsonl"
"""In the folder of all runs: what was added by hand."""
OWN = {"top1": "top-1", "disease_f1": "F1", "agreement_top1": "agreement", "evidence_grounded": "grounded"}
"""Our figures, and what they are called in the table."""
_LEAST = 3
"""Versions that a rank correlation needs to say anything."""


class Outside(Record):
    """A score from elsewhere, such as a competition's."""

    version: str
    score: float | None = None
    scheme: str = ""
    added: str = ""
    reasons: float | None = None
    """A mean per answer, as are the other two."""
    characters: float | None = None
    diseases: float | None = None


@dataclass
class _Version:
    """A line of the table."""

    when: str = ""
    scheme: str = ""
    own: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    means: tuple[float, ...] = ()
    """Reasons, characters of the reasons, and diseases per answer."""


def add(runs: Path, version: str, score: float | None, scheme: str, answers: Path | None) -> None:
    """Keeps a score from elsewhere. `answers` is the file that was scored there: its reasons and diseases are counted.

    Raises:
        UserError: there is nothing to keep, or the file holds no diagnoses.
    """
    if score is None and not scheme and answers is None:
        raise UserError("history add: give --score, --scheme or --answers")
    means = (
        _means([found.case.gold for found in _read(answers) if isinstance(found.case.gold, Diagnosis)])
        if answers
        else ()
    )
    if answers and not means:
        raise UserError(f"{answers}: no row of it names diseases")
    reasons, characters, diseases = means or (None, None, None)
    runs.mkdir(parents=True, exist_ok=True)
    with Lines(runs / FILE) as file:
        file.write(
            Outside(
                version=version,
                score=score,
                scheme=scheme,
                added=date.today().isoformat(),  # noqa: DTZ011  the day where the user is
                reasons=reasons,
                characters=characters,
                diseases=diseases,
            )
        )


def table(runs: Path) -> tuple[Table, list[str]]:
    """A line for each version, the oldest first; and how well our figures rank them as scores from elsewhere do.

    Raises:
        UserError: there is no version yet.
    """
    versions = dict(_evaluated(runs))
    for outside in read_records(runs / FILE, Outside) if (runs / FILE).exists() else ():
        line = versions.setdefault(outside.version, _Version())
        line.when = line.when or outside.added
        line.scheme = outside.scheme or line.scheme
        line.score = line.score if outside.score is None else outside.score
        if outside.reasons is not None:
            line.means = (outside.reasons, outside.characters or 0.0, outside.diseases or 0.0)
    if not versions:
        raise UserError(f"{runs}: no version here; evaluate a run, or: preceptor history add v1 --score 2746")
    ordered = sorted(versions.items(), key=lambda item: item[1].when)
    own = [name for name in OWN if any(name in line.own for _, line in ordered)]
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("version", overflow="fold", min_width=10)
    shown.add_column("scheme", overflow="fold", min_width=9)
    for column in (*(OWN[name] for name in own), "score", "reasons", "chars", "diseases"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, line in ordered:
        ours = [percent(line.own[metric]) if metric in line.own else UNKNOWN for metric in own]
        score = UNKNOWN if line.score is None else f"{line.score:g}"
        means = [f"{mean:.{digits}f}" for mean, digits in zip(line.means, (1, 0, 1), strict=False)] or [UNKNOWN] * 3
        shown.add_row(Text.assemble(name, "\n", (line.when, "dim")), line.scheme, *ours, score, *means)
    return shown, list(_ranks([line for _, line in ordered], own))


def _ranks(lines: Sequence[_Version], own: Sequence[str]) -> Iterator[str]:
    for metric in own:
        both = [(line.own[metric], line.score) for line in lines if metric in line.own and line.score is not None]
        if len(both) >= _LEAST and all(len(set(values)) > 1 for values in zip(*both, strict=True)):
            rho = float(spearmanr(*zip(*both, strict=True)).statistic)
            yield f"{OWN[metric]} and the score from elsewhere rank {len(both)} versions alike: Spearman {rho:+.2f}"


def _evaluated(runs: Path) -> Iterator[tuple[str, _Version]]:
    """The versions that were evaluated here: runs, or their sections where there are several."""
    for run in sorted({path.parent.parent for path in runs.glob("*/*/scores.jsonl")}):
        sections = sorted(path.parent for path in run.glob("*/scores.jsonl") if (path.parent / "done.json").exists())
        for section in sections:
            metrics = read_json(section / "metrics.json") or {}
            config = read_json(section / "config.json", "started", "inputs") or {}
            student = find_student(metrics)
            paths = [Path(entry["path"]) for entry in config["inputs"].get("predictions", ())]
            answers = [
                prediction.output
                for path in paths
                if path.exists()
                for prediction in read_records(path, Prediction)
                if prediction.model == student and isinstance(prediction.output, Diagnosis)
            ]
            figures = {name: metrics[student][name]["value"] for name in OWN if name in metrics.get(student, {})}
            name = run.name if len(sections) == 1 else f"{run.name}/{section.name}"
            yield name, _Version(str(config["started"])[:10], _scheme(run), figures, means=_means(answers))


def _scheme(run: Path) -> str:
    """How the run's last student was trained."""
    trained = []
    for path in run.glob("*/config.json"):
        config = read_json(path, "stage", "started", "config") or {}
        metrics = read_json(path.parent / "metrics.json")
        if config["stage"] in TRAINING and metrics:
            how = config["config"]
            marked = ", transductive" if metrics.get("transductive_rows") else ""
            trained.append(
                (config["started"], f"{how['student']}, {how['method']}, {metrics['rows']:,.0f} rows{marked}")
            )
    return max(trained)[1] if trained else ""


def _means(answers: Sequence[Diagnosis]) -> tuple[float, ...]:
    counts = [(len(a.reason), sum(map(len, a.reason)), len(a.diseases)) for a in answers]
    return tuple(np.mean(counts, axis=0).tolist()) if counts else ()


def _read(path: Path) -> Iterator[Imported]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return (found for found in read(path, importer_of(sniff(path), path)) if isinstance(found, Imported))
