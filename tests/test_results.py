"""The table of docs/results.md: figures from runs, and how they are told."""

import json
from math import isnan

import pytest

from benchmarks.results import __main__ as results
from benchmarks.results.figures import DIFFERENTIAL, Run, differentials, means, overall, read
from benchmarks.results.page import BEGINNING, MARK, PRETRAINED, About, page, pretrained, written
from preceptor.core.records import Case, Diagnosis, Failure, FailureKind, Prediction
from preceptor.core.statistics import Estimate

ABOUT = About("make results", "a machine")


def made(teacher, seed, **models):
    """A run of which each model has a top-1, and an ECE of half that with a floor of .01."""
    figures = {
        model: {name: Estimate(value=value, low=value - 0.1, high=value + 0.1, n=100) for name, value in row.items()}
        for model, row in ((m, {"top1": top1, "ece": top1 / 2, "ece_floor": 0.01}) for m, top1 in models.items())
    }
    return Run(teacher, seed, 1800.0, 100, figures)


RUNS = [
    made("over", 1, exact=0.9, sft=0.5, distill_first=0.6),
    made("over", 2, exact=0.9, sft=0.6, distill_first=0.8),
    made("honest", 3, exact=0.9, sft=0.7, distill_first=0.6),
    made("honest", 4, exact=0.9, sft=0.7, distill_first=0.8),
]


def test_the_seeds_variance_is_pooled_over_the_teachers():
    # Squares about the teachers' means: .02 and .02; 2 are free; t(.975, 2) = 4.3027.
    found = means(RUNS)
    half = 4.3027 * (0.04 / 2) ** 0.5 / 2**0.5
    for teacher in ("over", "honest"):
        assert found[teacher]["distill_first"]["top1"].value == pytest.approx(0.7)
        assert found[teacher]["distill_first"]["top1"].half == pytest.approx(half, abs=1e-4)


def test_differences_are_of_each_run():
    gains = means(RUNS, "sft")
    assert [gains[t]["distill_first"]["top1"].value for t in ("over", "honest")] == pytest.approx([0.15, 0.0])
    # Differences .1, .2, -.1, .1: squares .005 and .02.
    half = 4.3027 * (0.025 / 2) ** 0.5 / 2**0.5
    assert gains["over"]["distill_first"]["top1"].half == pytest.approx(half, abs=1e-4)
    both = overall(RUNS, "sft")["distill_first"]["top1"]
    assert both.value == pytest.approx(0.075)
    assert both.half == pytest.approx(half / 2**0.5, abs=1e-4)


def test_of_one_seed_there_is_no_interval():
    assert isnan(means(RUNS[:1])["over"]["sft"]["top1"].half)


def test_the_tables_word_for_word():
    told = page(RUNS, ABOUT)
    lines = told.splitlines()
    assert "4 runs of `recipes/results.yaml`, together 2.0 hours" in told
    assert lines.count("|  | parsed | top-1 | differential F1 | ECE (floor) | Brier | AUGRC |") == 5
    over = lines[lines.index("## A teacher who is over-confident") :]
    assert over[2] == "Seeds 1, 2."
    assert over[4:9] == [
        "|  | parsed | top-1 | differential F1 | ECE (floor) | Brier | AUGRC |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| the limit: the exact posterior |  | .900 ± .000 |  | .450 ± .000 (.010) |  |  |",
        "| SFT, best labels |  | .550 ± .152 |  | .275 ± .076 (.010) |  |  |",
        "| FIRST |  | .700 ± .430 |  | .350 ± .215 (.010) |  |  |",
    ]
    assert "| FIRST |  | +.150 ± .340 |  | +.075 ± .170 |  |  |" in over
    alone = page(RUNS[:1], ABOUT)
    assert "| FIRST |  | .600 |  | .300 (.010) |  |  |" in alone
    assert "All teachers" not in alone
    other = pretrained(RUNS[0], About("make results STUDENT=smollm2", "a machine"))
    assert "by `make results STUDENT=smollm2` in 0.5 hours. Machine: a machine. One seed" in other
    assert "| FIRST |  | .600 (.500 to .700) |  | .300 (.200 to .400) (.010) |  |  |" in other


def test_a_loss_has_its_sign():
    told = page([made("under", 7, sft=0.625, distill_first=0.5)], ABOUT)
    assert "| FIRST |  | −.125 |  | −.062 |  |  |" in told


def test_what_a_person_wrote_is_kept_and_the_other_part():
    first = written("", "tables\n")
    assert first == f"{BEGINNING}\n\n{MARK}\n\ntables\n"
    mine = first.replace(BEGINNING, "# Mine\n\nFIRST wins.")
    assert written(mine, "others\n") == f"# Mine\n\nFIRST wins.\n\n{MARK}\n\nothers\n"
    both = written(mine, "a row", PRETRAINED)
    assert both == f"# Mine\n\nFIRST wins.\n\n{MARK}\n\ntables\n\n{PRETRAINED}\n\na row\n"
    assert written(written(both, "others"), "a second", PRETRAINED) == (
        f"# Mine\n\nFIRST wins.\n\n{MARK}\n\nothers\n\n{PRETRAINED}\n\na second\n"
    )


def test_a_differential_is_held_against_the_exact_one():
    likely = {"Influenza": 0.6, "Common cold": 0.395, "Heart failure": 0.005}
    case = Case(
        id="a",
        text="Man, 30, fever for 2 days.",
        language="en",
        source="textbook",
        group="a",
        gold=Diagnosis(diseases=("Influenza",)),
        differential=likely,
    )
    silent = case.model_copy(update={"id": "b", "expects_abstention": True})
    said = [
        Prediction(case_id="a", model="knows", prompt_sha="", output=case.gold, distribution=likely),
        # What is named counts by its own probability, and abstention is no disease.
        Prediction(
            case_id="a",
            model="sees half",
            prompt_sha="",
            output=case.gold,
            confidence={"Influenza": 0.9},
            distribution={"Influenza": 0.001, "Peptic ulcer": 0.05, "": 0.05},
        ),
        Prediction(case_id="a", model="fails", prompt_sha="", failure=Failure(kind=FailureKind.UNPARSED)),
        Prediction(case_id="b", model="fails", prompt_sha="", output=Diagnosis()),
    ]
    found = {model: one.value for model, one in differentials([case, silent], said, "honest").items()}
    assert found.pop("teacher") < 1  # the record was written for no posterior
    assert found == {"exact": 1.0, "knows": 1.0, "sees half": 0.5, "fails": 0.0}


def test_no_two_runs_share_a_seed():
    plans = list(results.plans("results"))
    assert len({one.seed for one in plans}) == len({one.name for one in plans}) == 9
    assert [one.teacher for one in plans[:3]] == ["over", "honest", "under"]
    assert plans[1].overrides()[:3] == ("name=results-honest-4", "seed=4", "teacher.endpoint.name=honest")


@pytest.mark.slow
def test_the_harness_end_to_end(tmp_path):
    (plan,) = [one for one in results.plans("results-tiny", 1) if one.teacher == "over"]
    few = ("prepare.train=64", "prepare.validation=40", "prepare.test=16")
    results.run("results.yaml", plan.name, tmp_path, (*plan.overrides(), *few))
    found = read(tmp_path / plan.name, plan.teacher, plan.seed)
    told = page([found], ABOUT)
    assert found.cases == 16
    assert {"sft", "distill_first", "teacher", "few_shot", "exact"} <= set(found.figures)
    assert found.figures["exact"][DIFFERENTIAL].value == 1
    assert found.figures["distill_bucket"][DIFFERENTIAL].value > 0
    assert told.count("| FIRST |") == 2
    done = tmp_path / plan.name / "sft" / "done.json"
    before = done.stat().st_mtime_ns
    results.run("results.yaml", plan.name, tmp_path, (*plan.overrides(), *few))
    assert done.stat().st_mtime_ns == before
    assert json.loads(done.read_text())["seconds"] > 0
    with pytest.raises(SystemExit, match="made from another request"):
        results.run("results.yaml", plan.name, tmp_path, (*plan.overrides(), "prepare.train=65"))
