"""A simulated GPU under pipeline training with an energy counter like those of real GPUs.

`simulate` makes the `ClockRun`s that a rank would observe, and the truth behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perseus_plugin.profiling.observations import Activity, ClockRun, Tick

Array = NDArray[np.float64]

CLOCKS_MHZ = (705, 810, 900, 1005, 1095, 1200, 1290, 1350, 1410)


@dataclass(frozen=True)
class Counter:
    """How the energy counter works.

    Attributes:
        period_s: time between ticks. window_s: the part of it that is sampled. lag_s: sampling to tick.
        jitter_s: standard deviation of each tick's time. noise: relative error of each sample.
        poll_s: mean time between polls (they vary by half of it).
    """

    period_s: float
    window_s: float
    lag_s: float = 0.0
    jitter_s: float = 0.0
    noise: float = 0.0
    poll_s: float = 0.002


EXACT = Counter(0.020, 0.020)
V100 = Counter(0.020, 0.020, lag_s=0.004, jitter_s=0.0003, noise=0.005)
A100 = Counter(0.100, 0.100, lag_s=0.015, jitter_s=0.001, noise=0.003)
H100 = Counter(0.100, 0.025, lag_s=0.010, jitter_s=0.001, noise=0.003)


@dataclass(frozen=True)
class Work:
    """One kind of instruction: duration at the top clock, share of it that scales with the clock, power at the top."""

    time_s: float
    compute_share: float
    power_w: float

    def duration_s(self, clock_mhz: int, top_mhz: int) -> float:
        """Mean duration at a clock."""
        return self.time_s * (self.compute_share * top_mhz / clock_mhz + 1 - self.compute_share)

    def watts(self, clock_mhz: int, top_mhz: int) -> float:
        """Mean power at a clock: static plus dynamic, with a voltage that is flat and then rises."""
        return 90 + (self.power_w - 90) * _dynamic(clock_mhz) / _dynamic(top_mhz)


def _dynamic(clock_mhz: int) -> float:
    volts = 0.75 + 0.25 * max(0.0, (clock_mhz - 1000) / 410) ** 1.3
    return clock_mhz * volts**2


@dataclass(frozen=True)
class Job:
    """One stage of a 1F1B pipeline on one GPU.

    Attributes:
        work: per kind. waiting_w: blocking power at the top clock; waiting_slope: its relative loss down to 0 MHz.
        jitter_s: standard deviation of an execution's duration. timing_s: error of each recorded start and end.
        power_spread: relative standard deviation of each execution's power. drift: relative rise of all power
            over the sweep.
        ramp: power is lower by this share in the first half of an execution and higher in the second. dip: for the
            first 5 ms of an execution power is that of waiting; its mean over the execution stays.
        iterations: per run.
    """

    work: Mapping[str, Work]
    stages: int = 4
    stage: int = 1
    microbatches: int = 8
    waiting_w: float = 100.0
    waiting_slope: float = 0.1
    jitter_s: float = 0.0005
    timing_s: float = 0.00003
    power_spread: float = 0.01
    drift: float = 0.0
    ramp: float = 0.0
    dip: bool = False
    iterations: int = 10
    gap_s: float = 0.015


def two_kinds(forward_s: float, **options: float) -> Job:
    """A job with a forward of that duration and a backward of twice that."""
    work = {"forward": Work(forward_s, 0.75, 330.0), "backward": Work(2 * forward_s, 0.65, 370.0)}
    return Job(work, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Truth:
    """What was simulated: mean time and energy per (kind, clock), and blocking power by clock."""

    time_s: dict[tuple[str, int], float] = field(default_factory=dict)
    energy_j: dict[tuple[str, int], float] = field(default_factory=dict)
    waiting_w: dict[int, float] = field(default_factory=dict)

    @property
    def blocking_w(self) -> float:
        """The mean over clocks."""
        return float(np.mean(list(self.waiting_w.values())))


def simulate(
    job: Job, counter: Counter, seed: int, clocks: Sequence[int] = CLOCKS_MHZ, revisits: int = 2
) -> tuple[list[ClockRun], Truth]:
    """Runs at every clock in random order, the top clock first and `revisits` times more, the last time at the end."""
    rng = np.random.default_rng(seed)
    top = max(clocks)
    rest = [c for c in clocks if c != top]
    order = [top, *(int(c) for c in rng.permutation(rest))]
    for i in range(revisits):
        order.insert(round((i + 1) * len(rest) / revisits) + 1 + i, top)
    start_s = float(rng.uniform(0, 1000))
    total = len(order)
    runs = []
    for i, clock in enumerate(order):
        level = 1 + job.drift * (i - (total - 1)) / max(total - 1, 1)
        run = _run(job, counter, clock, top, start_s, level, rng, i * (job.iterations + 1))
        runs.append(run)
        start_s = run.end_s + float(rng.uniform(0.3, 0.6))
    truth = Truth(
        {(k, c): w.duration_s(c, top) for k, w in job.work.items() for c in clocks},
        {(k, c): w.duration_s(c, top) * w.watts(c, top) for k, w in job.work.items() for c in clocks},
        {c: _waiting_w(job, c, top) for c in clocks},
    )
    return runs, truth


def _waiting_w(job: Job, clock: int, top: int) -> float:
    return job.waiting_w * (1 - job.waiting_slope * (1 - _dynamic(clock) / _dynamic(top)))


def _run(
    job: Job,
    counter: Counter,
    clock: int,
    top: int,
    begin_s: float,
    level: float,
    rng: np.random.Generator,
    first: int,
) -> ClockRun:
    spans: list[tuple[str, float, float]] = []
    now_s = begin_s
    steps = []
    for i in range(job.iterations):
        iteration, now_s = _iteration(job, clock, top, now_s, rng)
        spans += iteration
        steps.append((first + i, now_s))
    edges, power = [begin_s - 1.0], [_waiting_w(job, clock, top) * level]
    for kind, start_s, end_s in spans:
        watts = job.work[kind].watts(clock, top) * level * (1 + job.power_spread * rng.standard_normal())
        waiting_w = _waiting_w(job, clock, top) * level
        first_s = 0.005 if job.dip else (end_s - start_s) / 2
        first_w = waiting_w if job.dip else watts * (1 - job.ramp)
        rest_w = (watts * (end_s - start_s) - first_w * first_s) / (end_s - start_s - first_s)
        edges += [start_s, start_s + first_s, end_s]
        power += [first_w, rest_w, waiting_w]
    edges.append(now_s + 1.0)
    ticks = _ticks(counter, np.array(edges), np.array(power), begin_s, now_s, rng)

    def seen(time_s: float) -> float:
        return time_s + job.timing_s * float(rng.standard_normal())

    activities = tuple(Activity(kind, seen(start_s), seen(end_s)) for kind, start_s, end_s in spans)
    return ClockRun(clock, begin_s, now_s, activities, ticks, steps=tuple(steps))


def _iteration(
    job: Job, clock: int, top: int, begin_s: float, rng: np.random.Generator
) -> tuple[list[tuple[str, float, float]], float]:
    """One iteration of 1F1B over all stages; the spans of `job.stage`."""
    done: dict[tuple[int, str, int], float] = {}
    streams = []
    for s in range(job.stages):
        warm = min(job.stages - 1 - s, job.microbatches)
        order = [("forward", m) for m in range(warm)]
        for m in range(job.microbatches - warm):
            order += [("forward", m + warm), ("backward", m)]
        order += [("backward", m) for m in range(job.microbatches - warm, job.microbatches)]
        streams.append(order)
    free, places = [begin_s] * job.stages, [0] * job.stages
    spans = []
    while any(p < len(o) for p, o in zip(places, streams, strict=True)):
        for s in range(job.stages):
            while places[s] < len(streams[s]):
                kind, m = streams[s][places[s]]
                need = (s - 1, kind, m) if kind == "forward" else (s + 1, kind, m)
                if 0 <= need[0] < job.stages and need not in done:
                    break
                start = max(free[s], done.get(need, begin_s))
                mean = job.work[kind].duration_s(clock, top)
                end = start + max(mean + job.jitter_s * float(rng.standard_normal()), 0.1 * mean)
                done[s, kind, m] = free[s] = end
                places[s] += 1
                if s == job.stage:
                    spans.append((kind, start, end))
    return spans, max(free) + job.gap_s


def _ticks(
    counter: Counter, edges: Array, power: Array, begin_s: float, end_s: float, rng: np.random.Generator
) -> tuple[Tick, ...]:
    """The counter's values at its ticks, as a poller sees them. Power is piecewise constant between `edges`."""
    energy = np.concatenate([[0.0], np.cumsum(np.diff(edges) * power)])

    def until(times: Array) -> Array:
        return np.interp(times, edges, energy)

    first_s = begin_s - float(rng.uniform(0, counter.period_s))
    grid = np.arange(first_s, end_s + counter.period_s, counter.period_s)
    times = grid + counter.jitter_s * rng.standard_normal(len(grid))
    ends = times - counter.lag_s
    if counter.window_s >= counter.period_s:
        added = np.diff(until(ends))
    else:
        sampled = (until(ends) - until(ends - counter.window_s)) / counter.window_s
        added = sampled[1:] * np.diff(times)
    added = added * (1 + counter.noise * rng.standard_normal(len(added)))
    values = np.round(5e4 + np.concatenate([[0.0], np.cumsum(added)]), 3)
    polls = begin_s + np.cumsum(counter.poll_s * rng.uniform(0.5, 1.5, int(2.2 * (end_s - begin_s) / counter.poll_s)))
    polls = polls[polls < end_s]
    shown = values[np.searchsorted(times, polls, side="right") - 1]
    changes = np.flatnonzero(np.diff(shown)) + 1
    return tuple(Tick(float(polls[i - 1]), float(polls[i]), float(shown[i])) for i in changes)
