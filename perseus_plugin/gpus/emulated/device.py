"""The emulated GPU as a `Gpu`, and what tests and the execution of emulated work do to it beyond that."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from perseus_plugin.errors import GpuError, os_problem
from perseus_plugin.files import open_file, write_atomically
from perseus_plugin.gpus.base import EnergyReading, GpuBackend, GpuLostError, GpuPermissionError
from perseus_plugin.gpus.emulated.dynamics import Dynamics, Tables
from perseus_plugin.gpus.emulated.physics import A100, LOAD_CLASSES, GpuModel, load_class
from perseus_plugin.gpus.emulated.state import (
    GPU_LOST,
    HEADER,
    IGNORE_LOCKS,
    NO_COUNTER,
    NO_PERMISSION,
    NOT_SUPPORTED,
    SETTINGS_OFFSET,
    ClockEvent,
    StateFile,
    initial_bytes,
)

DEFAULT_JITTER_S = 0.001


class EmulatedGpu:
    """An emulated GPU, opened from its state file. Implements `perseus_plugin.gpus.base.Gpu`.

    Args:
        path: the state file (`create` makes one).
        now: the clock; tests put a virtual one in its place.
        sleep: what a slow driver call (setting `call_s`) sleeps with.

    Raises:
        GpuError: on construction, for a file that is no emulated GPU of this version and boot.
    """

    emulated = True
    driver = ""

    def __init__(
        self,
        path: Path | str,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._now = now
        self._sleep = sleep
        self.state = StateFile(path)
        self.name = self.state.name
        self.uuid = self.state.uuid

    @classmethod
    def create(
        cls,
        path: Path | str,
        model: GpuModel = A100,
        uuid: str | None = None,
        *,
        power_limit_w: float | None = None,
        switch_latency_s: float | None = None,
        switch_jitter_s: float = DEFAULT_JITTER_S,
        tick_period_s: float | None = None,
        tick_window_s: float | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> EmulatedGpu:
        """Make the state file of a GPU unless it is there already with this description, and open it.

        A file of another description, version or boot is replaced; who has it open keeps the old one.

        Args:
            model: what it behaves like.
            uuid: default: derived from the path.
            power_limit_w: the power limit it begins with (default: the model's).
            switch_latency_s, switch_jitter_s: a clock change takes effect after `latency +
                uniform(0, jitter)`, whatever the clock (default: the model's, by clock).
            tick_period_s, tick_window_s: how often the energy counter moves (default: the model's), and how much of
                that it sees (default: all).

        Raises:
            GpuError: the file cannot be written, or a value is out of range.
        """
        path = Path(path).absolute()
        own_s = [model.switch_times_s(clock) for clock in model.clocks_mhz()]
        if switch_latency_s is None:
            switch_latency_s = min(min(times_s) for times_s in own_s)
        else:
            own_s = [(switch_latency_s, switch_latency_s)] * len(own_s)
        if tick_period_s is None:
            tick_period_s = model.tick_period_s
        window_s = tick_period_s if tick_window_s is None else tick_window_s
        if not (tick_period_s > 0 and 0 < window_s <= tick_period_s):
            raise GpuError(
                f"emulated GPU: tick period {tick_period_s} s and window {window_s} s; allowed: 0 < window <= period"
            )
        if switch_latency_s < 0 or switch_jitter_s < 0:
            raise GpuError(
                f"emulated GPU: switch latency {switch_latency_s} s and jitter {switch_jitter_s} s; allowed: from 0"
            )
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()
        tables = replace(
            model_tables(model, tick_period_s, window_s, tick_period_s * int(digest[:4], 16) / 65536),
            rise_s=[rise_s - switch_latency_s for rise_s, _ in own_s],
            drop_s=[drop_s - switch_latency_s for _, drop_s in own_s],
        )
        if power_limit_w is not None:
            tables = replace(tables, limit_w=_checked_limit_w(power_limit_w, tables))
        now_s = now()
        dynamics = Dynamics(
            at_s=now_s,
            clock_mhz=model.max_clock_mhz,
            static_w=model.static_w,
            dynamic_w=model.waiting.dynamic_w,
            ticks=int((now_s - tables.tick_origin_s) / tick_period_s),
            limit_w=tables.limit_w,
            spare_j=model.burst_j,
        )
        settings = {
            "latency_s": switch_latency_s,
            "jitter_s": switch_jitter_s,
            "set_call_s": model.set_call_s,
            "energy_call_s": model.energy_call_s,
        }
        uuid = uuid or f"EMULATED-{digest[:8]}-{digest[8:12]}-{digest[12:24]}"
        content = initial_bytes(uuid, model.name, tables, dynamics, settings)
        try:
            _place(path, bytes(content))
        except OSError as error:
            raise GpuError(f"{path}: cannot make the emulated GPU: {os_problem(error)}") from error
        return cls(path, now=now, sleep=sleep)

    # What every Gpu has.

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, falling."""
        return self.state.tables.clocks_mhz

    def lock_clock(self, frequency_mhz: int) -> None:
        """Ask for `frequency_mhz`; it takes effect after the switch latency.

        Raises:
            GpuError: a clock that is not supported, or an injected fault.
        """
        self._change_clock(frequency_mhz)

    def reset_clock(self) -> None:
        """Give up the lock: back to the highest clock after the switch latency."""
        self._change_clock(None)

    def read_clock_mhz(self) -> int:
        """The SM clock the GPU runs at now."""
        return self._current().effective_mhz(self.state.tables)

    def read_energy(self) -> EnergyReading:
        """The energy counter as of its last tick.

        Raises:
            GpuError: it has none, as an injected fault.
        """
        if int(self.state.setting("faults")) & NO_COUNTER:
            raise GpuError(f"{self.name}: it has no energy counter")
        current = self._current("energy_call_s")
        return EnergyReading(current.at_s, current.shown_j(self.tables), current.capped_s)

    def read_power_w(self) -> float:
        """Its power now, by its model."""
        return self._current().power_w(self.tables)

    def lock_mhz(self) -> int | None:
        """The lock requested last, 0 for none."""
        return self.state.snapshot().locked_mhz

    def power_limit_w(self) -> float:
        """The most that it may be set to draw: the limit it is delivered with, or else what its model draws."""
        return self.tables.most_w

    def enforced_limit_w(self) -> float:
        """The power limit in force."""
        return min(self.state.snapshot().limit_w, self.tables.most_w)

    def close(self) -> None:
        """Close the state file; does not reset the clock."""
        self.state.close()

    # What only an emulated GPU has.

    @property
    def tables(self) -> Tables:
        """Its unchanging tables."""
        return self.state.tables

    @contextmanager
    def changing(self) -> Iterator[Dynamics]:
        """Its state, advanced to now, under the lock of its file; what the block changes is written back."""
        with self.state.update() as dynamics:
            dynamics.advance(self.state.tables, self._now())
            yield dynamics

    def peek(self) -> Dynamics:
        """Its state as of now (a copy)."""
        dynamics = self.state.snapshot()
        dynamics.advance(self.state.tables, self._now())
        return dynamics

    def exact_energy_j(self) -> float:
        """The true energy integral, which no real counter shows."""
        return self.peek().energy_j

    def locked_mhz(self) -> int | None:
        """The lock requested last, whether in effect already or not (None: none)."""
        return self.lock_mhz() or None

    def events(self) -> list[ClockEvent]:
        """Lock and reset calls, oldest first (the last 4,096)."""
        return self.state.events()

    def switch_latency_s(self) -> float:
        """The least time a clock change takes to take effect."""
        return self.state.setting("latency_s")

    def set_slowdown(self, factor: float, kind: str | None = None) -> None:
        """Inject a straggler: work of `kind` (None: all) takes `factor` times as long from now on."""
        if not factor > 0:
            raise GpuError(f"emulated GPU: slowdown {factor}; allowed: above 0")
        with self.changing() as dynamics:
            for load in range(LOAD_CLASSES) if kind is None else (load_class(kind),):
                dynamics.slowdown[load] = factor

    def set_cap(self, mhz: int | None) -> None:
        """Throttle: from now on the GPU runs at most at `mhz`, whatever is asked for (None: no cap)."""
        with self.changing() as dynamics:
            dynamics.cap_mhz = mhz or 0

    def set_power_limit(self, watts: float) -> None:
        """Set the power limit, as a driver does; it holds from now on.

        Raises:
            GpuError: no limit that the card may be set to.
        """
        limit_w = _checked_limit_w(watts, self.tables)
        with self.changing() as dynamics:
            dynamics.limit_w = limit_w

    def set_faults(self, faults: int, *, call_s: float = 0.0) -> None:
        """Inject faults (bits of `state`), and let every driver call take `call_s`."""
        self.state.set_setting("faults", float(faults))
        self.state.set_setting("call_s", call_s)

    def _change_clock(self, mhz: int | None) -> None:
        if mhz is not None and mhz not in self.tables.clocks_mhz:
            clocks = self.tables.clocks_mhz
            nearest = min(clocks, key=lambda clock: abs(clock - mhz))
            raise GpuError(f"{self.name}: clock {mhz} MHz is not supported; the nearest one is {nearest} MHz")
        faults = self._driver_call("set_call_s")
        refusal = self._refusal(faults)
        with self.changing() as dynamics:
            self.state.log(dynamics, dynamics.at_s, mhz or 0, refusal is not None)
            if refusal is None:
                state = self.state
                honoured = mhz is None or not faults & IGNORE_LOCKS
                target = mhz if mhz is not None and honoured else self.tables.clocks_mhz[0]
                takes_effect_s = dynamics.at_s + state.setting("latency_s")
                takes_effect_s += dynamics.switch_s(self.tables, target) + state.setting("jitter_s") * dynamics.draw()
                dynamics.change_clock(target, mhz or 0, takes_effect_s)
                dynamics.advance(self.tables, dynamics.at_s)
        if refusal is not None:
            raise refusal

    def _current(self, own_time: str = "") -> Dynamics:
        if self._driver_call(own_time) & GPU_LOST:
            raise GpuLostError(f"{self.name}: the GPU is lost")
        return self.peek()

    def _driver_call(self, own_time: str = "") -> int:
        call_s = self.state.setting("call_s") + (self.state.setting(own_time) if own_time else 0.0)
        if call_s > 0:
            self._sleep(call_s)
        return int(self.state.setting("faults"))

    def _refusal(self, faults: int) -> GpuError | None:
        if faults & GPU_LOST:
            return GpuLostError(f"{self.name}: the GPU is lost")
        if faults & NO_PERMISSION:
            return GpuPermissionError(f"{self.name}: no permission to set clocks")
        if faults & NOT_SUPPORTED:
            return GpuError(f"{self.name}: setting clocks is not supported")
        return None


class EmulatedBackend(GpuBackend):
    """Emulated GPUs by their state files."""

    devices = ("cpu",)
    form = "PATH"
    emulated = True

    def open(self, rest: str) -> EmulatedGpu:
        """By its path."""
        return EmulatedGpu(rest)

    def lock_file(self, rest: str) -> Path:
        """Beside the state file: whoever sees the GPU sees its lock."""
        return Path(rest + ".lock")


def model_tables(model: GpuModel, tick_period_s: float, tick_window_s: float, tick_origin_s: float) -> Tables:
    """A model's curves at its clocks."""
    clocks = model.clocks_mhz()
    loads = range(LOAD_CLASSES)
    return Tables(
        clocks_mhz=clocks,
        stretch=tuple([model.stretch(load, clock) for clock in clocks] for load in loads),
        relative_power=tuple([model.relative_power(load, clock) for clock in clocks] for load in loads),
        dynamic_w=tuple(model.load(load).dynamic_w for load in loads),
        static_w=model.static_w,
        tick_period_s=tick_period_s,
        tick_window_s=tick_window_s,
        tick_origin_s=tick_origin_s,
        tick_lag_s=model.tick_lag_s,
        rise_s=[0.0] * len(clocks),
        drop_s=[0.0] * len(clocks),
        most_w=model.most_w,
        limit_w=model.limit_w,
        burst_j=model.burst_j,
    )


def _checked_limit_w(watts: float, tables: Tables) -> float:
    if not tables.static_w < watts <= tables.most_w:
        raise GpuError(
            f"emulated GPU: power limit {watts:g} W; allowed: above {tables.static_w:g} W, at most {tables.most_w:g} W"
        )
    return watts


def _place(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole, unless a file with the same description is there."""
    described = SETTINGS_OFFSET + 32  # header, switch latency and jitter, how long calls take
    with suppress(FileNotFoundError), os.fdopen(open_file(path, os.O_RDONLY, regular=True), "rb") as file:
        if file.read(described) == content[:described] and os.fstat(file.fileno()).st_size == len(content):
            return
    write_atomically(path, content, make=True)


assert HEADER.size <= SETTINGS_OFFSET
