"""What a curation takes its rows from: labels, the cases to validate training on, prompts that ask for two parts."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Prediction, Row
from preceptor.data.splits import family_key, joined, member
from preceptor.stages.base import read_records
from preceptor.tasks import curation
from preceptor.tasks.prompts import Prompt, act_in

VALIDATION, APART = "validation", "validation_rows"
"""A split, and where stands what training is validated on."""
PARTS = ["diseases", "evidence"]
"""What a prompt asks for in turn whose answers are learned, or given, by two models."""
_SHARE = 10
"""Of so many labelled cases at most one is kept apart."""


class Labels:
    """Labels by case, of which only the places in their files are held; all are checked when it begins.

    They stand in files of predictions or, as gold, of cases.

    Raises:
        UserError: a line that is no such record.
    """

    def __init__(self, paths: Sequence[Path], kind: type[Prediction] | type[Case] = Prediction) -> None:
        self._paths, self._kind = paths, kind
        self._places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.answered = set[str]()
        """Cases of which a label holds an answer."""
        self.count = self.voted = 0
        for source, path in enumerate(paths):
            with path.open("rb") as lines:
                starts = accumulate(map(len, lines), initial=0)
                for record, start in zip(read_records(path, kind), starts, strict=False):
                    if (label := _label(record)) is None:
                        continue
                    self._places[label.case_id].append((source, start))
                    self.count += 1
                    self.voted += label.agreement is not None
                    if label.output is not None:
                        self.answered.add(label.case_id)

    def __contains__(self, case_id: str) -> bool:
        """Whether a case has labels that were not taken."""
        return case_id in self._places

    def take(self, case_id: str) -> list[tuple[int, Prediction]]:
        """The labels of a case that were not taken before, with their files' numbers; no two have one sample number."""
        found: list[tuple[int, Prediction]] = []
        for source, start in self._places.pop(case_id, ()):
            with self._paths[source].open("rb") as file:
                file.seek(start)
                label = _label(self._kind.model_validate_json(file.readline()))
            assert label is not None
            used = {other.sample for _, other in found}
            if label.sample in used:
                label = label.model_copy(update={"sample": max(used) + 1})
            found.append((source, label))
        return found

    def rest(self) -> Iterator[Prediction]:
        """The labels that were not taken."""
        for case_id in list(self._places):
            for _, label in self.take(case_id):
                yield label


def _label(record: Prediction | Case) -> Prediction | None:
    """The label that a line of a file is; None for a case without gold."""
    if isinstance(record, Prediction):
        return record
    return _gold(record, record.gold) if record.gold else None


def golden(
    cases: Iterable[Case], held: Mapping[str, str], most: int, prompt: Prompt, rules: curation.Rules
) -> Iterator[Row]:
    """The first `most` validation cases with gold, written as labels are; none that stands in another split too.

    Gold is certain, where its confidence is to be stated: such rows are graded, and not learned.
    """
    kind = Consultation if rules.task == "consult" else Diagnosis
    fit = (
        curation.row(_certain(_gold(case, case.gold)), case.gold, case.text, prompt, rules)
        for case in cases
        if isinstance(case.gold, kind) and {held[case.id], held[family_key(case.text)]} == {VALIDATION}
    )
    return islice(fit, most)


def _certain(label: Prediction) -> Prediction:
    named = label.output.diseases if isinstance(label.output, Diagnosis) else ()
    return label.model_copy(update={"confidence": dict.fromkeys(named, 1.0)})


def _gold(case: Case, gold: Diagnosis | Consultation) -> Prediction:
    return Prediction(case_id=case.id, model="gold", prompt_sha="", output=gold)


def kept_apart(cases: Iterable[Case], most: int) -> dict[str, str]:
    """The cases to validate on, at most `most` and a tenth of all: their ids, with the families of their texts.

    Cases of one group or one text stay together. Names decide which, so that it is the same ones in every round.
    """
    members = [member(case) for case in cases]
    units: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for one in joined(members, range(len(members))):
        units[one.group][one.id] = one.text
    room, chosen = min(most, len(members) // _SHARE), dict[str, str]()
    for group in sorted(units, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()):
        if len(chosen) + len(units[group]) <= room:
            chosen |= units[group]
    return chosen


def check_parts(prompt: Prompt, where: str) -> None:
    """Refuse a prompt that two models can't answer in turn; `where` says what wants them to."""
    acts = [act_in(stage) or "nothing by name" for stage in prompt.stages]
    if acts != PARTS:
        asks = "once" if len(acts) == 1 else f"for {', then '.join(acts)}"
        raise UserError(
            f"{where}: the prompt asks {asks}; name one that asks for the diseases, then for the evidence, with lines "
            "[act: diseases] and [act: evidence], such as two_stage"
        )
