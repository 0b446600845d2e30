"""`verify.json`: what `perseus verify` measured. One model, from which the file is written, read, printed and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perseus_plugin.errors import ReportError
from perseus_plugin.files import read_model
from perseus_plugin.reporting.record.summary import Figure

_TIMED_WITHIN_US = 1000.0  # 95 % of the times; a clock change takes some of that, or a multiple
_WITHIN_PERCENT = 95.0  # of the places in a graph

GRAPHS = "replays of a CUDA graph"
"""Their name among what was not measured."""


def _told(meaning: str, default: Any = ...) -> Any:
    return Field(default=default, description=meaning)


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True, populate_by_name=True)


class Spread(_Section):
    """How a figure is spread over its samples."""

    median: float = _told("of the samples")
    p95: float = _told("95 % are at most this")
    highest: float = _told("of all")
    samples: int = _told("how many")


class Machine(_Section):
    """What was looked at."""

    gpu: str = _told("name of the GPU")
    emulated: bool = _told("whether the figures are a model's and not a GPU's")
    backend: str = _told("where the work ran")
    driver: str = _told("of the GPU; empty: none")
    software: dict[str, str] = _told("versions")
    cpus: int = _told("that this process may use")
    clocks_mhz: tuple[int, int] = _told("lowest and highest SM clock that can be locked")
    clock_count: int = _told("how many there are")
    power_limit_w: Figure = _told("the most that the card may be set to draw", None)


class Boundaries(_Section):
    """When an instruction is taken to begin or end, against when the GPU got there (microseconds)."""

    error_us: Spread = _told("size of the error of the time")
    bias_us: float = _told("mean error; positive: the time is too late")
    late_us: Spread = _told("from the boundary to the moment at which something is done about it, Python idle")
    late_busy_us: Spread = _told("the same while the training thread computes in Python, by the boundary's own time")
    late_queueing_us: Spread = _told("the same while the training thread queues kernels")
    reference_us: float = _told("how late the reference itself wakes up at most")
    drift_ppm: Figure = _told("by how much the GPU's event clock runs faster than the host's", None)


class Hooks(_Section):
    """What the hooks' two boundaries per instruction cost."""

    call_us: Spread = _told("time in both calls on the training thread")
    host_bound_us: float = _told("what an instruction takes more where the CPU is the bottleneck")
    gpu_bound_us: float = _told("what an instruction takes more where the GPU is")
    gpu_bound_se_us: float = _told("its standard error")
    instruction_ms: float = _told("length of the instruction there")
    share_percent: float = _told("the calls' median as a share of the instruction")


class Counter(_Section):
    """The energy counter."""

    period_ms: Figure = _told("median time between two changes; null: it did not move")
    period_p95_ms: Figure = _told("95 % of the times between two changes are at most this")
    ticks: int = _told("changes seen")
    window_ms: Figure = _told("length of the stretch of time that one change measures, as fitted")
    lag_ms: Figure = _told("from the end of that stretch to the change, as fitted")
    power_period_ms: Figure = _told("median time between two changes of the instantaneous power reading", None)


class KindOfWork(_Section):
    """One kind of work: its energy as the estimator finds it in a pipeline's pattern, and from long steady runs."""

    kind: str = _told("which")
    time_ms: float = _told("mean duration in the pattern")
    steady_time_ms: float = _told("mean duration in the steady runs")
    estimated_j: Figure = _told("energy of one execution by the estimator")
    estimated_se_j: Figure = _told("its standard error")
    estimated_w: Figure = _told("power by the estimator")
    steady_w: Figure = _told("power in the steady runs")
    power_error_percent: Figure = _told("estimated power against steady power")
    error_percent: Figure = _told("estimated energy against steady power times the duration in the steady runs")
    clock_mhz: Figure = _told("mean SM clock in the pattern's blocks, waits among them")
    steady_clock_mhz: Figure = _told("mean SM clock in the steady runs")
    capped_percent: Figure = _told("share of the steady runs' time at the power limit")


class Estimator(_Section):
    """The estimator of the profiling sweep against long steady runs."""

    kinds: tuple[KindOfWork, ...] = _told("instructions")
    waiting_w: Figure = _told("waiting power by the estimator")
    waiting_se_w: Figure = _told("its standard error")
    steady_waiting_w: Figure = _told("waiting power in long waits of the same kind")
    iterations: int = _told("of the pattern")
    executions: int = _told("of instructions in the pattern")
    seconds: float = _told("length of the pattern's blocks together")
    waiting_percent: float = _told("share of waiting in the pattern")
    unresolved: tuple[str, ...] = _told("what the estimator says that it does not know well enough")


class Waiting(_Section):
    """What the GPU draws in one way of waiting, without a lock on its clock."""

    how: str = _told("in which way it waited")
    power_w: Figure = _told("mean power")
    clock_mhz: Figure = _told("mean SM clock")
    seconds: float = _told("how long it was watched")


class Switch(_Section):
    """How long one change of the clock takes to be read back, from the call to the driver."""

    from_mhz: int = _told("before")
    to_mhz: int = _told("after")
    latency_ms: Spread | None = _told("of those that were seen; null: none was", None)
    unseen: int = _told("changes that were never read back")


class WaitingAtClock(_Section):
    """What the GPU draws while it waits at a locked clock."""

    clock_mhz: int = _told("that was asked for")
    read_mhz: Figure = _told("mean of what was read")
    power_w: Figure = _told("mean power, waiting as in the pattern")
    idle_w: Figure = _told("mean power without any work")


class GraphReplays(_Section):
    """A step captured as one CUDA graph and replayed, while nothing but the host's time says where the GPU is in it."""

    replays: int = _told("how many")
    marks: int = _told("places in the graph whose time was seen in each of them")
    replay_ms: Spread = _told("from its launch to its end, on the GPU")
    jitter_percent: float = _told("standard deviation of that, as a share of its median")
    call_us: Spread = _told("time in the call that launches a replay")
    begin_us: Spread = _told("from that call until the host sees that the graph runs")
    seen_us: Spread = _told("from the end of the graph until the host sees it: how well the figures below are known")
    where_us: Spread = _told("size of the error of the time of a place, by the time of the replays before")
    within_percent: float = _told("share of the places passed within what clocks by host time allow for")
    read_percent: float = _told("what a replay takes more while another process reads the GPU, as a share")
    read_se_percent: float = _told("its standard error")


class Verification(_Section):
    """The whole of verify.json."""

    schema_name: Literal["perseus-verify"] = Field(default="perseus-verify", alias="schema", description="what this is")
    version: Literal[1] = _told("of the format", 1)
    perseus_plugin: str = _told("version of this package")
    date: str = _told("when it was measured, UTC")
    seconds: float = _told("how long it took")
    set_clocks: bool = _told("whether clocks were set")
    machine: Machine = _told("what was looked at")
    calls_us: dict[str, Spread] = _told("how long reading takes, under load, by what is read (microseconds)")
    boundaries: Boundaries | None = _told("times of instructions; null: see missing", None)
    hooks: Hooks | None = _told("cost of the hooks; null: see missing", None)
    graphs: GraphReplays | None = _told("replays of a CUDA graph; null: see missing", None)
    counter: Counter | None = _told("the energy counter; null: see missing", None)
    estimator: Estimator | None = _told(
        "the estimator's error, with work below the power limit; null: see missing", None
    )
    at_the_limit: Estimator | None = _told(
        "the same with work that the power limit holds back; null: see missing", None
    )
    waiting: tuple[Waiting, ...] = _told("waiting power at unlocked clocks", ())
    switches: tuple[Switch, ...] = _told("clock changes; empty: see missing", ())
    waiting_at: tuple[WaitingAtClock, ...] = _told("waiting power by clock; empty: see missing", ())
    missing: dict[str, str] = _told("what was not measured, and why", {})

    def why_not_by_time(self, gpu: str) -> str:
        """Why clocks cannot be set by host time on a model of GPU, going by this file; empty if they can.

        They can where clock changes up and down, the times of the GPU's events, and where the GPU is in a replay of a
        CUDA graph by the host's time, are known on that very model.

        Args:
            gpu: name of the model.
        """
        if self.machine.emulated or self.machine.gpu != gpu:
            emulated = "an emulated " if self.machine.emulated else ""
            return f"it was measured on {emulated}{self.machine.gpu}, and this is {gpu}"
        if self.boundaries is None or self.boundaries.error_us.p95 > _TIMED_WITHIN_US:
            return f"it does not show that times of the GPU are known to within {_TIMED_WITHIN_US:g} us (boundaries)"
        ways = {one.to_mhz > one.from_mhz for one in self.switches if one.latency_ms is not None and not one.unseen}
        if ways != {True, False} or any(one.unseen for one in self.switches):
            return "it does not show that clocks change as asked for, up and down (switches): run it with --set-clocks"
        if self.graphs is None or self.graphs.within_percent < _WITHIN_PERCENT:
            why = self.missing.get(GRAPHS, "run it again" if self.graphs is None else "its replays vary too much")
            return f"it does not show that the time since a CUDA graph's launch says where the GPU is (graphs): {why}"
        return ""

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(self.model_dump(by_alias=True, mode="json"), indent=2, allow_nan=False) + "\n"


def load_verification(path: Path) -> Verification:
    """Read a file of `perseus verify`, and nothing but a file.

    Raises:
        ReportError: it cannot be read, or is something else; the message names file, place and value.
    """
    return read_model(path, Verification, ReportError, regular=True)
