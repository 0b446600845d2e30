"""The job's plans on rank 0: one per schedule, further ones for the pace of stragglers, told in sets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from perseus_plugin.exchange.messages import CatchUpPart, PlanPart, PlanParts, WaitPart
from perseus_plugin.iteration.replayed import StageCatchUp
from perseus_plugin.planning.graphed import phases_of
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.stragglers.external import PlannedWork, planned_work, slowed_by


@dataclass(frozen=True)
class _Kept:
    """A plan with every stage's part of it."""

    schedule: str
    plan: Plan
    parts: tuple[PlanPart, ...]
    work: PlannedWork


@dataclass(frozen=True)
class PlanSet:
    """A set of plans.

    Attributes:
        version: its number.
        parts: per stage, to be published; empty for a set that has been made before.
    """

    version: int
    parts: tuple[PlanParts, ...]


class PlanShelf:
    """Numbers plans and sets of them, and keeps what is asked of them later.

    Ranks are told of sets only: which plan of a set holds is the schedule's to say, when it begins.

    Args:
        stages: of the pipeline.
        by_time: whether ranks are told when a plan's phases begin, as their steps are one CUDA graph.
    """

    def __init__(self, stages: int, *, by_time: bool = False) -> None:
        self._stages, self._by_time = stages, by_time
        self._kept: dict[int, _Kept] = {}
        self._of_schedule: dict[str, int] = {}
        self._sets: dict[frozenset[int], int] = {}
        self._replaced: set[int] = set()
        self._number = self._version = 0

    def copy(self) -> PlanShelf:
        """One that changes by itself."""
        made = PlanShelf(self._stages, by_time=self._by_time)
        made._kept, made._of_schedule, made._sets = dict(self._kept), dict(self._of_schedule), dict(self._sets)
        made._replaced = set(self._replaced)
        made._number, made._version = self._number, self._version
        return made

    def put(
        self,
        schedule: str,
        plan: Plan,
        profile: Profile,
        catch_up: Sequence[StageCatchUp] = (),
        dwell_s: float = 0.0,
    ) -> int:
        """The plan of a schedule from now on, in the place of the one it had; returns its number. See `keep`."""
        number = self.keep(schedule, plan, profile, catch_up=catch_up, dwell_s=dwell_s)
        if schedule in self._of_schedule:
            self._replaced.add(self._of_schedule[schedule])
        self._of_schedule[schedule] = number
        return number

    def keep(
        self,
        schedule: str,
        plan: Plan,
        profile: Profile,
        slowdowns: Sequence[float] | None = None,
        catch_up: Sequence[StageCatchUp] = (),
        dwell_s: float = 0.0,
    ) -> int:
        """Give a plan a number.

        Args:
            schedule: it is for.
            plan: the plan.
            profile: it was made on, without the margin.
            slowdowns: per stage, how much longer than in the profile its instructions take; None: as in the profile.
            catch_up: per stage what late ranks need to know; empty: they do nothing.
            dwell_s: shortest time between two clock changes.
        """
        self._number += 1
        time_s = {(stage, kind, m.frequency_mhz): m.time_s for stage, kind, m in profile.rows()}
        parts = []
        for stage, planned in enumerate(plan.stages):
            slowdown = 1.0 if slowdowns is None else slowdowns[stage]
            parts.append(
                PlanPart(
                    version=self._number,
                    schedule=schedule,
                    clocks_mhz=tuple(p.frequency_mhz for p in planned),
                    # As measured: the plan's own times hold the margin.
                    times_s=tuple(slowdown * time_s[stage, p.instruction.kind, p.frequency_mhz] for p in planned),
                    slowdown=slowdown,
                    catch_up=CatchUpPart(**asdict(catch_up[stage]), dwell_s=dwell_s) if catch_up else None,
                    waits=_waits(plan, stage),
                    phases=phases_of(plan, stage) if self._by_time else None,
                )
            )
        self._kept[self._number] = _Kept(schedule, plan, tuple(parts), planned_work(plan, time_s))
        return self._number

    def number_of(self, schedule: str) -> int:
        """Number of the plan of a schedule that has one."""
        return self._of_schedule[schedule]

    def choose(self, numbers: Mapping[str, int]) -> None:
        """These are the plans of the schedules from now on; those that they had until now are kept."""
        self._of_schedule = dict(numbers)

    def take_out(self, schedule: str) -> None:
        """This schedule has no plan any more."""
        self.discard(self._of_schedule.pop(schedule))

    def clear(self) -> None:
        """The profile has changed: all schedules need a new plan, and no stand-in holds any more."""
        self._of_schedule.clear()
        self._kept.clear()
        self._replaced.clear()

    def retire(self, number: int) -> None:
        """This plan will not be asked for any more once no rank follows it."""
        self._replaced.add(number)

    def discard(self, number: int) -> None:
        """This plan will not be asked for any more."""
        self._kept.pop(number, None)

    # Sets.

    def set_with(self, number: int | None = None) -> PlanSet:
        """The set of all schedules' plans, this one in the place of its schedule's."""
        chosen = dict(self._of_schedule)
        if number is not None:
            chosen[self._kept[number].schedule] = number
        members = frozenset(chosen.values())
        if members in self._sets:
            return PlanSet(self._sets[members], ())
        self._version += 1
        self._sets[members] = self._version
        kept = [self._kept[one] for one in sorted(members)]
        parts = [
            PlanParts(version=self._version, parts=tuple(one.parts[stage] for one in kept))
            for stage in range(self._stages)
        ]
        return PlanSet(self._version, tuple(parts))

    def tidy(self, in_force: Sequence[int]) -> list[int]:
        """Drop plans and sets that nobody will follow any more.

        Args:
            in_force: versions that ranks follow, or followed until just now.

        Returns:
            Versions of the sets dropped.
        """
        own = set(self._of_schedule.values())
        followed = {one for members, version in self._sets.items() if version in in_force for one in members}
        for number in self._replaced - followed:
            self.discard(number)
        self._replaced &= followed
        # One plan may be another's stand-in (for a pace); all others must be the job's as they are now.
        stale = [
            members
            for members, version in self._sets.items()
            if version not in in_force
            if len(members - own) > 1 or len(members) != len(own) or not members <= self._kept.keys()
        ]
        return [self._sets.pop(members) for members in stale]

    # What is asked of them.

    def __contains__(self, schedule: str) -> bool:
        return schedule in self._of_schedule

    @property
    def schedules(self) -> Sequence[str]:
        """Those that have a plan."""
        return list(self._of_schedule)

    def of(self, schedule: str) -> Plan:
        """The plan of a schedule that has one."""
        return self._kept[self._of_schedule[schedule]].plan

    def numbered(self, number: int) -> Plan:
        """The plan of this number, which is kept."""
        return self._kept[number].plan

    @property
    def allowed_slowdown(self) -> float:
        """Share by which iterations may be longer than at full clocks, for each schedule's plan to be kept to."""
        allowed = [plan.deadline_s / plan.baseline_time_s - 1 for plan in map(self.of, self._of_schedule)]
        return max([0.0, *allowed])

    def slowed_by(self, version: int, stage: int, kinds: tuple[str, ...]) -> float | None:
        """See `stragglers.external.slowed_by`; of all plans of a set together."""
        members = next((members for members, of in self._sets.items() if of == version), frozenset[int]())
        total: dict[tuple[int, str], tuple[float, float]] = {}
        for one in members & self._kept.keys():
            for key, (planned_s, full_s) in self._kept[one].work.items():
                before = total.get(key, (0.0, 0.0))
                total[key] = before[0] + planned_s, before[1] + full_s
        return slowed_by(total, stage, kinds)


def _waits(plan: Plan, stage: int) -> tuple[WaitPart, ...]:
    planned = plan.stages[stage]
    end_s = plan.iteration_time_s if plan.waits_until_s is None else plan.waits_until_s
    starts_s, finishes_s = [*(p.start_s for p in planned), end_s], [*(p.finish_s for p in planned), 0.0]
    parts = []
    for wait in plan.waits_of(stage):
        parts.append(
            WaitPart(
                after=wait.after,
                frequency_mhz=wait.frequency_mhz,
                duration_s=wait.finish_s - wait.start_s,
                work_before_s=max(0.0, wait.start_s - finishes_s[wait.after]),
                work_after_s=max(0.0, starts_s[wait.after + 1] - wait.finish_s),
            )
        )
    return tuple(parts)
