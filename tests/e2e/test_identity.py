"""Losses and final parameters are bit-identical with the plugin on and off, and the plan is really followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import Probe, perseus_block

pytestmark = pytest.mark.e2e

CASES: dict[str, tuple[int, int, dict[str, Any], tuple[str, ...]]] = {
    "pp4": (4, 4, {}, ()),
    "pp2-dp2-evaluation": (4, 2, {}, ("--evaluate-every", "5")),
    "pp2-bf16-zero1-clipping": (
        2,
        2,
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0},
        (),
    ),
}
# As users start it, with nothing that is there before the job.
UNDER_TORCHRUN = "pp2-bf16-zero1-clipping"


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical(case: str, tmp_path: Path) -> None:
    ranks, stages, config, arguments = CASES[case]
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "job"}
    job = Probe(
        tmp_path,
        perseus_block(tmp_path / "out", stages),
        do=[("nothing", "plan 1 for"), ("end", "+20")],
        arguments=("--stages", str(stages), *arguments),
        ranks=ranks,
        config={**config, "csv_monitor": monitor},
    )
    job.run(torchrun=case == UNDER_TORCHRUN).check()
    summary = job.summary()
    assert summary["state"] == "finished"
    assert summary["emulated"] is True
    assert summary["ranks_reporting"] == ranks
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert summary["iterations"]["full_clock"] >= 2
    for name in ("iteration_time_s", "energy_j"):
        assert all(value > 0 for value in summary[name].values())
    events = (tmp_path / "monitor" / "job" / "Perseus_energy_j_measured.csv").read_text().splitlines()
    assert float(events[-1].split(",")[-1]) == pytest.approx(summary["energy_j"]["measured"])
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len({clock for stage in plan["stages"] for _, _, clock in stage}) > 1, "the plan slows nothing"
    header = (tmp_path / "out" / "profile.csv").read_text().splitlines()[0]
    assert header.startswith("stage,instruction,frequency,time,energy")
    job.check_identical()
