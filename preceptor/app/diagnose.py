"""One record, one answer: what the command shows of a model on disk."""

import asyncio
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Diagnosis, Polarity, Prediction, Sampling
from preceptor.data.layouts import language_of
from preceptor.tasks import prompts
from preceptor.tasks.strategies import Asking, zero_shot

NOT_FOR_CARE = "Illustrative, not for care."


def answer(text: str, model: str) -> tuple[Case, Prediction]:
    """What the model at a place says of a record: a run's section, an adapter's folder, or any model.

    Raises:
        UserError: there is no text, or no such model.
    """
    if not text.strip():
        raise UserError("the record is empty; give its text, - for stdin, or @FILE")
    from preceptor.llm.completer import ProviderError
    from preceptor.llm.local import Local
    from preceptor.model.load import load
    from preceptor.model.resolve import digest

    case = Case(id="record", text=text.strip(), language=language_of(text), source="command", group="record")
    loaded = load(model_in(Path(model)) or model)
    asking = Asking(prompts.load("diagnosis", "zero_shot", case.language), model, Sampling(), logprobs=0)
    conversation = zero_shot(case, asking)
    completer = Local(loaded, digest(loaded.folder))
    try:
        reply = asyncio.run(completer.complete(next(conversation)))
    except ProviderError as error:
        raise WorkError(f"{model} gives no answer: {error.detail}") from error
    try:
        conversation.send(reply)
    except StopIteration as end:
        prediction: Prediction = end.value
    return case, prediction


def model_in(folder: Path) -> Path | None:
    """The model that a section of a run left; None for other folders."""
    return next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)


def shown(case: Case, prediction: Prediction) -> Group:
    """The answer for a terminal: each disease with its confidence, and the words of the record."""
    output = prediction.output
    if not isinstance(output, Diagnosis):
        assert prediction.failure is not None
        said = Text(f"The model said: {prediction.text}", style="dim")
        return Group(Text(f"No answer: {prediction.failure.kind} {prediction.failure.detail}"), said)
    if output.abstained:
        return Group(Text("The record does not say enough to name a disease."), Text(NOT_FOR_CARE, style="dim"))
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
    return Group(*parts, Text(NOT_FOR_CARE, style="dim"))
