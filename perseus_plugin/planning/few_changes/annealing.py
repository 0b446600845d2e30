"""Phases improved by random moves in many plans side by side (simulated annealing).

A move turns the clock of a phase, shifts a cut, or both, in one stage or in two at once: what one stage gives up in
energy for time another one can use. All plans are timed together, level by level of the graph: some tens of thousands
of moves a second. Random numbers come from a fixed seed, so that the same input gives the same plan.
"""

from __future__ import annotations

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.replay import finishes
from perseus_plugin.planning.targets import ChangeLimits
from perseus_plugin.planning.work import Work

_PLANS, _LEAST_PLANS = 64, 24
_STEPS = 1500  # fewer plans are searched where all of them would be given fewer moves
_DRAWN = 6  # moves of each plan, of which the first is timed that does not lose by its energy alone
_HOT, _COLD = 0.03, 0.001  # temperature, in mean effective energies of an instruction
_OVER = 2.0  # a second beyond the deadline costs so many times what one before it saves
_RESHUFFLES = 8  # so many times the better half of the plans takes the place of the other
_TURN, _SHIFT = 0.6, 0.6  # share of moves that turn a clock, of those that shift a cut: some do both
_MOST_SHIFT = 5
_SURELY = 1 + 1e-9  # times are sums, and sums are rounded
# A step: by itself, per level of the graph, per plan and phase of a stage, and per plan and node.
_STEP, _STEP_LEVEL, _STEP_PHASE, _STEP_NODE = 500e-6, 8e-6, 0.6e-6, 1.0e-8


class Annealing:
    """Searches phases of all stages for the least energy by a deadline.

    Every stage has as many phases as it may have changes and one more, which has the clock of the first; phases may be
    empty.

    Args:
        problem: graph and options.
        stages: of `stage_clocks`.
        limits: on clock changes.
        deadline_s: to meet.
        second_w: about what a second of the iteration is worth.
        work: what is done is added to it.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        stages: tuple[StageClocks, ...],
        limits: ChangeLimits,
        deadline_s: float,
        second_w: float,
        work: Work,
    ) -> None:
        self._problem, self._limits, self._deadline_s, self._work = problem, limits, deadline_s, work
        self._over_w = _OVER * second_w
        self._stages = stages
        self._count = np.array([len(stage.nodes) for stage in stages])
        self._clocks = np.array([max(1, len(stage.frequency_mhz)) for stage in stages])
        shape = len(stages), int(self._count.max()), int(self._clocks.max())
        # Positions that a stage does not have are at a node of no time beyond the graph's.
        self._nodes = np.full(shape[:2], len(problem.graph), dtype=np.int64)
        self._time_s, self._sum_j = np.zeros(shape), np.zeros((shape[0], shape[1] + 1, shape[2]))
        for number, stage in enumerate(stages):
            rows, columns = stage.time_s.shape
            self._nodes[number, :rows] = stage.nodes
            self._time_s[number, :rows, :columns] = stage.time_s
            self._sum_j[number, 1 : rows + 1, :columns] = stage.energy_j.cumsum(axis=0)
        self._places = np.arange(shape[1])
        self._random = np.random.default_rng(0)

    def run(self, starts: list[Phases], until: float) -> list[Phases]:
        """The best that keeps deadline and limits, of `starts` and all that is found; none: nothing does.

        Args:
            starts: the better ones first; at least one.
            until: when to stop, in units of work.
        """
        graph = self._problem.graph
        self._phases = self._phase_count(starts)
        by_step = _STEP + _STEP_LEVEL * len(graph.level_start)
        by_plan = _STEP_PHASE * self._phases + _STEP_NODE * len(graph)
        left = max(0.0, until - self._work.done)
        plans = int(np.clip((left / _STEPS - by_step) / by_plan, _LEAST_PLANS, _PLANS))
        steps = int(left / (by_step + plans * by_plan))
        self._load([starts[number % len(starts)] for number in range(plans)])
        for step in range(steps):
            if self._work.over(until):
                break
            self._work.done += by_step + plans * by_plan
            done = step / steps
            self._step(self._problem.mean_energy_j * _HOT * (_COLD / _HOT) ** done)
            if int(done * _RESHUFFLES) < int((step + 1) / steps * _RESHUFFLES) and step + 1 < steps:
                self._reshuffle()
        return self._found()

    def _phase_count(self, starts: list[Phases]) -> int:
        if self._limits.max_changes is not None:
            return 1 if self._limits.max_changes < 2 else self._limits.max_changes + 1
        return 1 + max(len(clocks) for phases in starts for clocks in phases.clocks)

    def _load(self, starts: list[Phases]) -> None:
        shape = len(starts), len(self._stages), self._phases
        self._begin, self._clock = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for plan, phases in enumerate(starts):
            for stage, (begins, clocks) in enumerate(zip(phases.begins, phases.clocks, strict=True)):
                tied = len(clocks) > 1 and clocks[0] == clocks[-1]
                last = begins[-1] if tied else self._count[stage]
                kept = len(clocks) - tied
                self._begin[plan, stage, kept:] = last
                self._begin[plan, stage, :kept] = begins[:kept]
                self._clock[plan, stage, :] = clocks[kept - 1]
                self._clock[plan, stage, :kept] = clocks[:kept]
        self._clock[:, :, -1] = self._clock[:, :, 0]
        every = np.arange(shape[0])
        self._duration_s = np.zeros((len(self._problem.graph) + 1, shape[0]))
        self._duration_s[:-1] = self._problem.graph.constant_s[:, None]
        self._stage_j = np.zeros(shape[:2])
        for stage in range(shape[1]):
            which = np.full(shape[0], stage)
            self._spread(self._duration_s, every, which, self._begin[:, stage], self._clock[:, stage])
            self._stage_j[:, stage] = self._energy_j(which, self._begin[:, stage], self._clock[:, stage])
        self._over_j = self._penalty_j(self._duration_s, self._begin, self._clock)
        self._cost_j = self._stage_j.sum(axis=1) + self._over_j
        self._best_j = np.inf
        self._best: tuple[IntArray, IntArray] | None = None
        self._remember()

    def _spread(
        self, duration_s: FloatArray, plans: IntArray, stage: IntArray, begin: IntArray, clock: IntArray
    ) -> None:
        """Put the durations of one stage of each plan into their place."""
        phase = (begin[:, None, 1:] <= self._places[:, None]).sum(axis=2)
        at = clock[np.arange(len(clock))[:, None], phase]
        duration_s[self._nodes[stage], plans[:, None]] = self._time_s[stage[:, None], self._places, at]

    def _energy_j(self, stage: IntArray, begin: IntArray, clock: IntArray) -> FloatArray:
        """Of one stage of each plan."""
        end = np.concatenate([begin[:, 1:], self._count[stage][:, None]], axis=1)
        of = stage[:, None]
        energy_j: FloatArray = (self._sum_j[of, end, clock] - self._sum_j[of, begin, clock]).sum(axis=1)
        return energy_j

    def _penalty_j(self, duration_s: FloatArray, begin: IntArray, clock: IntArray) -> FloatArray:
        """What ending too late, and changes that follow too soon, count for; 0 where limits and deadline are kept."""
        finish_s = finishes(self._problem.graph, duration_s)
        end_s = finish_s.max(axis=0)
        over_s: FloatArray = np.maximum(0.0, end_s - self._deadline_s)
        if self._limits.min_dwell_s > 0:
            over_s += self._too_soon_s(finish_s - duration_s, end_s, begin, clock)
        return self._over_w * over_s

    def _too_soon_s(self, start_s: FloatArray, end_s: FloatArray, begin: IntArray, clock: IntArray) -> FloatArray:
        """By how much the shortest times between two changes are too short, of all stages together."""
        missing_s = np.zeros(len(begin))
        plans = np.arange(len(begin))[:, None]
        for stage, nodes in enumerate(self._nodes):
            count = int(self._count[stage])
            if not count:
                continue
            places = self._places[:count]
            phase = (begin[:, stage, None, 1:] <= places[:, None]).sum(axis=2)
            at = clock[plans, stage, phase]
            changed = at != np.roll(at, 1, axis=1)
            when_s = start_s[nodes[:count], plans]
            before_s = np.maximum.accumulate(np.where(changed, when_s, -np.inf), axis=1)
            # The last change of an iteration is that before the first one of the next.
            before_s = np.concatenate([before_s[:, -1:] - end_s[:, None], before_s[:, :-1]], axis=1)
            before_s = np.maximum(before_s, before_s[:, :1])
            dwell_s = np.where(changed, when_s - before_s, np.inf).min(axis=1)
            missing_s += np.maximum(0.0, self._limits.min_dwell_s * _SURELY - dwell_s)
        return missing_s

    def _step(self, temperature_j: float) -> None:
        """One timed move of every plan, taken if it loses no more than a random share of the temperature."""
        plans = len(self._cost_j)
        allowed_j = self._cost_j - temperature_j * np.log(1.0 - self._random.random(plans))
        drawn = np.repeat(np.arange(plans), _DRAWN)
        moves = [self._moved(drawn, stage) for stage in self._draw_stages(len(drawn))]
        cost_j = self._stage_j.sum(axis=1)[drawn]
        for stage, _, _, energy_j in moves:
            cost_j = cost_j + np.where(stage >= 0, energy_j - self._stage_j[drawn, stage], 0.0)
        # Of the moves that are drawn for a plan the first that can be taken.
        may = (cost_j <= allowed_j[drawn]).reshape(plans, _DRAWN)
        timed = np.flatnonzero(may.any(axis=1))
        if not len(timed):
            return
        chosen = timed * _DRAWN + may.argmax(axis=1)[timed]
        duration_s = self._duration_s[:, timed]
        begin, clock, stage_j = self._begin[timed], self._clock[timed], self._stage_j[timed]
        for stage, moved_begin, moved_clock, energy_j in moves:
            rows = np.flatnonzero(stage[chosen] >= 0)
            of, where = chosen[rows], stage[chosen[rows]]
            begin[rows, where], clock[rows, where] = moved_begin[of], moved_clock[of]
            stage_j[rows, where] = energy_j[of]
            self._spread(duration_s, rows, where, moved_begin[of], moved_clock[of])
        over_j = self._penalty_j(duration_s, begin, clock)
        cost_j = stage_j.sum(axis=1) + over_j
        taken = cost_j <= allowed_j[timed]
        into = timed[taken]
        self._duration_s[:, into] = duration_s[:, taken]
        self._begin[into], self._clock[into], self._stage_j[into] = begin[taken], clock[taken], stage_j[taken]
        self._over_j[into], self._cost_j[into] = over_j[taken], cost_j[taken]
        self._remember()

    def _draw_stages(self, count: int) -> list[IntArray]:
        """The stage of every move, and for half of them another one, else -1."""
        stages = len(self._stages)
        first = self._random.integers(0, stages, count)
        if stages == 1:
            return [first]
        second = (first + self._random.integers(1, stages, count)) % stages
        return [first, np.where(self._random.random(count) < 0.5, second, -1)]

    def _moved(self, plans: IntArray, stage: IntArray) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
        """A random move in one stage of each plan: stage, begins, clocks and energy."""
        count, every = len(plans), np.arange(len(plans))
        begin, clock = self._begin[plans, stage], self._clock[plans, stage]
        kind = self._random.random(count)
        turned = kind < _TURN
        which = self._random.integers(0, max(1, self._phases - 1), count)
        by = (self._random.integers(1, 3, count) * (2 * self._random.integers(0, 2, count) - 1)) * turned
        turn = clock[every, which] + by
        clock[every, which] = np.minimum(np.maximum(turn, 0), self._clocks[stage] - 1)
        clock[:, -1] = clock[:, 0]
        if self._phases > 1:
            cut = self._random.integers(1, self._phases, count)
            by = self._random.integers(1, _MOST_SHIFT + 1, count) * (2 * self._random.integers(0, 2, count) - 1)
            ends = np.concatenate([begin, self._count[stage][:, None]], axis=1)
            shifted = np.maximum(begin[every, cut] + by * (kind >= 1 - _SHIFT), ends[every, cut - 1])
            begin[every, cut] = np.minimum(shifted, ends[every, cut + 1])
        return stage, begin, clock, self._energy_j(stage, begin, clock)

    def _remember(self) -> None:
        kept_j = np.where(self._over_j <= 0, self._cost_j, np.inf)
        plan = int(kept_j.argmin())
        if kept_j[plan] < self._best_j:
            self._best_j = float(kept_j[plan])
            self._best = self._begin[plan].copy(), self._clock[plan].copy()

    def _reshuffle(self) -> None:
        """Go on with the better half of the plans, twice."""
        order = np.argsort(self._cost_j, kind="stable")
        half = len(order) // 2
        into, of = order[len(order) - half :], order[:half]
        self._duration_s[:, into] = self._duration_s[:, of]
        for values in (self._begin, self._clock, self._stage_j, self._over_j, self._cost_j):
            values[into] = values[of]

    def _found(self) -> list[Phases]:
        if self._best is None:
            return []
        begins, clocks = list[tuple[int, ...]](), list[tuple[int, ...]]()
        for count, begin, clock in zip(self._count.tolist(), *(one.tolist() for one in self._best), strict=True):
            kept = [(0, clock[0])]
            for first, end, at in zip(begin, [*begin[1:], count], clock, strict=True):
                if first == 0 < end:
                    kept = [(0, at)]
                elif first < end and at != kept[-1][1]:
                    kept.append((first, at))
            begins.append(tuple(first for first, _ in kept))
            clocks.append(tuple(at for _, at in kept))
        return [Phases(tuple(begins), tuple(clocks))]
