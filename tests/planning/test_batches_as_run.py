"""Steps planned by announced work, as run by emulated GPUs in virtual time: nothing is late, and nothing sleeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perseus_plugin.exchange.packing import unpacked
from perseus_plugin.gpus.emulated.physics import A100
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.replayed import InForce, Samples
from perseus_plugin.planning.batch_process import Lesson, Pupil
from perseus_plugin.planning.process import answer_to
from perseus_plugin.planning.request import PlanRequest
from tests.virtual_job import VirtualJob

FORWARD_S, BACKWARD_S = (0.06, 0.06, 0.06, 0.09), (0.12, 0.12, 0.12, 0.18)
MICROBATCHES, LEARNED_FROM, STEPS = 6, 8, 4


def works_of(step: int) -> list[float]:
    """Tokens, which vary by a factor of three."""
    return np.random.default_rng(step).uniform(500.0, 1500.0, MICROBATCHES).tolist()  # type: ignore[no-any-return]


def durations(records: list[IterationRecord]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(end_s - start_s for start_s, end_s in zip(one.starts_s, one.ends_s, strict=True)) for one in records
    )


def test_a_step_planned_by_its_work_takes_no_longer_and_saves_more_than_the_usual_plan() -> None:
    job = VirtualJob(A100, FORWARD_S, BACKWARD_S, MICROBATCHES)
    top_mhz = A100.max_clock_mhz
    survey = job.swept(range(top_mhz, 800, -105), 4)

    def at_full(step: int) -> tuple[float, float, list[IterationRecord]]:
        return job.iterate(lambda stage, slot: top_mhz, top_mhz, [work / 1000 for work in works_of(step)])

    samples = Samples(tuple((durations(at_full(step)[2]),) for step in range(LEARNED_FROM)))
    request = PlanRequest(
        "1F1B",
        job.streams,
        {},
        survey.profile,
        [survey.blocking_power_w] * len(FORWARD_S),
        margin=0.01,
        samples=samples,
        latency_s=0.005,
        lower_while_waiting=False,
    )
    usual = answer_to(request).plan
    assert usual is not None
    clocks = tuple(tuple(usual.clocks_mhz(stage)) for stage in range(len(FORWARD_S)))
    pupil = Pupil()
    learned = pupil.learn(
        Lesson(
            replace(request, in_force=InForce(clocks, (), 0.01)),
            [[works_of(step)] for step in range(LEARNED_FROM)],
        )
    )
    assert not learned.why_not
    took = np.zeros((3, 2))  # full clocks, the usual plan, a plan of its own; time and energy
    for step in range(100, 100 + STEPS):
        sizes = [work / 1000 for work in works_of(step)]
        own = [unpacked(part) for part in pupil.plan([works_of(step)]).replicas[0]]
        took[0] += at_full(step)[:2]
        took[1] += job.iterate(lambda stage, slot: clocks[stage][slot], top_mhz, sizes)[:2]
        took[2] += job.iterate(lambda stage, slot, own=own: own[stage]["clocks_mhz"][slot], top_mhz, sizes)[:2]
    ratio = took / took[0]
    assert ratio[2, 0] <= 1.002
    assert ratio[2, 1] < ratio[1, 1] - 0.005
    assert learned.saving == pytest.approx(1 - ratio[2, 1], abs=0.02)
