"""Larger jobs than can be searched whole: more time, more effort, more clocks and more changes are never worse.

Every plan but those of one test is made by a planner of its own, which knows of no other plan. Such plans come as near
to their bound as the puzzle of few clocks lets them, each by other ways, which leaves `SAME`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.schedules import early_recomputation_1f1b, gpipe, interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.work import SMALL
from perseus_plugin.profiling.profile import Measurement, Profile

from .jobs import Job

SAME = 1.003
SLOWDOWNS = st.sampled_from([0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1])


@st.composite
def larger_jobs(draw: st.DrawFn, most_stages: int = 8, most_microbatches: int = 24) -> Job:
    """A job of 4 stages and more; its clocks many or few, its rows convex or not, its stages alike or not."""
    stages, microbatches = draw(st.integers(4, most_stages)), draw(st.integers(10, most_microbatches))
    made = draw(st.sampled_from([one_f_one_b, gpipe, early_recomputation_1f1b, None]))
    if made is None:
        streams: Sequence[Sequence[object]] = interleaved_1f1b(
            stages, stages * max(1, microbatches // stages), chunks=2
        )
    else:
        streams = made(stages, microbatches)
    count, bumps = draw(st.sampled_from([2, 3, 4, 8, 16])), draw(st.sampled_from([0.0, 0.01, 0.08]))
    spread, alike = draw(st.sampled_from([0.0, 0.05, 0.3])), draw(st.booleans())
    drawn = random.Random(draw(st.integers(0, 10_000)))
    kinds = sorted({op.kind for stream in streams for op in stream if isinstance(op, Compute)})
    clocks = [1400, *drawn.sample(range(400, 1400, 15), count - 1)]
    table = {}
    for stage in range(stages):
        longer = 1 + spread * drawn.random()
        if not alike:
            clocks = [1400, *drawn.sample(range(400, 1400, 15), count - 1)]
        for kind in kinds:
            base_s = 0.05 * longer * (2 if kind == "backward" else 1) * drawn.uniform(0.99, 1.01)
            power_w, share = drawn.uniform(200, 400), drawn.uniform(0.3, 1)
            rows = []
            for clock in clocks:
                relative = clock / 1400
                seconds = base_s * (share / relative + 1 - share) * drawn.uniform(1 - bumps, 1 + bumps)
                watts = power_w * (0.3 + 0.7 * relative**3) * drawn.uniform(1 - bumps, 1 + bumps)
                rows.append(Measurement(clock, seconds, watts * seconds))
            table[stage, kind] = tuple(rows)
    return Job(streams, Profile(table), (drawn.uniform(30, 90),) * stages)  # type: ignore[arg-type]


def planner_of(job: Job, profile: Profile | None = None) -> Planner:
    return Planner(build_graph(job.streams), profile or job.profile, blocking_power_w=list(job.blocking_w))


def more_time_is_no_worse(job: Job, slowdown: float, more: float) -> None:
    planners = [planner_of(job) for _ in range(3)]
    assert len(planners[0].problem.instruction_nodes) > SMALL
    targets = (Target.slowdown(slowdown), Target.slowdown(slowdown + more), Target.cheapest())
    shorter_j, longer_j, least_j = (one.plan(target).energy_j for one, target in zip(planners, targets, strict=True))
    assert longer_j <= shorter_j * SAME
    assert least_j <= longer_j * SAME


@settings(max_examples=4, derandomize=True)
@given(larger_jobs(most_stages=5, most_microbatches=12), SLOWDOWNS, SLOWDOWNS)
def test_more_time(job: Job, slowdown: float, more: float) -> None:
    more_time_is_no_worse(job, slowdown, more)


@settings(max_examples=6, derandomize=True)
@given(larger_jobs(most_microbatches=10), st.sampled_from([0.1, 0.2]), st.floats(0.02, 0.98), st.floats(0, 1))
def test_a_little_more_time_far_above_the_bound_is_exactly_no_worse(
    job: Job, slowdown: float, place: float, share: float
) -> None:
    longer, shorter = (Target.slowdown(slowdown + 0.0025 * one) for one in (place, place * share))
    rounded = planner_of(job).solve(longer, search=False)
    assume(rounded.energy_j > rounded.relaxed.bound_j * 1.01)
    plans = [planner_of(job).plan(target) for target in (shorter, longer)]
    assert plans[1].energy_j <= plans[0].energy_j * (1 + 1e-9)
    assert plans[1].iteration_time_s <= plans[0].deadline_s


@pytest.mark.repeated
@settings(max_examples=40)
@given(larger_jobs(), SLOWDOWNS, SLOWDOWNS)
def test_more_time_of_more_jobs(job: Job, slowdown: float, more: float) -> None:
    more_time_is_no_worse(job, slowdown, more)


@settings(max_examples=3)
@given(larger_jobs(most_stages=5, most_microbatches=12), st.lists(SLOWDOWNS, min_size=2, max_size=3))
def test_more_time_for_the_same_planner_is_exactly_no_worse(job: Job, slowdowns: list[float]) -> None:
    planner, before = planner_of(job), list[tuple[float, float]]()
    for slowdown in slowdowns:
        energy_j = planner.plan(Target.slowdown(slowdown)).energy_j
        assert all(energy_j <= other_j * (1 + 1e-9) for other, other_j in before if other <= slowdown)
        before.append((slowdown, energy_j))


@settings(max_examples=4, derandomize=True)
@given(larger_jobs(most_stages=5, most_microbatches=12), SLOWDOWNS)
def test_more_effort_and_more_clocks(job: Job, slowdown: float) -> None:
    planner = planner_of(job)
    deadline = Target.deadline(planner.problem.full_clock_time_s * (1 + slowdown))
    rounded = planner_of(job).solve(deadline, search=False)
    quick = planner.solve(deadline)
    assert quick.energy_j <= rounded.energy_j * (1 + 1e-9)
    # The highest clock is what full clocks are, and so what the deadline is.
    fewer = Profile({key: (rows[0], *rows[1::2]) for key, rows in job.profile.table.items()})
    assert quick.energy_j <= planner_of(job, fewer).solve(deadline).energy_j * SAME


@pytest.mark.repeated
@settings(max_examples=6)
@given(larger_jobs(), SLOWDOWNS, st.sampled_from([0, 2, 4]))
def test_the_next_effort_and_more_changes(job: Job, slowdown: float, most: int) -> None:
    target = Target.slowdown(slowdown)
    quick, normal = (planner_of(job).plan(target, effort=effort) for effort in ("quick", "normal"))
    assert normal.energy_j <= quick.energy_j * (1 + 1e-9)
    limited = planner_of(job).plan(target, ChangeLimits(most))
    assert quick.energy_j <= limited.energy_j * SAME
