"""The job's plans on rank 0: one per schedule, further ones for the pace of stragglers, each with a version."""

from __future__ import annotations

from collections.abc import Sequence

from perseus_plugin.exchange import Exchange
from perseus_plugin.messages import PlanPart, part_key
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.straggler_external import PlannedWork, planned_work, slowed_by


class PlanShelf:
    """Numbers plans, publishes every stage's part, and keeps what is asked of them later.

    Args:
        exchange: to all ranks.
        stages: of the pipeline.
    """

    def __init__(self, exchange: Exchange, stages: int) -> None:
        self._exchange, self._stages = exchange, stages
        self._of_schedule: dict[str, tuple[int, Plan]] = {}
        self._work: dict[int, PlannedWork] = {}
        self._version = 0

    def put(self, schedule: str, plan: Plan, profile: Profile) -> int:
        """The plan of a schedule from now on; returns its version.

        Raises:
            ExchangeError: the store fails.
        """
        version = self.publish(schedule, plan, profile)
        self._of_schedule[schedule] = (version, plan)
        return version

    def publish(self, schedule: str, plan: Plan, profile: Profile, slowdowns: Sequence[float] | None = None) -> int:
        """Give a plan a version, and every stage its part.

        Args:
            schedule: it is for.
            plan: the plan.
            profile: it was made on, without the margin.
            slowdowns: per stage, how much longer than in the profile its instructions take; None: as in the profile.

        Raises:
            ExchangeError: the store fails.
        """
        self._version += 1
        time_s = {(stage, kind, m.frequency_mhz): m.time_s for stage, kind, m in profile.rows()}
        self._work[self._version] = planned_work(plan, time_s)
        for stage, planned in enumerate(plan.stages):
            slowdown = 1.0 if slowdowns is None else slowdowns[stage]
            part = PlanPart(
                version=self._version,
                schedule=schedule,
                clocks_mhz=tuple(p.frequency_mhz for p in planned),
                # As measured: the plan's own times hold the margin.
                times_s=tuple(slowdown * time_s[stage, p.instruction.kind, p.frequency_mhz] for p in planned),
                slowdown=slowdown,
            )
            self._exchange.publish(part_key(self._version, stage), part.model_dump())
        return self._version

    def discard(self, version: int) -> None:
        """Nobody will follow this version any more; the store shall not grow with every plan.

        Raises:
            ExchangeError: the store fails.
        """
        self._work.pop(version, None)
        for stage in range(self._stages):
            self._exchange.publish(part_key(version, stage), None)

    def clear(self) -> None:
        """The profile has changed: all schedules need a new plan."""
        self._of_schedule.clear()

    def __contains__(self, schedule: str) -> bool:
        return schedule in self._of_schedule

    def of(self, schedule: str) -> tuple[int, Plan]:
        """Version and plan of a schedule that has one."""
        return self._of_schedule[schedule]

    def slowed_by(self, version: int, stage: int, kinds: tuple[str, ...]) -> float | None:
        """See `straggler_external.slowed_by`."""
        return slowed_by(self._work.get(version), stage, kinds)
