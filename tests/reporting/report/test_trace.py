"""The trace against the trace-event format, as Google's document of it says, and against what was recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from perseus_plugin.iteration.timetable import Follow
from perseus_plugin.planning.plan import save_plan
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.trace import PLANNED, RAN, trace_of
from tests.reporting.job import Job

Microseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(min_length=1)]
    pid: int
    tid: int


class Complete(_Event):
    """A span: phase X has a duration."""

    ph: Literal["X"]
    cat: str
    ts: Microseconds
    dur: Microseconds
    args: dict[str, int | str]


class Counter(_Event):
    """Phase C: every argument is a number, a series of the track."""

    ph: Literal["C"]
    cat: str
    ts: Microseconds
    args: Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]


class Instant(_Event):
    """Phase i, with its scope: global, process or thread."""

    ph: Literal["i"]
    s: Literal["g", "p", "t"]
    cat: str
    ts: Microseconds
    args: dict[str, Any]


class ProcessName(_Event):
    """Metadata: names and order of processes and threads."""

    ph: Literal["M"]
    name: Literal["process_name", "thread_name"]
    ts: Microseconds
    args: dict[Literal["name"], str]


class SortIndex(_Event):
    """Metadata: order of processes."""

    ph: Literal["M"]
    name: Literal["process_sort_index"]
    ts: Microseconds
    args: dict[Literal["sort_index"], int]


class Trace(BaseModel):
    """The JSON object format."""

    model_config = ConfigDict(extra="forbid", strict=True)
    traceEvents: list[Complete | Counter | Instant | ProcessName | SortIndex]  # noqa: N815
    displayTimeUnit: Literal["ms", "ns"]  # noqa: N815
    otherData: dict[str, str]  # noqa: N815


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job") / "out", stages=3, microbatches=4, replicas=2).planned().finished()


@pytest.fixture(scope="module")
def trace(job: Job) -> Trace:
    text = json.dumps(trace_of(load_folder(job.folder)), allow_nan=False)
    return Trace.model_validate_json(text)


def spans(trace: Trace, rank: int, thread: int) -> list[Complete]:
    return [e for e in trace.traceEvents if isinstance(e, Complete) and (e.pid, e.tid) == (rank, thread)]


def test_the_schema_refuses_what_is_no_trace() -> None:
    span = {"ph": "X", "name": "a", "cat": "b", "pid": 1, "tid": 1, "ts": 0.0, "dur": 1.0, "args": {}}
    one: TypeAdapter[Any] = TypeAdapter(Complete | Counter | Instant | ProcessName | SortIndex)
    one.validate_python(span)
    for wrong in ({"dur": -1.0}, {"ts": "0"}, {"ph": "Q"}, {"pid": None}, {"color": "red"}):
        with pytest.raises(ValidationError):
            one.validate_python({**span, **wrong})


def test_every_rank_is_a_named_process_with_named_threads(trace: Trace, job: Job) -> None:
    names = {e.pid: e.args["name"] for e in trace.traceEvents if isinstance(e, ProcessName) if "process" in e.name}
    assert names == {rank: f"rank {rank} (stage {rank % 3}), test GPU" for rank in range(6)}
    threads = {(e.pid, e.args["name"]) for e in trace.traceEvents if isinstance(e, ProcessName) if "thread" in e.name}
    assert threads == {(rank, name) for rank in range(6) for name in ("as run", "plan", "iterations")}


def test_planned_waits_with_a_clock_of_their_own_stand_beside_the_plan(tmp_path: Path) -> None:
    made = Job(tmp_path / "out", stages=3, switch_latency_s=1e-6).planned().finished()
    of_job = Trace.model_validate_json(json.dumps(trace_of(load_folder(made.folder)), allow_nan=False))
    for rank in range(3):
        seen = [e for e in spans(of_job, rank, PLANNED) if e.cat == "wait"]
        planned = made.plan.waits_of(rank)
        assert planned
        assert [e.args["clock_mhz"] for e in seen[: len(planned)]] == [wait.frequency_mhz for wait in planned]
        assert [e.dur for e in seen[: len(planned)]] == pytest.approx(
            [1e6 * (wait.finish_s - wait.start_s) for wait in planned], abs=2
        )


def test_the_spans_are_the_recorded_operations(trace: Trace, job: Job) -> None:
    zero_s = float(trace.otherData["unix_time_of_zero_s"])
    for rank, record in load_folder(job.folder).records.items():
        seen = spans(trace, rank, RAN)
        expected = []
        for sample in record.samples:
            seen_there = job.records[rank, sample.number]
            offset_s = sample.begin_s - zero_s - seen_there.begin_s
            expected += [
                (start_s + offset_s, end_s - start_s)
                for start_s, end_s in zip(seen_there.starts_s, seen_there.ends_s, strict=True)
            ]
        assert len(expected) >= 3 * 9
        assert [e.ts for e in seen] == pytest.approx([1e6 * start_s for start_s, _ in expected], abs=2)
        assert [e.dur for e in seen] == pytest.approx([1e6 * time_s for _, time_s in expected], abs=2)
        first = record.samples[0]
        assert [e.name for e in seen[:9]] == [
            f"{one.name} {one.microbatch}" if one.microbatch >= 0 else one.name for one in first.operations
        ]


def test_the_plan_stands_beside_what_ran_under_it(trace: Trace, job: Job) -> None:
    for rank in range(6):
        row = job.plan.stages[rank % 3]
        planned = spans(trace, rank, PLANNED)
        under_plan = [s for s in load_folder(job.folder).records[rank].samples if s.state == "plan"]
        assert len(planned) == len(under_plan) * len(row)
        ran = {(e.args["iteration"], e.name): e for e in spans(trace, rank, RAN)}
        for event in planned:
            beside = ran[event.args["iteration"], event.name]
            assert event.args["clock_mhz"] == beside.args["asked_mhz"]
            # The made-up job runs exactly as planned.
            assert (event.ts, event.dur) == pytest.approx((beside.ts, beside.dur), abs=3)


def test_clocks_and_power_are_counters(trace: Trace, job: Job) -> None:
    for rank, record in load_folder(job.folder).records.items():
        counters = [e for e in trace.traceEvents if isinstance(e, Counter) and e.pid == rank]
        asked = [e.args["value"] for e in counters if e.name == "clock asked for (MHz)"]
        read = [e.args["value"] for e in counters if e.name == "clock read back (MHz)"]
        power = [e.args["value"] for e in counters if e.name == "power (W)"]
        assert asked == [r.clock_mhz for s in record.samples for r in s.requests if r.clock_mhz]
        assert read == [r.clock_mhz for s in record.samples for r in s.readings]
        assert len(power) == len(read) - len(record.samples)
        assert all(50 < watts < 500 for watts in power)


def test_rows_of_an_earlier_plan_are_left_out(tmp_path: Path) -> None:
    """plan.json is the newest plan; iterations under the one before ran at other clocks."""
    job = Job(tmp_path / "out").planned()
    earlier = job.number
    clocks = [row[0].frequency_mhz for row in job.plan.stages]
    changed = {1110: 810, 810: 1110, 1410: 1110}
    stages = tuple(
        tuple(replace(one, frequency_mhz=changed[one.frequency_mhz]) if stage == 1 else one for one in row)
        for stage, row in enumerate(job.plan.stages)
    )
    job.plan = replace(job.plan, stages=stages)
    assert clocks != [row[0].frequency_mhz for row in stages]
    job.parts = [
        part.model_copy(update={"version": 2, "clocks_mhz": tuple(job.plan.clocks_mhz(stage))})
        for stage, part in enumerate(job.parts)
    ]
    save_plan(job.plan, job.folder / "plan.json")
    job.timetable = job.timetable.switched(job.number, Follow(2))
    job.iterate(4)
    made = trace_of(load_folder(job.finished().folder))
    drawn = [e for e in made["traceEvents"] if e["ph"] == "X" and e["tid"] == PLANNED]
    assert {event["pid"] for event in drawn} == {0, 1}
    assert {event["args"]["iteration"] for event in drawn} == {earlier + 2}


def test_a_plan_of_another_schedule_is_left_out(tmp_path: Path, job: Job) -> None:
    other = Job(tmp_path / "out", stages=2, microbatches=2).planned()
    (other.folder / "plan.json").write_text((job.folder / "plan.json").read_text().replace("1F1B", "other"))
    folder = load_folder(other.finished().folder)
    assert not [e for e in trace_of(folder)["traceEvents"] if e["ph"] == "X" and e["tid"] == PLANNED]


def test_a_folder_without_samples_makes_an_empty_trace(tmp_path: Path) -> None:
    folder = load_folder(Job(tmp_path / "out", silent=(0, 1)).planned().finished().folder)
    assert Trace.model_validate(trace_of(folder)).traceEvents == []
