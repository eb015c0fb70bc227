"""Calibrations as they lie beside a model's weights: read for whoever asks it, and told when none is for the way."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Prediction
from preceptor.stages.asking import AskingConfig
from preceptor.stages.base import CALIBRATION, Context, replacing, sha256
from preceptor.tasks import calibrated
from preceptor.tasks.calibrated import Calibrations, Way
from preceptor.tasks.strategies import Asking

Settle = Callable[[Case, Prediction], Prediction]


def beside(model: Path) -> Calibrations:
    """What was learned of the weights in a folder.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = model / CALIBRATION
    try:
        return Calibrations.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Calibrations()
    except (ValidationError, OSError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not what calibrate writes ({told}); take it away, and calibrate anew") from error


def carry(source: Path, out: Path) -> None:
    """Lay what is known of the weights in a folder beside those that were made of them and answer as they do."""
    from preceptor.model.resolve import digest

    weights, made = digest(source), digest(out)
    known = [
        one.model_copy(update={"weights": made}) for one in beside(source).by_way.values() if one.weights == weights
    ]
    if known:
        write(out / CALIBRATION, Calibrations(by_way={one.asked: one for one in known}))


def write(path: Path, calibrations: Calibrations) -> None:
    """Write a file of calibrations whole or not at all."""
    with replacing(path) as new:
        new.write_text(calibrations.model_dump_json(indent=1) + "\n", "utf-8")


def way_of(config: AskingConfig, context: Context, asking: Asking) -> Way:
    """How a section asks a model, with what its examples are chosen from."""
    if "examples" not in context.inputs:
        return calibrated.way(asking, config.strategy)
    shown = [sha256(path) for path in context.inputs["examples"]]
    drawn = {"choice": config.examples, "shots": config.shots, "seed": config.seed, "from": shown}
    return calibrated.way(asking, config.strategy, examples=drawn)


def settling(config: AskingConfig, context: Context, folders: Sequence[Path], asking: Asking) -> Settle:
    """What has the last word on a model's predictions: a calibration that is read from, else one beside the weights.

    Where there is some, but none of these weights asked so, that is said. Two models that answer in turn, and one
    whose weights are elsewhere, have none.
    """
    if len(folders) == 1:
        from preceptor.model.resolve import digest

        (model,), weights, way = folders, digest(folders[0]), way_of(config, context, asking)
        known = beside(model)
        of_sections = [beside(path.parent) for path in context.inputs.get(CALIBRATION, ())]
        if calibration := next((one for each in (*of_sections, known) if (one := each.of(weights, way))), None):
            return lambda case, prediction: calibrated.apply(calibration, prediction, case)
        others = () if asking.model == "base" else of_sections  # of which none is ever calibrated
        if why := next(filter(None, (unlike(each, weights, way) for each in (known, *others))), ""):
            context.say(f"{context.section}: {asking.model}: {why}")
    return lambda _, prediction: calibrated.raw(prediction)


def unlike(known: Calibrations, weights: str, way: Way) -> str:
    """Why none of a model's calibrations is for this way of asking it, in one line; empty where it has none at all."""
    if not known.by_way:
        return ""
    ours = [one.way for one in known.by_way.values() if one.weights == weights]
    if not ours:
        return f"confidences are not calibrated: {CALIBRATION} is about other weights; run calibrate again"
    differ = min(([key for key in {**one, **way} if one.get(key) != way.get(key)] for one in ours), key=len)
    words = f"{', '.join(differ)} differ{'s' * (len(differ) == 1)}"
    return f"confidences are not calibrated: it is asked otherwise than it was for {CALIBRATION} ({words})"
