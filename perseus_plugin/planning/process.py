"""The planner in a process of its own, so that planning takes neither the interpreter nor the cores from training.

Run with PARENT (see `processes`), it reads a JSON line per request and writes one per answer, and ends when its
standard input does, so that it cannot outlive the trainer. On the signal `DROP` it gives up what it is working on, and
says so in the answer. Rank 0's side is `planner_process.PlannerProcess`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from perseus_plugin.errors import PerseusError
from perseus_plugin.iteration.replayed import Overheads, Replayed, Samples, StageCatchUp
from perseus_plugin.planning.child import DROP
from perseus_plugin.planning.paced import Pace
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.request import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.planning.targets import Target
from perseus_plugin.planning.work import WORTH_REFINING
from perseus_plugin.profiling.profile import Profile

if TYPE_CHECKING:
    from perseus_plugin.iteration.graph import PipelineGraph
    from perseus_plugin.planning.options import PlanningProblem
    from perseus_plugin.planning.planner import Planner
    from perseus_plugin.planning.replay import CatchUp
    from perseus_plugin.planning.robust import Promise, RobustPlan
    from perseus_plugin.planning.targets import ChangeLimits, Effort


_LAST = 19  # niceness that only takes what nobody else wants
_PACES, _PACE_FURTHER = 8, 1.5  # tries of slower paces until a limit is kept, and how much further than in proportion

__all__ = [
    "PaceRequest",
    "PlanAnswer",
    "PlanRequest",
    "answer_to",
    "by_time",
    "end_with",
    "graph_for",
    "limits_of",
    "pace_for",
    "plan_for",
    "planner_for",
    "with_errors",
    "with_margin",
]


def plan_for(request: PlanRequest, planner: Planner | None = None) -> Plan:
    """Plan in this process.

    Args:
        request: for what.
        planner: of this request; None: a new one.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    effort: Effort = request.effort  # type: ignore[assignment]
    planner, target, limits = planner or planner_for(request), request.target, limits_of(request)
    if request.drawn < 1:
        assert target.budget is not None  # nothing else is drawn a share of
        return _within_share(request, target.budget, plan_for(replace(request, drawn=1.0)))
    if request.full_clocks:
        # Looked for only for its time.
        return planner.plan_of(planner.full_clocks(planner.solve(target, search=False)))
    if request.search or target.budget is not None:
        return planner.plan(target, limits, effort)
    return planner.to_plan(planner.solve(target, limits, effort, search=False))


def planner_for(request: PlanRequest, tell: Callable[[float], None] | None = None) -> Planner:
    """The planner of a request's job, its margin kept; `tell` as for it.

    Raises:
        PerseusError: the request is inconsistent.
    """
    from perseus_plugin.planning.planner import Planner

    return Planner(
        graph_for(request),
        with_margin(request.profile, request.margin, request.blocking_power_w),
        blocking_power_w=request.blocking_power_w,
        full_clock_only=request.full_clock_only,
        schedule=request.schedule,
        switch_latency_s=wait_latency_s(request),
        brake_s=request.refine_s or math.inf,
        tell=tell,
    )


def wait_latency_s(request: PlanRequest) -> float | None:
    """How long a clock change takes for waits, None where those get no clock of their own."""
    return request.latency_s if request.lower_while_waiting else None


def graph_for(request: PlanRequest) -> PipelineGraph:
    """The graph of a request's schedule, in which overheads that are not known take no time.

    Raises:
        PerseusError: the streams do not fit each other.
    """
    from perseus_plugin.iteration.graph import build_graph

    known = request.overheads or Overheads()
    return build_graph(request.streams, request.constant_time_s, known.transfer_s, known.end_s)


def with_overheads(request: PlanRequest) -> PlanRequest:
    """The request with what iterations take beside the work that is known, as its samples tell it.

    Raises:
        PerseusError: the streams or the samples do not fit.
    """
    from perseus_plugin.planning.calibration import overheads

    if request.overheads is not None:
        return request
    with_unit = graph_for(replace(request, overheads=Overheads(transfer_s=1.0)))
    return replace(request, overheads=overheads(with_unit, request.samples))


def within_limit(request: PlanRequest) -> PlanRequest:
    """The request with the target that its limit leaves: its own where a plan for that keeps the limit.

    Raises:
        PerseusError: the request is inconsistent, or its target cannot be met.
    """
    from perseus_plugin.planning.power.fastest import is_within

    if request.limit is None:
        return request
    planner = planner_for(replace(request, margin=0.0))
    found = planner.solve(request.target, limits_of(request), search=request.search)
    if is_within(planner, found, request.limit):
        return replace(request, limit=None)
    # A margin that is not needed makes iterations shorter, and so draws more.
    return replace(request, target=Target.power_budget(request.limit), limit=None, margin=0.0)


def uniform_within_limit(request: PlanRequest) -> Plan | None:
    """One clock for all, within the request's limit or else the lowest; None: it has none.

    Raises:
        PerseusError: the request is inconsistent.
    """
    from perseus_plugin.planning.power.fastest import uniform_within

    if request.limit is None:
        return None
    planner = planner_for(replace(request, margin=0.0))
    return planner.plan_of(uniform_within(planner, request.limit, limits_of(request)))


def answer_to(request: PlanRequest) -> PlanAnswer:
    """Plan or answer stragglers in this process, over measured iterations if there are any.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    from perseus_plugin.planning.options import build_problem
    from perseus_plugin.planning.pace import slowed
    from perseus_plugin.planning.robust import (
        WORTH_CHANGING,
        catch_up_by_stage,
        held_against,
        is_much_better,
        replay_of,
        usual_delays,
        usual_way_to_catch_up,
        with_delays,
    )

    request = with_overheads(request)
    if request.limit is not None and request.pace is None:
        return replace(answer_to(within_limit(request)), uniform=uniform_within_limit(request))
    limit, request = request.limit, within_limit(request)
    overheads, latency_s = request.overheads or Overheads(), request.latency_s or 0.0
    graph = graph_for(request)
    problem = build_problem(graph, request.profile, request.blocking_power_w)
    delays_s = usual_delays(problem, request.samples)

    def catches_up(on: PlanningProblem, plan: Plan, way: CatchUp | None = None) -> tuple[StageCatchUp, ...]:
        if not request.catch_up:
            return ()
        return catch_up_by_stage(on, way or usual_way_to_catch_up(on, plan, latency_s), delays_s)

    if request.pace is not None:
        pace = pace_for(request) if limit is None else _pace_within(request, limit)
        paced = zip(request.pace.variants, pace.variants, strict=True)
        return PlanAnswer(
            None,
            0.0,
            pace=pace,
            overheads=overheads,
            cut_short=any(planned.plan is not None and planned.plan.cut_short for planned in pace.variants),
            paced_catch_up=tuple(
                ()
                if planned.plan is None
                else catches_up(
                    build_problem(graph, slowed(request.profile, variant), request.blocking_power_w), planned.plan
                )
                for variant, planned in paced
            ),
        )
    request, plan = by_time(request, problem)
    if request.samples is None:
        plan = with_errors(request, plan or plan_for(request))
        return PlanAnswer(
            plan,
            0.0,
            catch_up=catches_up(problem, plan),
            overheads=overheads,
            cut_short=plan.cut_short,
            made=request.how(),
        )
    promise = _promise(request)
    robust = _robust_plan(request, problem, request.samples, promise)
    held: Replayed | None = None
    if request.in_force is not None:
        known = request.in_force
        # Its latest starts are those of the graph that it was made on.
        seen_from_it = problem
        if known.transfer_s != overheads.transfer_s:
            older = graph_for(replace(request, overheads=replace(overheads, transfer_s=known.transfer_s)))
            seen_from_it = build_problem(older, request.profile, request.blocking_power_w)
        delays_now_s = usual_delays(seen_from_it, request.samples)
        replay = replay_of(problem, request.samples, latency_s)
        held = held_against(known, replay, promise, latency_s, delays_now_s - delays_s)
        least = WORTH_REFINING if request.refine_s else WORTH_CHANGING
        if held.kept and not is_much_better(robust.replayed, held, promise, least):
            told_anew = with_delays(known, seen_from_it, delays_now_s) if request.samples.starts_s else ()
            return PlanAnswer(
                None,
                0.0,
                replayed=replace(held, hinges=robust.replayed.hinges),
                held=held,
                catch_up=told_anew,
                overheads=replace(overheads, transfer_s=known.transfer_s),
                cut_short=robust.plan.cut_short,
            )
    way = robust.catch_up
    return PlanAnswer(
        with_errors(request, robust.plan),
        0.0,
        replayed=robust.replayed,
        held=held,
        catch_up=() if way is None else catches_up(problem, robust.plan, way),
        overheads=overheads,
        cut_short=robust.plan.cut_short,
        made=_made(request, robust).how(),
    )


def by_time(request: PlanRequest, problem: PlanningProblem | None = None) -> tuple[PlanRequest, Plan | None]:
    """The request with margin and number of clock changes that are best where a step is one CUDA graph.

    Over measured iterations, only with the number: they tell more of the margin. Under a power budget, which is kept by
    power and not by a margin, as it is.

    Args:
        request: for what; without a jitter nothing is chosen.
        problem: of its job, without the margin; None: a new one.

    Returns:
        Also its plan, where that was made: it is worth no less by replay than that of the request as it was.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    if request.jitter is None or request.target.budget is not None or request.full_clocks:
        return request, None
    from perseus_plugin.planning.graphed import Jitter, Replayer, choose_by_time, worth
    from perseus_plugin.planning.options import build_problem

    problem = problem or build_problem(graph_for(request), request.profile, request.blocking_power_w)
    replayer = Replayer(problem, request.latency_s or 0.0, Jitter(*request.jitter))
    slowdown = allowed_slowdown(request)
    asked = replace(request, jitter=None)
    margin, changes = choose_by_time(
        lambda margin, changes: plan_for(replace(_sorted(asked, "rounded", margin), max_changes=changes)),
        replayer,
        slowdown,
        request.margin,
        request.max_changes,
    )
    if request.samples is not None:
        return replace(asked, max_changes=changes), None
    plan = plan_for(asked)
    chosen = replace(asked, margin=margin, max_changes=changes)
    if chosen == asked:
        return asked, plan
    other = plan_for(chosen)
    best = max(((asked, plan), (chosen, other)), key=lambda one: worth(replayer.under(one[1]), slowdown))
    return best[0], replace(best[1], cut_short=plan.cut_short or other.cut_short)


def with_errors(request: PlanRequest, plan: Plan, planner: Planner | None = None) -> Plan:
    """The plan with how well it is known; `planner` is the request's, where there is one already."""
    from perseus_plugin.planning.confidence import with_confidence

    exact = planner if planner is not None and not request.margin else planner_for(replace(request, margin=0.0))
    return with_confidence(plan, exact, request.profile, request.blocking_power_se_w)


def allowed_slowdown(request: PlanRequest) -> float:
    """How much longer than at full clocks iterations may take, as a share, for the target to be met.

    Raises:
        PerseusError: it cannot be met.
    """
    if request.target.kind == "slowdown":
        return request.target.value
    planner = planner_for(replace(request, margin=0.0))
    found = planner.solve(request.target, limits_of(request), search=False)  # for its time alone
    return max(0.0, found.allowed_s / planner.problem.full_clock_time_s - 1)


def _promise(request: PlanRequest) -> Promise:
    from perseus_plugin.planning.robust import Promise

    budget, power_w = request.target.budget, None
    if budget is not None and request.samples is not None:
        if budget.job_w is None or budget.groups or budget.peaks.limited:
            # Where groups or peaks are tighter than the job, it may not draw more than is planned for them.
            power_w = plan_for(replace(request, margin=0.0)).power_w
        else:
            power_w = _of_pipeline_w(request, budget, budget.job_w)
        power_w *= len(request.samples.durations_s[0])
    return Promise(slowdown=allowed_slowdown(request), quantile=request.quantile, power_w=power_w)


def _of_pipeline_w(request: PlanRequest, budget: PowerBudget, job_w: float) -> float:
    """What GPUs of one pipeline may draw of a budget on the job; where no plan keeps that, what the nearest draws."""
    gpus = len(budget.ranks_by_stage(len(request.streams)))
    allowed_w = budget.gpu_w(job_w, gpus) * len(request.streams) / gpus
    if not budget.or_nearest:
        return allowed_w
    nearest = replace(request, margin=0.0, effort="quick", target=Target.power_budget(budget))
    return max(allowed_w, plan_for(nearest).power_w)


def _plans_within(request: PlanRequest, budget: PowerBudget) -> Callable[[float], Plan]:
    """Plans that draw at most so many times what a budget allows; they say of that budget what they keep."""
    # A margin that is not needed makes iterations shorter than planned, which then draw more.
    whole = plan_for(replace(request, margin=0.0))
    return lambda share: whole if share >= 1 else _within_share(replace(request, drawn=share), budget, whole)


def _within_share(request: PlanRequest, budget: PowerBudget, whole: Plan) -> Plan:
    """The plan that draws a share of what `whole`, which is made for all of the budget, does."""
    power = whole.power
    assert power is not None  # it was made for a budget
    tighter = replace(budget, job_w=power.job_w * request.drawn, or_nearest=False)
    plan = plan_for(replace(request, margin=0.0, drawn=1.0, target=Target.power_budget(tighter)))
    assert plan.power is not None
    drawn_w = {one.name: one.planned_w for one in plan.power.budgets}
    kept = tuple(replace(one, planned_w=drawn_w.get(one.name, one.planned_w)) for one in power.budgets)
    return replace(plan, power=replace(power, job_w=plan.power.job_w, budgets=kept, peaks=plan.power.peaks))


def _robust_plan(request: PlanRequest, problem: PlanningProblem, samples: Samples, promise: Promise) -> RobustPlan:
    """Choose margin and catching up by replaying the measured iterations."""
    from perseus_plugin.planning.robust import choose, margins_from, replay_of, within_power

    latency_s = request.latency_s or 0.0
    if request.target.budget is not None:
        return within_power(
            _plans_within(request, request.target.budget), replay_of(problem, samples, latency_s), promise
        )
    only_waits = plan_for(_sorted(request, "only waits"))

    def plan_with(margin: float) -> Plan:
        return plan_for(_sorted(request, "rounded", margin))

    def refined(margin: float) -> Plan:
        return plan_for(replace(request, margin=margin))

    return choose(
        plan_with,
        plan_for(_sorted(request, "full clocks")),
        replay_of(problem, samples, latency_s),
        promise,
        margins_from(request.margin),
        catches_up=request.catch_up,
        latency_s=latency_s,
        refined=refined,
        only_waits=only_waits if only_waits.waits else None,
    )


def _sorted(request: PlanRequest, sort: str, margin: float = 0.0) -> PlanRequest:
    """The request for one of the plans that are tried, see `RobustPlan`."""
    match sort:
        case "rounded":
            return replace(request, margin=margin, effort="quick", search=False)
        case "only waits":
            return replace(request, margin=0.0, full_clocks=True)
        case "full clocks":
            return replace(request, margin=0.0, full_clocks=True, lower_while_waiting=False)
    return replace(request, margin=margin)


def _made(request: PlanRequest, robust: RobustPlan) -> PlanRequest:
    """The request for the plan that was chosen."""
    if request.target.budget is not None:
        return replace(request, margin=0.0, drawn=robust.drawn)
    return _sorted(request, robust.sort, robust.replayed.margin)


def limits_of(request: PlanRequest) -> ChangeLimits:
    """A request's limits on clock changes."""
    from perseus_plugin.planning.targets import ChangeLimits

    return ChangeLimits(request.max_changes, request.min_dwell_s)


def pace_for(request: PlanRequest) -> Pace:
    """Answer stragglers in this process.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    from perseus_plugin.planning.pace import plan_pace

    assert request.pace is not None  # the caller looked
    return plan_pace(
        graph_for(request),
        request.profile,
        request.pace.variants,
        clocks_mhz=request.pace.clocks_mhz,
        blocking_power_w=request.blocking_power_w,
        slowdown=allowed_slowdown(request),
        at_least_s=request.pace.at_least_s,
        planned_on=lambda profile: with_margin(profile, request.margin, request.blocking_power_w),
        limits=limits_of(request),
        effort=request.effort,  # type: ignore[arg-type]
        full_clock_only=request.full_clock_only,
        schedule=request.schedule,
        switch_latency_s=wait_latency_s(request),
        brake_s=request.refine_s or math.inf,
    )


def _pace_within(request: PlanRequest, limit: PowerBudget) -> Pace:
    """As `pace_for`, at a pace at which no sort of pipeline draws more than its part of the limit on the job."""
    assert request.pace is not None  # the caller looked
    if limit.job_w is None:
        return pace_for(request)
    allowed_w = _of_pipeline_w(request, limit, limit.job_w)
    for _ in range(_PACES):
        pace = pace_for(request)
        over = max(planned.energy_j / pace.pace_s for planned in pace.variants) / allowed_w
        if over <= 1:
            break
        # Slower iterations draw less; what is waited for longer draws that as well.
        at_least_s = pace.pace_s * (1 + _PACE_FURTHER * (over - 1))
        request = replace(request, pace=replace(request.pace, at_least_s=at_least_s))
    return pace


def with_margin(profile: Profile, margin: float, blocking_power_w: Sequence[float]) -> Profile:
    """The profile with everything below the top clock taking longer by the margin.

    A plan for it has slowed instructions end that much before they are needed, and stays feasible at any margin, since
    full clocks are as fast as ever. In the time between the GPU waits, so the energy is that of the instruction and of
    blocking for that long.
    """
    return profile.scaled(1 + margin, below_top=True, added_w=blocking_power_w)


def end_with(parent: int) -> None:
    """End when the trainer is gone, even if a process it forked still holds our standard input open."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def yield_to_training(niceness: int) -> None:
    """The trainer comes first, and when memory runs out it goes last."""
    with suppress(OSError):
        os.nice(niceness)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Answer requests on standard input until it ends."""
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    yield_to_training(5)
    signal.signal(DROP, _drop)
    import perseus_plugin.planning.planner  # noqa: F401  (loads OR-Tools before the first request)

    for line in sys.stdin:
        print(answered(line), flush=True)


class _DroppedError(BaseException):
    """What is worked on is not wanted any more; nothing that handles errors shall go on with it."""


_droppable = False
_deaf_until_s = 0.0
_SWALLOWED_S = 1.0  # that long after it was raised, an error which has come to nobody was swallowed, as pydantic may do


def _drop(number: int, frame: object) -> None:
    global _deaf_until_s
    if _droppable and time.monotonic() >= _deaf_until_s:
        _deaf_until_s = time.monotonic() + _SWALLOWED_S  # what is tidied up meanwhile is not disturbed
        raise _DroppedError


def answered(line: str) -> str:
    """The answer to a line that holds a request, as a line; whatever is wrong with it is said in the answer."""
    global _droppable, _deaf_until_s
    try:
        _deaf_until_s, _droppable = 0.0, True
        answer = _answered(line)
        _droppable = False
    except _DroppedError:
        _droppable = False
        answer = json.dumps(PlanAnswer(None, 0.0, "it is not wanted any more", dropped=True).to_dict())
    return answer


def _answered(line: str) -> str:
    try:
        request = PlanRequest.from_dict(json.loads(line))
        if request.refine_s:
            yield_to_training(_LAST)
        return json.dumps(answer_to(request).to_dict())
    except Exception as failure:
        reason = str(failure) if isinstance(failure, PerseusError) else repr(failure)
        return json.dumps(PlanAnswer(None, 0.0, reason).to_dict())


if __name__ == "__main__":
    main()
