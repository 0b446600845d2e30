"""How well a plan's promises are known, given how well its profile is.

Times, energies and the blocking power are drawn again and again within their standard errors; each time the plan and
full clocks are priced on what was drawn, and the plan is held against a lower bound for every other plan on it. The
bound is the Lagrangian one at the prices of the relaxation's optimum: by weak duality they bound any profile's optimum
from below, whatever profile they were found on, so that nothing has to be solved again. Pure; the draws are seeded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.plan import Confidence, Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.replay import clocks_of
from perseus_plugin.profiling.profile import Measurement, Profile

LEVEL = 0.95
_SIGMAS = 1.96  # of a normal distribution, that hold this share
_DRAWS = 64
_LARGE, _FEWER_DRAWS = 4000, 24  # nodes from which a draw takes long
_LOOSER = 1e-3  # share by which the deadline of the prices is above the shortest iteration, where nothing has room


def with_confidence(plan: Plan, planner: Planner, profile: Profile, blocking_power_se_w: float | None = 0.0) -> Plan:
    """The plan with how well it is known.

    Unchanged where an error that matters is not known, or where errors are so large that no energy is a bound.

    Errors of times are taken to be shared by all instructions at a clock, as those were measured in the same
    iterations; errors of power to be each row's own.

    Args:
        plan: for a deadline, a slowdown or least energy: one that does not wait for a straggler.
        planner: of the profile itself, without any margin.
        profile: with standard errors.
        blocking_power_se_w: of the blocking power; None: unknown.
    """
    errors = _Errors.of(planner, profile)
    if errors is None or blocking_power_se_w is None:
        return plan
    draws = _Draws(plan, planner, errors, blocking_power_se_w)
    if not math.isfinite(draws.price_w):
        return plan
    rng = np.random.default_rng(0)
    count = _DRAWS if len(planner.problem.graph) <= _LARGE else _FEWER_DRAWS
    found = np.array([draws.draw(rng) for _ in range(count)])
    if not np.isfinite(found).all():
        return plan
    saving, gap = found[:, 0], found[:, 1]
    half = _SIGMAS * float(saving.std(ddof=1))
    middle = float(saving.mean())
    highest_gap = float(gap.mean()) + _SIGMAS * float(gap.std(ddof=1))
    return replace(
        plan,
        confidence=Confidence(
            level=LEVEL,
            saving=(min(middle - half, plan.saving), max(middle + half, plan.saving)),
            gap_at_most=max(highest_gap, plan.gap),
        ),
    )


class _Errors:
    """The options of every class with their relative standard errors, as tables.

    Attributes:
        clocks: distinct clocks of the profile, falling.
        clock: shape (classes, options), ids into `clocks`.
        time_s, energy_j: shape (classes, options), the highest clock first; padded with inf.
        time_se, power_se: the same, relative.
    """

    def __init__(self, table: list[tuple[Measurement, ...]]) -> None:
        width = max(len(rows) for rows in table)
        shape = (len(table), width)
        self.clocks = sorted({row.frequency_mhz for rows in table for row in rows}, reverse=True)
        self.clock = np.zeros(shape, dtype=np.int64)
        self.time_s, self.energy_j = np.full(shape, np.inf), np.full(shape, np.inf)
        self.time_se, self.power_se = np.zeros(shape), np.zeros(shape)
        for k, rows in enumerate(table):
            for i, row in enumerate(rows):
                self.clock[k, i] = self.clocks.index(row.frequency_mhz)
                self.time_s[k, i], self.energy_j[k, i] = row.time_s, row.energy_j
                self.time_se[k, i] = row.time_se_s / row.time_s
                both = (row.energy_se_j / row.energy_j) ** 2 - self.time_se[k, i] ** 2
                self.power_se[k, i] = math.sqrt(max(both, 0.0)) if both == both else math.nan

    @classmethod
    def of(cls, planner: Planner, profile: Profile) -> _Errors | None:
        """None where some error is unknown."""
        problem = planner.problem
        table = []
        for key, allowed in zip(problem.keys, problem.measured, strict=True):
            table.append(tuple(row for row in profile.table[key] if row.frequency_mhz in allowed))
        errors = cls(table)
        return errors if np.isfinite(errors.time_se + errors.power_se).all() else None


class _Draws:
    """What stays the same from draw to draw."""

    def __init__(self, plan: Plan, planner: Planner, errors: _Errors, blocking_power_se_w: float) -> None:
        self._problem, self._errors, self._blocking_se_w = planner.problem, errors, blocking_power_se_w
        problem = planner.problem
        self._nodes = problem.instruction_nodes
        self._class = problem.class_of[self._nodes]
        self._mhz = clocks_of(plan, problem.graph)
        self._waits_mhz = problem.waiting_costs.by_span(plan.wait_clocks_mhz)
        self._latency_s = planner.switch_latency_s or 0.0
        clocks = self._mhz[self._nodes]
        ids = np.array([errors.clocks.index(clock) for clock in clocks.tolist()])
        self._choice = (errors.clock[self._class] == ids[:, None]).argmax(axis=1)
        # Where the deadline is the shortest iteration, flow is kept at no event and there is no price of time.
        relaxed = planner.relaxation.solve(max(plan.iteration_time_s, planner.relaxation.shortest_s * (1 + _LOOSER)))
        self._deadline_s, self._bound_j, self.price_w = relaxed.deadline_s, relaxed.bound_j, relaxed.price_w
        self._node_price_w = relaxed.instruction_price_w[self._nodes]
        self._least_j = self._least_priced_j(errors.time_s, errors.energy_j, problem.blocking_power_w)

    def draw(self, rng: np.random.Generator) -> tuple[float, float]:
        """The plan's saving, and its energy above a lower bound for all plans, as shares."""
        errors, problem = self._errors, self._problem
        shared = rng.standard_normal(len(errors.clocks))[errors.clock]
        own = rng.standard_normal((2, *errors.time_s.shape))
        # The error of a lower clock's time is that of its ratio to the highest's.
        shift = shared * errors.time_se
        shift[:, 0] = 0.0
        shift += (own[0, :, 0] * errors.time_se[:, 0])[:, None]
        time_s = errors.time_s * np.exp(shift)
        energy_j = errors.energy_j * np.exp(shift) * np.maximum(1 + own[1] * errors.power_se, 0.0)
        waiting_w = np.maximum(problem.blocking_power_w + self._blocking_se_w * rng.standard_normal(), 0.0)
        planned_s, planned_j = self._run(self._choice, time_s, energy_j, waiting_w, self._mhz, self._waits_mhz)
        full_mhz, none = problem.full_clocks.frequency_mhz, np.zeros_like(self._waits_mhz)
        _, full_j = self._run(np.zeros_like(self._choice), time_s, energy_j, waiting_w, full_mhz, none)
        # A bound for plans as long as this one.
        bound_j = self._bound_j + self._least_priced_j(time_s, energy_j, waiting_w) - self._least_j
        bound_j -= self.price_w * (planned_s - self._deadline_s)
        bound_j += float(waiting_w.sum()) * planned_s - problem.total_blocking_w * self._deadline_s
        return 1 - planned_j / full_j, planned_j / bound_j - 1 if bound_j > 0 else math.inf

    def _run(
        self,
        choice: IntArray,
        time_s: FloatArray,
        energy_j: FloatArray,
        waiting_w: FloatArray,
        mhz: IntArray,
        waits_mhz: IntArray,
    ) -> tuple[float, float]:
        """Time and energy of an iteration; what waiting takes above its least is known."""
        problem = self._problem
        duration_s = problem.graph.constant_s.copy()
        duration_s[self._nodes] = time_s[self._class, choice]
        start_s, finish_s = problem.graph.times(duration_s)
        end_s = float(finish_s.max())
        spans = problem.waiting_costs.spans.times(start_s[:, None], finish_s[:, None], end_s)
        extra_j = float(problem.waiting_costs.extra_j(mhz, waits_mhz, spans, self._latency_s)[0])
        effective_j = self._effective_j(time_s, energy_j, waiting_w)[self._class, choice].sum()
        return end_s, float(effective_j) + float(waiting_w.sum()) * end_s + extra_j

    def _effective_j(self, time_s: FloatArray, energy_j: FloatArray, waiting_w: FloatArray) -> FloatArray:
        stage = np.array([stage for stage, _ in self._problem.keys])
        present = np.isfinite(time_s)
        return np.where(present, energy_j - waiting_w[stage][:, None] * np.where(present, time_s, 0.0), np.inf)

    def _least_priced_j(self, time_s: FloatArray, energy_j: FloatArray, waiting_w: FloatArray) -> float:
        """Sum over the instructions of the least effective energy plus price times duration."""
        effective_j = self._effective_j(time_s, energy_j, waiting_w)
        seconds = np.where(np.isfinite(time_s), time_s, 0.0)
        priced = effective_j[self._class] + self._node_price_w[:, None] * seconds[self._class]
        return float(priced.min(axis=1).sum())
