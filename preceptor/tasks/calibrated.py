"""What a calibration learns from answers whose truth is known, and what it makes of a new answer.

It is for one set of weights, asked in one way: under another prompt, strategy or source of confidence the same number
means something else, so `way` says how a model was asked, and `Calibrations.of` gives nothing for any other way.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from preceptor.clinical.names import Namer
from preceptor.clinical.textbook.exact import exact
from preceptor.core.calibration import (
    SINGLE,
    Quantile,
    Selection,
    SetScore,
    interpolated,
    isotonic,
    lot,
    quantiles,
    select,
    strangeness,
    temperature,
    tempered,
)
from preceptor.core.records import OTHER, Case, Diagnosis, Language, Prediction, Record, Withheld
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.strategies import Asking

Answered = tuple[Case, Prediction]
"""A case with gold, and an answer to it that names diseases."""
Way = Mapping[str, Any]
"""How a model is asked, as a person reads it."""
Method = Literal["temperature", "isotonic"]
LEAST = 20
"""Answers from which anything is learned."""
_STATED = 0.005
"""Models state confidences in whole percents."""
_ROUNDING = 1e-12
_Share = Annotated[float, Field(ge=0, le=1)]


class Wanted(Record):
    """What a calibration is to give."""

    method: Method = "temperature"
    risk: float | None = None
    """Most errors among the answers that are given; None gives them all."""
    coverage: float | None = 0.9
    """How often a set of diseases holds a true one; None makes no sets."""
    sets: SetScore = "lac"
    by: Literal["specialty"] | None = "specialty"
    """What coverage is to hold in each group of."""
    least: float = SINGLE
    """What lies closer than this to 0 or 1 can't be told from it: how finely the confidence counts."""


class Curve(Record):
    """From a confidence to a probability."""

    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    least: float = Field(default=SINGLE, gt=0, lt=0.5)
    points: tuple[tuple[_Share, _Share], ...] = ()
    """In place of a temperature, between which straight lines are drawn."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.temperature is None) != bool(self.points):
            raise ValueError("a curve has either a temperature or points")
        return self

    @classmethod
    def fitted(cls, wanted: Wanted, confidence: Sequence[float], true: Sequence[bool]) -> "Curve":
        """That of a method for such answers."""
        if wanted.method == "isotonic":
            return cls(points=tuple(isotonic(confidence, true)))
        return cls(temperature=temperature(confidence, true, wanted.least), least=wanted.least)

    def __call__(self, confidence: float) -> float:
        """The probability."""
        if self.temperature is None:
            return float(interpolated(confidence, self.points))
        return float(tempered(confidence, self.temperature, self.least))


class Calibration(Record):
    """How sure a model's answers are, as learned from `n` of them."""

    asked: str
    """Digest of `way`."""
    way: dict[str, Any]
    weights: str
    """Digest of the model's folder."""
    n: int
    wanted: Wanted
    first: Curve
    """For the disease that an answer names first."""
    later: Curve
    """For the others, whose probability is about another question: given the first, is this one there too?"""
    selection: Selection | None = None
    quantiles: dict[str, Quantile] = Field(default_factory=dict)
    """Of the truths' strangeness, by group; "" is for every other group."""

    @model_validator(mode="after")
    def _for_every_group(self) -> Self:
        if self.quantiles and "" not in self.quantiles:
            raise ValueError("quantiles: none is for cases of other groups")
        return self


class Calibrations(Record):
    """All that is known of one set of weights, by how it is asked."""

    by_way: dict[str, Calibration] = Field(default_factory=dict)

    def of(self, weights: str, way: Way) -> Calibration | None:
        """The calibration of these weights when they are asked so."""
        found = self.by_way.get(digest(way))
        return found if found and found.weights == weights else None

    def with_(self, calibration: Calibration) -> "Calibrations":
        """These and another one; what was learned of other weights goes out."""
        kept = {asked: one for asked, one in self.by_way.items() if one.weights == calibration.weights}
        return Calibrations(by_way={**kept, calibration.asked: calibration})


def way(asking: Asking, strategy: str, **more: Any) -> Way:
    """How a model is asked: all that its confidence may hang on. `more` is what its examples are chosen from."""
    turns = [[turn.role, turn.content] for turn in asking.prompt.turns]
    said: dict[str, Any] = {
        "strategy": strategy,
        "confidence": source(asking, strategy),
        "prompt": _sha(turns),
        "temperature": asking.sampling.temperature,
        "constrained": asking.constrained,
    }
    if said["confidence"] in ("samples", "votes"):
        said["votes"] = asking.votes
    if said["confidence"] == "candidates":
        said["candidates"] = _sha(asking.candidates)
    return {**said, **more}


def source(asking: Asking, strategy: str) -> str:
    """Where the confidence comes from: `chain` and the like, the votes of self-consistency, or nowhere."""
    if strategy == "self_consistency":
        return "votes"
    return asking.confidence or ("none" if asking.logprobs is None else "chain")


def least(way: Way) -> float:
    """How finely the confidence of a way of asking counts: of n samples all may agree on what is not certain."""
    if votes := way.get("votes"):
        return float(1 / (2 * votes + 2))
    return _STATED if way["confidence"] == "stated" else SINGLE


def digest(way: Way) -> str:
    """sha256 of a way of asking."""
    return _sha(dict(way))


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def answered(case: Case, prediction: Prediction) -> bool:
    """Whether an answer teaches anything: gold is known, it names a disease, and how sure it is of the first."""
    output = prediction.output
    named = isinstance(output, Diagnosis) and bool(output.diseases) and output.diseases[0] in prediction.confidence
    return named and isinstance(case.gold, Diagnosis)


def fit(answers: Sequence[Answered], wanted: Wanted, way: Way, weights: str, namer: Namer | None = None) -> Calibration:
    """What answers (see `answered`) teach.

    The first disease of an answer is right if it is among gold, as for `top1`; another one if it is in the most
    one-to-one pairs of answer and gold. Each has its own curve, for pooled the many first ones, whose confidence counts
    for threshold and figures, and the few later ones would bend each other's; fewer than `LEAST` later ones have none.
    Sets are made of confidences as the model has them: what is then learned of the truths' strangeness is learned of
    new cases too, whatever the curves are, which have seen these answers.
    """
    namer = namer or textbook_namer()
    first: list[tuple[float, bool]] = []
    later: list[tuple[float, bool]] = []
    for case, prediction in answers:
        (name, right), *others = outcomes(case, prediction, namer)
        first.append((prediction.confidence[name], right))
        later += [(prediction.confidence[name], right) for name, right in others if name in prediction.confidence]
    curve = Curve.fitted(wanted, *zip(*first, strict=True))
    selection, by_group = None, {}
    if wanted.risk is not None:
        selection = select([curve(p) for p, _ in first], [right for _, right in first], wanted.risk)
    if wanted.coverage is not None:
        strange = [_strangeness_of_truth(case, prediction, wanted.sets, namer) for case, prediction in answers]
        by_group = quantiles(strange, [group(case, wanted) for case, _ in answers], wanted.coverage)
    return Calibration(
        asked=digest(way),
        way=dict(way),
        weights=weights,
        n=len(answers),
        wanted=wanted,
        first=curve,
        later=Curve.fitted(wanted, *zip(*later, strict=True)) if len(later) >= LEAST else curve,
        selection=selection,
        quantiles=by_group,
    )


def apply(calibration: Calibration, prediction: Prediction, case: Case) -> Prediction:
    """The prediction with probabilities for confidences, a set of diseases, and its answer withheld if too doubtful.

    Failures and abstentions of the model's own stay as they are. Of an answer whose confidence is not known there is
    no set, and where a threshold is set it is withheld, as if it had none.
    """
    prediction = raw(prediction)
    output = prediction.output
    if not isinstance(output, Diagnosis) or output.abstained:
        return prediction
    head = output.diseases[0]
    curves = {name: calibration.first if name == head else calibration.later for name in prediction.confidence}
    confidence = {name: curves[name](p) for name, p in prediction.confidence.items()}
    update: dict[str, Any] = {"confidence": confidence, "uncalibrated": prediction.confidence}
    if calibration.quantiles and head in prediction.confidence:
        update["prediction_set"] = _set(calibration, prediction, case)
    threshold = calibration.selection.threshold if calibration.selection else None
    if threshold is not None and (sure := confidence.get(head, 0.0)) < threshold:
        ask = _ask(case.text, case.language, output)
        update["withheld"] = Withheld(output=output, confidence=sure, threshold=threshold, ask=ask)
        update["output"] = Diagnosis()
    return prediction.model_copy(update=update)


def raw(prediction: Prediction) -> Prediction:
    """The prediction as it was before any calibration."""
    if not prediction.uncalibrated and not prediction.withheld:
        return prediction
    update = {"confidence": prediction.uncalibrated, "uncalibrated": {}, "output": _given(prediction)}
    return prediction.model_copy(update={**update, "prediction_set": None, "withheld": None})


def outcomes(case: Case, prediction: Prediction, namer: Namer) -> list[tuple[str, bool]]:
    """The diseases of an answer, each with whether it is true."""
    assert isinstance(case.gold, Diagnosis)
    assert isinstance(prediction.output, Diagnosis)
    said, true = prediction.output.diseases, case.gold.diseases
    hits = {i for i, _ in namer.match(said, true)}
    return [(name, i in hits if i else bool(namer.match(said[:1], true))) for i, name in enumerate(said)]


def covers(case: Case, prediction: Prediction, namer: Namer | None = None) -> bool:
    """Whether a prediction's set holds a true disease, or OTHER where none of them had a name in its distribution."""
    held = prediction.prediction_set or ()
    classes, _ = _classes(raw(prediction))
    return any(classes[i] in held for i in _true(case, classes, namer or textbook_namer()))


def _given(prediction: Prediction) -> Any:
    return prediction.withheld.output if prediction.withheld else prediction.output


def _classes(prediction: Prediction) -> tuple[list[str], list[float]]:
    """The names between which the model's probability is shared, and last OTHER, with their shares.

    Where only the confidences of what it named are known, each disease takes its own of what the ones before it left.
    """
    if prediction.distribution:
        shares = {name: p for name, p in prediction.distribution.items() if name}
    else:
        shares, left = {}, 1.0
        for name in prediction.output.diseases if isinstance(prediction.output, Diagnosis) else ():
            if name in prediction.confidence and name not in shares:
                shares[name] = left * prediction.confidence[name]
                left -= shares[name]
    return [*shares, OTHER], [*shares.values(), max(0.0, 1 - sum(shares.values()))]


def _true(case: Case, classes: Sequence[str], namer: Namer) -> list[int]:
    """Which classes are true: the names of gold's diseases, else OTHER."""
    assert isinstance(case.gold, Diagnosis)
    known = classes[:-1]
    found = [i for i, name in enumerate(known) if namer.match((name,), case.gold.diseases)]
    return found or [len(known)]


def _strangeness_of_truth(case: Case, prediction: Prediction, score: SetScore, namer: Namer) -> float:
    """That of the true class which suits the distribution best."""
    classes, shares = _classes(prediction)
    strange = strangeness(score, shares, lot(case.id))
    return float(strange[_true(case, classes, namer)].min())


def _set(calibration: Calibration, prediction: Prediction, case: Case) -> tuple[str, ...]:
    """The classes that are no stranger than truths are, the likeliest first.

    A set that would be empty holds the likeliest class: it then covers the truth more often, never less.
    """
    classes, shares = _classes(prediction)
    strange = strangeness(calibration.wanted.sets, shares, lot(case.id))
    limit = calibration.quantiles.get(group(case, calibration.wanted), calibration.quantiles[""]).value
    order = np.argsort(-np.asarray(shares), kind="stable").tolist()
    held = [i for i in order if strange[i] <= limit + _ROUNDING]
    return tuple(classes[i] for i in held or order[:1])


def group(case: Case, wanted: Wanted) -> str:
    """The group of a case; empty where it has none, or where all are one."""
    return str(case.meta.get(wanted.by) or "") if wanted.by else ""


def _ask(text: str, language: Language, output: Diagnosis) -> str:
    """The finding that would help most; empty where the textbook doesn't know one of the diseases."""
    namer, book = textbook_namer(), exact().book
    known: Iterable[bool] = (namer.concept(name) in book.diseases for name in output.diseases)
    return exact().ask(text, language) if all(known) else ""
