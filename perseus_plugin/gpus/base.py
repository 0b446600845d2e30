"""The seam between us and GPUs: what one GPU does (`Gpu`), and what a way to reach GPUs knows (`GpuBackend`).

A backend is one file and one line in `registry.py`, or an entry point of another package; `docs/extending.md` adds one.
`gpus/emulated/` is the one in memory: a model with the same interface, for tests and for machines without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from perseus_plugin.errors import GpuError

DWELL_LATENCIES = 2.0
"""Shortest time between two changes, in switch latencies: below that a GPU is between clocks half of the time."""


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
    """One GPU whose SM clock can be read and locked.

    It is opened by the helper process that owns the clock, by `perseus doctor` and `perseus reset`, and each has one of
    its own: several processes have a GPU open at a time, of which one at most sets its clock. Calls come from one
    thread, one after the other, and each delays the next clock change: it should return within a millisecond or so, and
    wait for nothing but the driver.

    Every method may raise `GpuError` unless it says otherwise; `GpuPermissionError` and `GpuLostError` where it is one
    of these. The message goes to a person as it is, so it names the GPU and the remedy. After an error the next call
    may succeed: whoever calls decides whether to try again.

    A lock outlives the process that made it, as NVML's do: nothing but `reset_clock` gives it up, not `close` either.

    Attributes:
        name: for people, e.g. `"NVIDIA H100 80GB HBM3"` or `"emulated A100-SXM4-80GB"`.
        uuid: unique and stable over processes; two jobs on one GPU see the same. It names the GPU's lock file, so there
            is no slash in it.
        emulated: whether its numbers are a model's and not a GPU's.
        driver: version of the driver, empty if there is none.
    """

    name: str
    uuid: str
    emulated: bool
    driver: str

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, falling, at least one; always the same."""
        ...

    def lock_clock(self, frequency_mhz: int) -> None:
        """Ask the driver to run at `frequency_mhz`, one of the supported clocks; returns before it takes effect."""
        ...

    def reset_clock(self) -> None:
        """Give up the lock, whoever made it: the GPU runs as if it had never been locked. Idempotent."""
        ...

    def read_clock_mhz(self) -> int:
        """The SM clock the GPU runs at now, whoever set it."""
        ...

    def read_energy(self) -> EnergyReading:
        """The energy counter: all that the GPU has drawn since any time that stays the same; it never falls."""
        ...

    def lock_mhz(self) -> int | None:
        """The lock that is there, whoever made it; 0 for none, None where the driver does not tell. Never raises."""
        ...

    def power_limit_w(self) -> float:
        """The most that the card may be set to draw, in watts; NaN where the GPU does not tell. Never raises."""
        ...

    def close(self) -> None:
        """Release the handle; does not reset the clock. Idempotent, never raises."""
        ...


@runtime_checkable
class PowerReader(Protocol):
    """What a `Gpu` may do beside: tell its power at this instant, for `perseus verify`."""

    def read_power_w(self) -> float:
        """Power now, in watts, unsmoothed; NaN where the GPU does not tell."""
        ...


@runtime_checkable
class LimitReader(Protocol):
    """What a `Gpu` may do beside: tell the power limit in force, so that a profile is not used under another one."""

    def enforced_limit_w(self) -> float:
        """The power limit in force now, in watts; NaN where the GPU does not tell. Never raises."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """What a `Gpu` of a kind that can be divided into partitions, which share its clock, tells beside."""

    def mig_enabled(self) -> bool:
        """Whether it is divided.

        Raises:
            GpuLostError: it does not answer any more.
        """
        ...


def enforced_limit_w(gpu: Gpu) -> float:
    """The power limit in force on a GPU; NaN where it does not tell."""
    return gpu.enforced_limit_w() if isinstance(gpu, LimitReader) else math.nan


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """The GPU that a rank works on: its UUID, and its name for people."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class ListedGpu:
    """One GPU of the machine; `uuid` and `model` are empty where it does not tell, for `problem`."""

    index: int
    uuid: str = ""
    model: str = ""
    problem: str = ""


class GpuBackend(Protocol):
    """A way to reach GPUs, made without arguments when it is first asked something.

    Its name is that under which it is registered: the value of `perseus.gpu.backend`, and the beginning of the spec
    `NAME:REST` by which a GPU is named to the helper process. What subclasses of this class leave out does nothing.

    The helper process imports the backend's module, so that imports nothing heavy at its top.

    Attributes:
        devices: types of torch devices (`"cuda"`, `"xpu"`, `"cpu"`, ...) whose work runs on its GPUs.
        maker: whose GPUs they are, for people; empty: the backend's name says it.
        form: what REST looks like, for error messages.
        emulated: whether its GPUs are models, to whose time the work of the CPU is stretched.
    """

    devices: tuple[str, ...] = ("cuda",)
    maker: str = ""
    form: str = "UUID"
    emulated: bool = False

    def open(self, rest: str) -> Gpu:
        """Open a GPU.

        Raises:
            GpuError: it cannot be opened.
            ValueError: `rest` is none of the form.
        """
        ...

    def rest_of(self, uuid: str, socket: str) -> str:
        """What `open` is given for the GPU with this UUID; `socket` is `perseus.gpu.zeusd_socket`."""
        return uuid

    def find(self, device: str) -> FoundGpu | None:
        """The GPU behind a torch device such as `"cuda:1"`, on the training process; None if it is not one of ours."""
        return None

    def listed(self) -> Sequence[ListedGpu]:
        """Every GPU of this machine, for `perseus doctor` and `perseus reset`; also those that do not answer.

        Raises:
            GpuError: there is no driver, or it cannot list them.
        """
        return ()

    def visible(self, listed: Sequence[ListedGpu]) -> Sequence[ListedGpu]:
        """Those of them that a job started here would see.

        Raises:
            ConfigError: that cannot be told; the message says what is allowed.
        """
        return listed

    def lock_file(self, rest: str) -> Path | None:
        """Where the lock file of a GPU is; None: in the machine's folder of them, by its UUID."""
        return None

    def software(self) -> dict[str, str]:
        """What `perseus doctor` shows of it among the software: versions, or why there is none. Never raises."""
        return {}

    def service(self, socket: str) -> str:
        """State of the daemon that it needs, for `perseus doctor`; empty if it needs none. Never raises."""
        return ""
