"""The plan and its two file formats."""

from __future__ import annotations

import ast
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.plan import Plan, PlannedWait, load_plan, plan_from_json, plan_to_json, save_plan
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.planning.zeus import zeus_plan

from .jobs import bundled_profile


@pytest.fixture(scope="module")
def plan() -> Plan:
    planner = Planner(build_graph(one_f_one_b(2, 4)), bundled_profile(2), blocking_power_w=60.0, schedule="1f1b")
    return planner.plan(Target.slowdown(0.05))


def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_the_file_has_the_documented_keys(plan: Plan) -> None:
    content = json.loads(plan_to_json(plan))
    assert content["schema"] == "perseus-plan"
    assert content["schedule"] == "1f1b"
    assert content["baseline"] == {"iteration_time_s": plan.baseline_time_s, "energy_j": plan.baseline_energy_j}
    assert content["gap"] == plan.gap
    assert content["stages"][0][0] == ["forward", 0, plan.clocks_mhz(0)[0]]
    assert [len(stage) for stage in content["stages"]] == [8, 8]


def test_waits_survive_the_file(plan: Plan) -> None:
    waits = (PlannedWait(-1, 800, 0.0, 0.02), PlannedWait(7, 900, 0.3, 0.4))
    with_waits = replace(plan, waits=((), waits))
    assert plan_from_json(plan_to_json(with_waits)) == with_waits
    assert with_waits.waits_of(1) == waits
    assert plan.waits_of(1) == ()
    assert "waits" not in json.loads(plan_to_json(plan))


@pytest.mark.parametrize("after", [[1, 1], [3, 2], [8], [-2]])
def test_waits_stand_in_order_between_instructions(plan: Plan, after: list[int]) -> None:
    content = json.loads(plan_to_json(plan)) | {"waits": [[], [[one, 800, 0.0, 0.02] for one in after]]}
    with pytest.raises(PlanError, match="waits"):
        plan_from_json(json.dumps(content))


def test_chunks_survive_the_file() -> None:
    planner = Planner(build_graph(interleaved_1f1b(2, 4)), bundled_profile(2), blocking_power_w=60.0)
    plan = planner.plan(Target.slowdown())
    assert plan_from_json(plan_to_json(plan)) == plan
    assert {p.instruction.chunk for stage in plan.stages for p in stage} == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "schema"),
        ({"version": 2}, "version"),
        ({"energy_j": -1.0}, "energy_j"),
        ({"energy_j": "much"}, "energy_j"),
        ({"extra": 1}, "extra"),
        ({"gap": 0.5}, "gap: got 0.5"),
        ({"stages": []}, "stages"),
        ({"stages": [[["forward", 0, 1400]]]}, "predicted_s: 2 stages"),
        ({"baseline": {"iteration_time_s": 1.0}}, "baseline.energy_j"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(plan: Plan, change: dict[str, object], message: str) -> None:
    content = json.loads(plan_to_json(plan)) | change
    with pytest.raises(PlanError, match=message):
        plan_from_json(json.dumps(content))


@pytest.mark.parametrize("row", [["forward", 0], ["forward", 0, 0], [0, 0, 1400], ["forward", 0, 1400, "x"], []])
def test_a_bad_row_is_named(plan: Plan, row: list[object]) -> None:
    content = json.loads(plan_to_json(plan))
    content["stages"][1][3] = row
    with pytest.raises(PlanError, match=r"stages\.1\.3"):
        plan_from_json(json.dumps(content))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(PlanError, match=name):
            load_plan(tmp_path / name)


def test_clock_changes_count_the_way_back_to_the_first(plan: Plan) -> None:
    clocks = plan.clocks_mhz(0)
    changes = sum(a != b for a, b in itertools.pairwise(clocks)) + (clocks[0] != clocks[-1])
    assert plan.clock_changes(0) == changes > 0


def test_the_zeus_format_is_a_literal(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(zeus_plan(plan))
    expected = [[(p.instruction.kind, p.frequency_mhz) for p in stage] for stage in plan.stages]
    assert ast.literal_eval((tmp_path / "plan.py").read_text()) == expected
