from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from preceptor.clinical.textbook.book import load
from preceptor.core.errors import UserError
from preceptor.core.records import Diagnosis
from preceptor.data.rows import BadRow
from preceptor.data.tables import Columns, iso_date, name_of

NAMES = "支气管炎；高血压3级，极高危"
ROW = {"no": 7, "cc": "咳嗽3天", "hpi": None, "dx": NAMES, "pat": "P1", "day": "2024/1/31", "ward": "3"}
COLUMNS = {"id": "no", "sections": {"主诉": "cc", "现病史": "hpi"}, "diseases": "dx", "patient": "pat", "date": "day"}


def case(row=ROW, **change):
    return Columns.model_validate(COLUMNS | change).importer([row])(row)


def test_columns_become_a_case():
    found = case()
    assert (found.id, found.text, found.language) == ("7", "主诉: 咳嗽3天\n现病史:", "zh")
    assert (found.group, found.source, found.gold_source) == ("P1", "table", "file")
    assert found.gold == Diagnosis(diseases=("支气管炎", "高血压3级，极高危"))
    assert found.meta == {"patient": "P1", "date": "2024-01-31", "ward": "3"}


def test_a_text_column_and_the_least_there_is():
    row = {"record": "cough", "id": "x"}
    found = Columns(text="record").importer([row])(row)
    assert (found.text, found.language, found.gold, found.meta) == ("cough", "en", None, {"id": "x"})
    assert found.id.startswith("row-")
    assert Columns(text="record", language="zh").importer()(row).language == "zh"


def test_codes_are_gold_where_no_column_has_names():
    known = load().diseases
    code = next(iter(known.values()))
    row = ROW | {"icd1": f"{code.icd10}.x00; Z99.9", "icd2": ""}
    found = case(row, diseases=None, icd=["icd1", "icd2"])
    assert found.gold == Diagnosis(diseases=(code.zh, "Z99.9"))
    assert (found.gold_source, found.meta["icd"]) == ("code", [f"{code.icd10}.X00", "Z99.9"])
    both = case(row, icd="icd1")
    assert (both.gold.diseases[0], both.gold_source, both.meta["icd"][1]) == ("支气管炎", "file", "Z99.9")


@pytest.mark.parametrize("disease", load().diseases.values(), ids=lambda disease: disease.icd10)
def test_a_code_and_its_refinements_have_the_textbooks_name(disease):
    assert name_of(disease.icd10, "en") == name_of(disease.icd10 + "0x1", "en") == disease.en
    assert name_of(disease.icd10, "zh") == disease.zh


@pytest.mark.parametrize(
    ("given", "iso"),
    [
        *((f"{day}{time}", "2024-01-31")
          for day in ("2024-01-31", "2024/1/31", "20240131", "31.01.2024", "2024年1月31日")
          for time in ("", " 08:05", "T08:05:00+08:00")),
        ("45322", "2024-01-31"),
        ("45322.5", "2024-01-31"),
    ],
)  # fmt: skip
def test_dates(given, iso):
    assert iso_date(given) == iso


@pytest.mark.parametrize("given", ["31/01/2024", "2024-13-01", "2024-02-30", "1.2", "soon", "99999", "2024013", "45"])
def test_what_is_no_date(given):
    assert iso_date(given) is None


@given(st.dates(date(1950, 1, 1), date(2099, 12, 31)), st.sampled_from(["%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%d.%m.%Y"]))
def test_any_date_in_any_form(day, form):
    assert iso_date(day.strftime(form)) == day.isoformat()
    assert iso_date(str((day - date(1899, 12, 30)) // timedelta(days=1))) == day.isoformat()


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (ROW | {"cc": " "}, "text", "empty"),
        (ROW | {"no": True}, "id", "neither"),
        ({key: ROW[key] for key in ROW if key != "pat"}, "pat", "no such column"),
        (ROW | {"icd": "soon"}, "icd", "no ICD-10 code"),
    ],
)
def test_a_row_that_makes_no_case(row, field, reason):
    importer = Columns.model_validate(COLUMNS | ({"icd": "icd"} if "icd" in row else {})).importer()
    with pytest.raises(BadRow) as caught:
        importer(row)
    assert (caught.value.field, reason in caught.value.reason) == (field, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"date": "dya"}, "the file has no column 'dya'; did you mean 'day'?"),
        ({"icd": "zzz"}, "the file has no column 'zzz'; there are cc, day, dx, hpi, no, pat, ward"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest(change, reason):
    with pytest.raises(UserError) as caught:
        case(**change)
    assert reason in str(caught.value)


@pytest.mark.parametrize("columns", [{}, {"text": "a", "sections": {"b": "c"}}, {"text": "a", "more": "b"}])
def test_a_mapping_says_where_the_text_is(columns):
    with pytest.raises(ValidationError):
        Columns.model_validate(columns)
