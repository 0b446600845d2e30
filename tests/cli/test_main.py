"""The command as a whole: how it is asked, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin import __version__
from perseus_plugin.profiling.profile import save_profile
from tests.cli.commands import Perseus
from tests.planning.jobs import bundled_profile

# The command itself, which says when a solver has begun; whoever started the tests may have had signals ignored.
SAYING = """
import signal, sys
from {module} import {name}

solve = {name}.{solver}.solve

def told(*given):
    print("solving", file=sys.stderr, flush=True)
    return {solves}

{name}.{solver}.solve = told
signal.signal(signal.SIGINT, signal.default_int_handler)
from perseus_plugin.cli.main import run

run()
"""
CP_SAT = {
    "module": "perseus_plugin.planning.cp_sat",
    "name": "cp_model",
    "solver": "CpSolver",
    "solves": "solve(*given)",
}
FLOW = {
    "module": "ortools.graph.python",
    "name": "min_cost_flow",
    "solver": "SimpleMinCostFlow",
    "solves": "sum(range(10**13))",  # for hours, and without releasing the interpreter, as the solver does
}

LISTING = """
import sys
from perseus_plugin.cli.main import run

try:
    run()
finally:
    print(*sys.modules, file=sys.stderr)
"""
HEAVY = {"matplotlib", "pandas", "plotly", "pyarrow", "scipy", "torch"}
NOT_FOR_IT = {"numpy.ma", "ortools.linear_solver.pywraplp", "perseus_plugin.config", "perseus_plugin.exchange.messages"}


def test_it_says_its_version_and_helps_on_short_demand(perseus: Perseus) -> None:
    assert perseus("--version").stdout == f"perseus {__version__}\n"
    for command in ((), ("plan",), ("straggler", "report")):
        done = perseus(*command, "-h")
        assert done.returncode == 0
        assert done.stdout == perseus(*command, "--help").stdout


def test_choices_are_completed(perseus: Perseus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PERSEUS_COMPLETE", "complete_bash")
    for words, found in (("perseus plan --effort t", "thorough"), ("perseus simulate --gpu b", "b200\nb300")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", "3")
        assert perseus().stdout.strip() == found


@pytest.mark.parametrize(("solver", "status"), [(CP_SAT, 130), (FLOW, -signal.SIGINT)], ids=["search", "flow"])
def test_ctrl_c_ends_a_command_amid_a_solver_with_nothing_written(
    tmp_path: Path, solver: dict[str, str], status: int
) -> None:
    save_profile(bundled_profile(4), tmp_path / "profile.csv")
    options = ("--microbatches", "16", "--blocking-power", "60", "--effort", "thorough", "-o", "out.json")
    command = [sys.executable, "-c", SAYING.format(**solver), "plan", "profile.csv", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "solving\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == status, "a shell calls both 130"
    assert set(said.split()) <= {"solving"}
    assert [file.name for file in tmp_path.iterdir()] == ["profile.csv"]


def test_a_plan_of_a_small_job_loads_its_solvers_and_nothing_else_that_is_heavy(tmp_path: Path) -> None:
    save_profile(bundled_profile(2), tmp_path / "profile.csv")
    options = ("--microbatches", "4", "--blocking-power", "60")
    command = [sys.executable, "-c", LISTING, "plan", "profile.csv", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert {"ortools.graph.python.min_cost_flow", "ortools.sat.python.cp_model_helper"} <= loaded
    # Before 2.0 NumPy loads `numpy.ma` itself.
    numpy = subprocess.run(
        [sys.executable, "-c", "import numpy, sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert not (HEAVY | NOT_FOR_IT - {*numpy.stdout.split()}) & loaded


@pytest.mark.parametrize(
    ("command", "picture", "library"),
    [
        (("frontier", "none.csv", "--plot"), "out.xyz", "matplotlib"),
        (("simulate", "none.csv", "--plot"), "out.xyz", "matplotlib"),
        (("timeline", "none", "-o"), "out.xyz", "matplotlib"),
        (("report", "none", "--html"), "", "plotly"),
        (("simulate", "none.json", "--html"), "", "plotly"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_before_anything_is_read(
    perseus: Perseus, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], picture: str, library: str
) -> None:
    pytest.importorskip(library)
    if picture:
        refused = perseus(*command, picture)
        assert refused.returncode == 2
        assert f"got {picture}; allowed: a path that ends in ." in refused.stderr
        assert " .svg" in refused.stderr
    for name in [one for one in sys.modules if one.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    refused = perseus(*command, "out.svg")
    assert refused.returncode == 2
    assert f"needs {library}, which is not installed" in refused.stderr
