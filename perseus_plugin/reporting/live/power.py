"""What the GPUs of a job have drawn lately, by what its ranks tell of their iterations. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from perseus_plugin.exchange.messages import RankStats, Totals
from perseus_plugin.reporting.live.account import EVERY, FULL_CLOCK, PLAN


@dataclass(frozen=True, slots=True)
class Drawn:
    """Average power of all GPUs of the job over the last iterations, whatever these ran as.

    Attributes:
        power_w: of all GPUs together.
        over_s: how long those iterations took.
        iterations: how many they were, on the first rank.
    """

    power_w: float
    over_s: float
    iterations: int


@dataclass(slots=True)
class PowerMeter:
    """Takes what ranks tell from time to time, each for itself.

    Args:
        ranks: of the job.
    """

    ranks: int
    _before: dict[int, Totals] = field(default_factory=dict)

    def read(self, stats: Sequence[RankStats]) -> Drawn | None:
        """Since the last figure; None: not every rank has told of another iteration with a known energy since.

        Args:
            stats: of all ranks heard of, from the beginning of the run.
        """
        totals = {of_rank.placement.rank: of_rank.totals.get(EVERY, Totals()) for of_rank in stats}
        since = {rank: _since(self._before.get(rank, Totals()), now) for rank, now in totals.items()}
        watts = [_power_w(passed) for passed in since.values()]
        known_w = [power_w for power_w in watts if power_w is not None]
        if len(known_w) < self.ranks:
            return None
        self._before = totals
        first = since[min(since)]
        return Drawn(math.fsum(known_w), first.time_s, first.iterations)


def under_plan(stats: Sequence[RankStats], ranks: int, since: int) -> Drawn | None:
    """Under the plans that are followed from an iteration on; None: some ranks have not told of that yet.

    Args:
        stats: of all ranks heard of.
        ranks: of the job.
        since: that iteration.
    """
    return _together([one.totals.get(PLAN, Totals()) for one in stats if one.plan_since == since], ranks)


def at_full_clocks(stats: Sequence[RankStats], ranks: int) -> Drawn | None:
    """In the iterations of the sweep at full clocks; None: some ranks have not told of those.

    Args:
        stats: of all ranks heard of.
        ranks: of the job.
    """
    return _together([of_rank.totals.get(FULL_CLOCK, Totals()) for of_rank in stats], ranks)


def _together(totals: Sequence[Totals], ranks: int) -> Drawn | None:
    known_w = [watts for watts in map(_power_w, totals) if watts is not None]
    if len(known_w) < ranks:
        return None
    return Drawn(math.fsum(known_w), max(one.time_s for one in totals), min(one.iterations for one in totals))


def _since(before: Totals, now: Totals) -> Totals:
    known = now.energy_j is not None
    return Totals(
        iterations=now.iterations - before.iterations,
        time_s=now.time_s - before.time_s,
        energy_j=(now.energy_j or 0.0) - (before.energy_j or 0.0) if known else None,
        unread=now.unread - before.unread,
    )


def _power_w(passed: Totals) -> float | None:
    energy_j = passed.mean_energy_j
    return None if energy_j is None or passed.time_s <= 0 else energy_j * passed.iterations / passed.time_s
