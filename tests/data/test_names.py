"""A user's table of names is read row by row; a bad row is named and costs only itself."""

from pathlib import Path

import pytest

from preceptor.clinical.names import Entry
from preceptor.core.errors import UserError
from preceptor.core.records import Issue
from preceptor.data.names import read


def test_rows_become_entries_and_issues(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text(
        "\ufeffName,code,Aliases\n"
        "肺癌,C34.9,支气管肺癌|lung cancer； LC \n"
        ",A00,x\n"
        "骨折,ABC,\n"
        "湿疹,L30.900x001,\n"
        "1.,A01,\n"
        "荨麻疹,l50.9,？？\n"
        "一,二\n"
        "痛风,,痛风性关节炎\n",
        "utf-8",
    )
    found = list(read(path))
    assert [one for one in found if isinstance(one, Entry)] == [
        Entry("肺癌", "C34.9", ("支气管肺癌", "lung cancer", "LC")),
        Entry("骨折"),
        Entry("湿疹", "L30.900x001"),
        Entry("痛风", "", ("痛风性关节炎",)),
    ]
    assert [(one.line, one.field, one.action) for one in found if isinstance(one, Issue)] == [
        (3, "name", "dropped"),
        (4, "code", "changed"),
        (6, "name", "dropped"),
        (7, "aliases", "dropped"),
        (8, "", "dropped"),
    ]


def test_a_table_without_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text("disease,icd\n肺癌,C34\n", "utf-8")
    with pytest.raises(UserError, match=r"names\.csv:2: no column 'name' in it \(there are disease, icd\)"):
        list(read(path))
