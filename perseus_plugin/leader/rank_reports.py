"""What ranks have published after a sweep or a recheck, as rank 0 collects it by asking again and again."""

from __future__ import annotations

import time

from perseus_plugin.exchange.messages import (
    RECHECKS,
    RankEstimate,
    RankStats,
    Recheck,
    estimate_key,
    receive,
    recheck_key,
    stats_key,
)
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.gpus.base import DWELL_LATENCIES

TIMEOUT_S = 120.0


class RankReports:
    """Estimates of one round of the sweep, and rechecks of one order.

    Args:
        exchange: to all ranks.
        world_size: of the job.

    Attributes:
        rechecks: by rank, as far as they have come.
        round: of the sweep, from 0.
    """

    def __init__(self, exchange: Exchange, world_size: int) -> None:
        self._exchange, self._world_size = exchange, world_size
        self._estimates: dict[int, RankEstimate] = {}
        self._due_s: float | None = None
        self.rechecks: dict[int, Recheck] = {}
        self.round = 0

    def next_round(self) -> None:
        """The sweep is made again."""
        self._exchange.forget_told(estimate_key(self.round))
        self.round += 1
        self._estimates, self._due_s = {}, None

    def recheck_again(self) -> None:
        """What ranks have rechecked so far does not hold any more."""
        self._exchange.forget_told(RECHECKS)
        self.rechecks = {}

    def all_estimates(self) -> list[RankEstimate] | None:
        """This round's, by rank; None while some are missing.

        Raises:
            ExchangeError: the store fails.
        """
        for rank in range(self._world_size):
            if rank not in self._estimates:
                value = self._exchange.told(estimate_key(self.round, rank))
                if value is not None:
                    self._estimates[rank] = receive(RankEstimate, value)
        if len(self._estimates) < self._world_size:
            return None
        return [self._estimates[rank] for rank in range(self._world_size)]

    def all_rechecks(self, sequence: int) -> bool:
        """Whether all ranks have rechecked after the order of this number.

        Raises:
            ExchangeError: the store fails.
        """
        for rank in range(self._world_size):
            if rank not in self.rechecks:
                value = self._exchange.told(recheck_key(sequence, rank))
                if value is not None:
                    self.rechecks[rank] = receive(Recheck, value)
        return len(self.rechecks) == self._world_size

    def placed(self) -> tuple[list[int], int] | None:
        """The stage that each rank runs, and how many GPUs a node has; None while some have not told, by statistics.

        Raises:
            ExchangeError: the store fails.
        """
        told = [self._exchange.told(stats_key(rank)) for rank in range(self._world_size)]
        values = [value for value in told if value is not None]
        if len(values) < len(told):
            return None
        placements = [receive(RankStats, value).placement for value in values]
        return [one.stage for one in placements], 1 + max(one.local_rank for one in placements)

    @property
    def overdue(self) -> bool:
        """Whether ranks have had long enough, counted from the first time this is asked."""
        if self._due_s is None:
            self._due_s = time.monotonic() + TIMEOUT_S
        return time.monotonic() > self._due_s

    @property
    def missing(self) -> str:
        """Who has sent no estimate, for people."""
        absent = [rank for rank in range(self._world_size) if rank not in self._estimates]
        return (
            f"{len(absent)} of {self._world_size} ranks sent no measurements within {TIMEOUT_S:.0f} s "
            f"(first missing: rank {absent[0]}); see that rank's log"
        )

    @property
    def dwell_s(self) -> float:
        """The shortest time between two clock changes that the slowest GPU's switch latency asks for."""
        return DWELL_LATENCIES * self.latency_s

    @property
    def latency_s(self) -> float:
        """How long a clock change takes on the slowest GPU; 0.0 where that was not measured."""
        estimated = [one.switch_latency_s for one in self._estimates.values()]
        checked = [one.switch_latency_s for one in self.rechecks.values()]
        return max((latency_s or 0.0 for latency_s in (*estimated, *checked)), default=0.0)
