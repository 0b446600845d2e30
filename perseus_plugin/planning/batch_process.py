"""Plans for single batches beside the job, in a process of their own: a review of the job's plan takes seconds, these
have to be there before the step.

Run with PARENT (see `processes`), it reads a JSON line per request and writes one per answer: first what the job is and
what its iterations took (`Lesson`), then the works of one step after the other. Rank 0's side is `BatchProcess`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from perseus_plugin.errors import PerseusError, os_problem
from perseus_plugin.exchange.packing import packed
from perseus_plugin.planning.child import Child, ChildLostError
from perseus_plugin.planning.process import (
    allowed_slowdown,
    end_with,
    graph_for,
    limits_of,
    with_margin,
    with_overheads,
    yield_to_training,
)
from perseus_plugin.planning.request import PlanRequest

if TYPE_CHECKING:
    from perseus_plugin.iteration.graph import FloatArray
    from perseus_plugin.iteration.replayed import Replayed
    from perseus_plugin.planning.batches import BatchPlan, BatchPlanner
    from perseus_plugin.planning.options import ClockOptions, PlanningProblem
    from perseus_plugin.planning.robust import Promise
    from perseus_plugin.profiling.work_model import WorkModel

_RAISED_TO = 4  # clocks that a late instruction may be raised to
_LEARN_LIMIT_S, _STEP_LIMIT_S, _IDLE_S = 900.0, 60.0, 60.0
MOST_INSTRUCTIONS = 100_000
"""Of a step, in all pipelines together, that can be planned for while others run: that takes about 25 s."""

Works = Sequence[Sequence[float]]
"""Of one step: per replica and microbatch."""


@dataclass(frozen=True)
class Lesson:
    """What a job's steps are planned by.

    Attributes:
        request: as for the job's plan: its samples are the iterations to learn from, `in_force` the plan to do better
            than.
        works: of each of the samples.
    """

    request: PlanRequest
    works: Sequence[Works]


@dataclass(frozen=True)
class Learned:
    """What came of a lesson.

    Attributes:
        why_not: why steps are not planned for; empty: they are.
        lost: nothing has been learned, as the process was lost.
        misled: that is the works' fault, as they do not say how long instructions take.
        explained, error: see `WorkModel`; None: not known.
        margin: that plans are made with.
        time_ratio, saving: over the samples, against full clocks; None: not replayed.
        saving_in_force: of the plan in force, over the same.
    """

    why_not: str = ""
    lost: bool = False
    misled: bool = False
    explained: float | None = None
    error: float | None = None
    margin: float | None = None
    time_ratio: float | None = None
    saving: float | None = None
    saving_in_force: float | None = None


@dataclass(frozen=True)
class PlannedStep:
    """One step's plans.

    Attributes:
        replicas: per replica and stage a `messages.BatchPart`, packed: they are many, and rank 0 only passes them on.
        why_not: why there are none; empty: there are.
        lost: there are none, as the process was lost.
    """

    replicas: Sequence[Sequence[str]] = ()
    why_not: str = ""
    lost: bool = False


class Pupil:
    """What the process knows, which is nothing at first."""

    def __init__(self) -> None:
        self._planner: BatchPlanner | None = None
        self._request: PlanRequest | None = None
        self._model: WorkModel | None = None
        self._delays_s: FloatArray | None = None
        self._slowdown = 0.0

    def learn(self, lesson: Lesson) -> Learned:
        """Fit the model, choose the margin, and see whether that is better than the plan in force.

        Raises:
            PerseusError: the request is inconsistent.
        """
        import numpy as np

        from perseus_plugin.planning.batches import MARGINS, choose, sizes_of
        from perseus_plugin.planning.options import build_problem
        from perseus_plugin.planning.replay import by_node
        from perseus_plugin.planning.robust import Promise, gaps_of, is_much_better, usual_delays
        from perseus_plugin.profiling.work_model import fitted

        self._planner = None
        request = with_overheads(lesson.request)
        graph, samples = graph_for(request), request.samples
        assert samples is not None  # a lesson has some
        problem = build_problem(graph, request.profile, request.blocking_power_w)
        durations_s = [np.array([by_node(graph, of) for of in step]) for step in samples.durations_s]
        works = [np.array(step, dtype=np.float64) for step in lesson.works]
        model = fitted(_observed(problem, durations_s, works))
        if model is None:
            return Learned("too few instructions have been timed")
        if not math.isfinite(model.explained):
            return Learned("the announced works do not differ")
        known = Learned(explained=model.explained, error=model.error)
        if not model.explains:
            text = f"the announced works explain {100 * max(0.0, model.explained):.0f} % of how durations vary"
            return replace(known, why_not=text, misled=True)
        self._slowdown = allowed_slowdown(request)
        latency_s, promise = request.latency_s or 0.0, Promise(slowdown=self._slowdown, quantile=request.quantile)

        def planner_with(margin: float) -> BatchPlanner:
            return _planner_of(request, problem, margin, self._slowdown)

        predicted = [[sizes_of(problem, model.of, of.tolist()) for of in step] for step in works]
        margins = [request.margin, *(margin for margin in MARGINS if margin > request.margin)]
        gaps = gaps_of(problem, samples)
        chosen = choose(planner_with, predicted, durations_s, promise, latency_s, margins, gaps)
        replayed, held = chosen.replayed, _held(request, problem, promise)
        known = replace(
            known,
            margin=replayed.margin,
            time_ratio=replayed.time_ratio_mean,
            saving=replayed.saving_mean,
            saving_in_force=0.0 if held is None else held.saving_mean,
        )
        if chosen.planner is None:
            longer = 100 * (replayed.time_ratio_mean - 1)
            text = f"planned by the announced works, iterations would take {longer:.1f} % longer than at full clocks"
            return replace(known, why_not=text)
        if held is not None and held.kept and not is_much_better(replayed, held, promise):
            return replace(known, why_not="the job's plan is as good")
        self._planner, self._model, self._request = chosen.planner, model, request
        self._delays_s = usual_delays(problem, samples)
        return known

    def plan(self, works: Works, iteration: int = 0, base: int = 0) -> PlannedStep:
        """Plan a step.

        Args:
            works: of it.
            iteration, base: see `messages.BatchPart`.

        Raises:
            PerseusError: there is no such plan.
        """
        from perseus_plugin.planning.batches import sizes_of

        if self._planner is None or self._model is None or self._delays_s is None or self._request is None:
            return PlannedStep(why_not="nothing has been learned")
        usual, model = self._planner.problem, self._model
        plans = self._planner.step([sizes_of(usual, model.of, of) for of in works])
        about = {
            "version": 0,
            "schedule": self._request.schedule,
            "iteration": iteration,
            "base": base,
            "pace_s": max(plan.problem.full_clock_time_s for plan in plans),
            "usual_s": usual.full_clock_time_s,
        }
        dwell_s = self._request.min_dwell_s
        return PlannedStep(
            [[packed({**about, **of}) for of in _stages(plan, self._delays_s, dwell_s)] for plan in plans]
        )


def _observed(
    problem: PlanningProblem, durations_s: Sequence[FloatArray], works: Sequence[FloatArray]
) -> dict[tuple[int, str], tuple[FloatArray, FloatArray]]:
    """Works and times of every stage and kind."""
    import numpy as np

    found = {}
    for k, key in enumerate(problem.keys):
        nodes = [node for node in problem.instruction_nodes.tolist() if problem.class_of[node] == k]
        microbatches = [one.microbatch for node in nodes if (one := problem.graph.instructions[node]) is not None]
        found[key] = (
            np.concatenate([step[:, microbatches].ravel() for step in works]),
            np.concatenate([step[:, nodes].ravel() for step in durations_s]),
        )
    return found


def _planner_of(request: PlanRequest, problem: PlanningProblem, margin: float, slowdown: float) -> BatchPlanner:
    from perseus_plugin.planning.batches import BatchPlanner
    from perseus_plugin.planning.options import build_problem

    watts = request.blocking_power_w
    planned_on = with_margin(request.profile, margin, watts)
    return BatchPlanner(
        problem,
        build_problem(problem.graph, planned_on, watts, request.full_clock_only),
        slowdown=slowdown,
        limits=limits_of(request),
        schedule=request.schedule,
        latency_s=request.latency_s,
        catches_up=request.catch_up,
        # What a wait really is like is learned under one plan from iteration to iteration: these live for one.
        lower_while_waiting=False,
    )


def _held(request: PlanRequest, problem: PlanningProblem, promise: Promise) -> Replayed | None:
    """What the samples say of the plan in force; None: it is full clocks."""
    from perseus_plugin.planning.robust import held_against, replay_of

    if request.in_force is None or request.samples is None:
        return None
    latency_s = request.latency_s or 0.0
    replay = replay_of(problem, request.samples, latency_s)
    return held_against(request.in_force, replay, promise, latency_s, 0.0 * problem.full_clock_s)


def _stages(batch: BatchPlan, delays_s: FloatArray, dwell_s: float) -> list[dict[str, Any]]:
    """What the ranks of each stage need to know; see `messages.PlanPart` and `CatchUpPart`."""
    from perseus_plugin.planning.replay import clocks_of

    problem, late = batch.problem, batch.catch_up
    clocks = clocks_of(batch.plan, problem.graph)
    planned_s = problem.planned_s(clocks)
    found: list[dict[str, Any]] = []
    for nodes in problem.graph.stage_nodes:
        own = nodes[problem.class_of[nodes] >= 0]
        found.append({"clocks_mhz": clocks[own].tolist(), "times_s": _short(planned_s[own])})
        if late is not None:
            found[-1]["catch_up"] = {
                "latest_starts_s": _short(late.latest_start_s[own]),
                "usual_delays_s": _short(delays_s[own]),
                "kinds": [str(place) for place in range(len(own))],  # each has options of its own
                "options": {
                    str(place): _raised(problem.classes[problem.class_of[node]], float(planned_s[node]))
                    for place, node in enumerate(own.tolist())
                },
                "size_weight": 0.0,
                "dwell_s": dwell_s,
            }
    return found


def _short(numbers: FloatArray) -> list[float]:
    """The numbers to ten digits, which no clock tells apart, and which halves what has to be told."""
    return [float(f"{number:.10g}") for number in numbers.tolist()]


def _raised(options: ClockOptions, planned_s: float) -> list[tuple[int, float, float]]:
    """Few clocks that are no slower than planned, with what they take: the fastest, and those evenly between."""
    import numpy as np

    count = max(1, int(np.searchsorted(options.time_s, planned_s * (1 + 1e-9), side="right")))
    chosen = np.unique(np.linspace(0, count - 1, _RAISED_TO + 1).round().astype(int))
    clocks, times_s = options.frequency_mhz[chosen].tolist(), _short(options.time_s[chosen])
    watts = [round(one, 3) for one in (options.energy_j[chosen] / options.time_s[chosen]).tolist()]
    return list(zip(clocks, times_s, watts, strict=True))


class BatchProcess:
    """Rank 0's side: one request at a time, every method returns at once. The process starts with the first one.

    Args:
        wake: called when there is an answer, from a thread of its own.
        python: that runs it; None: this one.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None, python: str | None = None) -> None:
        self._wake, self._python = wake, python
        self._child: Child | None = None
        self._starting = threading.Lock()
        self._closed = self.busy = False
        self._answer: Learned | PlannedStep | None = None

    def learn(self, lesson: Lesson) -> None:
        """Begin a lesson."""

        def pieces() -> Any:
            yield '{"learn": '
            yield from lesson.request.pieces()
            yield ', "works": ' + json.dumps([[list(of) for of in step] for step in lesson.works]) + "}"

        self._submit(pieces, _LEARN_LIMIT_S, lambda data: Learned(**data), lambda why: Learned(why, lost=True))

    def plan(self, works: Works, iteration: int, base: int) -> None:
        """Begin to plan a step."""
        line = json.dumps({"plan": [list(of) for of in works], "iteration": iteration, "base": base})
        self._submit(
            lambda: [line],
            _STEP_LIMIT_S,
            lambda data: PlannedStep(**data),
            lambda why: PlannedStep(why_not=why, lost=True),
        )

    def poll(self) -> Learned | PlannedStep | None:
        """The answer, once; None while there is none."""
        answer = self._answer
        if answer is not None:
            self._answer = None
        return answer

    def close(self) -> None:
        """End the process."""
        with self._starting:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end(patience_s=1.0)

    def _submit(
        self,
        pieces: Callable[[], Any],
        limit_s: float,
        read: Callable[[dict[str, Any]], Learned | PlannedStep],
        failed: Callable[[str], Learned | PlannedStep],
    ) -> None:
        def ask() -> None:
            try:
                with self._starting:
                    if self._closed:
                        return
                    self._child = child = self._child or Child(
                        "perseus_plugin.planning.batch_process", str(os.getpid()), python=self._python
                    )
                child.tell(pieces(), limit_s)
                answer = read(json.loads(child.hear(limit_s, _IDLE_S)))
            except (ChildLostError, OSError, ValueError, KeyError, TypeError) as error:
                lost, self._child = self._child, None
                if lost is not None:
                    lost.end()  # one whose answers cannot be read runs on
                if isinstance(error, OSError):
                    problem = f"cannot be started: {os_problem(error)}"
                else:
                    problem = str(error) if isinstance(error, ChildLostError) else f"gave no answer: {error!r}"
                answer = failed(f"the process that plans batches {problem}")
            self._answer, self.busy = answer, False
            self._wake()

        self.busy, self._answer = True, None
        threading.Thread(target=ask, name="perseus-batches", daemon=True).start()


def answered(pupil: Pupil, line: str) -> str:
    """The answer to a line that holds a request, as a line; whatever is wrong with it is said in the answer."""
    data: dict[str, Any] = {}
    try:
        data = json.loads(line)
        if "plan" in data:
            return json.dumps(asdict(pupil.plan(data["plan"], data["iteration"], data["base"])))
        return json.dumps(asdict(pupil.learn(Lesson(PlanRequest.from_dict(data["learn"]), data["works"]))))
    except Exception as failure:
        reason = str(failure) if isinstance(failure, PerseusError) else repr(failure)
        return json.dumps(asdict(PlannedStep(why_not=reason) if "plan" in data else Learned(reason)))


def main() -> None:
    """Answer requests on standard input until it ends."""
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    yield_to_training(5)
    pupil = Pupil()
    for line in sys.stdin:
        print(answered(pupil, line), flush=True)


if __name__ == "__main__":
    main()
