"""The commands of README and quickstart page as they stand there: training, then all that reads what it left."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import commands

from .launching import REPOSITORY

pytestmark = pytest.mark.e2e

# What the pages name besides: the tests that this one belongs to, and what needs a network or a GPU.
ELSEWHERE = {("make", "test"), ("make", "docs"), ("pip", "install"), ("perseus", "doctor")}


def ready(words: list[str]) -> list[str]:
    """The command with this environment's programs; of `make` what it would run after setting up."""
    if words[0] == "perseus":
        return [sys.executable, "-m", "perseus_plugin.cli.main", *words[1:]]
    assert words == ["make", "quickstart"], words
    dry = ["make", "--dry-run", "--old-file=setup", "--directory", str(REPOSITORY), "quickstart", "STEPS=150"]
    lines = subprocess.run(dry, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if "torchrun" in line]
    assignment, program, *arguments = shlex.split(line)
    assert assignment == "DS_ACCELERATOR=cpu"
    assert program == ".venv/bin/torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def test_what_the_pages_say_can_be_done_in_this_order(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ran = []
    for page in (REPOSITORY / "docs" / "quickstart.md", REPOSITORY / "README.md"):
        for words in commands(page):
            if tuple(words[:2]) in ELSEWHERE or words in ran or "..." in words:  # three dots: a pattern
                continue
            ran.append(words)
            done = subprocess.run(
                ready(words), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=480, check=False
            )
            assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert ["make", "quickstart"] in ran
    assert len(ran) >= 6
    summary = json.loads((tmp_path / "out" / "quickstart" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["saving_percent"]["measured"] is not None
    for picture in ("timeline.png", "frontier.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
