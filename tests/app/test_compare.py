"""What `RUN[:MODEL]` means."""

from pathlib import Path

import pytest

from preceptor.app.compare import sides
from preceptor.core.errors import UserError
from preceptor.report.compare import Side
from preceptor.report.metrics import ModelScore
from preceptor.stages.base import write_records


def written(folder: Path, models: str) -> None:
    folder.mkdir(parents=True)
    scores = [
        ModelScore(case_id="1", sample=n, value=v, parts={"top1": v, "parsed": 1.0, "evidence_grounded": None}, model=m)
        for m in models.split()
        for n, v in enumerate((1.0, 0.0))
    ]
    write_records(folder / "scores.jsonl", scores)


def test_sides_are_runs_and_their_models(tmp_path: Path) -> None:
    written(tmp_path / "one" / "evaluate", "base student exact")
    assert sides("one", tmp_path) == [Side("one:student", {"1": {"top1": 0.5, "parsed": 1.0, "score": 0.5}})]
    (base,) = sides(f"{tmp_path / 'one'}:base", Path("nowhere"))
    assert base.scores == {"1": {"top1": 0.5, "parsed": 1.0, "score": 0.5}}
    assert [one.name for one in sides("one:*", tmp_path)] == ["one:base", "one:student", "one:exact"]
    with pytest.raises(UserError, match="no model 'studnt'; did you mean 'student'"):
        sides("one:studnt", tmp_path)
    with pytest.raises(UserError, match=r"oen: no such run in .*did you mean 'one'"):
        sides("oen", tmp_path)
    written(tmp_path / "one" / "evaluate_more", "student")
    with pytest.raises(UserError, match=r"name one of its evaluations: .*evaluate, .*evaluate_more"):
        sides("one", tmp_path)
    assert sides("one/evaluate_more", tmp_path)[0].scores
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it has no evaluation yet"):
        sides("empty", tmp_path)
