"""benchmarks/rate: the choice of settings and the resuming of runs, on made-up results."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from rate import jobs
from rate.compare import fewest_bits, frontier, of_common_seeds, settings_of, standard_error, thresholds, tuned_adamw
from rate.jobs import Job
from rate.plans import PLANS, quick
from rate.tables import _words
from training.task import Quality, Task


def result(method: str, strength: float, seed: int, points: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    """points: (Δ, bits, held-out score, test score)."""
    job = {"task": "made-up", "method": method, "setting": {"strength": strength}, "seed": seed, "epochs": None}
    return {"job": job, "points": [[step, bits, held, 0.1, test, 0.1] for step, bits, held, test in points]}


def task(measure: str = "accuracy", tolerance: float = 0.002) -> Task:
    quality = Quality(0.0, 0.0)
    return Task("made-up", None, None, None, lambda *_: quality, 1, 1, 1e-3, 0.0, measure, tolerance)  # type: ignore[arg-type]


def test_bits_are_the_fewest_at_the_quality_of_the_adamw_that_held_out_rows_choose() -> None:
    found = settings_of(
        [
            result("adamw", 1, 0, [(0, 32, 0.90, 0.80), (0.1, 3, 0.9, 0.80)]),
            result("adamw", 2, 0, [(0, 32, 0.89, 0.99), (0.1, 2, 0.9, 0.70)]),  # better on the test set: not chosen
            result("backslash", 1, 0, [(0, 32, 0.9, 0.8), (0.1, 1.5, 0.8, 0.799), (0.2, 1.0, 0.9, 0.797)]),
            result("l1", 1, 0, [(0, 32, 0.9, 0.8), (0.2, 1.0, 0.5, 0.5)]),
        ]
    )
    assert tuned_adamw(found).setting == {"strength": 1}
    least = thresholds(task(), found)
    assert least == pytest.approx({"held_out": 0.898, "test": 0.798})
    best = fewest_bits(found, "backslash", least["test"], "test")
    assert best is not None
    assert (best.step, best.bits) == (0.1, (1.5,))
    blind = fewest_bits(found, "backslash", least["held_out"], "held_out")
    assert blind is not None
    assert blind.bits == (1.0,)
    assert fewest_bits(found, "l1", least["test"], "test") is None


def test_one_percent_of_nll_is_a_lower_score() -> None:
    assert task("−NLL", 0.01).threshold(-1.5) == pytest.approx(-1.515)


def test_a_grid_that_one_seed_lacks_is_left_out() -> None:
    found = settings_of(
        [result("l1", 1, 0, [(0.1, 2, 0.5, 0.5), (0.2, 1, 0.5, 0.5)]), result("l1", 1, 1, [(0.1, 4, 0.5, 0.7)])]
    )
    assert [(s.step, s.bits, s.test) for s in found] == [(0.1, (2, 4), (0.5, 0.7))]


def test_own_grids_are_a_setting_beside_one_grid_for_all() -> None:
    run = result("adamw", 1, 0, [(0, 32, 0.9, 0.9), (0.1, 3, 0.9, 0.9)])
    run["points"].append([0.1, 2.0, 0.9, 0.1, 0.9, 0.1, 0.75])
    run["points"].append([0.2, 1.0, 0.9, 0.1, 0.8, 0.1, 0.75])
    found = settings_of([run])
    assert [(s.step, s.spread, s.bits) for s in found if s.step] == [
        (0.1, 0, (3,)),
        (0.1, 0.75, (2,)),
        (0.2, 0.75, (1,)),
    ]
    best = fewest_bits(found, "adamw", 0.9, "test")
    assert best is not None
    assert _words(best) == "strength 1, Δ 2^-3.32193, spread 0.75"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 8), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_frontier_holds_exactly_the_points_that_no_other_beats(points: list[tuple[float, float]]) -> None:
    found = settings_of([result("l1", i, 0, [(0.1, bits, score, score)]) for i, (bits, score) in enumerate(points)])
    kept = {(bits, score) for bits, score, _ in frontier(found, "l1")}
    for bits, score in points:
        beaten = any(b <= bits and s >= score and (b, s) != (bits, score) for b, s in points)
        assert ((bits, score) in kept) == (not beaten)


def test_standard_error_is_that_of_the_mean() -> None:
    assert standard_error((1.0, 2.0, 4.0)) == pytest.approx(statistics.stdev([1, 2, 4]) / 3**0.5)
    assert standard_error((1.0,)) == 0


def test_what_a_former_run_left_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Job("mlp", "l1", {"strength": 1.0}), Job("mlp", "l1", {"strength": 2.0})
    (tmp_path / f"{here.key}.json").write_text(json.dumps({"mark": 1}))
    assert jobs._missing([here, there, there], tmp_path) == [there]
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("nothing is missing"))
    assert jobs.run_all([here, here], tmp_path, 2, "") == [{"mark": 1}, {"mark": 1}]


def test_a_job_is_known_by_all_that_it_asks() -> None:
    base = Job("mlp", "l1", {"strength": 1.0, "lr": 1e-3})
    assert base.key == Job("mlp", "l1", {"lr": 1e-3, "strength": 1.0}).key
    others = [
        Job("cnn", "l1", base.setting),
        Job("mlp", "adamw", base.setting),
        Job("mlp", "l1", {"strength": 1.0}),
        Job("mlp", "l1", base.setting, 1),
        Job("mlp", "l1", base.setting, 0, 3),
    ]
    assert len({base.key, *(job.key for job in others)}) == 6


@pytest.mark.parametrize("name", PLANS)
def test_baselines_get_as_many_settings_as_backslash(name: str) -> None:
    plan = PLANS[name]
    ours = max(len(plan.settings.get(method, ())) for method in ("backslash", "backslash-grid"))
    assert len(plan.settings["adamw"]) >= ours
    assert len(plan.settings["l1"]) >= ours
    assert len(quick(plan).curves()) < len(plan.curves())


def test_only_seeds_that_every_setting_has_are_compared() -> None:
    runs = [result("l1", 1, seed, [(0.1, 2, 0.5, 0.5)]) for seed in (0, 1, 2)]
    runs += [result("l1", 2, seed, [(0.1, 2, 0.5, 0.5)]) for seed in (0, 2)]
    assert [(r["job"]["setting"]["strength"], r["job"]["seed"]) for r in of_common_seeds(runs)] == [
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 2),
    ]


def test_kept_runs_come_back_beside_those_that_are_there(tmp_path: Path) -> None:
    runs = [result("l1", strength, 0, [(0.1, 2, 0.5, 0.5)]) for strength in (1, 2)]
    jobs.keep([*runs, runs[0]], tmp_path / "runs.jsonl")
    (tmp_path / "runs").mkdir()
    mine = tmp_path / "runs" / f"{Job(**runs[0]['job']).key}.json"
    mine.write_text('{"mark": 1}')
    jobs.restore(tmp_path / "runs.jsonl", tmp_path / "runs")
    assert jobs.read_all([Job(**run["job"]) for run in runs], tmp_path / "runs") == [{"mark": 1}, runs[1]]
    jobs.restore(tmp_path / "nothing.jsonl", tmp_path / "runs")
