"""Rank 0's comparison of the plans with full clocks: collects all ranks' windows, keeps the pairs they make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perseus_plugin.config import WatchConfig
from perseus_plugin.exchange.messages import RankWindow, RankWindows, Seen, receive, windows_key
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.reporting.live.pairs import Effect, PairedBlock, Row, effect_on_energy, effect_on_time
from perseus_plugin.reporting.live.windows import ENERGY_TAKES, by_iteration

_MAX_BLOCKS = 400  # of the newest references that are kept
_LATELY = 40  # of the newest: a plan that did well for long must not hide for long that it does not any more
_LOOK_EVERY_S = 1.0
_PATIENCE_S = 60.0  # at least, until a rank that has not told of a block is done without
_SURE = 0.999


@dataclass(frozen=True, slots=True)
class Compared:
    """The plans in force against full clocks on the same work.

    Attributes:
        time, energy: under the plans; None: not known (yet).
    """

    time: Effect | None = None
    energy: Effect | None = None


class Comparison:
    """See the module's docstring.

    Args:
        config: the `watch` block.
        exchange: to all ranks.
        world_size: of the job.
        graph_s: how long an iteration of a schedule takes at full clocks in the graph; NaN: not known.
        monotonic: a clock.
        leader: the rank whose windows the others' are put to, this one.

    Attributes:
        compared: the newest figures.
    """

    def __init__(
        self,
        config: WatchConfig,
        exchange: Exchange,
        world_size: int,
        graph_s: Callable[[str], float],
        monotonic: Callable[[], float] = time.monotonic,
        leader: int = 0,
    ) -> None:
        self._config, self._exchange, self._world_size = config, exchange, world_size
        self._graph_s, self._monotonic, self._leader = graph_s, monotonic, leader
        self._since = 0
        self._own: Any = None
        self._heard: dict[int, dict[int, RankWindow]] = {}
        self._replica_of: dict[int, int] = {}
        self._first_heard_s: dict[int, float] = {}
        self._rows: dict[int, PairedBlock] = {}
        self._look_due_s = 0.0
        self.compared = Compared()
        self._lately: Effect | None = None
        self._too_slow: Effect | None = None

    def begin(self, since: int) -> None:
        """Plans that were made on new measurements are followed from this iteration on."""
        if since != self._since:
            self._since = since
            self._own, self._heard, self._first_heard_s, self._rows = None, {}, {}, {}
            self.compared, self._lately, self._too_slow = Compared(), None, None

    def collect(self, at_once: bool = False) -> bool:
        """Take what ranks have told since; returns whether that has changed the figures.

        Args:
            at_once: whatever has come now; otherwise once a second, and ranks that are late are waited for.

        Raises:
            ExchangeError: the store fails.
        """
        now_s = self._monotonic()
        if self._config.reference_share <= 0 or (now_s < self._look_due_s and not at_once):
            return False
        self._look_due_s = now_s + _LOOK_EVERY_S
        self._hear(self._leader, now_s)
        if not self._heard:
            return False
        for rank in range(self._world_size):
            if rank != self._leader:
                self._hear(rank, now_s)
        changed = False
        for block, told in sorted(self._heard.items()):
            if (
                at_once
                or len(told) == self._world_size
                or now_s > self._first_heard_s[block] + _patience_s(told[self._leader])
            ):
                changed |= self._enter(block, told)
                del self._heard[block]
        if changed:
            blocks = [self._rows[number] for number in sorted(self._rows)]
            self.compared = Compared(effect_on_time(blocks), effect_on_energy(blocks))
            self._lately = effect_on_time(blocks[-_LATELY:])
        return changed

    def _hear(self, rank: int, now_s: float) -> None:
        value = self._exchange.told(windows_key(rank))
        if value is None or (
            rank == self._leader and value is self._own
        ):  # its windows have been entered, or are too old
            return
        if rank == self._leader:
            self._own = value
        told = receive(RankWindows, value)
        self._replica_of[rank] = told.replica
        for window in told.windows:
            is_new = window.since == self._since and window.block not in self._rows
            if is_new and (rank == self._leader or window.block in self._heard):
                self._heard.setdefault(window.block, {})[rank] = window
                self._first_heard_s.setdefault(window.block, now_s)

    def _enter(self, block: int, told: dict[int, RankWindow]) -> bool:
        everywhere = by_iteration(list(told.values())) if len(told) == self._world_size else {}
        of_replica: dict[int, list[RankWindow]] = {}
        times = told[self._leader].seen
        for rank, window in told.items():
            of_replica.setdefault(self._replica_of[rank], []).append(window)
        in_replicas = [by_iteration(windows) for windows in of_replica.values()]
        # The replica with most work is waited for.
        sizes = [max(_size(of.get(seen.iteration, [])) for of in in_replicas) for seen in times]
        if not all(math.isfinite(size) for size in sizes):
            sizes = [1.0] * len(sizes)  # not known of all: what there is to compute is the schedule's to say
        rows = [
            Row(
                block,
                seen.reference,
                seen.time_s,
                _energy_j(everywhere.get(seen.iteration, [])),
                size * self._graph_s(seen.schedule),
            )
            for seen, size in zip(times, sizes, strict=True)
        ]
        self._rows[block] = PairedBlock(tuple(rows))
        while len(self._rows) > _MAX_BLOCKS:
            del self._rows[min(self._rows)]
        return bool(times)

    # What follows from it.

    @property
    def said(self) -> str:
        """How much longer iterations take, for people."""
        effect = self._too_slow or self.compared.time
        assert effect is not None  # it was found to be too slow
        low, high = effect.interval
        return (
            f"iterations under the plan take {100 * effect.share:.1f} % ({100 * low:.1f} to {100 * high:.1f} %) longer "
            "than at full clocks on the same work"
        )

    def too_slow(self, allowed: float) -> float | None:
        """By what share iterations are longer than allowed, if that is beyond doubt and beyond the tolerance.

        Args:
            allowed: share by which they may be longer than at full clocks.
        """
        limit = (1 + allowed) * (1 + self._config.tolerance_or_default) - 1
        beyond = [
            effect
            for effect in (self.compared.time, self._lately)
            if effect is not None
            and effect.iterations >= self._config.patience
            and min(effect.at_least(_SURE), effect.interval[0]) > limit
        ]
        self._too_slow = max(beyond, key=lambda effect: effect.share, default=None)
        return None if self._too_slow is None else (1 + self._too_slow.share) / (1 + allowed) - 1


def _patience_s(window: RankWindow) -> float:
    """How long other ranks may tell of this later than rank 0: where an energy does not come, they wait for it."""
    return max(_PATIENCE_S, *(2 * ENERGY_TAKES * seen.time_s for seen in window.seen))


def _size(seen: Sequence[Seen]) -> float:
    """How much work a replica's iteration had, as a multiple of the profile's; NaN: none of its ranks can tell."""
    usual_s = math.fsum(one.usual_s for one in seen)
    return math.fsum(one.spent_s for one in seen) / usual_s if usual_s > 0 else math.nan


def _energy_j(seen: Sequence[Seen]) -> float:
    energies = [one.energy_j for one in seen]
    if not energies or any(energy_j is None for energy_j in energies):
        return math.nan
    return math.fsum(energy_j for energy_j in energies if energy_j is not None)
