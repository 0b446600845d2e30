"""The exact continuous relaxation for one deadline, solved as a min-cost flow.

Primal: choose event times so that every instruction runs for some duration, at the energy of the lower convex hull of
its options, precedence holds and the iteration ends by the deadline; least total energy. Dual: a circulation in which
each instruction is a bundle of parallel arcs, one per hull vertex (length: its duration; capacity: difference of the
slopes beside it, in watts; the fastest one uncapacitated), precedence edges are uncapacitated, and one return arc
costs the deadline. See docs/planner.md for the formulation and references.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

from perseus_plugin.errors import PlanError
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.pipeline import FloatArray, IntArray

TIME_UNIT_S = 1e-6
POWER_UNIT_W = 1e-3
_UNLIMITED = 1 << 40


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Optimum of the relaxation.

    Attributes:
        deadline_s: the deadline it was solved for.
        bound_j: no plan that meets the deadline takes less energy per iteration (one GPU per stage, blocking included).
        price_w: energy that a second more of deadline would save, joules per second.
        instruction_price_w: shape (nodes,), energy that a second less of that node would save.
        earliest_finish_s, latest_finish_s: shape (nodes,), finish times in the earliest and the latest optimal
            solution, to the time unit; every mixture of the two is optimal too.
    """

    deadline_s: float
    bound_j: float
    price_w: float
    instruction_price_w: FloatArray
    earliest_finish_s: FloatArray
    latest_finish_s: FloatArray


@dataclass(frozen=True, eq=False)
class _Events:
    """Start and finish events of the nodes after merging those that an optimal solution can let coincide."""

    start: IntArray
    finish: IntArray
    source: int
    sink: int
    edge: npt.NDArray[np.bool_]
    """Edges whose two events have not been merged."""


class Relaxation:
    """Solves the relaxation of one problem for any deadline.

    Args:
        problem: graph and options.
        fixed_s: shape (nodes,), durations to hold fixed, NaN where free; None: all free.
        fixed_energy_j: effective energy of the fixed nodes together.
    """

    def __init__(
        self, problem: PlanningProblem, fixed_s: FloatArray | None = None, fixed_energy_j: float = 0.0
    ) -> None:
        self.problem = problem
        self.fixed_energy_j = fixed_energy_j
        n = len(problem.graph)
        self.free = problem.class_of >= 0
        self.least_s = problem.fastest_s
        if fixed_s is not None:
            self.free &= np.isnan(fixed_s)
            self.least_s = np.where(np.isnan(fixed_s), self.least_s, fixed_s)
        self.free_of_class = [
            np.flatnonzero(self.free & (problem.class_of == k)) for k in range(len(problem.classes))
        ]
        self.least_units = np.rint(self.least_s / TIME_UNIT_S).astype(np.int64)
        self.latency_units = np.rint(problem.graph.edge_latency_s / TIME_UNIT_S).astype(np.int64)
        self._nodes = np.arange(n)
        self.graph_in_units = problem.graph.in_units(TIME_UNIT_S)
        self._build_arcs()

    @cached_property
    def shortest_s(self) -> float:
        """The shortest possible iteration."""
        return self.problem.graph.iteration_time_s(self.least_s)

    @cached_property
    def events(self) -> _Events:
        """Merge the finish of a node into the start of its only successor, and likewise the other way.

        A finish may wait for the node's only successor, and a start may come as early as the only predecessor's
        finish, at no cost: energy never rises with duration along the hull, and is constant beyond its end.
        """
        graph = self.problem.graph
        n = len(graph)
        out_degree = np.bincount(graph.edge_source, minlength=n)
        in_degree = np.bincount(graph.edge_target, minlength=n)
        no_latency = self.latency_units == 0
        start, finish = np.arange(n), np.arange(n, 2 * n)
        start[in_degree == 0] = 2 * n
        finish[out_degree == 0] = 2 * n + 1
        only_source = no_latency & (in_degree[graph.edge_target] == 1)
        start[graph.edge_target[only_source]] = finish[graph.edge_source[only_source]]
        only_target = no_latency & (out_degree[graph.edge_source] == 1) & ~only_source
        renamed = np.arange(2 * n + 2)
        renamed[finish[graph.edge_source[only_target]]] = start[graph.edge_target[only_target]]
        start, finish = renamed[start], renamed[finish]
        used = np.unique(np.concatenate([start, finish, [2 * n, 2 * n + 1]]))
        renamed[used] = np.arange(len(used))
        start, finish = renamed[start], renamed[finish]
        return _Events(
            start=start,
            finish=finish,
            source=int(renamed[2 * n]),
            sink=int(renamed[2 * n + 1]),
            edge=finish[graph.edge_source] != start[graph.edge_target],
        )

    def _build_arcs(self) -> None:
        """Arcs of the flow network: instructions' hull vertices, fastest durations, edges, and the return arc."""
        graph, events = self.problem.graph, self.events
        owners: list[IntArray] = []
        lengths: list[IntArray] = []
        capacities: list[IntArray] = []
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            slopes = np.rint(np.append(options.slope_w, 0.0) / POWER_UNIT_W).astype(np.int64)
            capacity = slopes[:-1] - slopes[1:]
            length = np.rint(options.time_s[options.hull[1:]] / TIME_UNIT_S).astype(np.int64)
            use = capacity > 0
            count = int(use.sum())
            owners.append(np.repeat(nodes, count))
            lengths.append(np.tile(length[use], len(nodes)))
            capacities.append(np.tile(capacity[use], len(nodes)))
        self.arc_owner = np.concatenate([*owners, self._nodes])
        owner = self.arc_owner
        finite = np.concatenate(capacities) if capacities else np.empty(0, dtype=np.int64)
        # More flow than all finite arcs together carry would have to run through unlimited arcs alone.
        self.unlimited = min(_UNLIMITED, int(finite.sum()) + 1)
        edge_source, edge_target = graph.edge_source[events.edge], graph.edge_target[events.edge]
        self.tail = np.concatenate([events.start[owner], events.finish[edge_source], [events.sink]])
        self.head = np.concatenate([events.finish[owner], events.start[edge_target], [events.source]])
        self.length = np.concatenate(
            [*lengths, self.least_units, self.latency_units[events.edge], np.zeros(1, dtype=np.int64)]
        )
        unlimited = np.full(len(graph) + len(edge_source) + 1, self.unlimited, dtype=np.int64)
        self.capacity = np.concatenate([finite, unlimited])

    def solve(self, deadline_s: float) -> Relaxed:
        """Least energy at `deadline_s`.

        Raises:
            PlanError: the deadline is shorter than the shortest possible iteration.
        """
        if deadline_s < self.shortest_s:
            raise PlanError(
                f"deadline: got {deadline_s:.6f} s; the shortest possible iteration takes {self.shortest_s:.6f} s"
            )
        shortest_units = round(self.graph_in_units.iteration_time_s(self.least_units * 1.0))
        # Rounded durations may add up to more than the rounded deadline; that would be an unbounded problem.
        deadline_units = max(round(deadline_s / TIME_UNIT_S), shortest_units)
        flow = self._flow(deadline_units)
        owner_flow = flow[: len(self.arc_owner)]
        price = np.bincount(self.arc_owner, weights=owner_flow * POWER_UNIT_W, minlength=len(self.problem.graph))
        price_w = float(flow[-1] * POWER_UNIT_W)
        edge_price = flow[len(self.arc_owner) : -1] * POWER_UNIT_W
        earliest, latest = self._event_times(flow, deadline_units)
        return Relaxed(
            deadline_s=deadline_s,
            bound_j=self._dual_value(price, edge_price, price_w, deadline_s),
            price_w=price_w,
            instruction_price_w=price,
            earliest_finish_s=earliest[self.events.finish] * TIME_UNIT_S,
            latest_finish_s=latest[self.events.finish] * TIME_UNIT_S,
        )

    def _flow(self, deadline_units: int) -> IntArray:
        # Costs relative to a feasible schedule are smaller numbers than durations, and the solver scales by them.
        guess = self._guess(deadline_units)
        cost = guess[self.head] - guess[self.tail] - self.length
        cost[-1] = deadline_units - guess[self.events.sink] + guess[self.events.source]
        solver = min_cost_flow.SimpleMinCostFlow()
        arcs = solver.add_arcs_with_capacity_and_unit_cost(self.tail, self.head, self.capacity, cost)
        status = solver.solve()
        if status != solver.OPTIMAL:
            raise PlanError(f"the min-cost flow ended with {status}")
        return np.asarray(solver.flows(arcs), dtype=np.int64)

    def _guess(self, deadline_units: int) -> IntArray:
        """Event times half-way between the earliest and the latest schedule at the fastest durations."""
        graph, events = self.graph_in_units, self.events
        least = self.least_units * 1.0
        start, finish = graph.times(least)
        latest = graph.latest_finish(least, float(deadline_units))
        guess = np.zeros(int(max(events.start.max(), events.finish.max())) + 1)
        guess[events.finish] = (finish + latest) / 2
        guess[events.start] = (start + latest - least) / 2
        guess[events.source], guess[events.sink] = 0, deadline_units
        return np.rint(guess).astype(np.int64)

    def _dual_value(
        self, price: FloatArray, edge_price: FloatArray, price_w: float, deadline_s: float
    ) -> float:
        """The Lagrangian at these prices: by weak duality a lower bound for any conserving non-negative flow."""
        value = self.fixed_energy_j + (self.problem.total_blocking_w - price_w) * deadline_s
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            best = np.searchsorted(-options.slope_w, -price[nodes], side="left")
            chosen = options.hull[best]
            value += float((options.energy_j[chosen] + price[nodes] * options.time_s[chosen]).sum())
        held = ~self.free
        value += float((price[held] * self.least_s[held]).sum())
        return value + float((edge_price * self.problem.graph.edge_latency_s[self.events.edge]).sum())

    def _event_times(self, flow: IntArray, deadline_units: int) -> tuple[IntArray, IntArray]:
        """Earliest and latest event times that are optimal together with the flow (complementary slackness)."""
        n, count = len(self.problem.graph), len(self.arc_owner)
        owner, length = self.arc_owner, self.length[:count]
        carried, room = flow[:count] > 0, flow[:count] < self.capacity[:count]
        at_least, at_most = np.zeros(n, dtype=np.int64), np.full(n, np.iinfo(np.int64).max)
        np.maximum.at(at_least, owner[room], length[room])
        np.minimum.at(at_most, owner[carried], length[carried])
        bounded = at_most < np.iinfo(np.int64).max
        tight = flow[count:-1] > 0
        tail, head, latency = (a[count:-1] for a in (self.tail, self.head, self.length))
        events = self.events
        tails = [events.start, events.finish[bounded], tail, head[tight], [events.source]]
        heads = [events.finish, events.start[bounded], head, tail[tight], [events.sink]]
        total = deadline_units if flow[-1] > 0 else 0
        lengths = [at_least, -at_most[bounded], latency, -latency[tight], [total]]
        joined = (np.concatenate(tails), np.concatenate(heads), np.concatenate(lengths))
        size = int(max(events.start.max(), events.finish.max())) + 1
        earliest = _longest_paths(size, *joined)
        return earliest, deadline_units - _longest_paths(size, joined[1], joined[0], joined[2])


def _longest_paths(size: int, tail: IntArray, head: IntArray, length: IntArray) -> IntArray:
    """Longest path to every event from any start, all at least 0 (Bellman-Ford on whole arrays)."""
    order = np.argsort(head, kind="stable")
    tail, head, length = tail[order], head[order], length[order]
    first = np.flatnonzero(np.diff(head, prepend=-1))
    targets = head[first]
    value = np.zeros(size, dtype=np.int64)
    for _ in range(size + 1):
        reached = np.maximum(value[targets], np.maximum.reduceat(value[tail] + length, first))
        if np.array_equal(reached, value[targets]):
            return value
        value[targets] = reached
    raise PlanError("the min-cost flow is not optimal: its residual graph has a cycle of positive length")
