"""DDXPlus: synthetic patients whose evidences are codes, read with the questions and the severities beside them."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis
from preceptor.data.layouts import Importer, case_of
from preceptor.data.rows import BadRow

_EVIDENCES, _CONDITIONS = "release_evidences.json", "release_conditions.json"
_USED = ("AGE", "SEX", "PATHOLOGY", "EVIDENCES", "INITIAL_EVIDENCE", "DIFFERENTIAL_DIAGNOSIS")
_SEXES = {"M": "male", "F": "female"}


def importer(folder: Path) -> Importer:
    """Reads the patients of a folder by its `release_evidences.json` and `release_conditions.json`.

    Gold is the sampled pathology; `differential` has its probabilities; `meta` has `icd10`, `severity` (1 is
    the gravest, 5 the mildest) and `severities` of all in the differential.

    Raises:
        UserError: one of the two isn't there, or isn't what its name says.
    """
    evidences, conditions = (_table(folder / name) for name in (_EVIDENCES, _CONDITIONS))
    by_name = {str(entry.get("cond-name-eng") or name): entry for name, entry in conditions.items()}

    def read(row: Mapping[str, Any]) -> Case:
        disease, sex = str(row.get("PATHOLOGY") or "").strip(), str(row.get("SEX") or "").strip().upper()
        if disease not in by_name | conditions:
            raise BadRow("PATHOLOGY", f"{disease[:40]!r} is not in {_CONDITIONS}")
        answers: dict[str, list[str]] = {}
        for code in _list(row, "EVIDENCES"):
            name, _, value = str(code).partition("_@_")
            answers.setdefault(name, []).append(value)
        initial = str(row.get("INITIAL_EVIDENCE") or "").partition("_@_")[0]
        if unknown := sorted({*answers, *([initial] if initial else [])} - set(evidences)):
            raise BadRow("EVIDENCES", f"{unknown[0]!r} is not in {_EVIDENCES}")
        told = {name: _answered(evidences[name], values) for name, values in answers.items()}
        past = [told[name] for name in told if evidences[name].get("is_antecedent") and name != initial]
        present = [told[name] for name in told if not evidences[name].get("is_antecedent") and name != initial]
        sections = {
            "Sex": [_SEXES.get(sex, sex)],
            "Age": [] if row.get("AGE") in (None, "") else [str(row["AGE"])],
            "Chief complaint": [told.get(initial) or _answered(evidences[initial], [""])] if initial else [],
            "History of present illness": present,
            "Past medical history": past,
        }
        if not told:
            raise BadRow("EVIDENCES", "it names none")
        text = "\n".join(f"{label}: {' '.join(said)}" for label, said in sections.items())
        differential = _differential(row)
        grades = {name: entry.get("severity") for name, entry in (conditions | by_name).items()}
        meta = {
            "severity": grades[disease],
            "icd10": (by_name.get(disease) or conditions[disease]).get("icd10-id"),
            "severities": {name: grades.get(name) for name in differential},
        }
        gold = Diagnosis(diseases=(disease,))
        fields: dict[str, Any] = {"differential": differential or None, "language": "en", "meta": meta}
        return case_of(row, "ddxplus", text, _USED, gold, **fields)

    return read


def _table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"DDXPlus needs {path.name} beside its patients: put it into {path.parent}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise UserError(f"{path}: it must map names to entries, as DDXPlus has it")
    return found


def _list(row: Mapping[str, Any], field: str) -> list[Any]:
    """A list, which CSV keeps as Python writes it."""
    value = row.get(field)
    try:
        value = ast.literal_eval(value) if isinstance(value, str) and value.strip() else value or []
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow(field, "not a list as Python writes it") from error
    if not isinstance(value, list):
        raise BadRow(field, f"a list is wanted, not {type(value).__name__}")
    return value


def _differential(row: Mapping[str, Any]) -> dict[str, float]:
    try:
        found = {str(name): float(probability) for name, probability in _list(row, "DIFFERENTIAL_DIAGNOSIS")}
    except (TypeError, ValueError) as error:
        raise BadRow("DIFFERENTIAL_DIAGNOSIS", "pairs of name and probability are wanted") from error
    if not all(0 <= probability <= 1 for probability in found.values()):
        raise BadRow("DIFFERENTIAL_DIAGNOSIS", "a probability must be between 0 and 1")
    return found


def _answered(evidence: Mapping[str, Any], values: list[str]) -> str:
    """The question in English and its answer: yes, a number, or the values chosen."""
    meanings = evidence.get("value_meaning") or {}
    said = [str((meanings.get(value) or {}).get("en") or value) for value in values if value]
    scale = [value for value in evidence.get("possible-values") or () if isinstance(value, int)]
    of = f" (of {min(scale)} to {max(scale)})" if scale and said else ""
    return f"{evidence.get('question_en', '')} {', '.join(said) or 'Yes'}{of}."
