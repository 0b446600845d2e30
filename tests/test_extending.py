"""The examples of docs/extending.md do what the page says, and the files that it names are there."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin import build_graph
from perseus_plugin.config import PerseusConfig
from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.base import start_session
from perseus_plugin.integrations.in_memory import sessions_in_memory
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.leader.signals.registry import make_signal
from perseus_plugin.stragglers.external import ExternalFigures
from tests.factories import placement

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
ANSWERS = PAGE.partition("## I want to change X: where?\n")[2].strip().split("\n\n")[1:]

JOB = {
    "gpu": {"backend": "toy"},
    "slowdown": 0.15,  # on a busy machine times are noisy: with room for that there is always something to save
    "profiling": {
        "warmup_steps": 2,
        "clocks_mhz": [1000, 800, 600],
        "steps_per_clock": 6,  # some may be disturbed there, and every clock is to be measured
        "max_relative_error": 1.0,
        "max_time_error": 1.0,
    },
    "frontier": False,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All blocks of the page that name a file, installed as a package would be."""
    for name, block in BLOCKS.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
        if path.name == "entry_points.txt":
            (path.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-gpus\nVersion: 1.0\n")
    (tmp_path / "gpus").mkdir()
    monkeypatch.setenv("TOY_GPUS", str(tmp_path / "gpus"))
    monkeypatch.setenv("PERSEUS_LOCK_DIR", str(tmp_path / "locks"))
    return tmp_path


def run(folder: Path, script: str, *arguments: str) -> str:
    path = os.pathsep.join([str(folder / "packages"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(folder / "packages" / script), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_toy_framework_on_toy_gpus_is_profiled_planned_for_and_saves_energy(folder: Path) -> None:
    (folder / "perseus.json").write_text(json.dumps({**JOB, "output_dir": str(folder / "out")}))
    said = run(folder, "toy_train.py", str(folder / "perseus.json"))
    assert "Toy 1000 (toy)" in said
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["state"], summary["gpu"], summary["backend"]) == ("finished", "Toy 1000", "toy")
    assert summary["ranks_reporting"] == 2
    assert summary["iterations"]["plan"] > 0
    assert summary["plan"]["saving_percent"] > 3
    assert (folder / "out" / "profile.csv").read_text().count("\n") == 1 + 2 * 2 * 3
    names = {line.split()[0] for line in (folder / "out" / "figures.txt").read_text().splitlines()}
    assert "Perseus/energy_j/full_clock" in names
    for rank in range(2):
        locked_mhz, energy_j, _ = json.loads((folder / "gpus" / f"toy{rank}").read_text())
        assert locked_mhz == 0, "the GPU is left free"
        assert energy_j > 0


def test_the_adapter_keeps_the_order_of_calls(folder: Path) -> None:
    run(folder, "check_toy_adapter.py")


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 1), (2, 5), (3, 6), (4, 8)])
def test_the_schedule_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch, stages: int, microbatches: int) -> None:
    monkeypatch.syspath_prepend(folder / "packages")
    monkeypatch.setitem(SCHEDULES, "paired", SCHEDULES["1f1b"])  # put back as it was: not there
    streams = importlib.reload(importlib.import_module("toy_schedule")).paired(stages, microbatches)
    assert build_graph(streams, {}).stages == stages
    for stream in streams:
        kinds = [op.kind for op in stream if hasattr(op, "kind")]
        assert sorted(kinds) == ["backward"] * microbatches + ["forward"] * microbatches


def test_what_the_detector_reports_reaches_the_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder / "packages")
    detector = importlib.import_module("toy_detector").Detector()
    with sessions_in_memory() as sessions:
        start_session(PerseusConfig(), placement())
        assert detector.report() == {0: 1.0, 1: 1.3}, "the job gets what it would get"
    assert sessions[0].took == [ExternalFigures("toy detector", {0: 1.0, 1: 1.3}, comparable=True)]


def test_the_signal_is_found_by_its_name_and_says_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder / "packages")
    told = {"source": "evenings", "watts": 9000, "from": 17, "to": 20}
    now_s = 20_000 * 86400.0
    desk = SignalDesk([told], now=lambda: now_s)
    seen = []
    for _ in range(4):
        asked = desk.look()
        seen.append(None if asked is None or asked.limit is None else asked.limit.job_w)
        now_s = make_signal(told, "here").next_change(now_s)
    assert seen == [None, 9000, None, 9000]
    with pytest.raises(ConfigError, match="allowed: watts, from and to"):
        make_signal({"source": "evenings"}, "here")


def test_the_toys_are_short() -> None:
    assert set(BLOCKS) >= {"toy_gpus.py", "toy_framework.py", "toy_adapter.py"}
    for name, block in BLOCKS.items():
        assert block.count("\n") < 80, name


def test_the_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:perseus_plugin|docs|tests)/[\w/.]+)`", PAGE)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_answer_names_three_files_at_most() -> None:
    assert len(ANSWERS) == 11
    for answer in ANSWERS:
        assert answer.startswith("**"), answer
        files = set(re.findall(r"`((?:perseus_plugin|docs)/[\w/.]+)`", answer.replace("\n", " ")))
        assert 1 <= len(files) <= 3, answer
