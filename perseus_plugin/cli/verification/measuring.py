"""What `perseus verify` measures, one thing after the other."""

from __future__ import annotations

import math
import queue
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from perseus_plugin.cli.verification.arithmetic import (
    changes_s,
    extra_s,
    gaps_s,
    kind_of_work,
    spread,
    steady,
)
from perseus_plugin.cli.verification.bench import KINDS, Bench
from perseus_plugin.cli.verification.running import PatternRunner, SteadyRun, Watch, bounded, run_steadily
from perseus_plugin.control.controller import Controller
from perseus_plugin.control.helper.latency import percentile
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu, PowerReader
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Sweep
from perseus_plugin.profiling.collector import SweepCollector
from perseus_plugin.profiling.estimator import estimate_stage
from perseus_plugin.profiling.observations import Tick
from perseus_plugin.reporting.verification import Boundaries, Counter, Estimator, Hooks, Spread, Waiting
from perseus_plugin.session.tap import InstructionTap

_ROUNDS = 3  # of pattern and steady runs in turns, so that a GPU that warms up does not tell them apart
_POWER_S = 1.0  # for how long the instantaneous power is watched
_LONGEST_WAIT_S = 10.0


@dataclass(frozen=True)
class Subject:
    """What is measured on.

    Attributes:
        gpu: for readings, in this process.
        bench: runs work on it.
        watch: reads its counter, in the helper process.
        times_s: about how long an instruction of each kind takes at full clocks.
    """

    gpu: Gpu
    bench: Bench
    watch: Watch
    times_s: Mapping[str, float]


def warm_up(subject: Subject, seconds: float) -> None:
    """Work of both kinds, so that the GPU is as warm as in a job."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for kind in KINDS:
            subject.bench.queue(kind)
    subject.bench.settle()


def measure_calls(subject: Subject, seconds: float) -> dict[str, Spread]:
    """How long a reading takes while the GPU works, and while nobody else reads."""
    gpu, bench = subject.gpu, subject.bench
    subject.watch.pause()
    calls: dict[str, Callable[[], object]] = {
        "energy counter": gpu.read_energy,
        "SM clock": gpu.read_clock_mhz,
    }
    if isinstance(gpu, PowerReader):
        calls["instantaneous power"] = gpu.read_power_w
    taken_s: dict[str, list[float]] = {name: [] for name in calls}
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        bench.queue(FORWARD)
        for name, call in calls.items():
            begin_s = time.perf_counter()
            call()
            taken_s[name].append(time.perf_counter() - begin_s)
    bench.settle()
    subject.watch.go_on()
    return {name: spread(values, 1e6) for name, values in taken_s.items()}


def measure_boundaries(subject: Subject, seconds: float) -> Boundaries:
    """Times of boundaries against the host's clock, and how late what is done at them comes."""
    bench = subject.bench
    reference_s = [max(0.0, -time.monotonic() + bench.done_s()) for _ in range(20)]
    seen: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()
    errors_s = list[float]()
    late_s: dict[str, list[float]] = {"idle": [], "busy": [], "queueing": []}

    def reached(now_s: float) -> None:
        seen.put((now_s, time.monotonic()))

    with bounded(bench) as boundaries:
        for python, values in late_s.items():
            end_s = time.monotonic() + 0.3 * seconds
            while time.monotonic() < end_s or not values:
                bench.queue(FORWARD)
                boundaries.reach(reached)
                if python == "idle":
                    done_s = bench.done_s()
                    now_s, acted_s = seen.get(timeout=_LONGEST_WAIT_S)
                    errors_s.append(now_s - done_s)
                    values.append(acted_s - done_s)
                else:
                    _busy_until(seen, (lambda: sum(range(100))) if python == "busy" else bench.queue_short)
                    now_s, acted_s = seen.get(timeout=_LONGEST_WAIT_S)
                    values.append(acted_s - now_s)
    drift = bench.drift(max(0.1 * seconds, 0.1))
    return Boundaries(
        error_us=spread(errors_s, 1e6),
        bias_us=1e6 * statistics.mean(errors_s),
        late_us=spread(late_s["idle"], 1e6),
        late_busy_us=spread(late_s["busy"], 1e6),
        late_queueing_us=spread(late_s["queueing"], 1e6),
        reference_us=1e6 * statistics.median(reference_s),
        drift_ppm=None if drift is None else 1e6 * drift,
    )


def _busy_until(seen: queue.SimpleQueue[tuple[float, float]], work: Callable[[], object]) -> None:
    """Hold on to the interpreter as the training thread does, until something is seen."""
    end_s = time.monotonic() + _LONGEST_WAIT_S
    while seen.empty() and time.monotonic() < end_s:
        work()


class _NoRequests:
    """Clock requests that go nowhere: nothing here sets a clock."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """Dropped."""


def measure_hooks(subject: Subject, seconds: float) -> Hooks:
    """Blocks of instructions with and without hooks in turns."""
    bench, called_s = subject.bench, list[float]()
    kinds: dict[bool, dict[bool, list[float]]] = {}
    short, long = 200, max(2, round(0.1 / subject.times_s[FORWARD]))
    with bounded(bench) as boundaries:
        controller = Controller(_NoRequests())
        clocks = subject.gpu.supported_clocks_mhz()
        controller.follow([clocks[-1], clocks[0]] * (short // 2), [subject.times_s[FORWARD]] * short)
        errors: list[Exception] = []
        tap = InstructionTap(boundaries, controller, errors.append)

        def block(cpu_bound: bool, hooked: bool) -> float:
            """Seconds per instruction."""
            count = short if cpu_bound else long
            operations = tuple(Compute(FORWARD, microbatch) for microbatch in range(count))
            bench.settle()
            if hooked:
                tap.arm(IterationRecord(0, operations=operations, slots=tuple(range(count))))
            begin_s = time.monotonic()
            for _ in range(count):
                before_s = time.perf_counter()
                tap.begin()
                began_s = time.perf_counter()
                if cpu_bound:
                    bench.queue_short()
                else:
                    bench.queue(FORWARD)
                ending_s = time.perf_counter()
                tap.end()
                if hooked and not cpu_bound:
                    called_s.append(time.perf_counter() - ending_s + began_s - before_s)
            asked_s = time.monotonic()
            done_s = asked_s if cpu_bound else bench.done_s()
            tap.disarm()
            return (done_s - begin_s) / count

        for cpu_bound in (True, False):
            taken = kinds[cpu_bound] = {False: [], True: []}
            end_s = time.monotonic() + seconds / 2
            while time.monotonic() < end_s or len(taken[True]) < 3:
                for hooked in (False, True):
                    taken[hooked].append(block(cpu_bound, hooked))
        bench.settle()
        if errors:
            raise GpuError(f"verify: the hooks failed: {errors[0]}")
    cpu_s, _ = extra_s(kinds[True][False], kinds[True][True])
    gpu_s, gpu_se_s = extra_s(kinds[False][False], kinds[False][True])
    instruction_s = statistics.median(kinds[False][False])
    calls = spread(called_s, 1e6)
    return Hooks(
        call_us=calls,
        host_bound_us=1e6 * cpu_s,
        gpu_bound_us=1e6 * gpu_s,
        gpu_bound_se_us=1e6 * gpu_se_s,
        instruction_ms=1e3 * instruction_s,
        share_percent=100 * 1e-6 * calls.median / instruction_s,
    )


@dataclass(frozen=True)
class Energies:
    """What pattern and steady runs showed of the counter and of the estimator."""

    counter: Counter
    estimator: Estimator


def measure_energies(subject: Subject, seconds: float) -> Energies:
    """The sweep's pattern and steady runs of its parts in turns: what the estimator says against what these show.

    Raises:
        GpuError: the counter told too little.
    """
    bench, watch = subject.bench, subject.watch
    top_mhz = subject.gpu.supported_clocks_mhz()[0]
    collector = SweepCollector(top_mhz)
    first = len(watch.ticks())
    runs: dict[str | None, list[SteadyRun]] = {kind: [] for kind in (*KINDS, None)}
    blocks: list[tuple[float, float]] = []
    iterations = 0
    with bounded(bench) as boundaries:
        runner = PatternRunner(bench, boundaries, subject.times_s)
        for number in range(_ROUNDS):
            runner.iteration()  # not kept: the GPU comes from something else
            begin_s = time.monotonic()
            while time.monotonic() < begin_s + 0.4 * seconds / _ROUNDS or iterations < 2 * (number + 1):
                collector.add(Sweep(number, top_mhz, kept=True, round=number), runner.iteration())
                iterations += 1
            blocks.append((begin_s, time.monotonic()))
            for kind, found in runs.items():
                found.append(run_steadily(bench, kind, watch.long_enough_s(0.2 * seconds / _ROUNDS)))
    # The last change of the counter may still be under way.
    time.sleep(0.3)
    ticks = watch.ticks()[first:]
    for tick in ticks:
        collector.add_tick(Tick(tick.previous_poll_s, tick.time_s, tick.energy_j), tick.capped_s)
    estimate = estimate_stage(collector.runs())
    if not estimate.instructions or not math.isfinite(estimate.blocking_power_w):
        told = "; ".join(watch.troubles) or f"{len(ticks)} changes of the counter in {seconds:.0f} s"
        raise GpuError(f"the energy counter told too little: {told}")
    in_pattern = steady(ticks, blocks)
    alone = {kind: steady(ticks, [(run.begin_s, run.end_s) for run in found]) for kind, found in runs.items()}
    between_s = gaps_s(ticks)
    rows = {row.kind: row for row in estimate.instructions}
    length_s = sum(end_s - begin_s for begin_s, end_s in blocks)
    return Energies(
        Counter(
            period_ms=1e3 * statistics.median(between_s),
            period_p95_ms=1e3 * percentile(between_s, 0.95),
            ticks=len(ticks),
            window_ms=1e3 * estimate.window_s,
            lag_ms=1e3 * estimate.lag_s,
            power_period_ms=_power_period_ms(subject),
        ),
        Estimator(
            kinds=tuple(
                kind_of_work(
                    kind,
                    estimate,
                    in_pattern=in_pattern,
                    alone=alone[kind],
                    steady_time_s=statistics.mean(run.time_s for run in runs[kind]),
                )
                for kind in KINDS
            ),
            waiting_w=estimate.blocking_power_w,
            waiting_se_w=estimate.blocking_power_se_w,
            steady_waiting_w=alone[None].power_w,
            iterations=iterations,
            executions=sum(row.samples for row in rows.values()),
            seconds=length_s,
            waiting_percent=100 * runner.waiting_s * iterations / length_s,
            unresolved=tuple(sorted(estimate.unresolved)),
        ),
    )


def measure_at_the_limit(subject: Subject, seconds: float) -> Energies:
    """The same with the heaviest work there is.

    Raises:
        GpuError: there is no such work, or the counter told too little.
    """
    heavier = subject.bench.heavier()
    if heavier is None:
        raise GpuError("an emulated GPU has one kind of load")
    try:
        return measure_energies(replace(subject, bench=heavier), seconds)
    finally:
        heavier.close()


def _power_period_ms(subject: Subject) -> float | None:
    """How often the instantaneous power changes while the GPU is at work; None where it is not told or never does.

    Waiting would not do: there, two values in a row may be equal.
    """
    gpu, bench = subject.gpu, subject.bench
    if not isinstance(gpu, PowerReader):
        return None
    readings: list[tuple[float, float]] = []
    end_s = time.monotonic() + _POWER_S
    while time.monotonic() < end_s:
        bench.queue(FORWARD)
        queued_s = time.monotonic()
        while time.monotonic() < queued_s + 0.8 * subject.times_s[FORWARD]:
            value_w = gpu.read_power_w()
            readings.append((time.monotonic(), value_w))
            time.sleep(0.001)
    bench.settle()
    between_s = changes_s(readings)
    return 1e3 * statistics.median(between_s) if between_s else None


def measure_waiting(subject: Subject, seconds: float) -> list[Waiting]:
    """Each way of waiting that the bench can make itself; the first third does not count."""
    found = []
    seconds = subject.watch.long_enough_s(seconds)
    for how, wait in subject.bench.waits.items():
        subject.bench.settle()
        begin_s = time.monotonic()
        wait(seconds)
        found.append(waiting(subject.watch, how, begin_s, time.monotonic()))
    return found


def waiting(watch: Watch, how: str, begin_s: float, end_s: float) -> Waiting:
    """What was drawn in two thirds of this time, the last ones."""
    time.sleep(0.15)  # the last change of the counter within it may not have been told yet
    seen = steady(watch.ticks(), [(begin_s + (end_s - begin_s) / 3, end_s)])
    return Waiting(how=how, power_w=seen.power_w, clock_mhz=seen.clock_mhz, seconds=seen.seconds)


assert {FORWARD, BACKWARD} == set(KINDS)
