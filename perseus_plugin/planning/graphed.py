"""What a plan makes of steps that are one CUDA graph, whose clocks change by host time and not with instructions.

A stage's clock is what was asked for by the time, whatever it runs just then: an instruction is as far as its clocks
until now have brought it. `control.graphed` says what is asked for, from the times of the replays before.

Where durations vary, a plan with fewer clock changes, or one that ends slowed instructions earlier, may be the better
one: that is chosen by replaying such plans over the same drawn durations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from perseus_plugin.control.graphed import GraphClocks, TimedRequest
from perseus_plugin.errors import PlanError
from perseus_plugin.exchange.messages import PhasesPart
from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Profile

_SETTLE, _COUNTED = 12, 24  # replays: until the fit is that of many, and those that figures are of
_FEWEST, _MOST_RUN = 6, 200_000  # of those, and instructions of all of them: large jobs would take long
_CHANGES = (16, 8, 4, 2)  # clock changes per iteration that are tried where more are allowed
_WORSE = 2  # margins one after the other that are no better: larger ones are not, either


class Jitter(NamedTuple):
    """By how much durations vary: standard deviations, as shares.

    Attributes:
        within: of an instruction's duration.
        between: of the pace of a whole iteration.
    """

    within: float
    between: float


def jitter_of(profile: Profile) -> Jitter | None:
    """As a profile has it at full clocks: the root mean square over all kinds; None where it says nothing of that."""
    rows = [rows[0] for rows in profile.table.values()]
    shares = [
        [share for share in of if math.isfinite(share)]
        for of in ([row.spread_within for row in rows], [row.spread_between for row in rows])
    ]
    if not any(shares):
        return None
    return Jitter(*(math.sqrt(math.fsum(one * one for one in of) / len(of)) if of else 0.0 for of in shares))


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
    return Replayer(problem, latency_s, Jitter(jitter, jitter), seed).under(plan)


class Replayer:
    """Replays any plan of a job over the same drawn durations.

    Args:
        problem, latency_s, seed: see `replays`.
        jitter: by how much durations vary.
    """

    def __init__(self, problem: PlanningProblem, latency_s: float, jitter: Jitter, seed: int = 0) -> None:
        self._problem, self._latency_s, self._jitter, self._seed = problem, latency_s, jitter, seed
        self._runs = _Runs(problem, latency_s)
        self._full: list[tuple[float, float]] = []

    def _sizes(self) -> Iterator[FloatArray]:
        drawn, nodes = np.random.default_rng(self._seed), len(self._problem.graph)
        for _ in range(_SETTLE + max(_FEWEST, min(_COUNTED, _MOST_RUN // nodes))):
            pace = 1 + self._jitter.between * drawn.standard_normal()
            yield np.maximum(0.1, pace * (1 + self._jitter.within * drawn.standard_normal(nodes)))

    def under(self, plan: Plan) -> Replays:
        """Of one plan, without waits at clocks of their own."""
        parts = [phases_of(plan, stage) for stage in range(len(plan.stages))]
        clocks = [None if part is None else GraphClocks(part) for part in parts]
        seen: list[tuple[float, float, float, float, float]] = []
        for number, sizes in enumerate(self._sizes()):
            requests = [[] if one is None else one.requests(self._latency_s) for one in clocks]
            time_s, energy_j, ends_s = self._runs.run(requests, sizes)
            for one, end_s in zip(clocks, ends_s, strict=True):
                if one is not None:
                    one.saw(end_s)
            if number >= _SETTLE:
                seen.append((time_s, energy_j, *self._at_full_clocks(number - _SETTLE, sizes), max(map(len, requests))))
        return Replays(*np.mean(seen, axis=0).tolist())

    def _at_full_clocks(self, number: int, sizes: FloatArray) -> tuple[float, float]:
        if number == len(self._full):
            self._full.append(self._runs.run([[] for _ in self._problem.waiting], sizes)[:2])
        return self._full[number]


def worth(replayed: Replays, slowdown: float) -> float:
    """What a plan is worth: its saving, less what time it takes beyond the slowdown that is allowed (shares)."""
    # Loads what replays measured iterations, which the training process does without.
    from perseus_plugin.planning.robust import TIME_WORTH

    return replayed.saving - TIME_WORTH * max(0.0, replayed.slowdown - slowdown)


def choose_by_time(
    plan_with: Callable[[float, int | None], Plan],
    replayer: Replayer,
    slowdown: float,
    margin: float,
    max_changes: int | None,
) -> tuple[float, int | None]:
    """The margin, and then the number of clock changes, with which a plan by time is worth most.

    Args:
        plan_with: makes the plan of a margin and a number of clock changes, quickly.
        replayer: of the job, as its durations vary.
        slowdown: that is allowed against full clocks, as a share.
        margin: the least one.
        max_changes: the most per stage and iteration; None: any number.

    Returns:
        Margin and number, as given where none is worth more.
    """
    from perseus_plugin.planning.robust import margins_from

    def of(margin: float, changes: int | None) -> float:
        try:
            return worth(replayer.under(plan_with(margin, changes)), slowdown)
        except PlanError:  # few clock changes may not do at every margin
            return -math.inf

    best, chosen, worse = of(margin, max_changes), margin, 0
    for larger in margins_from(margin)[1:]:
        if (found := of(larger, max_changes)) > best:
            best, chosen, worse = found, larger, 0
        elif (worse := worse + 1) == _WORSE:
            break
    fewer: int | None = max_changes
    for changes in _CHANGES:
        if (max_changes is None or changes < max_changes) and (found := of(chosen, changes)) > best:
            best, fewer = found, changes
    return chosen, fewer


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
