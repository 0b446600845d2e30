"""The job's last iterations on rank 0, as plans are replayed over them."""

from __future__ import annotations

from collections.abc import Sequence

from perseus_plugin.exchange.messages import RankDurations, durations_key, receive
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.instructions import StreamOp
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.profiling.durations import joined
from perseus_plugin.profiling.profile import Profile

FEWEST = 4
_KEPT = 24
_VALUES = 400_000  # durations in one request


class RecentIterations:
    """Collects what ranks publish of their iterations.

    Args:
        exchange: to all ranks.
        world_size: of the job.
    """

    def __init__(self, exchange: Exchange, world_size: int) -> None:
        self._exchange, self._world_size = exchange, world_size
        self._kept: dict[str, dict[int, Samples]] = {}

    def samples(self, schedule: str, streams: Sequence[Sequence[StreamOp]], profile: Profile) -> Samples | None:
        """Iterations of a schedule; None while there are too few to judge by.

        Raises:
            ExchangeError: the store fails.
        """
        chosen = list(self.numbered(schedule, streams, profile).values())
        return together(chosen) if len(chosen) >= FEWEST else None

    def numbered(self, schedule: str, streams: Sequence[Sequence[StreamOp]], profile: Profile) -> dict[int, Samples]:
        """The same by number, each as samples of one iteration; however few there are.

        Raises:
            ExchangeError: the store fails.
        """
        values = [self._exchange.fetch(durations_key(rank)) for rank in range(self._world_size)]
        told = [receive(RankDurations, value) for value in values if value is not None]
        kept = self._kept.setdefault(schedule, {})
        kept.update(joined(told, schedule, streams, profile))
        replicas = max((len(one.durations_s[0]) for one in kept.values()), default=0)
        size = max(1, sum(len(stream) for stream in streams) * replicas)
        for number in sorted(kept)[: -max(FEWEST, min(_KEPT, _VALUES // size))]:
            del kept[number]
        return {number: kept[number] for number in sorted(kept) if len(kept[number].durations_s[0]) == replicas}

    def forget(self, schedule: str | None = None) -> None:
        """What was told of a schedule, or of all, does not hold any more.

        A schedule without a plan needs none; and with another profile, what was brought to full clocks by the old one
        is something else.
        """
        if schedule is None:
            self._kept.clear()
        else:
            self._kept.pop(schedule, None)


def together(single: Sequence[Samples]) -> Samples:
    """Samples of one iteration each, as samples of all."""
    return Samples(
        tuple(one.durations_s[0] for one in single),
        tuple(one.as_run_s[0] for one in single),
        tuple(one.starts_s[0] for one in single),
        tuple(one.times_s[0] for one in single),
    )
