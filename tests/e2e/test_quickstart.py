"""The commands of README and quickstart page as they stand there: training, then all that reads what it left."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import commands

from .launching import REPOSITORY

pytestmark = pytest.mark.e2e

# What the pages name besides: the tests that this one belongs to, and what needs a network or a GPU.
ELSEWHERE = {("make", "test"), ("make", "docs"), ("pip", "install"), ("perseus", "doctor")}


def ready(words: list[str], steps: int) -> list[str]:
    """The command with this environment's programs; of `make` what it would run after setting up, with more steps."""
    if words[0] == "perseus":
        return [sys.executable, "-m", "perseus_plugin.cli.main", *words[1:]]
    assert words == ["make", "quickstart"], words
    dry = ["make", "--dry-run", "--old-file=setup", "--directory", str(REPOSITORY), "quickstart", f"STEPS={steps}"]
    lines = subprocess.run(dry, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if "torchrun" in line]
    assignment, program, *arguments = shlex.split(line)
    assert assignment == "DS_ACCELERATOR=cpu"
    assert program == ".venv/bin/torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def shorten(settings: Path) -> None:
    """Short instructions; sweep over few clocks, without a second look at what a busy machine has disturbed."""
    config = json.loads(settings.read_text())
    config["perseus"]["emulation"] = {"time_scale": 10}
    config["perseus"]["profiling"] |= {"clock_count": 4, "steps_per_clock": 2}
    config["perseus"]["profiling"] |= {"max_relative_error": 1.0, "max_time_error": 1.0}
    settings.write_text(json.dumps(config))


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def train(words: list[str], folder: Path, steps: int) -> dict[str, Any]:
    """The training's summary. The script knows nothing of the plugin and cannot wait for it: where the machine was so
    busy that the job ended before its plan was measured, one of twice the length is run."""
    for attempt in range(3):
        run(ready(words, steps << attempt), folder)
        summary: dict[str, Any] = json.loads((folder / "out" / "quickstart" / "summary.json").read_text())
        assert summary["state"] == "finished"
        if summary["saving_percent"]["measured"] is not None:
            break
    return summary


@pytest.mark.parametrize("sweep", ["short", pytest.param("as-it-stands", marks=pytest.mark.repeated)])
def test_what_the_pages_say_can_be_done_in_this_order(sweep: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    steps = 150
    if sweep == "short":
        shorten(tmp_path / "examples" / "deepspeed_gpt" / "quickstart.json")
        steps = 60
    ran = []
    for page in (REPOSITORY / "docs" / "quickstart.md", REPOSITORY / "README.md"):
        for words in commands(page):
            if tuple(words[:2]) in ELSEWHERE or words in ran or "..." in words:  # three dots: a pattern
                continue
            ran.append(words)
            if words == ["make", "quickstart"]:
                assert train(words, tmp_path, steps)["saving_percent"]["measured"] is not None
            else:
                run(ready(words, steps), tmp_path)
    assert ["make", "quickstart"] in ran
    assert len(ran) >= 6
    for picture in ("timeline.png", "frontier.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
