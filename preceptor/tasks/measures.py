"""What else is told of a diagnosis beside its grade: figures that others report, so that results can be compared."""

from collections.abc import Mapping, Sequence

from rapidfuzz.distance import Indel

from preceptor.clinical.names import Level, Namer
from preceptor.core.records import OTHER, Case, Diagnosis, Prediction
from preceptor.tasks.calibrated import covers

LIKELY = 0.01
"""A disease belongs to a differential above this probability."""
DEPTHS = (1, 3, 5)
LEVELS: tuple[Level, ...] = ("concept", "category")
Names = Mapping[Level, tuple[Sequence[str], Sequence[str]]]
"""By level the diseases that an answer names and those of the gold, equal where they match."""


def measures(output: Diagnosis | None, case: Case, namer: Namer) -> Mapping[str, float | None]:
    """Figures of one answer by name; None where what they need is unknown. A failed answer scores 0.

    - `rouge_l`: ROUGE-L's F of the reasons against the gold's, by character, which serves Chinese too; None without.
    - `ddr`, `ddp`, `ddf1`: recall, precision and F1 of the diseases named against the differential, and `gtpa_k`:
      whether a true and likely disease is among the first k (DDXPlus, arXiv 2205.09148).
    """
    gold = case.gold if isinstance(case.gold, Diagnosis) else None
    said = output or Diagnosis()
    found: dict[str, float | None] = {"rouge_l": None}
    if gold and gold.reason and said.reason:
        found["rouge_l"] = Indel.normalized_similarity("\n".join(said.reason), "\n".join(gold.reason))
    if case.differential and gold:
        likely = [name for name, probability in case.differential.items() if probability > LIKELY]
        hits = len(namer.match(said.diseases, likely))
        found["ddr"], found["ddp"] = hits / max(1, len(likely)), hits / max(1, len(said.diseases))
        found["ddf1"] = 2 * hits / max(1, len(likely) + len(said.diseases))
        true = [gold.diseases[i] for i, _ in namer.match(gold.diseases, likely)]
        hit = next((place for place, name in enumerate(said.diseases) if namer.match((name,), true)), max(DEPTHS))
        found |= {f"gtpa_{k}": float(hit < k) for k in DEPTHS}
    return found


def assurance(prediction: Prediction, case: Case, namer: Namer) -> Mapping[str, float | None]:
    """Whether an answer keeps what its calibration promises; nothing where none was applied. The case has gold.

    - `withheld`: whether it was too doubtful to be given.
    - `set_coverage`: whether the set of diseases beside it holds a true one; `set_size`, of which `set_other`: whether
      it leaves the door open to any other disease, and `set_single`: whether it is one disease alone.
    """
    said, found = prediction.prediction_set, dict[str, float | None]()
    if prediction.uncalibrated or prediction.withheld:
        found["withheld"] = float(prediction.withheld is not None)
    if said is not None:
        found |= {
            "set_coverage": float(covers(case, prediction, namer)),
            "set_size": float(len(said)),
            "set_other": float(OTHER in said),
            "set_single": float(len(said) == 1 and OTHER not in said),
        }
    return found


def names(output: Diagnosis | None, gold: Diagnosis, namer: Namer) -> Names:
    """By level what the answer names and what is true, each as one word for one disease: equal where they match."""
    said = output.diseases if output else ()
    found: dict[Level, tuple[Sequence[str], Sequence[str]]] = {}
    for level in LEVELS:
        true = [_word(name, namer, level) for name in gold.diseases]
        given = [_word(name, namer, level) for name in said]
        for one, other in namer.match(said, gold.diseases, level=level):
            given[one] = true[other]
        found[level] = given, true
    return found


def _word(name: str, namer: Namer, level: Level) -> str:
    return (level == "category" and namer.code(name)) or namer.concept(name) or name
