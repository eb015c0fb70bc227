import json

import pytest

from preceptor.core.errors import UserError
from preceptor.core.records import Diagnosis
from preceptor.data.ddxplus import importer
from preceptor.data.files import importer_of, read, sniff
from preceptor.data.rows import BadRow
from tests.data.kinds import delimited


def evidence(question, kind="B", *, past=False, values=(), meaning=None):
    return {
        "question_en": question,
        "question_fr": "?",
        "data_type": kind,
        "is_antecedent": past,
        "possible-values": list(values),
        "value_meaning": {key: {"fr": "?", "en": text} for key, text in (meaning or {}).items()},
    }


EVIDENCES = {
    "E_1": evidence("Does it itch?"),
    "E_2": evidence("Where?", "M", values=["V_1", "V_2"], meaning={"V_1": "arm", "V_2": "left leg"}),
    "E_3": evidence("How strong is it?", "C", values=[0, 1, 10]),
    "E_4": evidence("Have you had it before?", past=True),
}
CONDITIONS = {
    "Gale": {"condition_name": "Gale", "cond-name-eng": "Scabies", "icd10-id": "B86", "severity": 5},
    "Urticaria": {"condition_name": "Urticaria", "cond-name-eng": "Urticaria", "icd10-id": "l50", "severity": 4},
}
ROW = {
    "AGE": "18",
    "DIFFERENTIAL_DIAGNOSIS": "[['Scabies', 0.75], ['Urticaria', 0.25]]",
    "SEX": "M",
    "PATHOLOGY": "Scabies",
    "EVIDENCES": "['E_1', 'E_2_@_V_1', 'E_2_@_V_2', 'E_3_@_10', 'E_4']",
    "INITIAL_EVIDENCE": "E_1",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "release_evidences.json").write_text(json.dumps(EVIDENCES))
    (tmp_path / "release_conditions.json").write_text(json.dumps(CONDITIONS))
    return tmp_path


def test_a_patient(folder):
    path = folder / "release_test_patients"
    path.write_text(delimited([ROW, ROW | {"AGE": "19"}, ROW]))
    assert sniff(path) == "ddxplus"
    case, other, same = (found.case for found in read(path, importer_of("ddxplus", path)))
    assert case.text == (
        "Sex: male\nAge: 18\nChief complaint: Does it itch? Yes.\n"
        "History of present illness: Where? arm, left leg. How strong is it? 10 (of 0 to 10).\n"
        "Past medical history: Have you had it before? Yes."
    )
    assert (case.gold, case.gold_source) == (Diagnosis(diseases=("Scabies",)), "file")
    assert case.differential == {"Scabies": 0.75, "Urticaria": 0.25}
    assert case.meta == {"severity": 5, "icd10": "B86", "severities": {"Scabies": 5, "Urticaria": 4}}
    assert (case.language, case.source) == ("en", "ddxplus")
    assert other.id not in (case.id, same.id)
    assert same.id == f"{case.id}-2"


def test_lists_that_are_lists_already(folder):
    row = ROW | {"EVIDENCES": ["E_1"], "DIFFERENTIAL_DIAGNOSIS": [["Scabies", 1]], "PATHOLOGY": "Gale", "AGE": 3}
    case = importer(folder)(row)
    assert case.gold == Diagnosis(diseases=("Gale",))
    assert "Past medical history:" in case.text


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"PATHOLOGY": "Mumps"}, "PATHOLOGY", "'Mumps' is not in release_conditions.json"),
        ({"EVIDENCES": "['E_9']"}, "EVIDENCES", "'E_9' is not in release_evidences.json"),
        ({"INITIAL_EVIDENCE": "E_9"}, "EVIDENCES", "'E_9' is not in"),
        ({"EVIDENCES": "__import__('os')"}, "EVIDENCES", "not a list as Python writes it"),
        ({"EVIDENCES": "[" * 9000}, "EVIDENCES", "not a list as Python writes it"),
        ({"EVIDENCES": "3"}, "EVIDENCES", "a list is wanted, not int"),
        ({"DIFFERENTIAL_DIAGNOSIS": "['x']"}, "DIFFERENTIAL_DIAGNOSIS", "pairs"),
        ({"DIFFERENTIAL_DIAGNOSIS": "[['x', 2]]"}, "DIFFERENTIAL_DIAGNOSIS", "between 0 and 1"),
    ],
)
def test_a_row_that_makes_no_case(folder, change, field, reason):
    with pytest.raises(BadRow) as caught:
        importer(folder)(ROW | change)
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "put it into"), ("{", "not JSON"), ("[]", "must map names"), ('{"a": 1}', "must map")],
)
def test_the_files_beside_it_are_needed(folder, content, reason):
    path = folder / "release_conditions.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=reason):
        importer(folder)
