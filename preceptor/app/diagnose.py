"""One record, one answer: what the command shows of a model on disk."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import OTHER, Case, Diagnosis, Polarity, Prediction, Reply, Request, Sampling
from preceptor.data.layouts import language_of
from preceptor.llm.completer import Completer, ProviderError
from preceptor.stages.base import needs_torch
from preceptor.stages.calibrations import beside, unlike
from preceptor.tasks import calibrated, prompts
from preceptor.tasks.calibrated import Calibration
from preceptor.tasks.diagnosis import CLOSINGS
from preceptor.tasks.strategies import Asking, zero_shot

NOT_FOR_CARE = "Illustrative, not for care."
_SHOWN = 500
"""Characters of a reply that can't be read, some of which never end."""


class Answer(NamedTuple):
    """What a model says of a record, and what its confidence is worth."""

    case: Case
    prediction: Prediction
    calibration: Calibration | None
    """That was applied."""
    note: str
    """Why none was, where the weights have one for another way of asking."""


def answer(text: str, model: str) -> Answer:
    """What the model at a place says of a record: a run's section, an adapter's folder, or any model.

    Raises:
        UserError: there is no text, no such model, or nothing here to run one.
    """
    if not text.strip():
        raise UserError("the record is empty; give its text, - for stdin, or @FILE")
    needs_torch("diagnose")
    from preceptor.llm.local import Local
    from preceptor.model.load import load
    from preceptor.model.resolve import digest

    case = Case(id="record", text=text.strip(), language=language_of(text), source="command", group="record")
    loaded = load(model_in(Path(model)) or model)
    prompt = prompts.load("diagnosis", "zero_shot", case.language)
    asking = Asking(prompt, model, Sampling(), logprobs=CLOSINGS, constrained=False)  # as `predict` asks
    conversation = zero_shot(case, asking)
    weights = digest(loaded.folder)
    completer = Local(loaded, weights)
    try:
        reply = asyncio.run(_reply(completer, next(conversation)))
    except ProviderError as error:
        raise WorkError(f"{model} gives no answer: {error.detail}") from error
    try:
        conversation.send(reply)
    except StopIteration as end:
        prediction: Prediction = end.value
    known, way = beside(loaded.folder), calibrated.way(asking, "zero_shot")
    if calibration := known.of(weights, way):
        return Answer(case, calibrated.apply(calibration, prediction, case), calibration, "")
    return Answer(case, prediction, None, unlike(known, weights, way))


async def _reply(completer: Completer, request: Request) -> Reply:
    try:
        return await completer.complete(request)
    finally:
        await completer.close()


def model_in(folder: Path) -> Path | None:
    """The model that a section of a run left; None for other folders."""
    return next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)


def shown(found: Answer) -> Group:
    """The answer for a terminal: each disease with its confidence, and the words of the record."""
    case, prediction, calibration, note = found
    output = prediction.output
    notes = (note, "The record is longer than the model can take in: its end was not read." if prediction.cut else "")
    parts: list[RenderableType] = [Text(one, style="dim") for one in notes if one]
    if not isinstance(output, Diagnosis):
        assert prediction.failure is not None
        said = Text(f"The model said: {prediction.text[:_SHOWN]}", style="dim")
        return Group(*parts, Text(f"No answer: {prediction.failure.kind} {prediction.failure.detail}"), said)
    if held := prediction.withheld:
        parts += [
            Text(f"No answer is given: of {held.output.diseases[0]} the model is sure to {held.confidence:.0%} only."),
            Text(f"Below {held.threshold:.0%} answers are withheld{_promise(calibration)}."),
        ]
        parts += [Text(f"To ask about first: {held.ask}", style="bold")] if held.ask else []
    elif output.abstained:
        parts.append("The record does not say enough to name a disease.")
    else:
        parts += _named(case, prediction, output)
    if prediction.prediction_set and calibration:
        names = [name for name in prediction.prediction_set if name != OTHER]
        names += ["another disease"] * (len(names) < len(prediction.prediction_set))
        one = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        parts.append(Text(f"With {100 * (calibration.wanted.coverage or 0):g}% certainty: {one}"))
    return Group(*parts, Text(NOT_FOR_CARE, style="dim"))


def _promise(calibration: Calibration | None) -> str:
    """What answers are withheld for."""
    risk = calibration.wanted.risk if calibration else None
    return "" if risk is None else f", so that at most {100 * risk:g}% of those given are wrong"


def _named(case: Case, prediction: Prediction, output: Diagnosis) -> list[RenderableType]:
    """Diseases and quotes."""
    diseases = Table.grid(padding=(0, 2))
    for name in output.diseases:
        confidence = prediction.confidence.get(name)
        diseases.add_row(Text(name, style="bold"), "" if confidence is None else f"{confidence:.0%}")
    quotes = Table.grid(padding=(0, 2))
    for evidence in output.evidence:
        sign = "-" if evidence.polarity is Polarity.NEGATED else "+"
        quotes.add_row(sign, Text(f"“{case.text[evidence.start : evidence.end]}”"), f"at {evidence.start}")
    parts: list[RenderableType] = [diseases, quotes]
    lost = len(output.reason) - len(output.evidence)
    if lost > 0:
        parts.append(f"{lost} of {len(output.reason)} reasons are not in the record")
    return parts
