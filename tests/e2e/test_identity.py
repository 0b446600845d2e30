"""Losses and parameters are bit-identical with the plugin on and off, and the plan is really followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import MIXED, Probe, perseus_block
from tests.e2e.observed import Observed, look_at_the_observed_job

pytestmark = pytest.mark.e2e

EVALUATION = ("--evaluate-every", "5")
# Ranks (of two stages), config, arguments; with a name that says which of them are started under torchrun.
CASES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "dp2-bf16-zero1-clipping-evaluation": (4, MIXED, EVALUATION),
    "dp2-evaluation": (4, {}, EVALUATION),
    "bf16-zero1-clipping-torchrun": (2, MIXED, ()),
}


@look_at_the_observed_job
def test_training_is_bit_identical(observed: Observed) -> None:
    check_followed(observed.probe)
    summary = observed.probe.summary()
    events = (observed.monitor / "Perseus_energy_j_measured.csv").read_text().splitlines()
    assert float(events[-1].split(",")[-1]) == pytest.approx(summary["energy_j"]["measured"])
    header = (observed.out / "profile.csv").read_text().splitlines()[0]
    assert header.startswith("stage,instruction,frequency,time,energy")
    observed.probe.check_identical()


@pytest.mark.repeated
@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_in_other_ways_to_train(case: str, tmp_path: Path) -> None:
    """`make test` has them where something else is looked at too: test_stragglers.py, test_life.py."""
    ranks, config, arguments = CASES[case]
    do = [("nothing", "plan 1 for"), ("end", "+45")]
    job = Probe(tmp_path, perseus_block(tmp_path / "out", 2), do, arguments, ranks, config)
    job.run(torchrun="torchrun" in case).check()
    check_followed(job)
    job.check_identical()


def check_followed(job: Probe) -> None:
    """All ranks were measured, and ran a plan that slows something."""
    summary = job.summary()
    assert summary["state"] == "finished"
    assert summary["emulated"] is True
    assert summary["ranks_reporting"] == job.ranks
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert summary["iterations"]["full_clock"] >= 2
    for name in ("iteration_time_s", "energy_j"):
        assert all(value > 0 for value in summary[name].values())
    plan = json.loads((job.folder / "out" / "plan.json").read_text())
    assert len({clock for stage in plan["stages"] for _, _, clock in stage}) > 1, "the plan slows nothing"
