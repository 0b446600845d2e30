"""What no plan with so few clock changes takes less than.

Prices of the instructions' time take precedence out of the problem: each stage is left with the cheapest of its phase
plans, which dynamic programming finds, so by weak duality all prices give a bound. The best are those of the program
that mixes whole phase plans (Dantzig and Wolfe); the relaxation's, moved somewhat towards those of the programs over
phases, come near. From there column generation goes on: all phase plans that were the cheapest at some prices are
mixed, and the prices of that program, brought nearer to the best ones so far, are tried. The bound is concave in the
prices, so what belongs to them beside the instructions may be averaged as they are.
"""

from __future__ import annotations

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.few_changes.phase_lp import solve_phases
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks, clock_of_instructions, stage_clocks
from perseus_plugin.planning.few_changes.segmentation import segment
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.work import Work

# Per instruction and pair of clocks, for each level.
_CUT_PAIR = 3.5e-9
_BEST_SHARE = 0.8  # share of the best prices in those that are tried
_TIGHT = 1e-4  # share of the energy by which it may be below what the program mixes


class LimitedBound:
    """The best bound of all prices that were seen.

    Args:
        problem: graph and options.
        relaxed: the relaxation's optimum without the limit.
        max_changes: most clock changes of a stage.
        allowed_s: by when every plan ends that the bound is for.
        waits_until_s: until when blocking power counts whatever the plan; None: until it ends.

    Attributes:
        bound_j: energy, blocking included.
        rest_j: what belongs to the relaxation's prices beside the instructions.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        relaxed: Relaxed,
        max_changes: int,
        allowed_s: float,
        waits_until_s: float | None,
    ) -> None:
        self._problem, self._max_changes, self._waits_until_s = problem, max_changes, waits_until_s
        self._relaxed, self._allowed_s = relaxed, allowed_s
        self._stages = stage_clocks(problem, every=True)
        slowest_s = problem.graph.constant_s.copy()
        for stage in self._stages:
            slowest_s[stage.nodes] = stage.time_s.max(axis=1)
        self.latest_s = min(allowed_s, problem.graph.iteration_time_s(slowest_s))
        self.bound_j = self._seen_j = relaxed.bound_j
        self._best: tuple[FloatArray, float] | None = None
        # Of every stage the phase plans that were cheapest, beside full clocks: times and energies of its instructions.
        self._plans = [[(stage.time_s[:, 0], stage.energy_j[:, 0])] for stage in self._stages]
        times, energies = problem.option_table
        nodes, price = problem.instruction_nodes, relaxed.instruction_price_w
        seconds = np.where(np.isfinite(times), times, 0.0)[problem.class_of[nodes]]
        least_j = (energies[problem.class_of[nodes]] + price[nodes, None] * seconds).min(axis=1)
        self.rest_j = relaxed.bound_j - float(least_j.sum())
        if waits_until_s is None and self.latest_s > relaxed.deadline_s:
            # Of the energy minimum: its price is rounded, and it holds until all take least.
            beyond_s = max(0.0, self.latest_s - problem.longest_s)
            self.rest_j += min(0.0, problem.total_blocking_w - relaxed.price_w) * beyond_s

    def rest(self, edge_price_w: FloatArray, sink_price_w: FloatArray) -> float:
        """What prices of precedence have beside the instructions, whatever the plan.

        Args:
            edge_price_w: shape (edges,), of each precedence.
            sink_price_w: shape (nodes,), of ending before the iteration does.
        """
        graph, problem = self._problem.graph, self._problem
        price_w = np.bincount(graph.edge_source, weights=edge_price_w, minlength=len(graph)) + sink_price_w
        # Starts may be anything from 0 on; of prices that balance, nothing is left.
        left_w = price_w - np.bincount(graph.edge_target, weights=edge_price_w, minlength=len(graph))
        rest_j = float(edge_price_w @ graph.edge_latency_s + price_w @ graph.constant_s)
        rest_j += float(np.minimum(left_w, 0.0).sum()) * self.latest_s
        end_w = -float(sink_price_w.sum())
        if self._waits_until_s is not None:
            rest_j += problem.total_blocking_w * self._waits_until_s
        else:
            end_w += problem.total_blocking_w
        return rest_j + min(end_w * self.latest_s, end_w * problem.shortest_s)

    def see(self, price_w: FloatArray, rest_j: float, work: Work) -> bool:
        """Try prices of all nodes' time; what is done is added to `work`.

        Returns:
            Whether a phase plan is the cheapest that was not before.
        """
        total_j, new = rest_j, False
        for stage, plans in zip(self._stages, self._plans, strict=True):
            if not len(stage.nodes):
                continue
            cost = stage.energy_j + price_w[stage.nodes, None] * stage.time_s
            work.done += cost.shape[0] * (self._max_changes + 1) * cost.shape[1] ** 2 * _CUT_PAIR
            found = segment(cost, np.zeros(len(cost)), self._max_changes, 0.0)
            at = np.arange(len(cost)), clock_of_instructions(stage, found.begins, found.clocks)
            total_j += float(cost[at].sum())
            if not any(np.array_equal(stage.time_s[at], time_s) for time_s, _ in plans):
                plans.append((stage.time_s[at], stage.energy_j[at]))
                new = True
        if self._best is None or total_j > self._seen_j:
            self._best, self._seen_j = (price_w, rest_j), total_j
        self.bound_j = max(self.bound_j, total_j)
        return new

    def of_fewer(self, max_changes: int, work: Work) -> LimitedBound:
        """That of so many changes, which has seen the best prices of this one."""
        problem, waits_until_s = self._problem, self._waits_until_s
        fewer = LimitedBound(problem, self._relaxed, max_changes, self._allowed_s, waits_until_s)
        fewer.see(*(self._best or (self._relaxed.instruction_price_w, self.rest_j)), work)
        return fewer

    def tighten(self, deadline_s: float, work: Work, until: float) -> None:
        """Column generation, until the bound is tight or `until` units of work are done."""
        while self._best is not None and not work.over(until):
            mix = solve_phases(self._problem, *self._columns(), deadline_s, work, until, every=True)
            if mix is None:
                return
            end_s = deadline_s if self._waits_until_s is None else self._waits_until_s
            mixed_j = mix.energy_j + self._problem.total_blocking_w * end_s
            if mixed_j - self.bound_j <= _TIGHT * abs(mixed_j):
                return
            rest_j = self.rest(mix.edge_price_w, mix.sink_price_w)
            before_j, (price_w, best_rest_j), new = self._seen_j, self._best, False
            for share in (_BEST_SHARE, 0.0):
                tried_w = share * price_w + (1 - share) * mix.price_w
                new |= self.see(tried_w, share * best_rest_j + (1 - share) * rest_j, work)
                if new and self._seen_j > before_j:
                    break
            if not new:  # the next program would be the same
                return

    def _columns(self) -> tuple[tuple[StageClocks, ...], Phases]:
        """Every stage as one phase, whose clocks are its phase plans."""
        tables = []
        for stage, plans in zip(self._stages, self._plans, strict=True):
            times, energies = (np.array(column).T.reshape(len(stage.nodes), -1) for column in zip(*plans, strict=True))
            tables.append(StageClocks(stage.nodes, np.arange(times.shape[1]), times, energies, stage.forbidden_j))
        return tuple(tables), Phases(((0,),) * len(tables), ((0,),) * len(tables))
