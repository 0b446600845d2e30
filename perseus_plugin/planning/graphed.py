"""What a plan makes of steps that are one CUDA graph, whose clocks change by host time and not with instructions.

A stage's clock is what was asked for by the time, whatever it runs just then: an instruction is as far as its clocks
until now have brought it. `control.graphed` says what is asked for, from the times of the replays before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perseus_plugin.control.graphed import GraphClocks, TimedRequest
from perseus_plugin.exchange.messages import PhasesPart
from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.plan import Plan

_SETTLE, _COUNTED = 12, 24  # replays: until the fit is that of many, and those that figures are of


def phases_of(plan: Plan, stage: int) -> PhasesPart | None:
    """One stage's plan by time; None for a stage without instructions."""
    planned = plan.stages[stage]
    if not planned:
        return None
    first = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(planned)) if a.frequency_mhz != b.frequency_mhz)]
    return PhasesPart(
        clocks_mhz=tuple(planned[at].frequency_mhz for at in first),
        starts_s=tuple(max(0.0, planned[at].start_s) for at in first),
        end_s=planned[-1].finish_s,
        iteration_s=plan.iteration_time_s,
    )


@dataclass(frozen=True, slots=True)
class Replays:
    """Replays of one plan.

    Attributes:
        time_s, energy_j: mean of an iteration's, one GPU per stage.
        full_s, full_j: of the same iterations at full clocks.
        changes: clock changes per iteration in the stage that has most, as asked for.
    """

    time_s: float
    energy_j: float
    full_s: float
    full_j: float
    changes: float

    @property
    def saving(self) -> float:
        """Energy saved against full clocks, as a share."""
        return 1 - self.energy_j / self.full_j

    @property
    def slowdown(self) -> float:
        """Time beyond that at full clocks, as a share."""
        return self.time_s / self.full_s - 1


def replays(problem: PlanningProblem, plan: Plan, latency_s: float, jitter: float, seed: int = 0) -> Replays:
    """What comes of a plan whose clocks change by host time.

    Args:
        problem: that the plan was made for.
        plan: without waits at clocks of their own.
        latency_s: how long a clock change takes.
        jitter: standard deviation, as a share, of an instruction's duration, and of the pace of a whole iteration: both
            are drawn anew for each.
        seed: of what is drawn.
    """
    drawn = np.random.default_rng(seed)
    parts = [phases_of(plan, stage) for stage in range(len(plan.stages))]
    clocks = [None if part is None else GraphClocks(part) for part in parts]
    full: list[list[TimedRequest]] = [[] for _ in clocks]
    runs = _Runs(problem, latency_s)
    seen: list[tuple[float, float, float, float, float]] = []
    for number in range(_SETTLE + _COUNTED):
        pace = 1 + jitter * drawn.standard_normal()
        sizes = np.maximum(0.1, pace * (1 + jitter * drawn.standard_normal(len(problem.graph))))
        requests = [[] if one is None else one.requests(latency_s) for one in clocks]
        time_s, energy_j, ends_s = runs.run(requests, sizes)
        for one, end_s in zip(clocks, ends_s, strict=True):
            if one is not None:
                one.saw(end_s)
        if number >= _SETTLE:
            changes = max(map(len, requests))
            seen.append((time_s, energy_j, *runs.run(full, sizes)[:2], changes))
    return Replays(*np.mean(seen, axis=0).tolist())


class _Runs:
    def __init__(self, problem: PlanningProblem, latency_s: float) -> None:
        graph = problem.graph
        self._problem, self._latency_s = problem, latency_s
        self._stage: list[int] = graph.stage.tolist()
        self._class: list[int] = problem.class_of.tolist()
        self._constant_s: list[float] = graph.constant_s.tolist()
        self._starts: list[int] = graph.predecessor_start.tolist()
        self._sources: list[int] = graph.edge_source.tolist()
        self._latencies: list[float] = graph.edge_latency_s.tolist()
        self._full_mhz: list[int] = problem.waiting_costs.full_mhz.tolist()
        self._rows: list[dict[int, tuple[float, float]]] = []
        for k, rows in enumerate(problem.measured):
            seconds, joules = problem.full_clock[k].tolist()
            self._rows.append({**rows, int(problem.full_clock_mhz[k]): (seconds, joules)})

    def run(self, requests: Sequence[Sequence[TimedRequest]], sizes: FloatArray) -> tuple[float, float, list[float]]:
        """One iteration: its time, the energy of all stages, and when each stage's last instruction ends."""
        stages = len(requests)
        lines = [_Line(self._full_mhz[stage], requests[stage], self._latency_s) for stage in range(stages)]
        finish_s = [0.0] * len(self._stage)
        ends_s, free_s, energy_j = [0.0] * stages, [0.0] * stages, 0.0
        size: list[float] = sizes.tolist()
        for node, stage in enumerate(self._stage):
            start_s = max(
                (
                    finish_s[self._sources[edge]] + self._latencies[edge]
                    for edge in range(self._starts[node], self._starts[node + 1])
                ),
                default=0.0,
            )
            k = self._class[node]
            if k < 0:
                finish_s[node] = start_s + self._constant_s[node]
                continue
            energy_j += self._waiting_j(stage, lines[stage], free_s[stage], start_s)
            finish_s[node], joules = self._work(self._rows[k], lines[stage], start_s, size[node])
            energy_j += joules
            ends_s[stage] = free_s[stage] = finish_s[node]
        time_s = max(finish_s)
        for stage in range(stages):
            energy_j += self._waiting_j(stage, lines[stage], free_s[stage], time_s)
        return time_s, energy_j + self._problem.total_blocking_w * time_s, ends_s

    def _work(
        self, rows: dict[int, tuple[float, float]], line: _Line, start_s: float, size: float
    ) -> tuple[float, float]:
        """When an instruction ends, and its effective energy."""
        now_s, left, energy_j = start_s, size, 0.0
        while True:
            clock, until_s = line.at(now_s)
            if clock not in rows:
                clock = min(rows, key=lambda mhz: abs(mhz - clock))
            seconds, joules = rows[clock]
            if now_s + left * seconds <= until_s:
                return now_s + left * seconds, energy_j + left * joules
            done = (until_s - now_s) / seconds
            energy_j, left, now_s = energy_j + done * joules, left - done, until_s

    def _waiting_j(self, stage: int, line: _Line, begin_s: float, end_s: float) -> float:
        """What a wait takes beyond the least waiting power."""
        power = self._problem.waiting[stage]
        if power.is_constant:
            return 0.0
        energy_j = 0.0
        while begin_s < end_s:
            clock, until_s = line.at(begin_s)
            until_s = min(until_s, end_s)
            watts = float(np.interp(clock, power.clocks_mhz, power.power_w)) - power.lowest_w
            energy_j, begin_s = energy_j + watts * (until_s - begin_s), until_s
        return energy_j


class _Line:
    """One stage's clock over an iteration; asked for rising times."""

    def __init__(self, full_mhz: int, requests: Sequence[TimedRequest], latency_s: float) -> None:
        self._clocks = [full_mhz, *(full_mhz if one.frequency_mhz is None else one.frequency_mhz for one in requests)]
        self._until_s = [*(one.after_s + latency_s for one in requests), float("inf")]
        self._at = 0

    def at(self, time_s: float) -> tuple[int, float]:
        """The clock at a time, and until when it holds."""
        while time_s >= self._until_s[self._at]:
            self._at += 1
        return self._clocks[self._at], self._until_s[self._at]
