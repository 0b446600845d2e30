"""How long the instructions of the last iterations took: kept on every rank, put together on rank 0.

They are what plans are replayed over. Of a rank, iterations at full clocks come first, as nothing has to be made of
them; what ran at other clocks is brought to full clocks by the profile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from perseus_plugin.exchange.messages import IterationDurations, Placement, PlanPart, RankDurations
from perseus_plugin.iteration.instructions import Compute, StreamOp
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.iteration.timetable import Directive, Follow, RanAs, Sweep
from perseus_plugin.profiling.profile import Profile

KEPT = 12
_RECENT = 300  # iterations; what lies further back may have been another job
_VALUES = 4096  # in one message
_DIGITS = 7  # of a second

_Seen = tuple[IterationRecord, tuple[int, ...]]  # and at which clocks it ran


class DurationsLog:
    """A rank's last iterations that nothing disturbed.

    Args:
        top_mhz: the sweep's highest clock.
    """

    def __init__(self, top_mhz: int) -> None:
        self._top_mhz = top_mhz
        self._full: deque[_Seen] = deque(maxlen=KEPT)
        self._other: deque[_Seen] = deque(maxlen=KEPT)
        self.new = 0

    def add(self, directive: Directive, record: IterationRecord, part: PlanPart | None) -> None:
        """An iteration has ended.

        Args:
            directive: what it ran as.
            record: what was seen.
            part: the plan that it followed, if it did.
        """
        if not (record.undisturbed and record.complete):
            return
        clocks: tuple[int, ...] = (0,)
        if isinstance(directive, Sweep):
            if not directive.kept or directive.paired:  # when instructions begin is then no sign of either clock
                return
            clocks = (0 if directive.frequency_mhz == self._top_mhz else directive.frequency_mhz,)
        elif isinstance(directive, Follow):
            if directive.straggler or part is None:
                return
            clocks = tuple(part.clocks_mhz)
            if record.raised:
                raised = dict(record.raised)
                clocks = tuple(raised.get(position, clock) for position, clock in enumerate(clocks))
            if set(clocks) == {self._top_mhz}:
                clocks = (0,)
        elif directive.ran_as is RanAs.WARM_UP:
            return
        (self._full if clocks == (0,) else self._other).append((record, clocks))
        self.new += 1

    def message(self, placement: Placement) -> RankDurations:
        """What is to be published."""
        self.new = 0
        newest = max((record.number for record, _ in (*self._full, *self._other)), default=0)
        full, other = (
            [_durations_of(record, clocks) for record, clocks in kept if record.number > newest - _RECENT]
            for kept in (self._full, self._other)
        )
        chosen = [*full, *other[max(0, len(other) - (KEPT - len(full))) :]]
        size = max((len(one.durations_s) + len(one.starts_s) for one in chosen), default=1)
        chosen = sorted(chosen, key=lambda one: one.number)[-max(1, _VALUES // size) :]
        return RankDurations(placement=placement, iterations=tuple(chosen))


def _durations_of(record: IterationRecord, clocks_mhz: tuple[int, ...]) -> IterationDurations:
    """Made only of iterations that are published: most are not, and this takes the interpreter from training."""
    rows = [
        (start_s, end_s)
        for slot, start_s, end_s in zip(record.slots, record.starts_s, record.ends_s, strict=True)
        if slot >= 0
    ]
    return IterationDurations(
        number=record.number,
        schedule=record.schedule,
        clocks_mhz=clocks_mhz,
        durations_s=tuple(round(end_s - start_s, _DIGITS) for start_s, end_s in rows),
        starts_s=tuple(round(start_s - record.begin_s, _DIGITS) for start_s, _ in rows),
        time_s=round(record.end_s - record.begin_s, _DIGITS),
    )


def joined(
    ranks: Sequence[RankDurations],
    schedule: str,
    streams: Sequence[Sequence[StreamOp]],
    profile: Profile,
) -> dict[int, Samples]:
    """Iterations of this schedule that all ranks have seen, by number; each as samples of one iteration.

    Of ranks that work together on one stage the first one stands for all. A replica of which a stage is missing is left
    out.

    Args:
        ranks: what they have published.
        schedule: its key.
        streams: of the schedule, per stage.
        profile: what clocks do to durations.
    """
    kinds = [[op.kind for op in stream if isinstance(op, Compute)] for stream in streams]
    ratio = {
        (stage, kind, m.frequency_mhz): rows[0].time_s / m.time_s
        for (stage, kind), rows in profile.table.items()
        for m in rows
    }
    by_place: dict[tuple[int, int], RankDurations] = {}
    for told in sorted(ranks, key=lambda one: one.placement.rank):
        by_place.setdefault((told.placement.replica, told.placement.stage), told)
    replicas = [
        replica
        for replica in sorted({replica for replica, _ in by_place})
        if all((replica, stage) in by_place for stage in range(len(streams)))
    ]
    at_full: list[list[dict[int, tuple[float, ...]]]] = []
    seen: list[list[dict[int, IterationDurations]]] = []
    for replica in replicas:
        of_replica = [_at_full_clocks(by_place[replica, s], s, schedule, kinds[s], ratio) for s in range(len(streams))]
        at_full.append(of_replica)
        seen.append([{one.number: one for one in by_place[replica, s].iterations} for s in range(len(streams))])
    if not at_full:
        return {}
    numbers = set.intersection(*(set(stage) for replica in at_full for stage in replica))
    found = {}
    for number in sorted(numbers):
        found[number] = Samples(
            (tuple(tuple(stage[number] for stage in replica) for replica in at_full),),
            (tuple(tuple(stage[number].durations_s for stage in replica) for replica in seen),),
            (tuple(tuple(stage[number].starts_s for stage in replica) for replica in seen),),
            (tuple(max(stage[number].time_s for stage in replica) for replica in seen),),
        )
    return found


def _at_full_clocks(
    told: RankDurations,
    stage: int,
    schedule: str,
    kinds: Sequence[str],
    ratio: Mapping[tuple[int, str, int], float],
) -> dict[int, tuple[float, ...]]:
    """Durations at full clocks, by iteration."""
    found = {}
    for one in told.iterations:
        if one.schedule != schedule or len(one.durations_s) != len(kinds):
            continue
        clocks = one.clocks_mhz if len(one.clocks_mhz) == len(kinds) else one.clocks_mhz[:1] * len(kinds)
        factors = [
            1.0 if clock == 0 else ratio.get((stage, kind, clock)) for kind, clock in zip(kinds, clocks, strict=True)
        ]
        if None not in factors:
            found[one.number] = tuple(
                duration_s * (factor or 0.0) for duration_s, factor in zip(one.durations_s, factors, strict=True)
            )
    return found
