"""The commands of README and quickstart page as they stand there: training, then all that reads what it left."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import commands

from .launching import JOB_TIMEOUT_S, REPOSITORY
from .observed import Observed, look_at_the_observed_job

pytestmark = pytest.mark.e2e

# What the pages name besides: the tests that this one belongs to, and what needs a network or a GPU.
ELSEWHERE = {("make", "test"), ("make", "docs"), ("pip", "install"), ("perseus", "doctor")}
QUICKSTART = ["make", "quickstart"]


def ready(words: list[str], steps: int) -> list[str]:
    """The command with this environment's programs; of `make` what it would run after setting up, with more steps."""
    if words[0] == "perseus":
        return [sys.executable, "-m", "perseus_plugin.cli.main", *words[1:]]
    assert words == QUICKSTART, words
    dry = ["make", "--dry-run", "--old-file=setup", "--directory", str(REPOSITORY), "quickstart", f"STEPS={steps}"]
    lines = subprocess.run(dry, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if "torchrun" in line]
    assignment, program, *arguments = shlex.split(line)
    assert assignment == "DS_ACCELERATOR=cpu"
    assert program == ".venv/bin/torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def trained(folder: Path) -> dict[str, Any]:
    """The summary that the training left."""
    summary: dict[str, Any] = json.loads((folder / "out" / "quickstart" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == summary["ranks"] == 4
    return summary


def train(words: list[str], folder: Path) -> None:
    """Until the plan is measured. The script knows nothing of the plugin and cannot wait for it: where the machine was
    so busy that the job ended before, one of twice the length is run."""
    for attempt in range(3):
        run(ready(words, 150 << attempt), folder)
        measured = trained(folder)["saving_percent"]["measured"]
        if measured is not None:
            break
    assert measured is not None


def follow_the_pages(folder: Path, train: Callable[[list[str], Path], None], at_a_time: int = 1) -> None:
    """Run the commands of the pages in their order, `train` for the one that does; of the others so many at a time."""
    pytest.importorskip("matplotlib")
    ran: list[list[str]] = []
    for page in (REPOSITORY / "docs" / "quickstart.md", REPOSITORY / "README.md"):
        for words in commands(page):
            if tuple(words[:2]) in ELSEWHERE or words in ran or "..." in words:  # three dots: a pattern
                continue
            ran.append(words)
    assert ran[0] == QUICKSTART
    assert len(ran) >= 6
    train(ran[0], folder)
    with ThreadPoolExecutor(at_a_time) as pool:
        for _ in pool.map(lambda words: run(ready(words, 0), folder), ran[1:]):
            pass
    for picture in ("timeline.png", "frontier.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    return tmp_path


def test_the_quickstart_starts_and_ends(folder: Path) -> None:
    """With a few steps."""
    run(ready(QUICKSTART, 4), folder)
    assert sum(trained(folder)["iterations"].values()) > 0


@look_at_the_observed_job
def test_what_the_pages_say_can_be_done_with_what_a_job_leaves(observed: Observed, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "quickstart").symlink_to(observed.out)
    follow_the_pages(folder, lambda words, folder: None, at_a_time=2)


@pytest.mark.repeated
def test_what_the_pages_say_can_be_done_in_this_order(folder: Path) -> None:
    follow_the_pages(folder, train)
