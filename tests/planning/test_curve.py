"""What is drawn of a frontier comes back from its file, and files of something else are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.curve import load_curve
from perseus_plugin.planning.frontier import make_frontier, save_frontier
from perseus_plugin.planning.planner import Planner

from .jobs import bundled_profile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    planner = Planner(build_graph(one_f_one_b(2, 4)), bundled_profile(2), blocking_power_w=60.0)
    save_frontier(make_frontier(planner), tmp_path / "frontier.json")
    return tmp_path / "frontier.json"


def test_a_curve_comes_back_as_it_was_saved(file: Path) -> None:
    planner = Planner(build_graph(one_f_one_b(2, 4)), bundled_profile(2), blocking_power_w=60.0)
    assert load_curve(file) == make_frontier(planner).curve()
    assert len(load_curve(file).samples) > 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "perseus-plan"}, "schema: "),
        ({"version": 2}, "version: "),
        ({"points": []}, "points: "),
        ({"baseline": {"iteration_time_s": 1.0}}, "baseline.energy_j: "),
        ({"points": [{"deadline_s": "soon"}]}, "points.0.deadline_s: "),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(file: Path, change: dict[str, object], reason: str) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PlanError, match=f"frontier.json: {reason}"):
        load_curve(file)


def test_a_file_that_is_not_there_or_cut_off_is_refused(file: Path) -> None:
    file.write_text(file.read_text()[:-40])
    with pytest.raises(PlanError, match=r"frontier\.json: not valid JSON: "):
        load_curve(file)
    with pytest.raises(PlanError, match="cannot be read"):
        load_curve(file.parent / "gone.json")


def test_reading_needs_no_solver() -> None:
    code = "import sys, perseus_plugin.planning.curve; sys.exit('ortools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
