"""A DeepSpeed job whose sequences vary in length and are announced: iterations are planned for their own batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from perseus_plugin.reporting.record.iterations import OWN_BATCH
from perseus_plugin.reporting.record.records import load_record
from tests.e2e.launching import Probe, perseus_block

pytestmark = [pytest.mark.e2e, pytest.mark.repeated]


def test_announced_batches_are_planned_for_and_training_is_bit_identical(tmp_path: Path) -> None:
    block = perseus_block(tmp_path / "out", 2)
    block["emulation"] = {"forward_time_s": [0.06, 0.08], "backward_time_s": [0.12, 0.16]}
    do = [("nothing", "batches are planned for one by one: announced"), ("end", "+16")]
    job = Probe(tmp_path, block, do, ("--announce", "4"), 2, {"gradient_accumulation_steps": 4})
    job.run().check()
    batches = job.summary()["batches"]
    assert batches["announced"] > 20
    assert batches["explained_percent"] > 50
    assert batches["planned"] > 0
    first, last = (own_batches(tmp_path / "out", rank) for rank in (0, 1))
    assert first
    assert first == last, "ranks of a pipeline do not follow the same plans"
    job.check_identical()


def own_batches(folder: Path, rank: int) -> set[int]:
    """Iterations that a rank ran under plans for their own batches."""
    rows = [row for row in load_record(folder, rank).stretches if row.sort.reason == OWN_BATCH]
    return {number for row in rows for number in range(row.first, row.first + row.count)}
