"""Two real jobs under one power budget that drops by a third and comes back; one of them is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shared_budget import run

# What jobs are told: tests/cli/sharing/test_table.py; that a job keeps it: tests/session/test_one_job.py.
pytestmark = [pytest.mark.e2e, pytest.mark.repeated]


def test_what_jobs_may_draw_stays_below_the_budget_and_what_a_killed_job_leaves_is_the_others(tmp_path: Path) -> None:
    shared = run(tmp_path, seconds=12.0, lasting_s=15.0)  # a busy machine may be elsewhere for some
    told_w = {}
    for phase in ("first", "a third less", "one is killed", "as at first"):
        samples = shared.of(phase)
        assert len(samples) > 6, f"{phase}: the budget is in force"
        assert all(one.held_w <= one.budget_w * (1 + 1e-6) for one in samples)
        told_w[phase] = samples[-1].told_w
    assert sum(told_w["a third less"]) < 0.7 * sum(told_w["first"])
    first, less = (shared.of(phase)[2:] for phase in ("first", "a third less"))
    assert shared.most_w(less) < 0.9 * shared.most_w(first), "as run"
    one, other = told_w["one is killed"]
    assert other == 0.0
    assert one > told_w["a third less"][0], "the rest is the other's"
