"""Power budgets and prices on the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from perseus_plugin.planning.plan import load_plan
from perseus_plugin.profiling.profile import save_profile
from perseus_plugin.reporting.report.palette import AMBER, BLUE, BOUND, RED, SERIES, VIOLET
from tests.cli.commands import OF_AXES, Perseus, colours
from tests.planning.jobs import bundled_profile


@pytest.fixture
def job(tmp_path: Path) -> tuple[object, ...]:
    save_profile(bundled_profile(2), tmp_path / "profile.csv")
    return tmp_path / "profile.csv", "--microbatches", 4, "--blocking-power", 60


def test_a_plan_within_a_budget_says_what_it_draws(perseus: Perseus, job: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    told = ("--power-budget", "1.2kW", "--group", "last=1,3:560", "--replicas", 2, "--peak-w", "1400W")
    nodes = ("--node-watts", 80, "--node-share", 0.02, "--gpus-per-node", 2, "--peak-window", 2)
    done = perseus("plan", *job, *told, *nodes, "-o", out)
    assert done.returncode == 0, done.stderr
    plan = load_plan(out)
    assert plan.power is not None
    assert [(one.name, round(one.allowed_w, 6)) for one in plan.power.budgets] == [("the job", 1200.0), ("last", 560.0)]
    assert all(one.planned_w <= one.allowed_w * (1 + 1e-9) for one in plan.power.budgets)
    assert plan.power.peaks.window_s == 2
    assert plan.power.peaks.job_w <= 1400
    assert f"{plan.power.budgets[1].planned_w:.1f} W of 560.0 W" in done.stdout
    assert "shortest iteration possible" in done.stdout


def test_what_costs_least_is_planned_and_its_cost_shown(
    perseus: Perseus, job: tuple[object, ...], tmp_path: Path
) -> None:
    out, times_s = tmp_path / "plan.json", []
    for per_gpu_hour in (0, 0.01, 100):
        done = perseus("plan", *job, "--price-kwh", 0.1, "--price-gpu-hour", per_gpu_hour, "-o", out)
        assert done.returncode == 0, done.stderr
        assert "cost per 1,000 iterations" in done.stdout
        times_s.append(load_plan(out).iteration_time_s)
    assert times_s[0] > times_s[1] > times_s[2]


def test_a_frontier_marks_budget_and_price_and_says_where_full_speed_is_best(
    perseus: Perseus, job: tuple[object, ...], tmp_path: Path
) -> None:
    marks = ("--power-budget", 450, "--price-kwh", 0.1, "--price-gpu-hour", 100)
    done = perseus(
        "frontier", *job, *marks, "--tolerance", 0.05, "-o", tmp_path / "f.json", "--plot", tmp_path / "f.svg"
    )
    assert done.returncode == 0, done.stderr
    assert "within the power budget: " in done.stdout
    assert "least cost: " in done.stdout
    assert "full speed, with " in done.stdout
    picture = (tmp_path / "f.svg").read_text()
    assert "within the power budget" in picture
    assert {BLUE, RED, BOUND, VIOLET, AMBER} <= colours(picture) <= {*SERIES, BOUND, *OF_AXES}


def test_budgets_are_simulated_beside_slowdowns(perseus: Perseus, job: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = perseus("simulate", *job, "--slowdown", 0, "--power-budget", 450, "--power-budget", "50W", "-o", out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert [row["power_budget_w"] for row in rows] == ["", "450.0", "50.0"]
    assert float(rows[1]["energy_j"]) / float(rows[1]["iteration_s"]) <= 450
    assert "the lowest plan found draws" in rows[2]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--power-budget", "much"), '--power-budget: got "much"; allowed: watts'),
        (("--power-budget", "50"), "got 50.0 W for the job; the lowest plan found draws"),
        (("--power-budget", "450", "--slowdown", "0.1"), "got --slowdown and --power-budget, --group or --peak-w"),
        (("--power-budget", "450", "--replicas", "0"), "--replicas: got 0"),
        (("--gpus-per-node", "0"), "--gpus-per-node: got 0; allowed: a whole number from 1"),
        (("--node-watts", "-1"), "node overhead, watts: got -1"),
        (("--peak-window", "0"), "peak window: got 0"),
        (("--group", "0-9:450"), "allowed: 0 to 1, rising"),
        (("--group", "450"), "group: got"),
        (("--price-kwh", "0.1"), "--price-gpu-hour: missing"),
        (("--price-kwh", "-1", "--price-gpu-hour", "2"), "price per kWh: got -1"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(
    perseus: Perseus, job: tuple[object, ...], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = perseus("plan", *job, "-o", tmp_path / "plan.json", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
