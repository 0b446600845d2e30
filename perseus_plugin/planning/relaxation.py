"""The exact continuous relaxation, solved as a min-cost flow.

Primal: choose event times so that every instruction runs for some duration, at the energy of the lower convex hull
of its options, precedence holds and the iteration ends by the deadline; least total energy. Dual: a flow in which
each instruction is a bundle of parallel arcs, one per hull vertex (length: its duration; capacity: difference of the
slopes beside it, in watts; the fastest one uncapacitated) and precedence edges are uncapacitated. Events whose time
is forced (begin, deadline, everything critical at the fastest) are one node. The formulation: docs/planner-figures.md.

The solver works on integers. The bound is evaluated afterwards in floating point at the flow that it found: by weak
duality every flow gives a true bound, so units only decide how tight it is (a few parts in a million).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.solvers import keeping_the_interpreter

# Units as shares of a mean instruction's duration and power. (The steepest slope would be no measure: between two
# clocks of nearly the same duration a slope can be anything.)
_TIME_RESOLUTION = 1e-5
_POWER_RESOLUTION = 1e-4
_STEEPEST_UNITS = 1e9
# Events that can move by no more than this share of the iteration count as forced.
_FORCED = 1e-8
_MORE_ROOM = 16
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Optimum of the relaxation.

    Attributes:
        deadline_s: the deadline it was solved for; for the energy minimum, the iteration time found.
        bound_j: no plan that meets the deadline takes less effective energy plus blocking power until the deadline.
        price_w: effective energy that a second more of deadline would save, joules per second; infinite at the
            shortest possible iteration.
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
    """Start and finish events of the nodes after merging those that an optimal solution can let coincide.

    Attributes:
        start, finish: shape (nodes,), event ids.
        count: number of events.
        source, sink: ids of the iteration's begin and end.
        edge: ids of the graph's edges whose two events have not been merged.
    """

    start: IntArray
    finish: IntArray
    count: int
    source: int
    sink: int
    edge: IntArray


@dataclass(frozen=True, eq=False)
class _Network:
    """The flow network at one deadline: integer costs relative to a feasible schedule.

    Attributes:
        guess_s: shape (events,), the schedule.
        earliest_s, latest_s: shape (events,), range of every event's time.
        node_of: shape (events,), flow node; 0 for all events whose time is forced.
        cost: shape (arcs,), time units by which the arc's two events lie further apart than its length.
    """

    guess_s: FloatArray
    earliest_s: FloatArray
    latest_s: FloatArray
    node_of: IntArray
    cost: IntArray


class Relaxation:
    """Solves the relaxation of one problem for any deadline.

    Args:
        problem: graph and options.
        coarser_time, coarser_power: units are this many times larger than usual.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        coarser_time: float = 1.0,
        coarser_power: float = 1.0,
    ) -> None:
        self.problem = problem
        self.free = problem.class_of >= 0
        self.least_s = problem.fastest_s
        self.free_of_class = [np.flatnonzero(self.free & (problem.class_of == k)) for k in range(len(problem.classes))]
        mean_s = float(self.least_s.mean())
        self.time_unit_s = coarser_time * _TIME_RESOLUTION * mean_s
        self.power_unit_w = coarser_power * _POWER_RESOLUTION * problem.mean_energy_j / mean_s
        self.least_graph_times = problem.graph.times(self.least_s)
        self._build_arcs()

    @classmethod
    def sized(cls, problem: PlanningProblem) -> Relaxation:
        """In coarser units for larger jobs: their bound loses a part in 10,000 and is found several times faster."""
        size = len(problem.graph)
        return cls(problem, min(100.0, max(1.0, size / 500)), min(500.0, max(1.0, size / 100)))

    @property
    def shortest_s(self) -> float:
        """The shortest possible iteration."""
        return float(self.least_graph_times[1].max())

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
        start, finish = np.arange(n), np.arange(n, 2 * n)
        start[in_degree == 0] = 2 * n
        finish[out_degree == 0] = 2 * n + 1
        no_latency = graph.edge_latency_s == 0
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
            count=len(used),
            source=int(renamed[2 * n]),
            sink=int(renamed[2 * n + 1]),
            edge=np.flatnonzero(finish[graph.edge_source] != start[graph.edge_target]),
        )

    def _build_arcs(self) -> None:
        """Arcs of the network: hull vertices of the free instructions, all nodes' least durations, edges."""
        graph, events = self.problem.graph, self.events
        owners: list[IntArray] = []
        lengths: list[FloatArray] = []
        capacities: list[IntArray] = []
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            slopes = np.append(options.slope_w, 0.0) / self.power_unit_w
            slopes = np.rint(np.minimum(slopes, _STEEPEST_UNITS)).astype(np.int64)
            capacity = slopes[:-1] - slopes[1:]
            use = capacity > 0
            owners.append(np.repeat(nodes, int(use.sum())))
            lengths.append(np.tile(options.time_s[options.hull[1:]][use], len(nodes)))
            capacities.append(np.tile(capacity[use], len(nodes)))
        finite = np.concatenate([*capacities, np.empty(0, dtype=np.int64)])
        self.owner = np.concatenate([*owners, np.arange(len(graph))])
        self.finite_arcs = len(finite)
        # More flow than all finite arcs together carry would have to run through unlimited arcs alone.
        # No iteration becomes shorter than with all that finite arcs together carry.
        self.blocking_units = min(math.ceil(self.problem.total_blocking_w / self.power_unit_w), int(finite.sum()) + 1)
        unlimited = len(graph) + len(events.edge)
        most = int(finite.sum()) + self.blocking_units + 1
        self.capacity = np.concatenate([finite, np.full(unlimited, most, dtype=np.int64)])
        self.length_s = np.concatenate([*lengths, self.least_s, graph.edge_latency_s[events.edge]])
        source, target = graph.edge_source[events.edge], graph.edge_target[events.edge]
        self.tail = np.concatenate([events.start[self.owner], events.finish[source]])
        self.head = np.concatenate([events.finish[self.owner], events.start[target]])

    @property
    def room(self) -> int:
        """What an arc without a limit gets at first: what the optimum sends through none, as a rule.

        That is what one instruction of every stage can carry. Room for all that there is makes the solver take several
        times as long in large networks.
        """
        steepest = max((float(options.slope_w.max(initial=0.0)) for options in self.problem.classes), default=0.0)
        units = round(min(steepest / self.power_unit_w, _STEEPEST_UNITS))
        return self.problem.graph.stages * units + self.blocking_units + 1

    def solve(self, deadline_s: float) -> Relaxed:
        """Least effective energy at `deadline_s`, with blocking power until then.

        Raises:
            PlanError: the deadline is shorter than the shortest possible iteration.
        """
        if not deadline_s >= self.shortest_s:
            raise PlanError(
                f"deadline: got {deadline_s:.6f} s; the shortest possible iteration takes {self.shortest_s:.6f} s"
            )
        # Beyond the longest iteration only the waiting grows.
        network = self._network(min(deadline_s, self.longest_s))
        flow = self._flow(network, sink_units=None)
        found = self._result(network, flow, deadline_s, blocking_w=0.0)
        return found if deadline_s <= self.longest_s else replace(found, price_w=0.0)

    @cached_property
    def longest_s(self) -> float:
        """The iteration with every free instruction at its least effective energy."""
        slowest = np.where(self.free, self.problem.slowest_s, self.least_s)
        return self.problem.graph.iteration_time_s(slowest)

    def cheapest(self, at_most_s: float = math.inf) -> Relaxed:
        """Least energy at any iteration time, blocking power until its end; `deadline_s` is that end.

        Args:
            at_most_s: a deadline that is known not to be shorter than the cheapest iteration.
        """
        longest = self.longest_s
        network = self._network(longest, sink_is_free=True)
        flow = self._flow(network, self.blocking_units)
        found = self._result(network, flow, longest, blocking_w=self.problem.total_blocking_w)
        # Rounded event times may be early by a unit per step of the longest path; the optimum is flat there.
        rounding_s = len(self.problem.graph.level_start) * self.time_unit_s
        end = max(float(found.latest_finish_s.max()) + rounding_s, self.shortest_s)
        times = self.solve(min(end, longest, at_most_s))
        return replace(
            times,
            bound_j=found.bound_j,
            price_w=self.blocking_units * self.power_unit_w,
            instruction_price_w=found.instruction_price_w,
        )

    def _network(self, deadline_s: float, sink_is_free: bool = False) -> _Network:
        graph, events = self.problem.graph, self.events
        start, finish = self.least_graph_times
        latest = np.maximum(graph.latest_finish(self.least_s, deadline_s), finish)
        earliest_event = np.zeros(events.count)
        latest_event = np.full(events.count, deadline_s)
        for event, low, high in ((events.start, start, latest - self.least_s), (events.finish, finish, latest)):
            np.maximum.at(earliest_event, event, low)
            np.minimum.at(latest_event, event, high)
        earliest_event[events.source] = latest_event[events.source] = 0.0
        latest_event = np.maximum(latest_event, earliest_event)
        forced = latest_event - earliest_event <= _FORCED * deadline_s
        forced[[events.source, events.sink]] = True, not sink_is_free
        guess = (earliest_event + latest_event) / 2
        guess[events.sink] = deadline_s
        node_of = np.zeros(events.count, dtype=np.int64)
        node_of[~forced] = np.arange(1, 1 + int((~forced).sum()))
        apart = (guess[self.head] - guess[self.tail] - self.length_s) / self.time_unit_s
        # Rounded up, a cycle of unlimited arcs, which cannot be negative, does not become so.
        cost = np.concatenate([np.rint(apart[: self.finite_arcs]), np.ceil(apart[self.finite_arcs :])])
        return _Network(guess, earliest_event, latest_event, node_of, cost.astype(np.int64))

    def _flow(self, network: _Network, sink_units: int | None) -> IntArray:
        tail, head = network.node_of[self.tail], network.node_of[self.head]
        use = np.flatnonzero(tail != head)
        flow = np.zeros(len(tail), dtype=np.int64)
        if not len(use):
            return flow
        room = self.room
        while True:
            solver = min_cost_flow.SimpleMinCostFlow()
            capacity = np.minimum(self.capacity[use], room)
            arcs = solver.add_arcs_with_capacity_and_unit_cost(tail[use], head[use], capacity, network.cost[use])
            if sink_units is not None:
                solver.set_node_supply(0, sink_units)
                solver.set_node_supply(int(network.node_of[self.events.sink]), -sink_units)
            with keeping_the_interpreter():
                status = solver.solve()
            if status != solver.OPTIMAL:
                raise PlanError(f"the min-cost flow ended with {status}")
            flow[use] = solver.flows(arcs)
            # Where nothing is full that has no limit, more room would change nothing.
            if not ((flow[use] == capacity) & (capacity < self.capacity[use])).any():
                return flow
            room *= _MORE_ROOM

    def _result(self, network: _Network, flow: IntArray, deadline_s: float, blocking_w: float) -> Relaxed:
        """Bound, prices and event times from a flow; `blocking_w` is paid until the end where that is free."""
        events, count = self.events, len(self.owner)
        carried = flow[:count] * self.power_unit_w
        price = np.bincount(self.owner, weights=carried, minlength=len(self.problem.graph)).astype(np.float64)
        edge_price = (flow[count:] * self.power_unit_w).astype(np.float64)
        self._price_forced(network, price)
        balance = np.bincount(events.start, weights=price, minlength=events.count)
        balance -= np.bincount(events.finish, weights=price, minlength=events.count)
        balance += np.bincount(self.tail[count:], weights=edge_price, minlength=events.count)
        balance -= np.bincount(self.head[count:], weights=edge_price, minlength=events.count)
        price_w = -float(balance[events.sink])
        balance[events.sink] += blocking_w
        held = np.flatnonzero((network.node_of == 0) | (np.arange(events.count) == events.sink))
        low, high = balance[held] * network.earliest_s[held], balance[held] * network.latest_s[held]
        bound = float(np.minimum(low, high).sum()) + self._least_priced_energy(price)
        bound += float((edge_price * self.length_s[count:]).sum())
        if not blocking_w:
            bound += self.problem.total_blocking_w * deadline_s
        earliest, latest = self._event_times(network, flow)
        pinned = int((network.node_of == 0).sum()) > 2
        return Relaxed(
            deadline_s=deadline_s,
            bound_j=bound,
            price_w=math.inf if pinned else price_w,
            instruction_price_w=price,
            earliest_finish_s=earliest[events.finish],
            latest_finish_s=latest[events.finish],
        )

    def _price_forced(self, network: _Network, price: FloatArray) -> None:
        """Instructions between two forced events carry no flow in the network: price them by their own hull."""
        both = (network.node_of[self.events.start] == 0) & (network.node_of[self.events.finish] == 0)
        longest = network.latest_s[self.events.finish] - network.earliest_s[self.events.start]
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            inner = nodes[both[nodes]]
            if len(inner) and len(options.slope_w):
                segment = np.searchsorted(options.time_s[options.hull], longest[inner], side="right") - 1
                slopes = np.append(options.slope_w, 0.0)
                price[inner] = slopes[np.clip(segment, 0, len(slopes) - 1)]

    def _least_priced_energy(self, price: FloatArray) -> float:
        """Sum over all nodes of the least energy plus price times duration."""
        value = float((price * np.where(self.free, 0.0, self.least_s)).sum())
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            chosen = options.hull[np.searchsorted(-options.slope_w, -price[nodes], side="left")]
            value += float((options.energy_j[chosen] + price[nodes] * options.time_s[chosen]).sum())
        return value

    def _event_times(self, network: _Network, flow: IntArray) -> tuple[FloatArray, FloatArray]:
        """Earliest and latest event times that are optimal together with the flow (complementary slackness)."""
        n, count = len(self.problem.graph), len(self.owner)
        events = self.events
        apart = -network.cost
        carried, room = flow[:count] > 0, flow[:count] < self.capacity[:count]
        at_least, at_most = np.full(n, -_NEVER), np.full(n, _NEVER)
        np.maximum.at(at_least, self.owner[room], apart[:count][room])
        np.minimum.at(at_most, self.owner[carried], apart[:count][carried])
        bounded = at_most < _NEVER
        tight = flow[count:] > 0
        edge_tail, edge_head, edge_apart = self.tail[count:], self.head[count:], apart[count:]
        tails = (events.start, events.finish[bounded], edge_tail, edge_head[tight])
        heads = (events.finish, events.start[bounded], edge_head, edge_tail[tight])
        lengths = (at_least, -at_most[bounded], edge_apart, -edge_apart[tight])
        tail, head = network.node_of[np.concatenate(tails)], network.node_of[np.concatenate(heads)]
        length = np.concatenate(lengths)
        use = tail != head
        tail, head, length = tail[use], head[use], length[use]
        size = int(network.node_of.max()) + 1
        # Every arc was rounded by less than a unit, so these are below the earliest and above the latest times.
        depth = len(self.problem.graph.level_start) * 2
        low, high = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        units = self.time_unit_s
        low[network.node_of] = np.floor((network.earliest_s - network.guess_s) / units).astype(np.int64) - depth
        high[network.node_of] = np.ceil((network.latest_s - network.guess_s) / units).astype(np.int64) + depth
        low[0] = high[0] = 0
        earliest = _longest_paths(low, tail, head, length)
        latest = -_longest_paths(-high, head, tail, length)
        return (
            network.guess_s + earliest[network.node_of] * units,
            network.guess_s + latest[network.node_of] * units,
        )


def _longest_paths(
    value: npt.NDArray[np.int64], tail: IntArray, head: IntArray, length: IntArray
) -> npt.NDArray[np.int64]:
    """Longest path to every node from node 0, whose value stays 0 (Bellman-Ford; only what has risen is followed).

    Args:
        value: lower bounds to begin with.
    """
    if not len(tail):
        return value
    order = np.argsort(tail, kind="stable")
    head, length = head[order], length[order]
    first = np.searchsorted(tail[order], np.arange(len(value) + 1))
    risen, has_risen = np.arange(len(value)), np.zeros(len(value), dtype=bool)
    for _ in range(2 * len(value) + 2):
        degree = first[risen + 1] - first[risen]
        arcs = np.repeat(first[risen] - np.cumsum(degree) + degree, degree) + np.arange(int(degree.sum()))
        reached, targets = np.repeat(value[risen], degree) + length[arcs], head[arcs]
        more = reached > value[targets]
        if not more.any():
            return value
        np.maximum.at(value, targets[more], reached[more])
        if value[0] != 0:
            break
        has_risen[targets[more]] = True
        risen = np.flatnonzero(has_risen)
        has_risen[risen] = False
    raise PlanError("the min-cost flow is not optimal: its residual graph has a cycle of positive length")
