"""The wheel beside what a training environment has; needs the package index, and minutes where it is far."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.session.test_one_job import SHORT

ROOT = Path(__file__).parents[1]
TRAINING = ("numpy==1.26.4", "protobuf==4.25.8")
"""What many images for training hold fixed; a solver and pictures of today ask for others."""


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: Path, *packages: object) -> Path:
    """The Python of a fresh environment with some packages."""
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def installed(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    return {one["name"].lower().replace("_", "-"): one["version"] for one in listed}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "perseus_plugin", source / "perseus_plugin")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", source, source)
    (made,) = source.glob("*.whl")
    return made


@pytest.mark.repeated
def test_installing_changes_no_version_and_a_job_there_plans_in_another_environment(
    wheel: Path, tmp_path: Path
) -> None:
    training = environment(tmp_path / "training", *TRAINING)
    before = installed(training)
    report = run(training, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", wheel)
    new = {one["metadata"]["name"].lower().replace("_", "-") for one in json.loads(report)["install"]}
    assert "perseus-plugin" in new
    assert not new & before.keys(), "versions that would change"
    assert not new & {"ortools", "plotly", "pandas", "rich", "typer", "protobuf"}

    run(training, "-m", "pip", "install", "--quiet", wheel)
    assert {**installed(training), **before} == installed(training)
    planner = environment(tmp_path / "planner", f"{wheel}[planner]")
    block: dict[str, Any] = {**SHORT, "planner": {"python": str(planner)}}
    code = f"""
import sys
sys.path.append({str(ROOT)!r})  # after what is installed: for the job that is run, which lies among the tests
from pathlib import Path
import perseus_plugin
assert {str(tmp_path)!r} in perseus_plugin.__file__
from tests.one_job import OneJob, Step
folder = Path({str(tmp_path / "job")!r})
OneJob(folder, [Step()] * 10_000, plugin={block!r}, until=(folder / "plan.json").exists).run()
"""
    run(training, "-I", "-c", code)
    assert (tmp_path / "job" / "plan.json").exists()
