"""Our plans against plans that real GPUs ran, on a slice of them; `docs/evidence.md` has all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.measured_runs import SLICE

ROOT = Path(__file__).parents[2]


def test_no_plan_is_worse_than_the_one_that_was_run() -> None:
    command = [sys.executable, "benchmarks/measured_runs.py", str(SLICE), "--only", "plans", "--power-limit", "300"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (row,) = (line for line in said.splitlines() if line.startswith("| t5-3b-a100 "))
    _, plans, energy, time, _, of_energy, _, worse = row.strip("| ").split(" | ")
    assert (plans, worse) == ("4", "0")
    assert float(energy.split(", ")[1]) < float(of_energy.split(", ")[0]), "the worst one, beside the model's error"
    assert float(time.split(", ")[1]) < 0.1
