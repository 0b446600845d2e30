"""Tests that fail beside others are tried again alone, few and not all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Passes when it runs for the second time, but for what is asked of it.
SUITE = """
from pathlib import Path
import pytest
from tests.again import hold

@pytest.mark.parametrize("name", {names})
def test_it(name):
    before = Path(name)
    if name != "good":
        passes = before.exists() and name != "bad"
        before.write_text(before.read_text() + "x" if before.exists() else "x")
        {check}

def test_good():
    Path("good").write_text("")
"""
ASSERTS, HOLDS, ENDS = "assert passes", "hold(passes, 'the same')", "import os; passes or os._exit(3)"


def run(folder: Path, names: list[str], check: str = ASSERTS) -> tuple[int, str, dict[str, int]]:
    """The status, what was said at the end, and how often each test ran."""
    (folder / "test_suite.py").write_text(SUITE.format(names=names, check=check))
    words = [sys.executable, "-m", "tests.again", "--numprocesses", "2", "--rootdir", str(folder), "test_suite.py"]
    root = Path(__file__).parents[1]
    done = subprocess.run(words, cwd=folder, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True)
    return done.returncode, done.stdout, {name: len((folder / name).read_text()) for name in names}


def test_what_passes_alone_is_named(tmp_path: Path) -> None:
    status, said, runs = run(tmp_path, ["once"])
    assert status == 0
    assert said.endswith("passed alone; CONTRIBUTING.md says what to do about it:\n    test_suite.py::test_it[once]\n")
    assert runs == {"once": 2}


@pytest.mark.parametrize(
    ("names", "check", "times"),
    [
        (["bad", "once"], ASSERTS, 2),
        (["once"], HOLDS, 1),
        (["once"], ENDS, 1),
        (["a", "b", "c", "d"], ASSERTS, 1),
    ],
    ids=["fails alone", "no accident", "a process ends", "too many"],
)
def test_what_is_no_accident_stays_a_failure(names: list[str], check: str, times: int, tmp_path: Path) -> None:
    status, said, runs = run(tmp_path, names, check)
    assert status == 1
    assert "passed alone" not in said
    assert runs == dict.fromkeys(names, times)


def test_nothing_is_tried_again_where_all_is_well(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("")
    status, said, _ = run(tmp_path, ["good"])
    assert (status, "Once more" in said) == (0, False)
