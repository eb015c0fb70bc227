"""Which evaluations a user means by `RUN[:MODEL]`, and their scores."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preceptor.core.errors import UserError
from preceptor.report.compare import METRICS, SCORE, Side
from preceptor.report.metrics import ModelScore
from preceptor.report.summary import find_student
from preceptor.stages.base import nearest, read_records

ALL = "*"


def sides(named: str, runs: Path) -> list[Side]:
    """The scores that `RUN[:MODEL]` means; a run is a name in `runs`, or a folder.

    By default its student's; for `RUN:*` those of every model.

    Raises:
        UserError: there is no such run, it has no evaluation or several, or no such model.
    """
    run, _, model = named.partition(":")
    folder = next((path for path in (Path(run), runs / run) if path.is_dir()), None)
    if folder is None:
        known = [path.parent.parent.name for path in runs.glob("*/*/scores.jsonl")]
        raise UserError(f"{run}: no such run in {runs}{nearest(run, known)}")
    found = sorted({*folder.glob("scores.jsonl"), *folder.glob("*/scores.jsonl")})
    if len(found) != 1:
        sections = ", ".join(str(path.parent) for path in found)
        raise UserError(
            f"{folder}: {f'name one of its evaluations: {sections}' if found else 'it has no evaluation yet'}"
        )
    by_model: dict[str, dict[str, list[ModelScore]]] = defaultdict(lambda: defaultdict(list))
    for score in read_records(found[0], ModelScore):
        by_model[score.model][score.case_id].append(score)
    model = model or find_student(by_model)
    if model not in (*by_model, ALL):
        raise UserError(f"{found[0]}: no model {model!r}{nearest(model, by_model)}")
    return [
        Side(f"{run}:{name}", {case: _mean(scores) for case, scores in by_model[name].items()})
        for name in (by_model if model == ALL else [model])
    ]


def _mean(scores: Sequence[ModelScore]) -> dict[str, float]:
    known = {name: [part for s in scores if (part := s.parts.get(name)) is not None] for name in METRICS}
    known[SCORE] = [score.value for score in scores if score.value is not None]
    return {name: float(np.mean(values)) for name, values in known.items() if values}
