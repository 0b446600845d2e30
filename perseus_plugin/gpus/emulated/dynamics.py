"""How an emulated GPU's state moves through time. Pure: no file, no clock of its own.

Between two events (a clock change taking effect, work completing, somebody changing the load) power and
speed are constant, so time, work and energy are integrated exactly, segment by segment. The C library of the
tests that simulates NVML does the same arithmetic on the same file (`state.py` describes it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from perseus_plugin.gpus.emulated.physics import LOAD_CLASSES, WAITING

MAX_PENDING = 8
"""Clock changes that can be under way at once; a further one replaces the last."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What never changes about one emulated GPU.

    Attributes:
        clocks_mhz: supported SM clocks, falling.
        stretch: per load class and clock, time over time at the highest clock.
        relative_power: per load class and clock, power above static power over the same at the highest clock.
        dynamic_w: per load class, power above static power at the highest clock.
        static_w: power of a GPU that switches nothing.
        tick_period_s, tick_window_s, tick_origin_s: the energy counter moves at `origin + k * period`, by
            `period` times the mean power of the last `window` before that moment (window == period: it
            misses nothing).
        tick_lag_s: how long after that moment the counter shows it.
        rise_s, drop_s: per clock, how long a change to it takes beyond the least one.
        most_w: the most that the power limit may be set to; limit_w: what it was when the GPU was made (inf: none).
        burst_j: how much can be drawn beyond the limit after a time below it.
    """

    clocks_mhz: tuple[int, ...]
    stretch: tuple[Sequence[float], ...]
    relative_power: tuple[Sequence[float], ...]
    dynamic_w: tuple[float, ...]
    static_w: float
    tick_period_s: float
    tick_window_s: float
    tick_origin_s: float
    tick_lag_s: float
    rise_s: Sequence[float]
    drop_s: Sequence[float]
    most_w: float
    limit_w: float
    burst_j: float

    def index_at_most(self, clock_mhz: int) -> int:
        """Index of the highest supported clock not above `clock_mhz` (of the lowest if there is none)."""
        for index, clock in enumerate(self.clocks_mhz):
            if clock <= clock_mhz:
                return index
        return len(self.clocks_mhz) - 1


@dataclass(slots=True)
class Dynamics:
    """What changes. Times are `time.monotonic()`; everything is as of `at_s`.

    Attributes:
        at_s: the moment up to which everything is integrated.
        energy_j: exact energy so far.
        counter_j: what the energy counter shows; window_j: energy seen in the current tick's window so far.
        ticks: number of counter ticks so far (boundary k is at `tick_origin_s + k * tick_period_s`).
        tick_j: what the last tick brought.
        capped_s: time spent below the clock asked for.
        static_w, dynamic_w, load: current load: power is `static_w + dynamic_w *
            relative_power[load][clock]`.
        work_s: full-clock duration of the running work (0: none runs); done_s: how much of it is done.
        started_s, finished_s: when the last work started, and finished (0 while it runs); work_id: its
            number.
        slowdown: per load class, a factor on the time its work takes (1: none).
        clock_mhz: the clock asked for that is in effect; locked_mhz: the lock requested last (0: none).
        cap_mhz: the GPU runs at most at this clock (0: no cap).
        limit_w: the power limit (inf: none); where the load would draw more, the clock goes down until it does not.
        spare_j: what can still be drawn beyond the limit before that; it fills again below the limit.
        pending: clock changes under way, (takes effect at, MHz) by rising time.
        log_count: lock and reset calls so far; random: state of the latency jitter's generator.
    """

    at_s: float
    clock_mhz: int
    static_w: float
    ticks: int
    energy_j: float = 0.0
    counter_j: float = 0.0
    window_j: float = 0.0
    capped_s: float = 0.0
    dynamic_w: float = 0.0
    work_s: float = 0.0
    done_s: float = 0.0
    started_s: float = 0.0
    finished_s: float = 0.0
    slowdown: list[float] = field(default_factory=lambda: [1.0] * LOAD_CLASSES)
    work_id: int = 0
    log_count: int = 0
    random: int = 88172645463325252
    load: int = WAITING
    locked_mhz: int = 0
    cap_mhz: int = 0
    limit_w: float = math.inf
    spare_j: float = 0.0
    tick_j: float = 0.0
    pending: list[tuple[float, int]] = field(default_factory=list)

    def effective_index(self, tables: Tables) -> int:
        """Index of the clock the GPU runs at."""
        index = self._asked_index(tables, self.clock_mhz)
        return index if self.spare_j > 0.0 else self._held_index(tables, index)

    def effective_mhz(self, tables: Tables) -> int:
        """The clock the GPU runs at."""
        return tables.clocks_mhz[self.effective_index(tables)]

    def time_per_work(self, tables: Tables, index: int) -> float:
        """Seconds that one second of full-clock work takes at clock number `index`."""
        return tables.stretch[self.load][index] * self.slowdown[self.load]

    def power_w(self, tables: Tables) -> float:
        """Power now."""
        return self._power_at_w(tables, self.effective_index(tables))

    def shown_j(self, tables: Tables) -> float:
        """What whoever reads the energy counter sees."""
        fresh = self.at_s < tables.tick_origin_s + self.ticks * tables.tick_period_s + tables.tick_lag_s
        return self.counter_j - self.tick_j if fresh else self.counter_j

    def advance(self, tables: Tables, to_s: float) -> None:
        """Move on to `to_s`. A time in the past changes nothing (another process was here first)."""
        while True:
            while self.pending and self.pending[0][0] <= self.at_s:
                self.clock_mhz = self.pending.pop(0)[1]
            if self.at_s >= to_s:
                return
            end_s = min(to_s, self.pending[0][0]) if self.pending else to_s
            asked = self._asked_index(tables, self.clock_mhz)
            beyond_w = self._power_at_w(tables, asked) - self.limit_w
            index = asked if self.spare_j > 0.0 else self._held_index(tables, asked)
            exhausts = False
            if beyond_w > 0.0 and self.spare_j > 0.0:
                exhausted_s = self.at_s + self.spare_j / beyond_w
                exhausts = exhausted_s <= end_s
                end_s = max(self.at_s, exhausted_s) if exhausts else end_s
            finishes = False
            if self.work_s > 0.0:
                pace = self.time_per_work(tables, index)
                completes_s = self.at_s + (self.work_s - self.done_s) * pace
                finishes = completes_s <= end_s
                exhausts = exhausts and not completes_s < end_s
                end_s = max(self.at_s, completes_s) if finishes else end_s
                self.done_s += (end_s - self.at_s) / pace
            self._integrate(tables, end_s, self._power_at_w(tables, index))
            if tables.clocks_mhz[index] < self.clock_mhz:
                self.capped_s += end_s - self.at_s
            if exhausts:
                self.spare_j = 0.0
            elif tables.burst_j > 0.0 and (beyond_w < 0.0 or self.spare_j > 0.0):
                self.spare_j = min(tables.burst_j, max(0.0, self.spare_j - beyond_w * (end_s - self.at_s)))
            self.at_s = end_s
            if finishes:
                self.end_work(tables)

    def completes_s(self, tables: Tables) -> float:
        """When the running work will be done if nobody changes anything. At `at_s` if none runs."""
        if self.work_s <= 0.0:
            return self.at_s
        ahead = replace(self, pending=list(self.pending))
        # Work takes at most its longest stretch from its last change on.
        longest_s = self.work_s * max(tables.stretch[self.load]) * self.slowdown[self.load]
        ahead.advance(tables, max([self.at_s, *(at_s for at_s, _ in self.pending)]) + 2.0 * longest_s)
        return ahead.finished_s

    def begin_work(self, tables: Tables, load: int, work_s: float, dynamic_w: float, backdated_s: float) -> None:
        """Start work of `work_s` full-clock seconds, `backdated_s` before `at_s`, in place of any other."""
        before_w = self.power_w(tables)
        self.load, self.dynamic_w, self.work_s = load, dynamic_w, work_s
        self.work_id += 1
        self.started_s, self.finished_s = self.at_s - backdated_s, 0.0
        self.done_s = min(work_s, backdated_s / self.time_per_work(tables, self.effective_index(tables)))
        correction_j = (self.power_w(tables) - before_w) * backdated_s
        self.spare_j = max(0.0, self.spare_j - max(0.0, self.power_w(tables) - self.limit_w) * backdated_s)
        self.energy_j += correction_j
        self.window_j += correction_j
        if self.done_s >= work_s:
            self.end_work(tables)

    def end_work(self, tables: Tables) -> None:
        """The running work is done (or given up) at `at_s`: from here on the GPU waits."""
        self.finished_s = self.at_s
        self.work_s = self.done_s = 0.0
        self.load, self.dynamic_w = WAITING, tables.dynamic_w[WAITING]

    def change_clock(self, mhz: int, locked_mhz: int, takes_effect_s: float) -> None:
        """Let the clock become `mhz` at `takes_effect_s`, or with the change before it if that is later."""
        if len(self.pending) >= MAX_PENDING:
            self.pending.pop()
        if self.pending:
            takes_effect_s = max(takes_effect_s, self.pending[-1][0])
        self.pending.append((takes_effect_s, mhz))
        self.locked_mhz = locked_mhz

    def switch_s(self, tables: Tables, mhz: int) -> float:
        """How long a change to `mhz` takes beyond the least one, from the clock asked for last."""
        before_mhz = self.pending[-1][1] if self.pending else self.clock_mhz
        index = tables.index_at_most(mhz)
        return tables.rise_s[index] if mhz > before_mhz else tables.drop_s[index]

    def draw(self) -> float:
        """A pseudo-random number in [0, 1) (xorshift64), the same sequence whoever draws."""
        x = self.random
        x ^= (x << 13) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 7
        x ^= (x << 17) & 0xFFFFFFFFFFFFFFFF
        self.random = x
        return (x >> 11) / float(1 << 53)

    def _asked_index(self, tables: Tables, clock_mhz: int) -> int:
        return tables.index_at_most(min(clock_mhz, self.cap_mhz) if self.cap_mhz else clock_mhz)

    def _held_index(self, tables: Tables, asked: int) -> int:
        """The clock under the power limit: the highest one, at most the one asked for, at which the load keeps it."""
        for index in range(asked, len(tables.clocks_mhz)):
            if self._power_at_w(tables, index) <= self.limit_w:
                return index
        return len(tables.clocks_mhz) - 1

    def _power_at_w(self, tables: Tables, index: int) -> float:
        return self.static_w + self.dynamic_w * tables.relative_power[self.load][index]

    def _integrate(self, tables: Tables, end_s: float, power_w: float) -> None:
        """Add constant `power_w` from `at_s` to `end_s` to the energy and to the counter."""
        self.energy_j += power_w * (end_s - self.at_s)
        period, window = tables.tick_period_s, tables.tick_window_s
        scale = period / window
        at_s = self.at_s
        boundary = tables.tick_origin_s + (self.ticks + 1) * period
        if end_s >= boundary:
            self.window_j += power_w * max(0.0, boundary - max(at_s, boundary - window))
            self.tick_j = self.window_j * scale
            self.counter_j += self.tick_j
            self.window_j = 0.0
            self.ticks += 1
            at_s = boundary
            whole = int((end_s - at_s) / period)
            if whole > 0:
                self.tick_j = power_w * period
            self.counter_j += whole * power_w * period
            self.ticks += whole
            at_s += whole * period
            boundary = tables.tick_origin_s + (self.ticks + 1) * period
        self.window_j += power_w * max(0.0, end_s - max(at_s, boundary - window))
