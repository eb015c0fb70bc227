"""What evaluation reads that may come from elsewhere: cases, other tools' predictions, the user's names of diseases."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.clinical.names import Entry
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Issue, Prediction
from preceptor.data import answers, files, names
from preceptor.report.summary import Words
from preceptor.stages.base import Context, read_records, write_records

ISSUES, JOINED = "issues.jsonl", "predictions.jsonl"


@dataclass
class Inputs:
    """What is read, and what was wrong with it."""

    context: Context
    issues: list[Issue] = field(default_factory=list)
    labels: dict[str, Diagnosis | Consultation] = field(default_factory=dict)
    """Of cases without gold, by id: what stood beside predictions from elsewhere."""

    def __post_init__(self) -> None:
        """Looks for the files.

        Raises:
            UserError: one is not there.
        """
        for need in ("elsewhere", "names"):
            for path in self.context.inputs.get(need, ()):
                if not path.is_file():
                    key = "predictions" if need == "elsewhere" else need
                    raise UserError(
                        f"{self.context.section}.{key}: no file {path} (seen from {Path.cwd()}); mend the path"
                    )

    def table(self) -> list[Entry]:
        """The user's names of diseases."""
        path = self.context.optional("names")
        return list(self._good(names.read(path))) if path else []

    def cases(self, limit: int | None) -> list[Case]:
        """The cases of a run's files, or of any that `prepare` reads; else those of the predictions' own prompts.

        Raises:
            UserError: there are none, or two of one id.
        """
        found: dict[str, Case] = {}
        for path in self.context.inputs.get("cases", ()):
            for case in self._read(path, limit):
                if found.setdefault(case.id, case) != case:
                    raise UserError(
                        f"{path}: another case has the id {case.id!r} too; name one of the files in `from:`"
                    )
        if not self.context.inputs.get("cases"):
            made = (case for path in self.context.inputs["elsewhere"] for case in answers.asked(path))
            found = {case.id: case for case in made}
            if not found:
                raise UserError(
                    f"{self.context.section}: no cases: name a section or a file that has them in "
                    f"{self.context.section}.from; predictions stand in only where a prompt and a label are beside them"
                )
        return list(found.values())

    def _read(self, path: Path, limit: int | None) -> Iterator[Case]:
        layout = files.sniff(path) if path.stat().st_size else "preceptor"
        if layout == "preceptor":
            return read_records(path, Case, limit)
        return (row.case for row in self._good(files.read(path, files.importer_of(layout, path))))

    def join(self, cases: Sequence[Case], models: Iterable[str], parse: answers.Parse) -> None:
        """Writes the predictions from elsewhere as ours, and the issues; takes the labels of cases without gold.

        `parse` reads a reply to the task.

        Raises:
            UserError: one of the `models` has the name of one of ours.
        """
        paths = dict(zip(models, self.context.inputs.get("elsewhere", ()), strict=True))
        if paths:
            ours = self.context.inputs.get("predictions", ())
            taken = {prediction.model for path in ours for prediction in read_records(path, Prediction)} & paths.keys()
            if taken:
                key = f"{self.context.section}.predictions.{min(taken)}"
                raise UserError(f"{key}: a model of ours has that name already; call {paths[min(taken)]} otherwise")
            write_records(self.context.folder / JOINED, self._joined(cases, paths, parse))
        if paths or self.issues:
            write_records(self.context.folder / ISSUES, self.issues)

    def _joined(self, cases: Sequence[Case], paths: Mapping[str, Path], parse: answers.Parse) -> Iterator[Prediction]:
        index = answers.Index(cases)
        bare = {case.id for case in cases if case.gold is None}
        for model, path in paths.items():
            for one in self._good(answers.read(path, model, index, parse)):
                yield one.prediction
                if one.prediction.case_id in bare and one.label:
                    self._label(path, one, parse)

    def predictions(self) -> Iterator[Prediction]:
        """Ours, then those from elsewhere."""
        joined = [self.context.folder / JOINED] if self.context.inputs.get("elsewhere") else []
        for path in (*self.context.inputs.get("predictions", ()), *joined):
            yield from read_records(path, Prediction)

    @property
    def first(self) -> str:
        """The first row that was left out, and why; empty if none was."""
        dropped = (one for one in self.issues if one.action == "dropped")
        return next((f"the first row that was left out: {one.file}:{one.line}: {one.problem}" for one in dropped), "")

    def notices(self, words: Words, labels: int) -> Iterator[str]:
        """What was left out, what was joined by its place, by file; and how many cases stand on `labels`."""
        for key, matters in (
            ("unjoined", [issue for issue in self.issues if issue.action == "dropped"]),
            ("placed", [issue for issue in self.issues if issue.action == "kept" and issue.field == answers.PLACED]),
        ):
            times = Counter(issue.file for issue in matters)
            for file, one in {issue.file: issue for issue in reversed(matters)}.items():
                yield words(key, file=Path(file).name, n=times[file], line=one.line, reason=one.problem)
        if labels:
            yield words("labels", n=labels)

    def _good(self, found: Iterable[Any]) -> Iterator[Any]:
        for one in found:
            if isinstance(one, Issue):
                self.issues.append(one)
            else:
                yield one

    def _label(self, path: Path, one: answers.Joined, parse: answers.Parse) -> None:
        parsed = parse(one.label, "stop")
        if parsed.output is not None:
            self.labels.setdefault(one.prediction.case_id, parsed.output)
        else:
            reason = parsed.detail.replace("the reply", "it")
            self.issues.append(Issue(file=str(path), line=one.line, field="label", reason=reason, action="kept"))
