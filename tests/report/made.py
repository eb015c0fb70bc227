"""Small cases and answers for the report's tests."""

from preceptor.core.records import Case, Diagnosis, Evidence, Failure, FailureKind, Prediction

TEXT = "Fever for 3 days, productive cough. Denies chest pain. Wheeze on both sides."


def evidence(words: str, text: str = TEXT) -> Evidence:
    """A passage of a text."""
    return Evidence(text=words, start=text.index(words), end=text.index(words) + len(words))


def case(number: int, *diseases: str, abstain: bool = False, text: str = TEXT, **more: object) -> Case:
    """A case whose gold names the diseases, with one piece of evidence."""
    fields: dict[str, object] = {
        "id": f"case-{number}",
        "text": text,
        "language": "en",
        "source": "test",
        "group": f"group-{number}",
        "gold": Diagnosis(
            diseases=diseases, reason=("productive cough",), evidence=(evidence("productive cough", text),)
        ),
        "gold_source": "human",
        "expects_abstention": abstain,
    }
    return Case.model_validate(fields | more)


def answer(
    number: int,
    *diseases: str,
    model: str = "student",
    reason: tuple[str, ...] = ("productive cough",),
    confidence: float | None = None,
    sample: int = 0,
) -> Prediction:
    """A model's answer; without diseases it abstains."""
    return Prediction(
        case_id=f"case-{number}",
        model=model,
        sample=sample,
        prompt_sha="0" * 64,
        output=Diagnosis(diseases=diseases, reason=reason if diseases else ()),
        confidence={} if confidence is None else {diseases[0]: confidence},
    )


def failure(
    number: int, kind: FailureKind = FailureKind.UNPARSED, model: str = "student", text: str = "?"
) -> Prediction:
    """An answer that never came, or could not be read."""
    return Prediction(
        case_id=f"case-{number}",
        model=model,
        prompt_sha="0" * 64,
        text=text,
        failure=Failure(kind=kind, detail="why it failed"),
    )
