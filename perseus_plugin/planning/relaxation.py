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
from ortools.graph.python import min_cost_flow

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.events import Events, longest_paths, merged_events
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.solvers import keeping_the_interpreter
from perseus_plugin.planning.steady import Steady, balanced, find_steady

# Units as shares of a mean instruction's duration and power. (The steepest slope would be no measure: between two
# clocks of nearly the same duration a slope can be anything.)
_TIME_RESOLUTION = 1e-5
_POWER_RESOLUTION = 1e-4
_STEEPEST_UNITS = 1e9
# Events that can move by no more than this share of the iteration count as forced.
_FORCED = 1e-8
_MORE_ROOM = 16
# From so many instructions on what repeats is solved once, if that takes the bound no further than this share of the
# energy from what the times take.
_LONG = 8192
_REPEATED_TO = 1e-3
_ROUNDED = 1e-9  # a deadline so little shorter than another one is it: times are sums, and sums are rounded
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
class _Network:
    """The flow network at one deadline: integer costs relative to a feasible schedule.

    That changes no optimum, and the solver's effort grows with the largest cost.

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
    def events(self) -> Events:
        """Start and finish of all nodes."""
        return merged_events(self.problem.graph)

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
        if not deadline_s >= self.shortest_s * (1 - _ROUNDED):
            raise PlanError(
                f"deadline: got {deadline_s:.6f} s; the shortest possible iteration takes {self.shortest_s:.6f} s"
            )
        deadline_s = max(deadline_s, self.shortest_s)
        # Beyond the longest iteration only the waiting grows.
        network = self._network(min(deadline_s, self.longest_s))
        found = self._repeated(network, deadline_s)
        if found is None:
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
        return _Network(guess, earliest_event, latest_event, node_of, self._costs(guess))

    def _costs(self, guess_s: FloatArray) -> IntArray:
        apart = (guess_s[self.head] - guess_s[self.tail] - self.length_s) / self.time_unit_s
        # Rounded up, a cycle of unlimited arcs, which cannot be negative, does not become so.
        cost = np.concatenate([np.rint(apart[: self.finite_arcs]), np.ceil(apart[self.finite_arcs :])])
        return cost.astype(np.int64)

    def _tied(self, network: _Network, before: IntArray, last: IntArray, apart_s: float) -> _Network:
        """The network in which some nodes' events come just so much later than others' do: together they are one."""
        later = np.arange(self.events.count)
        for of in (self.events.start, self.events.finish):
            later[of[before]] = of[last]
        root, steps = later.copy(), (later != np.arange(len(later))).astype(np.int64)
        while (later[root] != root).any():
            steps += later[root] != root
            root = later[root]
        # A time that is forced for one is so for all.
        held = np.flatnonzero(network.node_of == 0)
        guess = network.guess_s + steps * apart_s
        guess[root[held]] = guess[held]
        guess = guess[root] - steps * apart_s
        node_of = network.node_of.copy()
        node_of[root[held]] = 0
        return replace(network, guess_s=guess, node_of=node_of[root], cost=self._costs(guess))

    def _flow(self, network: _Network, sink_units: int | None) -> IntArray:
        """The optimal flow; arcs without a limit get one that it rarely uses up: the solver is mostly faster for it."""
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
        price, edge_price = self._prices(flow)
        self._price_forced(network, price)
        bound, price_w = self._bound(network, price, edge_price, deadline_s, blocking_w)
        earliest, latest = self._event_times(network, flow)
        events, pinned = self.events, int((network.node_of == 0).sum()) > 2
        return Relaxed(
            deadline_s=deadline_s,
            bound_j=bound,
            price_w=math.inf if pinned else price_w,
            instruction_price_w=price,
            earliest_finish_s=earliest[events.finish],
            latest_finish_s=latest[events.finish],
        )

    def _prices(self, flow: IntArray) -> tuple[FloatArray, FloatArray]:
        """Of all nodes' time, and of the edges whose events have not been merged."""
        carried, count = flow * self.power_unit_w, len(self.owner)
        price = np.bincount(self.owner, weights=carried[:count], minlength=len(self.problem.graph))
        return price.astype(np.float64), carried[count:].astype(np.float64)

    def _bound(
        self, network: _Network, price: FloatArray, edge_price: FloatArray, deadline_s: float, blocking_w: float
    ) -> tuple[float, float]:
        """By weak duality at any prices, and what they have the deadline cost; see `_result`."""
        events, count = self.events, len(self.owner)
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
        return bound, price_w

    @cached_property
    def _steady(self) -> tuple[Steady, Relaxation] | None:
        """What repeats in a long iteration, and the relaxation of a shorter one."""
        problem = self.problem
        if len(problem.graph) < _LONG:
            return None
        steady = find_steady(problem.graph, self.least_s, problem.class_of)
        if steady is None:
            return None
        return steady, Relaxation.sized(replace(problem, graph=steady.graph, class_of=problem.class_of[steady.kept]))

    def _repeated(self, network: _Network, deadline_s: float) -> Relaxed | None:
        """The optimum of a shorter iteration, repeated; None where nothing repeats, or that is no optimum here."""
        if self._steady is None:
            return None
        (steady, short), graph, events = self._steady, self.problem.graph, self.events
        until_s = min(deadline_s, self.longest_s)
        short_s = min(max(short.shortest_s, until_s * short.shortest_s / self.shortest_s), short.longest_s)
        apart_s = (until_s - short_s) / steady.count
        short_network = short._network(short_s)
        flow = short._flow(short_network, sink_units=None)
        tied = short._tied(short_network, steady.before, steady.last, apart_s)
        try:
            found = short._result(short_network, flow, short_s, blocking_w=0.0)
            times = short._event_times(tied, short._flow(tied, sink_units=None))
        except PlanError:  # before so many repetitions what repeats is not what takes longest
            return None
        earliest, latest = (one[short.events.finish][steady.node] + steady.repeats * apart_s for one in times)
        aim_s = (earliest + latest) / 2
        edge_price = short._every_edge_price(found.instruction_price_w, short._prices(flow)[1])
        forced = network.node_of == 0
        price, edge_price = balanced(
            graph,
            found.instruction_price_w[steady.node],
            edge_price[steady.edge],
            aim_s,
            forced[events.start],
            forced[events.finish],
        )
        self._price_forced(network, price)
        bound, _ = self._bound(network, price, edge_price[events.edge], deadline_s, blocking_w=0.0)
        energy_j = self._energy_j(aim_s, until_s) + self.problem.total_blocking_w * deadline_s
        if energy_j - bound > _REPEATED_TO * abs(bound):
            return None
        return Relaxed(deadline_s, bound, found.price_w, price, earliest, latest)

    def _every_edge_price(self, price: FloatArray, edge_price: FloatArray) -> FloatArray:
        """Of all edges: between merged events flows what their nodes carry."""
        graph = self.problem.graph
        alone = np.bincount(graph.edge_target, minlength=len(graph))[graph.edge_target] == 1
        every: FloatArray = np.where(alone, price[graph.edge_target], price[graph.edge_source])
        every[self.events.edge] = edge_price
        return every

    def _energy_j(self, aim_s: FloatArray, deadline_s: float) -> float:
        """Effective energy where every node finishes at such a time, or as near to it as all others let it."""
        graph, finish = self.problem.graph, self.least_graph_times[1].copy()
        latest_s = np.maximum(graph.latest_finish(self.least_s, deadline_s), finish)
        aim_s = np.where(self.free, np.minimum(aim_s, latest_s), 0.0)
        start = np.zeros(len(graph))
        first = slice(0, int(graph.level_start[1]))
        finish[first] = np.maximum(self.least_s[first], aim_s[first])
        for low, high, sources, latency, offsets in graph.forward_steps:
            start[low:high] = np.maximum.reduceat(finish[sources] + latency, offsets)
            finish[low:high] = np.maximum(start[low:high] + self.least_s[low:high], aim_s[low:high])
        duration_s, energy_j = finish - start, 0.0
        for options, nodes in zip(self.problem.classes, self.free_of_class, strict=True):
            hull = options.hull
            energy_j += float(np.interp(duration_s[nodes], options.time_s[hull], options.energy_j[hull]).sum())
        return energy_j

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
        earliest = longest_paths(low, tail, head, length)
        latest = -longest_paths(-high, head, tail, length)
        return (
            network.guess_s + earliest[network.node_of] * units,
            network.guess_s + latest[network.node_of] * units,
        )
