"""A teacher's beliefs about its tokens, held against gold before a student learns from them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from preceptor.core.errors import UserError
from preceptor.core.recalibration import FOLDS, METHODS, Method, Observation, Recalibrated
from preceptor.core.records import Case, Diagnosis, Prediction, Reply
from preceptor.llm.ledger import Ledger
from preceptor.stages.base import LEDGER, Context, replacing
from preceptor.tasks import decisions

DECIDED = 30
"""Answers with a decision from which anything is learned."""
_SYMBOLS: Mapping[Method, str] = {"temperature": "T", "resoftmax": "c", "smoothing": "e"}


def read(path: Path | None) -> Recalibrated | None:
    """What calibrate left of a teacher; None where it left nothing.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    if path is None:
        return None
    try:
        return Recalibrated.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not what calibrate writes ({told}); run it again with --fresh") from error


def write(path: Path, found: Recalibrated) -> None:
    """Write it whole or not at all."""
    with replacing(path) as new:
        new.write_text(found.model_dump_json(indent=1) + "\n", "utf-8")


def observed(said: Iterable[tuple[Case, Prediction]], context: Context) -> Iterator[Observation]:
    """The decisions in the last replies of these answers, as the ledger has them."""
    with Ledger(context.runs / LEDGER) as ledger:
        for case, prediction in said:
            output = prediction.output
            reply = ledger.find(prediction.reply) if prediction.reply else None
            if isinstance(reply, Reply) and isinstance(output, Diagnosis):
                yield from decisions.observations(reply, output, case)


def figures(found: Recalibrated) -> dict[str, Any]:
    """For metrics.json: of the way that was chosen as of any calibration, and of all."""
    chosen, before = found.methods[found.chosen.method], found.before
    return {
        "n": found.n,
        "decided": found.cases,
        "recalibration": found.chosen.model_dump(),
        "ece_uncalibrated": before.ece,
        "ece_floor_uncalibrated": before.ece_floor,
        "nll_uncalibrated": before.nll,
        "reliability_uncalibrated": [one.model_dump() for one in before.reliability],
        **chosen.after.model_dump(),
        "methods": {method: {"value": one.value, **one.after.model_dump()} for method, one in found.methods.items()},
    }


def told(found: Recalibrated, asked: int) -> Iterator[str]:
    """What came out, for the user."""
    before = found.before
    yield (
        f"{found.n} decisions in {found.cases} of {asked} answers; by {FOLDS}-fold cross-validation "
        f"(a perfect teacher's ECE in brackets):"
    )
    for method in METHODS:
        one = found.methods[method]
        chosen = method == found.chosen.method
        worse = chosen and one.after.ece >= before.ece and one.after.nll >= before.nll
        yield (
            f"{method} {_SYMBOLS[method]} {one.value:.2f}{' (chosen)' if chosen else ''}: "
            f"ECE {before.ece:.3f} -> {one.after.ece:.3f} ({one.after.ece_floor:.3f}), "
            f"NLL {before.nll:.3f} -> {one.after.nll:.3f}"
            + ("; no better than as it was: it wants more cases, or the teacher none of it" if worse else "")
        )
