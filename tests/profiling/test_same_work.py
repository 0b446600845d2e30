from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from perseus_plugin.profiling.observations import BLOCKING, InstructionEstimate, StageEstimate, StepMean
from perseus_plugin.profiling.pooling import pool, to_profile
from perseus_plugin.profiling.same_work import on_common_work
from perseus_plugin.profiling.step_sizes import fit_durations

from .varying import CLOCKS_MHZ, SIZES, slowed, sweep

TOP = CLOCKS_MHZ[0]
WATTS = 300.0


def estimate(steps: list[StepMean], power_error: float = 0.01) -> StageEstimate:
    """As a rank makes it from its own steps alone, with every instruction at one power."""
    alone = fit_durations({0: steps})
    rows = tuple(
        InstructionEstimate(
            kind,
            clock,
            duration.time_s,
            duration.se_s,
            WATTS * duration.time_s,
            WATTS * math.hypot(duration.se_s, power_error * duration.time_s),
            duration.samples,
            alone.spread[0, kind],
        )
        for (_, kind, clock), duration in sorted(alone.at.items(), key=lambda item: (item[0][1], -item[0][2]))
    )
    return StageEstimate(rows, 80.0, 1.0, 0.1, 0.01, frozenset(), tuple(steps))


def job(seed: int, *, paired: bool = True, replicas: int = 2) -> dict[tuple[int, int], list[StageEstimate]]:
    return {
        (replica, stage): [estimate(steps)]
        for replica in range(replicas)
        for stage, steps in sweep(SIZES["buckets"], 10 * seed + replica, paired=paired).items()
    }


def pooled(estimates: dict[tuple[int, int], list[StageEstimate]]) -> list[StageEstimate]:
    common = on_common_work(estimates, max_relative_error=0.05)
    return [pool([e for (_, s), e in common.items() if s == stage]) for stage in range(4)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_times_of_all_stages_are_of_one_work(replicas: int) -> None:
    inside = []
    for seed in range(5):
        stages = pooled(job(seed, replicas=replicas))
        for stage in stages:
            top = {row.kind: row for row in stage.instructions if row.frequency_mhz == TOP}
            for row in stage.instructions:
                if row.frequency_mhz != TOP:
                    error = row.time_s / top[row.kind].time_s / slowed(row.kind, row.frequency_mhz) - 1
                    assert abs(error) < 0.015
                    inside.append(abs(error) <= 1.96 * row.time_se_s / row.time_s)
        # Stages are as far apart as they are, though each rank's own steps would not say so.
        assert stages[3].instructions[0].time_s / stages[0].instructions[0].time_s == pytest.approx(1.3, rel=0.01)
    assert np.mean(inside) >= 0.9


def test_energies_follow_the_times_and_are_resolved_by_them() -> None:
    """Alone a rank takes the sizes of its steps for an effect of the clocks, and knows its energies accordingly."""
    alone = job(1)[0, 0][0]
    assert any(row.energy_se_j > 0.05 * row.energy_j for row in alone.instructions)
    for stage in pooled(job(1)):
        assert not stage.unresolved
        for row in stage.instructions:
            assert row.energy_j / row.time_s == pytest.approx(WATTS, rel=1e-3)
            assert row.energy_se_j < 0.02 * row.energy_j


def test_where_all_ran_at_one_clock_energies_stay_unresolved() -> None:
    stages = pooled(job(1, paired=False, replicas=1))
    assert all(stage.unresolved == {"forward", "backward"} for stage in stages)


def test_spread_reaches_the_profile() -> None:
    profile, _ = to_profile(pooled(job(2)))
    for _, _, row in profile.rows():
        assert row.spread_between == pytest.approx(0.19, rel=0.15)
        assert 0 < row.spread_between_se < 0.05
        assert row.spread_within == pytest.approx(0.02)
        assert 0 < row.spread_within_se < 0.01


def test_ranks_of_one_stage_and_replica_know_no_more_of_its_work_than_one() -> None:
    single = job(3, replicas=1)
    shards = {where: [estimates[0]] * 4 for where, estimates in single.items()}
    for alone, together in zip(pooled(single), pooled(shards), strict=True):
        for row, joined in zip(alone.instructions, together.instructions, strict=True):
            assert joined.time_s == pytest.approx(row.time_s)
            assert joined.time_se_s == pytest.approx(row.time_se_s)


def test_estimates_without_steps_stay_as_they_are() -> None:
    plain = {where: [replace(estimates[0], steps=())] for where, estimates in job(4).items()}
    assert on_common_work(plain, max_relative_error=0.05) == {where: found[0] for where, found in plain.items()}


def test_what_was_never_seen_stays_unresolved() -> None:
    estimates = job(5, replicas=1)
    estimates[0, 0] = [replace(estimates[0, 0][0], unresolved=frozenset({"evaluate", BLOCKING}))]
    assert on_common_work(estimates, max_relative_error=0.05)[0, 0].unresolved == {"evaluate", BLOCKING}


Job = dict[tuple[int, int], list[StageEstimate]]


def announced_job(seed: int, *, told: bool) -> tuple[Job, dict[tuple[int, int], float]]:
    """Two stages in lock-step at one clock at a time, whose steps vary by a third; and what was announced of them."""
    draw = np.random.default_rng(seed)
    clocks = [clock for clock in (1410, 1110, 810) for _ in range(6)]
    sizes = draw.lognormal(0.0, 0.33, len(clocks))
    estimates: Job = {}
    for stage in (0, 1):
        means_s = 0.02 * (1 + stage) * sizes * 1410 / np.array(clocks) * draw.lognormal(0, 0.01, len(clocks))
        rows = zip(clocks, means_s.tolist(), strict=True)
        estimates[0, stage] = [
            estimate([StepMean(step, clock, "forward", mean_s, 8) for step, (clock, mean_s) in enumerate(rows)])
        ]
    known = sizes if told else draw.permutation(sizes)
    return estimates, {(0, step): 1000.0 * size for step, size in enumerate(known.tolist())}


def test_announced_work_tells_how_large_steps_were() -> None:
    estimates, works = announced_job(1, told=True)
    without = on_common_work(estimates, max_relative_error=0.05)[0, 0]
    announced = on_common_work(estimates, max_relative_error=0.05, works=works)[0, 0]
    for clock in (1110, 810):
        blind, seeing = (
            next(row for row in one.instructions if row.frequency_mhz == clock) for one in (without, announced)
        )
        top_s = next(row.time_s for row in announced.instructions if row.frequency_mhz == 1410)
        assert seeing.time_s / top_s == pytest.approx(1410 / clock, rel=0.03)
        assert seeing.time_se_s < 0.2 * blind.time_se_s


def test_announced_work_that_says_nothing_is_not_believed() -> None:
    estimates, works = announced_job(2, told=False)
    with_it, without = (on_common_work(estimates, max_relative_error=0.05, works=one) for one in (works, None))
    assert repr(with_it) == repr(without)  # NaN is not itself
