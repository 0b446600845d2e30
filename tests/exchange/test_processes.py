"""Processes of ours run nothing that lies in the job's working folder, and find what they need all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_plugin.cli.verification.peers import wait_for_a_peer
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.exchange import processes
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A100
from perseus_plugin.planning.curve import FRONTIER_FILE
from perseus_plugin.planning.frontier_process import FrontierProcess
from perseus_plugin.planning.planner_process import PlannerProcess
from tests.planning.test_process import request
from tests.waiting import wait_until

OTHERS = ("numpy", "ortools", "pydantic", "pydantic_core", "pynvml", "yaml", "perseus_plugin", "sitecustomize")
PLANTED = """
import os
open(os.environ["PLANTED_RAN"], "a").write(__name__ + "\\n")
"""


def helper_works(folder: Path) -> None:
    EmulatedGpu.create(folder / "gpu", A100)
    helper = ClockHelper.start(f"emulated:{folder / 'gpu'}")
    try:
        assert helper.wait_ready(60.0) is not None
    finally:
        helper.close()


def planner_works(folder: Path) -> None:
    planner = PlannerProcess()
    planner.submit(request())
    answers = []
    try:
        wait_until(lambda: answers.append(planner.poll()) or answers[-1] is not None)
        assert answers[-1].error == ""
    finally:
        planner.close()


def frontier_works(folder: Path) -> None:
    frontier = FrontierProcess(request(), folder / FRONTIER_FILE)
    try:
        wait_until(lambda: frontier.ended)
        assert frontier.progress.failure == ""
    finally:
        frontier.close()


def peers_work(folder: Path) -> None:
    begin_s, end_s = wait_for_a_peer("gloo", ("cpu", "cpu"), 0.1)
    assert begin_s < end_s


@pytest.mark.parametrize("works", [helper_works, planner_works, frontier_works, peers_work])
def test_a_module_in_the_working_folder_is_not_run(
    works: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, ran, own = tmp_path / "planted", tmp_path / "ran", tmp_path / "own"
    planted.mkdir()
    own.mkdir()
    for name in {*sys.stdlib_module_names, *OTHERS} - {"os"}:
        (planted / f"{name}.py").write_text(PLANTED)
    (planted / "os.py").write_text('raise SystemExit("os of the working folder")')
    monkeypatch.chdir(planted)
    monkeypatch.setenv("PLANTED_RAN", str(ran))
    # An empty entry stands for the working folder, as a relative one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "../planted", os.environ.get("PYTHONPATH", "")]))
    works(own)
    assert not ran.exists(), ran.read_text()


def test_a_process_has_this_package_and_not_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version may lie where PYTHONPATH leads."""
    (tmp_path / "perseus_plugin").mkdir()
    (tmp_path / "perseus_plugin" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = subprocess.run(
        processes.command("perseus_plugin.control.helper", "nonsense", "--parent", "1"),
        env=processes.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, b"")


def test_packages_are_found_where_the_trainer_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":relative:/opt/packages:")
    monkeypatch.setenv("PYTHONUSERBASE", "/home/me/python")
    monkeypatch.setenv("PYTHONSTARTUP", "/home/me/startup.py")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/opt/driver")
    monkeypatch.setenv("HOME", "/home/me")
    environment = processes.environment()
    assert environment["PYTHONPATH"] == "/opt/packages"
    assert environment["PYTHONUSERBASE"] == "/home/me/python"
    assert "PYTHONSTARTUP" not in environment
    assert environment["LD_LIBRARY_PATH"] == "/opt/driver"
    assert environment["HOME"] == "/home/me"


def test_no_process_of_ours_is_started_in_another_way() -> None:
    package = Path(processes.__file__).parents[1]
    others = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "processes.py" and ("sys.executable" in path.read_text() or '"-m"' in path.read_text())
    ]
    assert not others


def test_another_python_is_told_nothing_of_where_this_ones_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/somewhere")
    environment = processes.environment("/opt/perseus/bin/python")
    assert [name for name in environment if environment[name] == "/somewhere"] == ["LD_LIBRARY_PATH"]
    assert environment["PYTHONNOUSERSITE"] == "1"
    command = processes.command("perseus_plugin.planning.process", "1", python="/opt/perseus/bin/python")
    assert command == ["/opt/perseus/bin/python", processes.__file__, "perseus_plugin.planning.process", "1"]
