"""What rank 0 decides for all ranks: (state, observed) -> (state, effects). Pure.

Everything that can happen to a job while it trains is an observation (`observed`), and what follows from it is on this
page:

    Runs, Ended      iterations begin and end on rank 0
    Troubled         a rank cannot control its GPU any more                 -> GIVEN_UP
    Measured         all ranks have told what the sweep said                -> PLANNING, or another round
    NotMeasured      some have not, for too long                            -> GIVEN_UP
    Checked          all ranks have timed a profile's top clock             -> PLANNING, or a sweep
    Answered         the planner has answered                               -> FOLLOWING
    Turned, Due      time passes
    Situated         who is slow, as far as is known                        (FOLLOWING) plans for their pace
    Watched          what references have shown                             (FOLLOWING) -> RECHECKING
    Targeted         what the job is to aim at has changed                  (FOLLOWING) plans for that
    Placed           how many GPUs share a node                             (FOLLOWING) plans for that, under a budget
    Drew             what GPUs have drawn under the plans in force          (FOLLOWING) plans for that, under a budget
    DrewAtFull       what they have drawn in the sweep at full clocks       (FOLLOWING) plans for that, under a budget
    Rechecked        ranks have timed their instructions at full clocks     (RECHECKING) -> PLANNING

The caller does what is asked for (`effects`), in its order, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

from perseus_plugin.exchange.messages import Recheck
from perseus_plugin.iteration.timetable import Follow, FullClock, Sweep
from perseus_plugin.leader.aiming import FULL_CLOCKS, GoOver, PlanAtFirst, PlanFor, Stay, next_move, power_w
from perseus_plugin.leader.effects import (
    Ask,
    Effect,
    ForgetIterations,
    Order,
    PublishSet,
    Record,
    RefuseReports,
    SaveFailure,
    SaveProfile,
    Say,
    Show,
    ShowPlan,
    WithdrawSet,
)
from perseus_plugin.leader.goal_plans import MadePlan
from perseus_plugin.leader.job_schedules import MAX_PLANNED
from perseus_plugin.leader.measuring import (
    SweepInForce,
    UnusableProfileError,
    another_round,
    estimated,
    plannable,
    said_of_measured,
)
from perseus_plugin.leader.observed import (
    Answered,
    Checked,
    Drew,
    DrewAtFull,
    Due,
    Ended,
    Measured,
    NotMeasured,
    Observed,
    Placed,
    Rechecked,
    Runs,
    Situated,
    Targeted,
    Troubled,
    Turned,
    Watched,
)
from perseus_plugin.leader.reviews import (
    EVERY,
    SOON,
    catches_up_otherwise,
    clocks_of,
    in_force,
    said_of_overheads,
    said_of_replay,
)
from perseus_plugin.leader.state import JobState, Phase, Rules
from perseus_plugin.leader.target_book import Goal, described
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.work import SMALL, WORTH_REFINING
from perseus_plugin.profiling.failed import FILE
from perseus_plugin.profiling.survey import Survey, misfit, rescaled
from perseus_plugin.stragglers.situation import Answer, Situation

_FORGIVEN_AFTER = 1000  # iterations under plans that hold, after which dropped ones do not count any more
_DETECTION_TAKES_S = 3.0  # ranks tell each other of their paces once a second
_ENOUGH_DRAWN = 8  # iterations that say what is drawn
_DRAWN_MORE, _DRAWN_LESS = 0.003, 0.02  # shares of a budget by which more, or less, is drawn until plans reckon with it
_AT_FULL_MORE = 0.02  # the same at full clocks, where few iterations tell, and none under a plan
_DRAWS_AT_MOST = 1.25  # times what the profile says: what is more is no error of a profile
ValueT = TypeVar("ValueT")


def decide(state: JobState, observed: Observed, rules: Rules) -> tuple[JobState, tuple[Effect, ...]]:
    """What is known from now on, and what is to be done; `state` stays as it is."""
    if isinstance(observed, Ended):
        return with_ended(state, [observed], rules), ()
    changes = state.copy_to_set() if isinstance(observed, Turned) else state.copy()
    deciding = _Deciding(changes, rules)
    deciding.see(observed)
    return deciding.state, tuple(deciding.effects)


def with_ended(state: JobState, ended: Sequence[Ended], rules: Rules) -> JobState:
    """What is known once these iterations have ended, which asks for nothing to be done; `state` stays as it is."""
    deciding = _Deciding(state.copy_to_count(), rules)
    for one in ended:
        deciding.ended(one)
    return deciding.state


class _Deciding:
    """One decision: a state that changes, and the effects so far."""

    def __init__(self, state: JobState, rules: Rules) -> None:
        self.state, self.effects = state, list[Effect]()
        self._rules, self._config = rules, rules.config

    def see(self, observed: Observed) -> None:
        phase = self.state.phase
        match observed:
            case Runs():
                self.state.schedules.use(observed.schedule, observed.stream_of)
            case Targeted():
                self._targeted(observed)
            case _ if phase is Phase.GIVEN_UP:
                pass
            case Troubled():
                self._give_up(f"rank {observed.rank}: {observed.reason}")
            case Turned():
                self.state.iteration, self.state.news_take_s = observed.iteration, observed.news_take_s
                self.state.now_s = observed.now_s
            case Due() if phase is Phase.PLANNING:
                self._ask_for_plan()
            case Due() if phase is Phase.FOLLOWING:
                self._aim()
                self._show_usual()
            case Answered():
                self._answered(observed)
            case Measured() if phase is Phase.MEASURING:
                self._or_give_up(lambda: self._measured(observed))
            case NotMeasured() if phase is Phase.MEASURING:
                self._give_up(observed.missing)
            case Checked() if phase is Phase.MEASURING:
                self._or_give_up(lambda: self._checked(observed.rechecks))
            case Situated() if phase is Phase.FOLLOWING:
                self._situated(observed.situation, observed.now_s)
            case Placed():
                self.state.gpus_per_node = observed.gpus_per_node
                self._aim()
            case Drew() if phase is Phase.FOLLOWING:
                self._drew(observed)
            case DrewAtFull() if observed.iterations >= _ENOUGH_DRAWN:
                self.state.full_w = observed.power_w
                self._reckon_with_full_clocks()
            case Watched() if phase is Phase.FOLLOWING and not self.state.unanswered:
                self._watched(observed)
            case Rechecked() if phase is Phase.RECHECKING:
                self._rechecked(observed)

    # Iterations.

    def ended(self, seen: Ended) -> None:
        state, directive = self.state, seen.directive
        state.reigns.count(seen.number)
        if seen.schedule:
            state.schedules.ran(seen.schedule, seen.number)
        if not seen.counts:
            return
        if isinstance(directive, Sweep) and directive.kept and directive.is_full(self._rules.top_mhz):
            state.times.add_full(seen.schedule, seen.time_s)
        elif isinstance(directive, FullClock) and state.phase is Phase.RECHECKING:
            state.times.add_again(seen.schedule, seen.time_s)
        elif isinstance(directive, Follow) and self._is_current(directive):
            # References say how plans do, where there are any.
            referred = self._config.watch.reference_share > 0 and directive.has_references
            expected_s = None if referred else state.expected_s(seen.schedule)
            if expected_s is not None and math.isfinite(seen.size):
                expected_s *= seen.size
            state.times.add_planned(seen.schedule, seen.time_s, expected_s)
            situation = state.answers.situation
            if directive.straggler and situation is not None and seen.schedule == situation.schedule:
                state.answers.count_iteration()
            state.held += 1
            if state.held >= _FORGIVEN_AFTER:
                state.strikes = 0

    def _is_current(self, directive: Follow) -> bool:
        return self.state.phase is Phase.FOLLOWING and directive.version == self.state.followed

    # Measuring.

    def _measured(self, seen: Measured) -> None:
        profiling = self._config.profiling
        survey, of_stages = estimated(seen.estimates, self._rules.stages, profiling, seen.works)
        another = another_round(of_stages, self.state.sweep, self._rules.top_mhz, profiling)
        if another is not None:
            self.effects.append(another.why)
            self._sweep_over(another.clocks_mhz, another.paired)
            return
        self.effects += [SaveProfile(survey), *said_of_measured(survey, profiling)]
        self._plan_on(survey)

    def _checked(self, rechecks: Sequence[Recheck]) -> None:
        """A profile from elsewhere: is it this job's, by what all ranks measured at full clocks?"""
        known = self.state.known
        if known is None:
            return
        if self._config.cuda_graph and self.state.times.full and not any(recheck.time_s for recheck in rechecks):
            # In a graph no instruction is seen. Whether iterations take what they should is the watch's to say.
            self._plan_on(known)
            return
        why_not = misfit(known, rechecks)
        if why_not and self._config.profiling.load is not None:
            reason = f"the profile of perseus.profiling.load is not of this job: {why_not}"
            raise UnusableProfileError(reason, lasting=False)
        if why_not:
            self._warn("profiling anew, as the kept profile does not fit: %s. Nothing needs to be done", why_not)
            self.state.known = None
            self._sweep_over(self._rules.full_sweep_mhz)
            return
        self._plan_on(rescaled(known, rechecks))

    def _sweep_over(self, clocks_mhz: tuple[int, ...], paired: bool = False) -> None:
        begins = self._order("sweep", clocks_mhz=clocks_mhz, paired=paired)
        blocks = 2 * (len(clocks_mhz) - 1) if paired else len(clocks_mhz)
        end = begins + self._rules.steps_per_block * blocks
        self.state.sweep = SweepInForce(clocks_mhz, end, self.state.sweep.round + 1)

    def _plan_on(self, survey: Survey) -> None:
        self.state.survey, said = plannable(survey, self._config.profiling)
        self.effects += [] if said is None else [said]
        self.state.phase = Phase.PLANNING
        self._ask_for_plan()

    def _or_give_up(self, measure: Callable[[], None]) -> None:
        try:
            measure()
        except UnusableProfileError as error:
            if error.lasting:
                self.effects.append(SaveFailure(str(error)))
            self._give_up(str(error), kept_in=FILE if error.lasting else "")

    # Planning.

    def _ask_for_plan(self) -> bool:
        """Have the planner work on the next schedule that wants a plan; whether there is one."""
        state = self.state
        following = state.schedules.next_to_plan(state.plans.schedules)
        if following is not None:
            schedule, instead_of = following
            self._ask(schedule, instead_of=instead_of)
            return True
        if state.schedules.too_many and not state.said_too_many:
            state.said_too_many = True
            text = "more than %d schedules take turns: those beyond run at full clocks. Nothing needs to be done"
            self._inform(text, MAX_PLANNED)
        return False

    def _ask(self, schedule: str, goal: Goal | None = None, **more: Any) -> None:
        state = self.state
        assert state.survey is not None  # only asked for once there is one
        stream_of = state.schedules.stream_of(schedule)
        more.setdefault("margin", state.margin)
        goal = goal or state.goal
        # A new target can be refused. What is in force cannot: without a plan its iterations would draw most.
        in_force = state.phase is Phase.FOLLOWING and replace(goal, draws=state.goal.draws) == state.goal
        self.effects.append(Ask(schedule, stream_of, state.survey, goal, or_nearest=in_force, **more))

    def _answered(self, seen: Answered) -> None:
        state, asked, answer = self.state, seen.asked, seen.answer
        if asked.survey is not state.survey or state.phase not in (Phase.PLANNING, Phase.FOLLOWING):
            return  # what it was made on does not hold any more
        if asked.quick:
            self._take_aimed(seen)
        elif asked.goal != state.goal:
            return  # it is asked anew
        elif asked.answer is not None:
            self._take_refined_pace(seen, asked.answer)
        elif asked.situation is not None:
            self._take_pace(seen, asked.situation)
        elif asked.refine:
            self._take_refined(seen)
        elif asked.review:
            self._take_review(seen)
        elif answer.plan is None:
            if state.phase is Phase.PLANNING and self._refused(_why_not(seen)):
                state.goal = state.aimed
                return
            self._go_without(asked.schedule, _why_not(seen), "" if answer.lost else _advice(asked.goal))
        else:
            self._take_plan(seen, answer.plan)

    def _go_without(self, schedule: str, why: str, advice: str) -> None:
        state = self.state
        state.schedules.refuse(schedule)
        if not state.plans.schedules and state.schedules.next_to_plan(()) is None:
            self._give_up(f"there is no plan: {why}" + (f" ({advice})" if advice else ""))
            return
        self._warn(
            "there is no plan for %s: %s. Its iterations run at full clocks; %s",
            schedule,
            why,
            advice or "nothing needs to be done",
        )

    def _take_plan(self, seen: Answered, plan: Plan) -> None:
        state, schedule, answer = self.state, seen.asked.schedule, seen.answer
        state.planning_time_s = answer.planning_time_s
        instead_of = seen.asked.instead_of
        if instead_of is not None:
            state.plans.take_out(instead_of)
            for number in state.goal_plans.take_out(instead_of):
                state.plans.discard(number)
            state.requests = _without(state.requests, instead_of)
            state.replayed = _without(state.replayed, instead_of)
            self.effects.append(ForgetIterations(instead_of))
        state.fallen = False
        number = self._put(seen, plan)
        self._say_if_exceeded(seen, plan)
        before = state.requests[schedule].overheads if schedule in state.requests else None
        self.effects += said_of_overheads(schedule, answer.overheads, before)
        state.requests = {**state.requests, schedule: _kept(seen)}
        self._inform("plan %d for %s ready in %.2f s: %s", number, schedule, answer.planning_time_s, plan.promise)
        if answer.replayed is not None:
            self.effects.append(said_of_replay(number, schedule, answer.replayed, self._config.quantile))
        first = state.phase is not Phase.FOLLOWING
        state.phase = Phase.FOLLOWING
        self._show_usual()
        state.at_full |= not self._config.enforce
        begins = self._follow()
        facts: dict[str, Any] = {"iteration": begins, "plan": number, "schedule": schedule}
        facts |= {"saving": plan.saving, "gap": plan.gap}
        facts |= {"replayed_saving": None if answer.replayed is None else answer.replayed.saving_mean}
        facts |= {"planning_time_s": answer.planning_time_s, "refined": seen.asked.refine}
        self.effects.append(Record("plan", facts))
        if first:
            self._reached(begins)
            self._reckon_with_full_clocks()
            if not self._config.enforce:
                self._inform(
                    "a dry run (perseus.enforce is false): clocks are left alone from iteration %d on; what the plan "
                    "would do is in summary.json, and `perseus report` shows it",
                    begins,
                )

    def _put(self, seen: Answered, plan: Plan) -> int:
        """Put a plan onto the shelf, to be held against newer iterations from now on."""
        state, schedule, answer = self.state, seen.asked.schedule, seen.answer
        known = in_force(plan, answer, seen.asked.margin)
        hinges = answer.replayed is not None and answer.replayed.hinges
        state.reviews.follow(schedule, known, state.iteration, hinges, refined=seen.asked.refine)
        state.replayed = {**state.replayed, schedule: answer.replayed}
        number = state.plans.put(schedule, plan, seen.asked.survey.profile, answer.catch_up, seen.request.min_dwell_s)
        request = state.requests[schedule] if answer.plan is None else _kept(seen)
        self._keep_for(state.goal, schedule, MadePlan(number, request, answer.replayed, known, answer.uniform))
        return number

    def _review(self) -> None:
        """Hold a plan in force against newer iterations, now and then."""
        state = self.state
        if state.answers.situation is not None:
            return
        due = state.reviews.due(state.plans.schedules, state.iteration)
        if due is not None:
            self._ask(due, review=True, in_force=state.reviews.in_force(due))

    def _refine(self) -> None:
        """Have a plan in force searched on, where that can be worth it."""
        state = self.state
        if state.answers.situation is not None:
            self._refine_pace(state.answers.situation)
            return
        schedule = state.reviews.to_refine(state.plans.schedules, state.iteration)
        if schedule is None:
            return
        plan = state.plans.of(schedule)
        if plan.gap > WORTH_REFINING and sum(map(len, plan.stages)) > SMALL:
            self._ask(schedule, review=True, refine=True, in_force=state.reviews.in_force(schedule))
        else:
            state.reviews.refined(schedule)

    def _refine_pace(self, situation: Situation) -> None:
        """The same of the plans for the pace of stragglers, who have been slow for a while."""
        answers, answer = self.state.answers, self.state.answers.answer
        pace = None if answer is None else answer.to_refine
        if answer is None or pace is None or self.state.iteration < answers.refine_at:
            return
        answers.refine_at = self.state.iteration + EVERY
        self._ask(
            situation.schedule,
            situation=situation,
            pace=pace,
            overheads=answer.overheads,
            refine=True,
            answer=answer,
        )

    def _take_refined(self, seen: Answered) -> None:
        state, schedule = self.state, seen.asked.schedule
        if state.answers.situation is not None:
            return  # it is tried again
        if schedule not in state.plans or state.reviews.in_force(schedule) != seen.asked.in_force:
            return  # another plan has come into force meanwhile
        state.reviews.refined(schedule)
        if seen.answer.plan is not None:
            self._take_review(seen)

    def _take_review(self, seen: Answered) -> None:
        """The plan in force stays, perhaps with other usual delays; or another one holds better."""
        state, schedule, answer = self.state, seen.asked.schedule, seen.answer
        if answer.error or schedule not in state.plans or state.answers.situation is not None:
            return
        before = state.plans.of(schedule)
        if answer.plan is None:
            state.replayed = {**state.replayed, schedule: answer.replayed}
            if answer.catch_up:
                self._put(seen, before)
                self._follow()
                return
        elif clocks_of(answer.plan) != clocks_of(before) or catches_up_otherwise(seen.request.in_force, answer):
            if seen.asked.refine:
                self._inform("plan for %s: refined in the background for %.1f s", schedule, answer.planning_time_s)
            elif answer.held is not None:
                kept = "there is a better one" if answer.held.kept else "it would not have kept to its time"
                self._inform("plan for %s: over the last iterations %s", schedule, kept)
            state.made_anew |= before is state.plan  # what was measured under the usual plan says nothing of this one
            self._take_plan(seen, answer.plan)
            return
        state.reviews.stay(schedule, answer.replayed is not None and answer.replayed.hinges)

    def _show_usual(self) -> None:
        """What a person looks at is the plan of the schedule that runs most."""
        state = self.state
        before = None if state.plan is None else state.plan.schedule
        usual = state.schedules.usual(state.plans.schedules, before)
        if usual is None or state.plans.of(usual) is state.plan:
            return
        state.plan = state.plans.of(usual)
        self.effects.append(ShowPlan(state.plan, state.requests[usual]))

    # What is aimed at.

    def _targeted(self, seen: Targeted) -> None:
        targets = self.state.targets
        if isinstance(next_move(self.state, self._rules), Stay) or self.state.unplannable is not None:
            # A ramp begins now, however long power has been what it is; one that is under way goes on at its pace.
            self.state.stepped_s = max(self.state.stepped_s, self.state.now_s)
        for entry in seen.entries:
            targets.take(entry)
        targets.expire(seen.unix_s)
        if not self._config.enforce:
            targets.refuse_all("a dry run follows no target: set perseus.enforce to true")
        self.state.unplannable = self.state.step = None
        if self.state.phase is Phase.GIVEN_UP:
            targets.refuse_all(self.state.given_up_why)
        self._aim()
        self._tell_of_targets()

    def _aim(self) -> None:
        """Go over to what is aimed at, or have its plans made."""
        state = self.state
        if not self._config.enforce and state.phase is Phase.FOLLOWING:
            return  # nothing is followed
        move = next_move(state, self._rules)
        if isinstance(move, PlanFor):
            state.step = None if move.goal == state.aimed else move.goal
            request = state.requests[move.schedule]
            kept = state.replayed.get(move.schedule)
            margin = max(self._margin_in_force, 0.0 if kept is None else kept.margin)
            self._ask(move.schedule, move.goal, quick=True, margin=margin, overheads=request.overheads)
        elif isinstance(move, PlanAtFirst):
            state.goal, state.at_full = move.goal, state.aimed.is_full
            state.schedules.forget_refusals()
        elif isinstance(move, GoOver):
            self._go_over(move.goal)
        elif isinstance(move, Stay):
            assert state.orders.latest is not None  # what is followed was ordered
            state.targets.reached(state.orders.latest.switch)
            self._tell_of_targets()

    def _go_over(self, goal: Goal) -> None:
        """All ranks go over to the plans of this goal."""
        state = self.state
        made = {} if goal.is_full else state.goal_plans.of(goal)
        if made and goal != state.goal:
            state.goal = goal
            state.plans.choose({schedule: one.number for schedule, one in made.items()})
            state.requests = {schedule: one.request for schedule, one in made.items()}
            state.replayed = {schedule: one.replayed for schedule, one in made.items()}
            for schedule, one in made.items():
                # It was made quickly, or long ago. Not at once: another change would have to wait for the planner.
                state.reviews.follow(schedule, one.in_force, state.iteration - EVERY + SOON)
            state.answers.forget()  # they were made beside other plans
            state.made_anew = True
            self._show_usual()
        state.at_full, state.stepped_s, state.step, state.fallen = goal.is_full, state.now_s, None, False
        self._reached(self._follow())

    def _reached(self, begins: int) -> None:
        """What is to be in force is, from this iteration on, unless something newer is on its way."""
        state = self.state
        now = FULL_CLOCKS if state.at_full else state.goal
        self._begin_reign(begins, str(now), now)
        if now == state.aimed:
            state.targets.reached(begins)
        state.targets.ordered(begins)
        self._tell_of_targets()

    def _begin_reign(self, begins: int, says: str, goal: Goal = FULL_CLOCKS) -> None:
        """This is in force from that iteration on, and written down where it is something else than before."""
        state = self.state
        if not state.reigns.begin(begins, says):
            return
        facts: dict[str, Any] = {"iteration": begins, "says": says, **goal.to_dict()}
        if goal.limit is not None:
            del facts["limit"]["stage_of"]  # as long as the job has ranks
        made = None if goal == FULL_CLOCKS else state.expectations.predicted(state.plan, state.replayed)
        if made is not None:
            facts |= {"time_ratio": made.time_ratio, "energy_ratio": made.energy_ratio}
        self.effects.append(Record("goal", facts))

    def _take_aimed(self, seen: Answered) -> None:
        state, asked, answer = self.state, seen.asked, seen.answer
        if answer.plan is None:
            if asked.goal == state.step:
                state.step, state.stepped_s = None, -math.inf  # there is nothing between: in one step
            corrects = replace(asked.goal, draws=state.goal.draws) == state.goal
            if asked.goal == state.aimed and (corrects or not self._refused(_why_not(seen))):
                state.unplannable = asked.goal
                self._warn("there is no plan for the target %s: %s. The one before stays", asked.goal, _why_not(seen))
        elif asked.schedule in state.plans:
            profile, dwell_s = asked.survey.profile, seen.request.min_dwell_s
            known = in_force(answer.plan, answer, asked.margin)
            number = state.plans.keep(asked.schedule, answer.plan, profile, catch_up=answer.catch_up, dwell_s=dwell_s)
            self._keep_for(
                asked.goal, asked.schedule, MadePlan(number, _kept(seen), answer.replayed, known, answer.uniform)
            )
            self._inform(
                "plan %d for %s at %s ready in %.2f s: %s",
                number,
                asked.schedule,
                asked.goal,
                answer.planning_time_s,
                answer.plan.promise,
            )
            self._say_if_exceeded(seen, answer.plan)
        self._aim()

    def _say_if_exceeded(self, seen: Answered, plan: Plan) -> None:
        """A limit that no plan keeps is come near to, which is said once."""
        state, limit = self.state, seen.asked.goal.limit
        exceeded = _exceeded(plan, limit)
        if limit is None or not exceeded or limit == state.said_exceeded:
            return
        state.said_exceeded = limit
        self._warn(
            "the power budget (%s) cannot be kept: %s under the plan that comes nearest, which %s followed. Allow more "
            "power (perseus.power_budget_w, perseus target)",
            described(limit),
            exceeded + _by_profile(seen.asked.goal),
            "is" if self._config.enforce else "would be",
        )

    def _reckon_with_full_clocks(self) -> None:
        """GPUs that draw more at full clocks than by their profile do so under plans, while nothing else is known."""
        state, planned_w = self.state, power_w(FULL_CLOCKS, self.state, self._rules)
        swept = state.plan is not None and set(state.times.full) == {state.plan.schedule}
        if state.full_w is None or planned_w is None or not swept or state.draws != 1:
            return
        draws = min(state.full_w / planned_w, _DRAWS_AT_MOST)
        if draws > 1 + _AT_FULL_MORE:
            state.draws = draws
            text = "GPUs draw %.0f W at full clocks, %.0f W by the profile: plans for power budgets account for that"
            self._inform(text, state.full_w, planned_w)
            self._aim()

    def _drew(self, seen: Drew) -> None:
        """A budget is kept by what is measured: plans reckon with what GPUs draw beyond their profile, or less."""
        state, limit = self.state, self.state.goal.limit
        planned_w = power_w(state.goal, state, self._rules)
        if limit is None or limit.job_w is None or planned_w is None or state.plan is None:
            return
        if state.at_full or state.fallen or state.answers.situation is not None or seen.iterations < _ENOUGH_DRAWN:
            return
        allowed_w = limit.gpu_w(limit.job_w, self._rules.pipelines * self._rules.stages)
        drawn_w, expected_s = seen.power_w, state.expected_s(state.plan.schedule)
        # Where the plan comes near to its limit only, there is none that draws less.
        too_much = drawn_w > allowed_w * (1 + _DRAWN_MORE) and not _exceeded(state.plan, limit)
        if not too_much and expected_s is not None and seen.time_s > seen.iterations * expected_s:
            # Something has held iterations up, and GPUs waited. When it is over they draw as in iterations on time.
            drawn_w *= seen.time_s / (seen.iterations * expected_s)
        too_little = drawn_w < allowed_w * (1 - _DRAWN_LESS) and state.plan.power is not None
        draws = min(max(drawn_w / planned_w, 1 / _DRAWS_AT_MOST), _DRAWS_AT_MOST)
        if (too_much or too_little) and abs(draws / state.draws - 1) > _DRAWN_MORE:
            state.draws = draws
            text = "GPUs draw %.0f W, of %.0f W that are allowed and %.0f W by the profile: planning again with that"
            self._inform(text, drawn_w, allowed_w, planned_w)
            self._aim()

    def _keep_for(self, goal: Goal, schedule: str, made: MadePlan) -> None:
        followed = {self.state.plans.number_of(one) for one in self.state.plans.schedules}
        for number in self.state.goal_plans.put(goal, schedule, made):
            if number not in followed:
                self.state.plans.discard(number)

    def _refused(self, why: str) -> bool:
        """Take what cannot be planned for out of the book; whether it was somebody's to say."""
        refused = self.state.targets.refuse(why)
        self._tell_of_targets()
        return refused

    def _tell_of_targets(self) -> None:
        for outcome in self.state.targets.take_changed():
            self.effects.append(Record("target", asdict(outcome)))
            said = f"{outcome.says} (number {outcome.number}, said by {outcome.source})"
            if outcome.state == "in force":
                self._inform("target: %s is in force from iteration %d on", said, outcome.iteration)
            elif outcome.state == "refused":
                self._warn("a target was refused: %s: %s; correct it and say it again", said, outcome.reason)
            elif outcome.state != "waiting":
                self._inform("target: %s: %s, %s", said, outcome.state, outcome.reason)

    # Following, and who is slow.

    def _follow(self) -> int:
        """All ranks follow the plans there are, and what answers the stragglers there are; returns from when on."""
        answers = self.state.answers
        if self.state.at_full:
            reason = "full clocks are the target" if self._config.enforce else "a dry run"
            begins = self._order("full", reason=reason)
        elif answers.situation is None or answers.answer is None:
            begins = self._order("follow", version=self._set_with(), limited=self._is_limited)
        else:
            version, variants = answers.answer.versions_in(answers.situation, self._set_with)
            begins = self._order("follow", version=version, variants=variants, straggler=True, limited=self._is_limited)
        self.effects += [WithdrawSet(version) for version in self.state.plans.tidy(self.state.orders.versions)]
        return begins

    def _set_with(self, number: int | None = None) -> int:
        made = self.state.plans.set_with(number)
        if made.parts:
            self.effects.append(PublishSet(made.version, made.parts))
        return made.version

    def _situated(self, situation: Situation | None, now_s: float) -> None:
        """Answer a new situation."""
        state = self.state
        state.unanswered = not state.at_full and situation != state.answers.situation
        if not state.unanswered or not state.answers.may_answer(now_s):
            return
        answer = None if situation is None else state.answers.known(situation)
        if situation is None or answer is not None:
            self._switch(situation, answer, now_s)
            return
        assert state.plan is not None  # it is followed
        schedule = state.plan.schedule
        pace = situation.request(state.plan, state.expectations.seconds_per_planned(schedule))
        self._ask(schedule, situation=situation, pace=pace)

    def _take_pace(self, seen: Answered, situation: Situation) -> None:
        """The planner has answered; the job's plan stays if it found nothing."""
        state, answer = self.state, seen.answer
        if answer.pace is None:
            self._warn(
                "stragglers are not planned for: %s. The plan stays as it is; nothing needs to be done", answer.error
            )
        made = self._with_plans(seen, situation)
        facts = {"error": answer.error} if answer.pace is None else state.answers.facts(situation, made)
        for number in state.answers.learn(situation, made):
            state.plans.discard(number)
        self.effects.append(Record("replan", {"planning_time_s": answer.planning_time_s, **facts}))
        if state.plan is not None and state.plan.schedule == situation.schedule:
            self._switch(situation, made, seen.now_s)

    def _with_plans(self, seen: Answered, situation: Situation) -> Answer:
        """The planner's answer to stragglers, its plans kept."""
        answer, versions = seen.answer, {}
        paced = answer.pace.variants if answer.pace else ()
        catch_ups = answer.paced_catch_up or ((),) * len(paced)
        for slowdowns, planned, catch_up in zip(situation.variants, paced, catch_ups, strict=False):
            if planned.plan is not None:
                profile, dwell_s = seen.asked.survey.profile, seen.request.min_dwell_s
                number = self.state.plans.keep(situation.schedule, planned.plan, profile, slowdowns, catch_up, dwell_s)
                versions[slowdowns] = number
        return Answer(answer.pace, versions, seen.asked.pace, answer.overheads)

    def _take_refined_pace(self, seen: Answered, before: Answer) -> None:
        """Plans for the pace in force take the place of those that there are if they save more."""
        state, found = self.state, seen.answer.pace
        answers, situation = state.answers, state.answers.situation
        if situation is None or answers.answer is not before or state.unanswered or state.at_full or state.fallen:
            return  # another plan is in force, or about to be; what is slow for long is tried again
        if found is None or before.pace is None or not answers.saves_more(found):
            answers.improve(replace(before, refined=True))
            return
        # What leaving the job's plan would have taken is as it was.
        both = zip(found.variants, before.pace.variants, strict=True)
        variants = tuple(replace(one, without_j=known.without_j) for one, known in both)
        pace = replace(found, without_s=before.pace.without_s, variants=variants)
        made = self._with_plans(replace(seen, answer=replace(seen.answer, pace=pace)), situation)
        made = replace(made, asked=before.asked, refined=True)
        answers.improve(made)
        for number in before.versions.values():
            state.plans.retire(number)
        begins = self._follow()
        self._inform(
            "plans for the pace of stragglers: refined in the background for %.1f s", seen.answer.planning_time_s
        )
        facts = {"planning_time_s": seen.answer.planning_time_s, "iteration": begins, **answers.facts(situation, made)}
        self.effects.append(Record("refined", facts))

    def _switch(self, situation: Situation | None, answer: Answer | None, now_s: float) -> None:
        """All ranks go over to what this situation asks for."""
        answers = self.state.answers
        answers.put_in_force(situation, answer, now_s)
        answers.refine_at = self.state.iteration + SOON
        begins = self._follow()
        if situation is None:
            self._inform("no rank is slow any more: back to the job's plan")
        else:
            self._inform("planned for %d slow replica(s)", answers.slow_replicas)
        slow = [] if situation is None else [[replica, list(stages)] for replica, stages in situation.slow]
        pace_s = None if answer is None or answer.pace is None else answer.pace.pace_s
        facts = {"iteration": begins, "version": self.state.followed, "slow": slow, "pace_s": pace_s}
        figures = (
            ("Perseus/straggler/slow_replicas", float(answers.slow_replicas)),
            ("Perseus/straggler/switches", float(answers.figures.switches)),
            ("Perseus/straggler/energy_saved_j", answers.figures.energy_saved_j),
        )
        self.effects += [Record("switch", facts), Show(figures)]

    # Whether the plan holds.

    def _watched(self, seen: Watched) -> None:
        state = self.state
        if not self._ask_for_plan() and seen.planner_idle and not (state.at_full and self._config.enforce):
            self._review()
        if state.at_full or state.fallen:
            return
        if seen.refiner_idle:
            self._refine()
        if seen.slowed is not None:
            self._drop(seen.said, seen.slowed, by_references=True)
            return
        overrun, seen_s = state.times.overrun, state.times.planned_s
        if overrun is None or seen_s is None:
            return
        if overrun <= 1 + self._config.watch.tolerance_against_sweep:
            state.slow_since = None
        elif not self._may_be_a_straggler(seen_s):
            text = f"iterations take {seen_s:.4g} s instead of {seen_s / overrun:.4g} s under the plan"
            self._drop(text, overrun - 1)

    def _may_be_a_straggler(self, iteration_time_s: float) -> bool:
        """Whether to wait for what detection says of iterations that run long."""
        state, config = self.state, self._config.stragglers
        patience = config.window + _DETECTION_TAKES_S / iteration_time_s
        if state.slow_since is None:
            state.slow_since = state.iteration
        return config.enabled and config.detect and state.iteration - state.slow_since < patience

    @property
    def _is_limited(self) -> bool:
        """Whether full clocks draw more than is allowed, as far as is known."""
        state, limit = self.state, self.state.goal.limit
        if limit is None or state.plan is None or limit.job_w is None or limit.groups or limit.peaks.limited:
            return limit is not None
        full_w = power_w(FULL_CLOCKS, state, self._rules)
        return full_w is None or limit.node_w(full_w, self._rules.pipelines * self._rules.stages) > limit.job_w

    def _fall_back(self, text: str) -> None:
        """All ranks go over to one clock for all: full clocks would draw more than is allowed."""
        state = self.state
        assert state.survey is not None  # it was planned on
        made = state.goal_plans.of(state.goal)
        uniform = {schedule: one for schedule, one in made.items() if one.uniform is not None}
        if not uniform or uniform.keys() != set(state.plans.schedules):
            self._give_up(text)
            return
        for number in state.goal_plans.clear():
            state.plans.discard(number)
        numbers = {}
        for schedule, one in uniform.items():
            assert one.uniform is not None  # those only
            numbers[schedule] = state.plans.keep(schedule, one.uniform, state.survey.profile)
            kept = replace(one, number=numbers[schedule], replayed=None, in_force=None)
            state.goal_plans.put(state.goal, schedule, kept)
        state.plans.choose(numbers)
        state.replayed = {}
        state.reviews.clear()
        if state.strikes <= self._config.watch.max_replans:
            for schedule in numbers:
                state.reviews.follow(schedule, None, state.iteration)
        state.answers.forget()
        state.fallen = True
        self._warn(
            "%s: one clock for all, as full clocks draw more than the power budget allows (%s). It is planned again "
            "after %d iterations, %d times at most; nothing needs to be done",
            text,
            state.goal,
            EVERY,
            self._config.watch.max_replans,
        )
        self._show_usual()
        self._begin_reign(self._follow(), f"{state.goal}, one clock for all", state.goal)

    def _drop(self, text: str, excess: float, *, by_references: bool = False) -> None:
        state = self.state
        state.dropped += 1
        state.strikes += 1
        state.held = 0
        if self._is_limited:
            self._fall_back(text)
            return
        state.excess, state.found_by_references = excess, by_references
        if state.strikes > self._config.watch.max_replans:
            self._give_up(
                f"{text}; plan number {state.strikes} that does not hold: raise perseus.watch.tolerance or margin"
            )
            return
        self._warn(
            "%s: back to full clocks, measuring and planning again. If this comes back, raise perseus.watch.tolerance "
            "or perseus.margin",
            text,
        )
        state.answers.leave()
        state.times.measure_again()
        self._begin_reign(self._order("full", reason=text, recheck=True), "full clocks, to measure again")
        state.recheck_sequence = state.orders.sequence
        state.phase = Phase.RECHECKING

    @property
    def _margin_in_force(self) -> float:
        """The margin of the plans that are followed, as a share: the least one that was asked for, or what was chosen.

        Over measured iterations a margin is chosen anew. For how durations vary, where a step is one CUDA graph, it
        would be the same one again.
        """
        made = (one.made for one in self.state.requests.values() if self._config.cuda_graph)
        return max((self.state.margin, *(one.margin for one in made if one is not None)))

    def _rechecked(self, seen: Rechecked) -> None:
        state = self.state
        if state.times.again is None:
            return
        schedule, full_s, long_enough = state.times.again
        if not seen.complete and not long_enough:
            return
        assert state.survey is not None  # it was planned on
        state.survey = rescaled(state.survey, seen.rechecks)
        before_s = state.expectations.full_s(schedule)
        is_slower = before_s is not None and full_s > before_s * (1 + self._config.watch.tolerance_or_default)
        if is_slower and not state.found_by_references:
            self._warn(
                "at full clocks an iteration takes %.4g s, it took %.4g s before: the job itself is slower, not the "
                "plan; planning for that. If its batches have not grown, look at data loading and at what else runs on "
                "the nodes",
                full_s,
                before_s,
            )
        else:
            state.margin = self._margin_in_force + state.excess
        state.times.use_again()
        state.plans.clear()
        state.goal_plans.clear()
        state.reviews.clear()
        state.schedules.forget_refusals()
        self.effects.append(ForgetIterations())
        state.answers.forget()
        state.made_anew, state.phase = True, Phase.PLANNING
        self._ask_for_plan()

    # What all ranks are told.

    def _give_up(self, why: str, kept_in: str = "") -> None:
        limit = self.state.targets.goal.limit
        if limit is not None:
            self._warn("the power budget (%s) is not kept, as the job stays at full clocks", described(limit))
        if kept_in:
            self._warn(
                "%s. Training stays at full clocks. A restarted job of the same sort does not profile again; remove %s "
                "from the output folder to have it do so",
                why,
                kept_in,
            )
        else:
            self._warn("%s. Training stays at full clocks. A restart of the job tries again", why)
        self.state.given_up_why = f"the job stays at full clocks: {why}"
        self.effects.append(RefuseReports(self.state.given_up_why))
        self.state.targets.refuse_all(self.state.given_up_why)
        self._tell_of_targets()
        self._begin_reign(self._order("full", reason=why), "full clocks, for good")
        self.state.phase = Phase.GIVEN_UP

    def _order(self, action: Literal["follow", "full", "sweep"], **what: Any) -> int:
        """Order all ranks; returns the iteration from which that holds."""
        state = self.state
        state.times.forget_planned()
        state.slow_since = None
        anew = action == "follow" and state.made_anew
        state.made_anew &= action != "follow"
        state.orders = state.orders.given(
            state.iteration, state.times.full_s, state.news_take_s, anew=anew, action=action, **what
        )
        news = state.orders.latest
        assert news is not None  # it has just been given
        state.followed = news.version_for(self._rules.replica)
        self.effects.append(Order(news))
        return news.switch

    def _inform(self, text: str, *values: Any) -> None:
        self.effects.append(Say("info", text, values))

    def _warn(self, text: str, *values: Any) -> None:
        self.effects.append(Say("warning", text, values))


def _why_not(seen: Answered) -> str:
    """Why there is no plan; its watts are those of the profile."""
    return seen.answer.error + _by_profile(seen.asked.goal)


def _by_profile(goal: Goal) -> str:
    """What watts are, where GPUs draw others than by their profile."""
    if goal.limit is None or goal.draws == 1:
        return ""
    return f" (in watts of the profile, of which GPUs draw {goal.draws:.1%})"


def _exceeded(plan: Plan, limit: PowerBudget | None) -> str:
    """What of a limit a plan does not keep, as none does; empty: it keeps it all."""
    return "" if limit is None or plan.power is None else plan.power.exceeded(limit.peaks)


def _advice(goal: Goal) -> str:
    """What to change where there is no plan for what the configuration asks for."""
    return "try looser perseus.limits" + ("" if goal.limit is None else ", or more power: see perseus.power_budget_w")


def _kept(seen: Answered) -> PlanRequest:
    """What a plan was made for, as long as it is kept."""
    return replace(
        seen.request,
        samples=None,
        in_force=None,
        refine_s=0.0,
        overheads=seen.answer.overheads,
        made=seen.answer.made,
    )


def _without(values: Mapping[str, ValueT], key: str) -> dict[str, ValueT]:
    return {name: value for name, value in values.items() if name != key}
