"""A job's kept iterations as a Chrome trace, which Perfetto and chrome://tracing open. Pure.

Every rank is a process. Its threads are what ran and, beside it, what the plan said; counters are the clock that was
asked for, the clock that was read back, and power.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from perseus_plugin.planning.plan import Plan
from perseus_plugin.reporting.record.iterations import PLAN
from perseus_plugin.reporting.record.samples import Sample
from perseus_plugin.reporting.report.folder import JobFolder
from perseus_plugin.reporting.report.lanes import Lanes

Event = dict[str, Any]

RAN, PLANNED, ITERATIONS = 1, 2, 3
_THREADS = {RAN: "as run", PLANNED: "plan", ITERATIONS: "iterations"}


def trace_of(folder: JobFolder) -> dict[str, Any]:
    """The trace: `traceEvents` and what it is of; times are microseconds from the first of them on."""
    samples = [sample for record in folder.records.values() for sample in record.samples]
    zero_s = min((_first_s(sample) for sample in samples), default=0.0)
    origins = _origins(folder)
    of_plan = _versions(folder)
    events: list[Event] = []
    for rank, record in folder.records.items():
        if not record.samples:
            continue
        stage = record.placement.stage
        events.append(_meta(rank, 0, "process_name", name=f"rank {rank} (stage {stage}), {record.header.gpu}"))
        events.append(_meta(rank, 0, "process_sort_index", sort_index=rank))
        events += [_meta(rank, thread, "thread_name", name=name) for thread, name in _THREADS.items()]
        for sample in record.samples:
            events += _iteration(rank, sample, zero_s)
            if sample.state == PLAN and folder.plan is not None and sample.plan in of_plan:
                origin_s = origins[record.placement.replica, sample.number] - zero_s
                events += _planned(rank, sample, folder.plan, stage, origin_s)
    return _file(
        events,
        gpu=folder.gpu,
        emulated=str(bool(folder.emulated)).lower(),
        unix_time_of_zero_s=repr(zero_s),
    )


def trace_of_lanes(several: Sequence[Lanes], **facts: str) -> dict[str, Any]:
    """Iterations beside each other: each is a process, its stages are threads, and counters are the stages' clocks.

    Args:
        several: the iterations.
        facts: what else the file says of itself.
    """
    events: list[Event] = []
    for pid, lanes in enumerate(several):
        events.append(_meta(pid, 0, "process_name", name=lanes.title))
        events.append(_meta(pid, 0, "process_sort_index", sort_index=pid))
        for stage, row in enumerate(lanes.rows):
            events.append(_meta(pid, stage + 1, "thread_name", name=f"stage {stage}"))
            for one in row:
                name = _label(one.instruction.kind, one.instruction.microbatch, one.instruction.chunk)
                args = {"clock_mhz": one.clock_mhz or "full clock"}
                time_s = one.finish_s - one.start_s
                events.append(_span(pid, stage + 1, name, "instruction", one.start_s, time_s, args))
                if one.clock_mhz:
                    events.append(_counter(pid, f"clock of stage {stage} (MHz)", one.start_s, one.clock_mhz))
    return _file(events, **facts)


def _file(events: list[Event], **facts: str) -> dict[str, Any]:
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"source": "perseus_plugin", **facts},
    }


def _iteration(rank: int, sample: Sample, zero_s: float) -> Iterator[Event]:
    begin_s = sample.begin_s - zero_s
    args = {"state": sample.state, "plan": sample.plan, "schedule": sample.schedule}
    yield _span(rank, ITERATIONS, f"iteration {sample.number}", "iteration", begin_s, sample.time_s, args)
    for one in sample.operations:
        kind = "instruction" if one.microbatch >= 0 else "constant"
        asked: dict[str, Any] = {"iteration": sample.number, "asked_mhz": one.asked_mhz or "full clock"}
        yield _span(
            rank,
            RAN,
            _label(one.name, one.microbatch, one.chunk),
            kind,
            begin_s + one.start_s,
            one.finish_s - one.start_s,
            asked,
        )
    for request in sample.requests:
        if request.clock_mhz:
            yield _counter(rank, "clock asked for (MHz)", begin_s + request.time_s, request.clock_mhz)
        else:
            yield _instant(rank, "clock lock given up", begin_s + request.time_s)
    for reading in sample.readings:
        yield _counter(rank, "clock read back (MHz)", begin_s + reading.time_s, reading.clock_mhz)
    for since_s, _, watts in sample.powers():
        yield _counter(rank, "power (W)", begin_s + since_s, round(watts, 1))


def _versions(folder: JobFolder) -> set[int]:
    """Versions of the plan that is in the folder, which does not tell its own: those that every rank ran like it."""
    if folder.plan is None:
        return set()
    fits: dict[int, bool] = {}
    for record in folder.records.values():
        for sample in record.samples:
            if sample.state == PLAN:
                fits[sample.plan] = fits.get(sample.plan, True) and _fits(sample, folder.plan, record.placement.stage)
    return {version for version, fit in fits.items() if fit}


def _fits(sample: Sample, plan: Plan, stage: int) -> bool:
    """Whether the plan has the same instructions at the same clocks; it may be a later one."""
    ran = [(one.name, one.microbatch, one.chunk, one.asked_mhz) for one in sample.instructions]
    return stage < len(plan.stages) and ran == [
        (p.instruction.kind, p.instruction.microbatch, p.instruction.chunk, p.frequency_mhz) for p in plan.stages[stage]
    ]


def _planned(rank: int, sample: Sample, plan: Plan, stage: int, origin_s: float) -> Iterator[Event]:
    """The plan beside what ran, both from the pipeline's first instruction on."""
    shift_s = origin_s - min(row[0].start_s for row in plan.stages)
    for one in plan.stages[stage]:
        name = _label(one.instruction.kind, one.instruction.microbatch, one.instruction.chunk)
        args = {"iteration": sample.number, "clock_mhz": one.frequency_mhz}
        yield _span(rank, PLANNED, name, "plan", shift_s + one.start_s, one.finish_s - one.start_s, args)
    for wait in plan.waits_of(stage):
        args = {"iteration": sample.number, "clock_mhz": wait.frequency_mhz}
        yield _span(rank, PLANNED, "wait", "wait", max(0.0, shift_s + wait.start_s), wait.finish_s - wait.start_s, args)


def _origins(folder: JobFolder) -> dict[tuple[int, int], float]:
    """Unix time of a pipeline's first instruction, by replica and iteration."""
    origins: dict[tuple[int, int], float] = {}
    for record in folder.records.values():
        for sample in record.samples:
            key = (record.placement.replica, sample.number)
            if sample.instructions:
                start_s = sample.begin_s + sample.instructions[0].start_s
                origins[key] = min(start_s, origins.get(key, start_s))
    return origins


def _first_s(sample: Sample) -> float:
    """Unix time of the first thing known of a sample; clocks are asked for before it begins."""
    before_s = [0.0, *(one.time_s for one in sample.requests), *(one.time_s for one in sample.readings)]
    return sample.begin_s + min(before_s)


def _label(kind: str, microbatch: int, chunk: int) -> str:
    if microbatch < 0:
        return kind
    return f"{kind} {microbatch}" + (f" chunk {chunk}" if chunk else "")


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _meta(pid: int, tid: int, what: str, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _span(pid: int, tid: int, name: str, kind: str, start_s: float, time_s: float, args: dict[str, Any]) -> Event:
    times = {"ts": _us(start_s), "dur": _us(max(time_s, 0.0))}
    return {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, **times, "args": args}


def _instant(pid: int, name: str, time_s: float) -> Event:
    return {"ph": "i", "s": "p", "name": name, "cat": "clock", "pid": pid, "tid": RAN, "ts": _us(time_s), "args": {}}


def _counter(pid: int, name: str, time_s: float, value: float) -> Event:

    return {"ph": "C", "name": name, "cat": "clock", "pid": pid, "tid": 0, "ts": _us(time_s), "args": {"value": value}}
