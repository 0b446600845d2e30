"""The protocol every GPU backend implements, and how one is named across a process boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from perseus_plugin.errors import GpuError


class GpuPermissionError(GpuError):
    """This process may not do that to the GPU; the message says how to be allowed to."""


class GpuLostError(GpuError):
    """The GPU no longer answers (fell off the bus, or its daemon is gone)."""


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """One reading of a GPU's energy counter.

    Attributes:
        time_s: `time.monotonic()` when it was read (the system-wide clock, comparable between processes).
        energy_j: the counter's value; it moves in ticks, so two readings may be equal.
        capped_s: how long in all the GPU has run below the clock asked for because of its power limit (NaN:
            the GPU does not tell).
    """

    time_s: float
    energy_j: float
    capped_s: float = math.nan


class Gpu(Protocol):
    """One GPU whose SM clock can be read and locked. Every method may raise `GpuError`.

    Attributes:
        name: for people, e.g. `"NVIDIA H100 80GB HBM3"` or `"emulated A100-SXM4-80GB"`.
        uuid: unique and stable over processes; two jobs on one GPU see the same.
        emulated: whether its numbers are a model's and not a GPU's.
        driver: version of the driver, empty if there is none.
    """

    name: str
    uuid: str
    emulated: bool
    driver: str

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, falling."""
        ...

    def lock_clock(self, frequency_mhz: int) -> None:
        """Ask the driver to run at `frequency_mhz`; returns before it takes effect."""
        ...

    def reset_clock(self) -> None:
        """Give up the lock: the GPU runs as if it had never been locked. Idempotent."""
        ...

    def read_clock_mhz(self) -> int:
        """The SM clock the GPU runs at now, whoever set it."""
        ...

    def read_energy(self) -> EnergyReading:
        """The energy counter."""
        ...

    def lock_mhz(self) -> int | None:
        """The lock that is there, whoever made it; 0 for none, None where the driver does not tell. Never raises."""
        ...

    def power_limit_w(self) -> float:
        """The most that the card may be set to draw, in watts; NaN where the GPU does not tell. Never raises."""
        ...

    def close(self) -> None:
        """Release the handle; does not reset the clock."""
        ...
