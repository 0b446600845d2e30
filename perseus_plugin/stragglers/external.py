"""Figures of other straggler detectors, corrected for what the plan makes of them. Pure.

A detector that knows nothing of the plan sees planned slow clocks, and perhaps unequal stages, as slowness. What is
left after dividing by the plan is compared with the other ranks, and where stages differ in the work they do also with
the rank's own past.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from perseus_plugin.planning.plan import Plan
from perseus_plugin.stragglers.book import Report

_PAST = 3  # figures that make a rank's own past
_IN_A_ROW = 2  # figures that must say so


@dataclass(frozen=True, slots=True)
class ExternalFigures:
    """What another detector has measured over some iterations.

    Attributes:
        source: who says so.
        relative_time: per rank, any measure proportional to the time its work took.
        kinds: what the kinds of instruction that the measure covers begin with; empty for all.
        comparable: the work is the same on every rank, so that a rank that was slow from the start shows; else ranks
            are compared with their own past.
    """

    source: str
    relative_time: Mapping[int, float]
    kinds: tuple[str, ...] = ()
    comparable: bool = False


class ExternalJudge:
    """Follows one detector.

    A rank is slow when `_IN_A_ROW` figures say so by more than the threshold, and normal again after one that is within
    half of it.

    Args:
        threshold: smallest slowdown that counts, as a share.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._past: dict[int, list[float]] = {}
        self._recent: dict[int, list[float]] = {}
        self._told: dict[int, float] = {}

    def judge(self, figures: ExternalFigures, planned: Mapping[int, float]) -> list[Report]:
        """What the figures change.

        Args:
            figures: of iterations that all ran under the same plan.
            planned: per rank, how many times as long as at full clocks its work takes by that plan; ranks of which
                that is not known are left out.

        Returns:
            Reports to enter; empty while nothing changes.
        """
        corrected = {
            rank: value / planned[rank]
            for rank, value in figures.relative_time.items()
            if rank in planned and 0 < value < float("inf")
        }
        ratios = corrected if figures.comparable else self._against_past(corrected)
        if len(ratios) < 2:
            return []
        # All ranks slower than they were is no straggler.
        usual = statistics.median_low(ratios.values())
        reports = []
        for rank, ratio in sorted(ratios.items()):
            level = self._level(rank, ratio / usual)
            if level != self._told.get(rank, 1.0):
                self._told[rank] = level
                reports.append(Report(rank=rank, slowdown=level, source=figures.source))
        return reports

    def _against_past(self, corrected: Mapping[int, float]) -> dict[int, float]:
        """Every rank's figure over those it began with; without ranks that have too few of them."""
        ratios = {}
        for rank, value in corrected.items():
            past = self._past.setdefault(rank, [])
            if len(past) < _PAST:
                past.append(value)
            else:
                ratios[rank] = value / statistics.median(past)
        return ratios

    def _level(self, rank: int, slowdown: float) -> float:
        recent = self._recent.setdefault(rank, [])
        recent.append(slowdown)
        del recent[:-_IN_A_ROW]
        told = self._told.get(rank, 1.0)
        if slowdown < 1 + self._threshold / 2:
            return 1.0
        if len(recent) < _IN_A_ROW or min(recent) <= 1 + self._threshold:
            return told
        level = statistics.mean(recent)
        return level if abs(level / told - 1) > self._threshold else told


PlannedWork = Mapping[tuple[int, str], tuple[float, float]]
"""Per (stage, kind), seconds of an iteration's instructions at the plan's clocks and at the highest one."""


def planned_work(plan: Plan, time_s: Mapping[tuple[int, str, int], float]) -> PlannedWork:
    """What a plan makes of each stage's work.

    Args:
        plan: the plan.
        time_s: by stage, kind and clock.
    """
    top_mhz: dict[tuple[int, str], int] = {}
    for stage, kind, clock_mhz in time_s:
        top_mhz[stage, kind] = max(clock_mhz, top_mhz.get((stage, kind), 0))
    work: dict[tuple[int, str], tuple[float, float]] = {}
    for stage, instructions in enumerate(plan.stages):
        for planned in instructions:
            kind = planned.instruction.kind
            planned_s, full_s = work.get((stage, kind), (0.0, 0.0))
            planned_s += time_s[stage, kind, planned.frequency_mhz]
            work[stage, kind] = planned_s, full_s + time_s[stage, kind, top_mhz[stage, kind]]
    return work


def slowed_by(work: PlannedWork | None, stage: int, kinds: tuple[str, ...]) -> float | None:
    """How many times as long as at the highest clock a stage's instructions of these kinds take; None: not known."""
    rows = [
        times for (of, kind), times in (work or {}).items() if of == stage and (not kinds or kind.startswith(kinds))
    ]
    full_s = sum(full for _, full in rows)
    return sum(planned for planned, _ in rows) / full_s if full_s > 0 else None
