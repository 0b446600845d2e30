"""What one rank sees of each block of references and of the iterations beside it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from perseus_plugin.exchange.messages import (
    BatchPart,
    Placement,
    PlanPart,
    RankWindow,
    RankWindows,
    Seen,
    windows_key,
)
from perseus_plugin.exchange.parts import Parts, batch_part
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.references import Block, block_near
from perseus_plugin.iteration.timetable import REFERENCE, Directive, Follow

_KEPT = 6  # windows that rank 0 may still have to fetch
ENERGY_TAKES = 16  # iterations until an energy that has not come will not come any more


@dataclass
class _Open:
    block: Block
    since: int
    seen: dict[int, Seen]


class Windows:
    """Collects and publishes a rank's windows.

    Args:
        exchange: to rank 0.
        placement: of this rank.
        share: of references.
        top_mhz: the highest clock; instructions planned at it take as long as at full clocks, so that they tell how
            large an iteration's work is, under the plan as in a reference.
    """

    def __init__(self, exchange: Exchange, placement: Placement, share: float, top_mhz: int) -> None:
        self._exchange, self._placement, self._share, self._top_mhz = exchange, placement, share, top_mhz
        self._following: Follow | None = None
        self._open: list[_Open] = []
        self._finished: deque[RankWindow] = deque(maxlen=_KEPT)
        self._energy_j: dict[int, float] = {}

    def saw(self, directive: Directive, record: IterationRecord, parts: Parts) -> None:
        """An iteration has ended.

        Args:
            directive: what it ran as.
            record: what was seen.
            parts: of the newest plans.

        Raises:
            ExchangeError: the store fails.
        """
        if isinstance(directive, Follow):
            if directive.straggler or (self._following and directive.since != self._following.since):
                self._open.clear()  # what is in force has changed within the window
            self._following = None if directive.straggler else directive
        elif directive != REFERENCE:
            self._following = None
            self._open.clear()
        if self._following is not None:
            self._enter(self._following, directive, record, parts)
        if self._open or self._energy_j:
            self._finish(record.number)

    def energy(self, number: int, energy_j: float) -> None:
        """The energy of an iteration has come; NaN: it is not known."""
        self._energy_j[number] = energy_j

    def _enter(self, following: Follow, directive: Directive, record: IterationRecord, parts: Parts) -> None:
        block = block_near(record.number - following.since, self._share)
        if block is None or not block.window_first <= record.number - following.since < block.window_end:
            return
        if not self._open or self._open[-1].block != block:
            self._open.append(_Open(block, following.since, {}))
        if not (record.undisturbed and record.timed):
            return
        # What was announced of the batch tells its size, at full clocks too; else the instructions do.
        part = batch_part(parts, record) or parts.get((following.version, record.schedule))
        if part is None:
            return  # this schedule runs at full clocks under these plans too
        spent_s, usual_s = work_seen(record, part, self._top_mhz)
        self._open[-1].seen[record.number] = Seen(
            iteration=record.number,
            reference=directive == REFERENCE,
            schedule=record.schedule,
            time_s=record.end_s - record.begin_s,
            spent_s=spent_s,
            usual_s=usual_s,
        )

    def _finish(self, number: int) -> None:
        """Publish windows that are over and whose energies have come, or will not."""
        for window in list(self._open):
            end = window.since + window.block.window_end
            # Energies come in order: one that has not come before a later one is not known.
            known = all(one in self._energy_j for one in window.seen) or max(self._energy_j, default=-1) >= end
            if number >= end + ENERGY_TAKES or (number >= end and known):
                self._open.remove(window)
                seen = tuple(
                    one.model_copy(update={"energy_j": _known(self._energy_j.get(one.iteration))})
                    for one in window.seen.values()
                )
                self._finished.append(RankWindow(since=window.since, block=window.block.number, seen=seen))
                message = RankWindows(replica=self._placement.replica, windows=tuple(self._finished))
                self._exchange.tell(windows_key(self._placement.rank), message.model_dump())
        oldest = min((one for window in self._open for one in window.seen), default=number - ENERGY_TAKES)
        self._energy_j = {one: energy_j for one, energy_j in self._energy_j.items() if one >= oldest}


def work_seen(record: IterationRecord, part: PlanPart, top_mhz: int) -> tuple[float, float]:
    """Seconds that instructions which run at full clocks under the plan took, and take by the profile.

    Only those with a full-clock one before them are taken, as the clock may still rise within the first one. Where the
    batch was announced, its iteration and a usual one stand for them.

    Args:
        record: of an iteration under the plan, or of a reference.
        part: of the plan for the iteration's schedule.
        top_mhz: the highest clock.

    Returns:
        Zeros where there are none, or were not seen, or the record does not fit the part.
    """
    if isinstance(part, BatchPart):
        return part.pace_s, part.usual_s
    if not record.complete or len(part.clocks_mhz) != sum(slot >= 0 for slot in record.slots):
        return 0.0, 0.0
    held = _at_full_clocks(part.clocks_mhz, top_mhz)
    spent, usual = [], []
    for operation, slot, start_s, end_s in zip(
        record.operations, record.slots, record.starts_s, record.ends_s, strict=True
    ):
        if isinstance(operation, Compute) and held[slot]:
            spent.append(end_s - start_s)
            usual.append(part.times_s[slot])
    return math.fsum(spent), math.fsum(usual)


@lru_cache(maxsize=32)  # of the plans in force, for iteration after iteration
def _at_full_clocks(clocks_mhz: tuple[int, ...], top_mhz: int) -> tuple[bool, ...]:
    """Which instructions are, after one that is as well."""
    return tuple(
        clock == top_mhz and (slot == 0 or clocks_mhz[slot - 1] == top_mhz) for slot, clock in enumerate(clocks_mhz)
    )


def step_size(record: IterationRecord, part: PlanPart, top_mhz: int) -> float:
    """How much work an iteration under the plan had, as a multiple of the profile's; NaN: this rank cannot tell."""
    spent_s, usual_s = work_seen(record, part, top_mhz) if record.complete else (0.0, 0.0)
    return spent_s / usual_s if usual_s > 0 else math.nan


def _known(energy_j: float | None) -> float | None:
    return None if energy_j is None or not math.isfinite(energy_j) else energy_j


def by_iteration(windows: Sequence[RankWindow]) -> dict[int, list[Seen]]:
    """What ranks have seen of the same iterations, as far as all of them have it."""
    seen: dict[int, list[Seen]] = {}
    for window in windows:
        for one in window.seen:
            seen.setdefault(one.iteration, []).append(one)
    return {number: of for number, of in seen.items() if len(of) == len(windows)}
