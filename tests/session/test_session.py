from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.control.selection import Selection, with_facts
from perseus_plugin.control.wire import DeviceFacts, Event, Trouble
from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.exchange.messages import PhasesPart, Placement, PlanPart, WaitPart
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StreamOp
from perseus_plugin.iteration.timetable import WARM_UP as WARMING_UP
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Round, Sweep, Timetable
from perseus_plugin.leader.job import Job
from perseus_plugin.profiling.failed import save_failure
from perseus_plugin.profiling.kept import save_survey
from perseus_plugin.profiling.known import profiled_as
from perseus_plugin.profiling.profile import Profile, save_profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.reporting.live import publishers as publishers_module
from perseus_plugin.reporting.live.publishers import InMemoryPublisher
from perseus_plugin.session import start as start_module
from perseus_plugin.session.link import FinishedIteration, Link
from perseus_plugin.session.start import link_for, prepare, start_session
from tests.factories import placement, profile, session_of
from tests.waiting import processes_naming

TABLE = Timetable(Round(1, (1410, 810)), settle_steps=1, steps_per_clock=2)
STREAM: list[StreamOp] = [
    Constant("load"),
    Compute("forward", 0),
    Send(1),
    Receive(1),
    Compute("backward", 0),
    Constant("step"),
]


def stream_of(stage: int) -> Sequence[StreamOp]:
    assert stage == 0
    return STREAM


class FakeHelper:
    """Notes what a rank asks of its clock helper."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.early_s: list[float] = []
        self.fails_at = ""

    def _note(self, what: str, value: Any) -> None:
        if what == self.fails_at:
            raise OSError(f"{what}: the pipe is gone")
        self.calls.append((what, value))

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        self._note("early" if apply_at_s else "request", frequency_mhz)
        self.early_s += [apply_at_s] if apply_at_s else []

    def retire(self) -> None:
        self._note("request", None)

    def mark(self, tag: int) -> None:
        self._note("mark", tag)

    def close(self, timeout_s: float = 5.0) -> bool:
        self._note("close", timeout_s)
        return True

    def take(self) -> list[tuple[str, Any]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def requests(self) -> list[int | None]:
        """The clocks asked for since the last time."""
        return [value for what, value in self.take() if what == "request"]


class Broken(Timetable):
    """Fails when it is asked."""

    def at(self, iteration: int) -> Directive:
        raise ZeroDivisionError("the timetable is broken")


class AtClose:
    """A worker that does what it is told when the session ends."""

    def __init__(self) -> None:
        self.does: Callable[[], object] = lambda: None

    def close(self) -> None:
        self.does()


class Rank:
    """A session, and the training that it is hooked into."""

    def __init__(self, table: Timetable = TABLE, with_helper: bool = True, where: Placement | None = None) -> None:
        self.link = Link(table)
        self.helper = FakeHelper()
        self.events: list[list[tuple[str, float]]] = []
        self.worker = AtClose()
        helper = self.helper if with_helper else None
        self.session = session_of(self.link, helper, where, monitor=self.events.append, worker=self.worker)

    def iterate(self, key: str = "A") -> FinishedIteration | None:
        """One training iteration as an integration brackets it."""
        session = self.session
        session.begin_iteration()
        if session.begin_schedule(key, stream_of):
            for operation in STREAM:
                if isinstance(operation, (Compute, Constant)):
                    session.tap.begin()
                    session.tap.end()
            session.end_schedule()
        session.end_iteration()
        finished = self.link.take_finished()
        assert len(finished) <= 1
        return finished[0] if finished else None

    def follow(self, version: int, first: int, key: str = "A", waits: tuple[WaitPart, ...] = ()) -> None:
        """News has come: follow a plan."""
        part = PlanPart(version=version, schedule=key, clocks_mhz=(810, 1410), times_s=(0.1, 0.2), waits=waits)
        self.link.use_parts({(version, key): part})
        self.link.run_by(self.link.timetable.switched(first, Follow(version)))


@pytest.fixture
def rank() -> Rank:
    return Rank()


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    return caplog


# Steps that are one CUDA graph.

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
PHASES = PhasesPart(clocks_mhz=(810, 1410), starts_s=(0.0, 60.0), end_s=120.0, iteration_s=120.0)


def replay(rank: Rank, *, amid: Callable[[], None] = lambda: None) -> FinishedIteration:
    """One training iteration whose schedule is replayed: nothing of it is seen."""
    rank.session.begin_iteration()
    assert rank.session.begin_schedule("A", stream_of, replayed=True)
    amid()
    rank.session.end_schedule()
    rank.session.end_iteration()
    (finished,) = rank.link.take_finished()
    return finished


def follow_by_time(rank: Rank, lead_s: float = 0.01) -> None:
    rank.link.rise_early(lead_s)
    rank.follow(1, first=0)
    rank.link.use_parts({(1, "A"): rank.link.parts[1, "A"].model_copy(update={"phases": PHASES})})


def test_all_clocks_of_a_graph_are_asked_for_at_its_launch_and_taken_back_at_its_end(rank: Rank) -> None:
    follow_by_time(rank)
    at_end: list[list[tuple[str, Any]]] = []
    for _ in range(2):
        finished = replay(rank, amid=lambda: at_end.append(rank.helper.take()))
        assert (finished.record.replayed, finished.record.timed, finished.record.complete) == (True, True, False)
        assert [one for one in at_end[-1] if one[0] != "mark"] == [("request", 810), ("early", 1410), ("early", None)]
        assert [one for one in rank.helper.take() if one[0] != "mark"] == [("request", None)], "nothing is left over"
    assert finished.record.undisturbed
    rises_s = rank.helper.early_s[2] - finished.record.begin_s
    assert 0 < rises_s < 60.0, "with room, and a clock change earlier"


def test_what_comes_within_a_graphs_iteration_takes_its_clocks_back(rank: Rank) -> None:
    follow_by_time(rank)

    def evaluate() -> None:
        rank.helper.take()
        rank.session.evaluation()

    assert not replay(rank, amid=evaluate).record.undisturbed
    assert [one for one in rank.helper.take() if one[0] != "mark"] == [("request", None)]
    replay(rank)
    assert ("request", 810) in rank.helper.take(), "the next one follows the plan"


def test_an_eager_step_amid_graphs_follows_the_plan_by_its_instructions(rank: Rank) -> None:
    follow_by_time(rank)
    replay(rank)
    rank.helper.take()
    finished = rank.iterate()
    assert finished is not None
    assert finished.record.complete
    assert rank.helper.requests() == [810, 1410]
    replay(rank)
    assert rank.helper.requests() == [810, None]


@pytest.mark.parametrize("lacks", ["phases", "latency"])
def test_a_graph_whose_clocks_cannot_be_set_by_time_runs_at_full_clocks(rank: Rank, lacks: str) -> None:
    follow_by_time(rank, 0.0 if lacks == "latency" else 0.01)
    if lacks == "phases":
        rank.follow(1, first=0)
    for _ in range(2):
        assert not replay(rank).record.applied
        assert rank.helper.requests() == [None]


def test_a_graph_whose_end_is_not_seen_leaves_no_request(rank: Rank) -> None:
    follow_by_time(rank)
    rank.session.begin_iteration()
    rank.session.begin_schedule("A", stream_of, replayed=True)
    rank.helper.take()
    rank.session.end_iteration()
    rank.link.take_finished()
    assert [one for one in rank.helper.take() if one[0] != "mark"] == [("request", None)]
    replay(rank)
    assert ("request", 810) in rank.helper.take(), "the next one follows the plan"


# Iterations.


def test_an_iteration_is_timed_and_handed_over_whole(rank: Rank) -> None:
    finished = rank.iterate()
    assert finished is not None
    assert finished.directive == WARMING_UP
    seen = finished.record
    assert (seen.number, seen.schedule, seen.complete) == (0, "A", True)
    assert seen.operations == (Constant("load"), Compute("forward", 0), Compute("backward", 0), Constant("step"))
    times = [seen.begin_s, *(t for pair in zip(seen.starts_s, seen.ends_s, strict=True) for t in pair), seen.end_s]
    assert times == sorted(times)
    assert [rank.iterate().record.number for _ in range(3)] == [1, 2, 3]  # type: ignore[union-attr]


def test_the_counter_is_read_at_both_ends_of_every_iteration(rank: Rank) -> None:
    for _ in range(3):
        rank.iterate()
    assert [value for what, value in rank.helper.take() if what == "mark"] == [0, 1, 2, 3, 4, 5]


def test_the_worker_learns_the_schedule_once(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(rank.link, "use_schedule", lambda key, streams: told.append(key))
    for key in "AABAA":
        rank.iterate(key)
    assert told == ["A", "B", "A"]


def test_each_block_of_the_sweep_holds_its_clock(rank: Rank) -> None:
    asked = []
    disturbed = []
    for _ in range(7):
        finished = rank.iterate()
        assert finished is not None
        asked.append(rank.helper.requests())
        disturbed.append(not finished.record.undisturbed)
    assert asked == [[None], [1410], [], [], [810], [], []]
    assert disturbed == [True, True, False, False, True, False, False], "only the first of its sort follows a change"
    assert rank.iterate().directive == FullClock("planning")  # type: ignore[union-attr]
    assert rank.helper.requests() == [None]


def test_a_plan_is_followed_from_its_iteration_on(rank: Rank) -> None:
    for _ in range(7):
        rank.iterate()
    rank.follow(1, first=8)
    rank.helper.take()
    assert rank.iterate().directive == FullClock("planning")  # type: ignore[union-attr]
    assert rank.helper.requests() == [None]
    finished = rank.iterate()
    assert finished is not None
    assert finished.directive == Follow(1)
    assert not finished.record.undisturbed
    assert rank.helper.requests() == [810, 1410]
    finished = rank.iterate()
    assert finished is not None
    assert finished.record.undisturbed
    assert [call for call in rank.helper.take() if call[0] != "mark"] == [
        ("request", 810),
        ("early", 1410),
        ("request", 1410),
        ("early", None),
    ]


def test_waits_at_clocks_of_their_own_are_recorded(rank: Rank) -> None:
    rank.link.rise_early(1e-6)
    waits = tuple(WaitPart(after=after, frequency_mhz=705, duration_s=0.1) for after in (-1, 0, 1))
    rank.follow(1, first=0, waits=waits)
    watched = [rank.iterate() for _ in range(2)]
    assert [finished.record.lowered for finished in watched if finished is not None] == [[], []]
    finished = rank.iterate()
    assert finished is not None
    assert {clock for _, clock in finished.record.lowered} == {705}
    assert (-1, 705) in finished.record.lowered
    assert ("request", 705) in rank.helper.take()


def test_rises_are_asked_for_by_the_measured_lead(rank: Rank) -> None:
    rank.link.rise_early(0.025)
    rank.follow(1, first=0)
    finished = rank.iterate()
    assert finished is not None
    begin_s = finished.record.starts_s[
        1
    ]  # of the first of two instructions, of 0.1 s; work that is constant comes first
    assert rank.helper.early_s[0] - begin_s == pytest.approx(0.1 - 0.025)


@pytest.mark.parametrize("why", ["no part", "another version", "another schedule", "another length"])
def test_a_plan_that_does_not_fit_is_not_followed(rank: Rank, why: str) -> None:
    rank.follow(1, first=0, key="B" if why == "another schedule" else "A")
    if why == "no part":
        rank.link.use_parts({})
    elif why == "another version":
        rank.link.use_parts({(2, "A"): rank.link.parts[1, "A"]})
    elif why == "another length":
        rank.link.use_parts({(1, "A"): rank.link.parts[1, "A"].model_copy(update={"clocks_mhz": (810,) * 3})})
    for _ in range(2):
        finished = rank.iterate()
        assert finished is not None
        assert not finished.record.undisturbed, "it is no iteration under the plan"
        assert not finished.record.applied
        assert rank.helper.requests() == [None]
    assert not rank.session.closed
    rank.follow(1, first=0)
    rank.iterate()
    assert rank.helper.requests() == [810, 1410], "it is followed as soon as it fits"


def test_another_schedule_runs_at_full_clocks_until_there_is_a_plan_for_it(rank: Rank) -> None:
    rank.follow(1, first=0)
    rank.iterate()
    rank.helper.take()
    rank.iterate("B")
    assert rank.helper.requests() == [None]
    rank.iterate("A")
    assert rank.helper.requests() == [810, 1410]


def test_an_evaluation_runs_at_full_clocks_and_disturbs(rank: Rank) -> None:
    rank.follow(1, first=0)
    rank.iterate()
    rank.iterate()
    rank.helper.take()
    rank.session.evaluation()
    rank.session.tap.begin()
    rank.session.tap.end()
    assert rank.helper.take() == [("request", None)]
    finished = rank.iterate()
    assert finished is not None
    assert not finished.record.undisturbed
    assert finished.record.number == 2, "an evaluation is no iteration"
    assert rank.helper.requests() == [810, 1410], "the plan goes on after it"
    last = rank.iterate()
    assert last is not None
    assert last.record.undisturbed
    assert last.record.applied


def test_an_evaluation_amid_an_iteration_disturbs_that_one_too(rank: Rank) -> None:
    for _ in range(3):
        rank.iterate()
    rank.link.take_finished()
    rank.session.begin_iteration()
    rank.session.begin_schedule("A", stream_of)
    rank.session.end_schedule()
    rank.session.evaluation()
    rank.session.end_iteration()
    (finished,) = rank.link.take_finished()
    assert not finished.record.undisturbed


def test_an_iteration_that_raised_is_incomplete_and_the_next_one_is_whole(rank: Rank) -> None:
    rank.session.begin_iteration()
    rank.session.begin_schedule("A", stream_of)
    rank.session.tap.begin()
    rank.session.end_schedule()
    rank.session.end_iteration()
    assert [not f.record.complete for f in rank.link.take_finished()] == [True]
    finished = rank.iterate()
    assert finished is not None
    assert finished.record.complete
    assert finished.record.number == 1


def test_a_schedule_outside_an_iteration_is_not_hooked(rank: Rank) -> None:
    assert rank.session.begin_schedule("A", stream_of) is False
    rank.session.end_schedule()
    rank.session.end_iteration()
    assert rank.link.take_finished() == []
    assert not rank.session.closed


def test_without_a_helper_iterations_are_observed() -> None:
    rank = Rank(Timetable(Round(1, ()), 1, 2), with_helper=False)
    assert rank.session.controller is None
    first, second = rank.iterate(), rank.iterate()
    assert first is not None
    assert second is not None
    assert second.record.complete
    assert second.record.undisturbed
    rank.session.evaluation()
    rank.session.close()
    assert rank.helper.calls == []


def test_events_are_written_on_the_training_thread_after_an_iteration(rank: Rank) -> None:
    rank.link.add_events([("Perseus/x", 1.0)])
    rank.link.add_events([("Perseus/x", 2.0)])
    rank.session.begin_iteration()
    assert rank.events == []
    rank.session.end_iteration()
    assert rank.events == [[("Perseus/x", 1.0)], [("Perseus/x", 2.0)]]


# Ends.


def test_failing_gives_the_clock_up_tells_once_and_puts_the_framework_back(
    rank: Rank, heard: pytest.LogCaptureFixture
) -> None:
    put_back: list[bool] = []
    rank.session.on_close(lambda: put_back.append(True))
    rank.follow(1, first=0)
    rank.iterate()
    rank.helper.take()
    rank.session.fail(GpuError("no permission"))
    rank.session.fail(GpuError("again"))
    assert rank.helper.requests() == [None]
    assert put_back == [True]
    assert rank.link.trouble_reason == "no permission"
    assert heard.text.count("perseus is off from here on") == 1
    assert "Traceback" not in heard.text, "an error meant for people needs none"
    assert rank.session.closed
    assert rank.iterate() is None, "training goes on without us"
    assert rank.session.begin_schedule("A", stream_of) is False
    rank.session.evaluation()
    assert rank.helper.calls == []


def test_an_unforeseen_error_is_told_with_its_traceback(rank: Rank, heard: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        rank.session.fail(error)
    assert "ZeroDivisionError" in heard.text
    assert rank.link.trouble_reason == "ZeroDivisionError()"


@pytest.mark.parametrize("where", ["mark", "request", "stream", "monitor", "timetable"])
def test_an_error_of_ours_never_reaches_the_training(rank: Rank, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("ours")

    rank.follow(1, first=0)
    if where in {"mark", "request"}:
        rank.helper.fails_at = where
        # Only the first call fails: giving the clock up afterwards works.
        note = rank.helper._note

        def once(what: str, value: Any) -> None:
            try:
                note(what, value)
            finally:
                rank.helper.fails_at = "" if what == where else rank.helper.fails_at

        rank.helper._note = once  # type: ignore[method-assign]
    elif where == "monitor":
        rank.link.add_events([("x", 1.0)])
        monkeypatch.setattr(rank.session, "_monitor", broken)
    elif where == "timetable":
        rank.link.run_by(Broken(**{f.name: getattr(TABLE, f.name) for f in fields(TABLE)}))
    rank.session.begin_iteration()
    rank.session.begin_schedule("A", broken if where == "stream" else stream_of)
    for _ in range(4):
        rank.session.tap.begin()
        rank.session.tap.end()
    rank.session.end_schedule()
    rank.session.end_iteration()
    rank.link.take_finished()
    assert rank.session.closed
    assert rank.link.trouble_reason is not None
    assert rank.helper.requests()[-1] is None, "full clocks"
    assert rank.iterate() is None


def test_more_operations_than_the_schedule_has_end_the_session_only(rank: Rank) -> None:
    rank.session.begin_iteration()
    rank.session.begin_schedule("A", stream_of)
    for _ in range(9):
        rank.session.tap.begin()
        rank.session.tap.end()
    assert rank.session.closed
    assert rank.helper.requests()[-1] is None


@pytest.mark.parametrize("failed", [False, True])
def test_closing_ends_everything_once(rank: Rank, failed: bool) -> None:
    order: list[str] = []
    rank.session.on_close(lambda: order.append("framework"))
    rank.worker.does = lambda: order.append("worker")
    rank.iterate()
    if failed:
        rank.session.fail(GpuError("lost"))
    rank.helper.take()
    rank.session.close()
    rank.session.close()
    assert order == ["framework", "worker"]
    assert [call for call in rank.helper.take() if call[0] == "close"] != []
    assert rank.session.closed
    assert rank.iterate() is None


def test_whatever_fails_at_the_end_reaches_no_script(rank: Rank, heard: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        raise RuntimeError("the store is gone")

    rank.worker.does = failing
    rank.session.close()
    assert "the summary may be incomplete: RuntimeError('the store is gone')" in heard.text


def test_closing_gives_the_clock_up_before_anything_that_may_take_long(rank: Rank) -> None:
    rank.follow(1, first=0)
    rank.iterate()
    rank.helper.take()
    seen: list[list[int | None]] = []
    rank.worker.does = lambda: seen.append(rank.helper.requests())
    rank.session.close()
    assert seen == [[None]]


def test_the_last_events_are_written_and_a_monitor_that_is_gone_is_no_error(rank: Rank) -> None:
    rank.worker.does = lambda: rank.link.add_events([("Perseus/energy_j/measured", 1.0)])
    rank.session.close()
    assert rank.events == [[("Perseus/energy_j/measured", 1.0)]]
    other = Rank()
    other.worker.does = lambda: other.link.add_events([("x", 1.0)])

    def gone(_: object) -> None:
        raise RuntimeError("the writer is closed")

    other.session._monitor = gone
    other.session.close()


# Starting.


class FakeClockHelper(FakeHelper):
    """What `LastingHelper.start` returns."""

    started: list[FakeClockHelper]
    facts: DeviceFacts | None
    events: tuple[Event, ...] = ()

    @classmethod
    def start(cls, spec: str, *, min_dwell_s: float, gives_way: bool) -> FakeClockHelper:
        helper = cls()
        helper._note("start", (spec, min_dwell_s))
        cls.started.append(helper)
        return helper

    def wait_ready(self, timeout_s: float) -> DeviceFacts | None:
        return self.facts

    def measure_latency(self) -> None:
        self._note("measure", None)

    def free_after(self, silence_s: float) -> None:
        self._note("free_after", silence_s)

    def on_end(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def drain(self) -> list[Event]:
        return list(self.events)


FACTS = DeviceFacts("test GPU", "GPU-0", False, (1410, 1110, 810, 600), True, "", "", 1, "nvml")


@pytest.fixture
def fakes() -> type[FakeClockHelper]:
    FakeClockHelper.started, FakeClockHelper.events = [], ()
    FakeClockHelper.facts = FACTS
    logging.getLogger("perseus_plugin").addHandler(logging.NullHandler())  # as a program that has set its own up
    return FakeClockHelper


def block(folder: Path, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"output_dir": str(folder / "out"), "gpu": {"backend": "emulated"}}
    made["profiling"] = {"warmup_steps": 2, "clock_count": 3, **more.pop("profiling", {})}
    return made | more


@dataclass
class Started:
    """What a session is about, and what its threads would share."""

    job: Job
    helper: Any
    link: Link


def start(folder: Path, **more: Any) -> Started:
    """Find out what a session with these settings is about."""
    config = parse_config(block(folder, **more))
    where, start_helper = placement(world_size=1), FakeClockHelper.start
    job, helper = prepare(config, where, exchange=LocalExchange(), start_helper=start_helper)  # type: ignore[arg-type]
    return Started(job, helper, link_for(job, helper))


def test_the_end_of_the_helper_wakes_the_sessions_thread(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    made = start(tmp_path)
    made.link.wake.clear()
    fakes.started[0].ended()
    assert made.link.wake.is_set()


def test_a_session_starts_with_a_sweep_of_the_gpus_clocks(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    made = start(tmp_path, limits={"min_dwell_s": 0.5})
    table = made.link.timetable
    assert (tmp_path / "out").is_dir()
    assert set(table.sweep.clocks_mhz) == {1410, 1110, 600} or set(table.sweep.clocks_mhz) == {1410, 1110, 810}
    assert table.sweep.clocks_mhz[0] == table.sweep.clocks_mhz[-1] == 1410
    assert (table.sweep.first, table.settle_steps, table.steps_per_clock) == (2, 1, 5)
    (helper,) = fakes.started
    assert [call[0] for call in helper.calls] == ["start", "measure"]
    spec, dwell_s = helper.calls[0][1]
    assert spec.startswith(f"emulated:{tmp_path}")
    assert dwell_s == 0.5
    assert made.job.known.profile is False
    assert made.job.known.fingerprint["stage 0: gpu"] == "test GPU"


def test_what_is_only_recorded_is_no_part_of_what_a_job_is(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    config = parse_config(block(tmp_path))
    job, _ = prepare(
        config,
        placement(world_size=1),
        facts={"model": "m"},
        about={"samples per iteration": "8"},
        exchange=LocalExchange(),
        start_helper=fakes.start,  # type: ignore[arg-type]
    )
    assert job.facts == {"model": "m", "samples per iteration": "8"}
    assert "stage 0: model" in job.known.fingerprint
    assert "stage 0: samples per iteration" not in job.known.fingerprint


def test_clocks_can_be_given(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    table = start(tmp_path, profiling={"clocks_mhz": [1400, 620]}).link.timetable
    assert table.sweep.clocks_mhz == (1410, 600, 1410)


def test_a_given_silence_is_told_at_the_start(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    made = start(tmp_path, limits={"free_after_s": 60})
    assert made.helper is not None
    assert ("free_after", 60) in fakes.started[0].calls


def test_why_a_helper_did_not_start_is_said(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    fakes.facts, fakes.events = None, (Trouble("helper_failed", "no NVIDIA driver here", 0.0),)
    assert start(tmp_path).link.trouble_reason == "no NVIDIA driver here"


def test_a_given_switch_latency_is_not_measured(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    link = start(tmp_path, limits={"switch_latency_s": 0.03}).link
    assert link.rise_lead_s == 0.03
    assert "measure" not in [call[0] for call in fakes.started[0].calls]
    _, (_, dwell_s) = fakes.started[0].calls[0]
    assert dwell_s == 0.06, "it follows from the latency"


def verified(folder: Path, **changes: Any) -> str:
    """What `perseus verify` may have written on the GPU of these tests."""
    content = json.loads((EVIDENCE / "verify-h100.json").read_text())
    content["machine"]["gpu"] = FACTS.name
    took = {"median": 9.0, "p95": 12.0, "highest": 14.0, "samples": 8}
    ways = [(1410, 810), (810, 1410)]
    content["graphs"] = {
        **dict.fromkeys(("replay_ms", "call_us", "begin_us", "seen_us", "where_us"), took),
        "replays": 40,
        "marks": 12,
        "jitter_percent": 0.1,
        "within_percent": 99.0,
        "read_percent": 0.0,
        "read_se_percent": 0.1,
    }
    content["switches"] = [{"from_mhz": a, "to_mhz": b, "latency_ms": took, "unseen": 0} for a, b in ways]
    for name, value in changes.items():
        content[name] = value(content[name])
    (folder / "verify.json").write_text(json.dumps(content))
    return str(folder / "verify.json")


def on_a_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection("nvml", "nvml:GPU-0", FACTS.name, poll_interval_s=0.005)
    monkeypatch.setattr(start_module, "select_gpu", lambda *about: selection)


def test_on_a_real_gpu_clocks_are_set_by_time_once_that_was_verified(
    tmp_path: Path, fakes: type[FakeClockHelper], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path, cuda_graph=True).helper is not None, "this one is emulated"
    on_a_real_gpu(monkeypatch)
    assert start(tmp_path).helper is not None, "by its instructions"
    with pytest.raises(ConfigError, match=r"perseus\.gpu\.verified: missing; with perseus\.cuda_graph"):
        start(tmp_path, cuda_graph=True)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"perseus\.gpu\.verified: .*other\.json"):
        start(tmp_path, cuda_graph=True, gpu={"backend": "nvml", "verified": str(tmp_path / "other.json")})
    made = start(tmp_path, cuda_graph=True, gpu={"backend": "nvml", "verified": verified(tmp_path)})
    assert made.helper is not None
    with pytest.raises(ConfigError, match=r"perseus\.limits\.switch_latency_s: got 0; allowed with perseus"):
        start(tmp_path, cuda_graph=True, limits={"switch_latency_s": 0})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"machine": lambda was: {**was, "gpu": "another GPU"}}, "measured on another GPU, and this is test GPU"),
        ({"machine": lambda was: {**was, "emulated": True}}, "measured on an emulated test GPU"),
        ({"boundaries": lambda was: None}, "(boundaries)"),
        ({"switches": lambda was: []}, "(switches): run it with --set-clocks"),
        ({"switches": lambda was: was[:1]}, "up and down (switches)"),
        ({"switches": lambda was: [was[0], {**was[1], "unseen": 3}]}, "up and down (switches)"),
        ({"graphs": lambda was: None}, "where the GPU is (graphs): run it again"),
        (
            {"graphs": lambda was: None, "missing": lambda was: {"replays of a CUDA graph": "no memory"}},
            "where the GPU is (graphs): no memory",
        ),
        ({"graphs": lambda was: {**was, "within_percent": 90.0}}, "(graphs): its replays vary too much"),
    ],
)
def test_what_was_verified_otherwise_does_not_do(
    tmp_path: Path,
    fakes: type[FakeClockHelper],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    why: str,
) -> None:
    on_a_real_gpu(monkeypatch)
    gpu = {"backend": "nvml", "verified": verified(tmp_path, **changes)}
    made = start(tmp_path, cuda_graph=True, gpu=gpu)
    assert made.helper is None
    assert made.link.trouble_reason is not None
    assert why in made.link.trouble_reason


def test_a_loaded_profile_leaves_only_the_top_clock_to_measure(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    save_profile(profile(2), tmp_path / "profile.csv")
    made = start(tmp_path, profiling={"load": str(tmp_path / "profile.csv"), "blocking_power_w": 83.0})
    assert made.link.timetable.sweep.clocks_mhz == (1410,)
    assert made.job.known.survey.blocking_power_w == 83.0
    assert made.job.known.survey.profile.stages == 2


def test_a_kept_profile_of_the_same_job_is_used_again(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    first = start(tmp_path)
    survey = Survey(profile(2), 83.0, frozenset(), {(0, "load"): 0.1})
    save_survey(survey, first.job.known.fingerprint, tmp_path / "out")
    again = start(tmp_path)
    assert again.job.known.profile
    assert again.job.known.survey.unresolved == survey.unresolved
    assert again.job.known.survey.constant_time_s == survey.constant_time_s
    assert again.link.timetable.sweep.clocks_mhz == (1410,)
    assert not start(tmp_path, profiling={"reuse": False}).job.known.profile
    vague = replace(survey, unresolved=frozenset({(1, "forward")}))
    save_survey(vague, first.job.known.fingerprint, tmp_path / "out")
    assert not start(tmp_path).job.known.profile, "what is not known well enough is measured again"
    rows = [(s, k, replace(m, time_se_s=0.05 * m.time_s)) for s, k, m in survey.profile.rows()]
    save_survey(replace(survey, profile=Profile.from_rows(rows)), first.job.known.fingerprint, tmp_path / "out")
    assert not start(tmp_path).job.known.profile, "neither energies nor times"
    fakes.facts = replace(FACTS, name="another GPU")
    other = start(tmp_path)
    assert not other.job.known.profile
    assert len(other.link.timetable.sweep.clocks_mhz) > 1


def test_a_profile_is_of_the_power_limit_that_it_was_measured_under(
    tmp_path: Path, fakes: type[FakeClockHelper]
) -> None:
    fakes.facts = replace(FACTS, enforced_limit_w=700.0)
    first = start(tmp_path)
    save_survey(Survey(profile(2), 83.0), first.job.known.fingerprint, tmp_path / "out")
    assert start(tmp_path).job.known.profile
    fakes.facts = replace(FACTS, enforced_limit_w=500.0)
    assert not start(tmp_path).job.known.profile


@pytest.mark.parametrize("facts", [None, DeviceFacts("test GPU", "GPU-0", False, (), False, "no permission", "", 1)])
def test_a_gpu_that_cannot_be_controlled_is_observed_and_the_others_are_told(
    tmp_path: Path, fakes: type[FakeClockHelper], facts: DeviceFacts | None, heard: pytest.LogCaptureFixture
) -> None:
    fakes.facts = facts
    made = start(tmp_path)
    reason = with_facts(Selection("nvml", "nvml:GPU-0", "test GPU"), facts).why_not
    assert reason
    assert made.helper is None
    assert made.link.timetable.sweep.clocks_mhz == ()
    assert made.link.trouble_reason == reason
    assert f"observing only, no clock will be set: {reason}" in heard.text
    assert fakes.started[0].calls[-1][0] == "close"


def test_with_the_backend_off_nothing_is_started_and_nobody_is_alarmed(
    tmp_path: Path, fakes: type[FakeClockHelper]
) -> None:
    made = start(tmp_path, gpu={"backend": "off"})
    assert fakes.started == []
    assert made.helper is None
    assert made.link.trouble_reason is None
    assert made.link.timetable.sweep.clocks_mhz == ()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"emulation": {"forward_time_s": [0.1], "backward_time_s": [0.1]}},
            r"perseus\.emulation\.forward_time_s: got 1 numbers; allowed: one per stage, 2 here",
        ),
        (
            {"profiling": {"warmup_steps": 1}},
            r"perseus\.profiling\.warmup_steps: got 1; allowed: a whole number from 2",
        ),
        (
            {"profiling": {"load": "missing.csv", "blocking_power_w": 1.0}},
            r"perseus\.profiling\.load: /.*/missing\.csv: cannot read the profile",
        ),
        (
            {"power_budget_groups_w": {"node 9": 400, "0,7-9": 400}},
            r'power budget of 0,7-9: got ranks "7-9"; allowed: 0 to \d+, rising',
        ),
        ({"output_dir": "/dev/null/out"}, r"perseus\.output_dir: got '/dev/null/out'; allowed: a folder that can"),
    ],
)
def test_what_does_not_fit_the_job_stops_it_before_it_starts(
    tmp_path: Path, fakes: type[FakeClockHelper], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, **more)


def test_a_profile_of_another_number_of_stages_is_refused(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    save_profile(profile(3), tmp_path / "profile.csv")
    with pytest.raises(ConfigError, match=r"with 3 stages; allowed: a profile of this job's 2 stages"):
        start(tmp_path, profiling={"load": str(tmp_path / "profile.csv"), "blocking_power_w": 83.0})


def test_a_loaded_profile_says_what_waiting_draws_or_the_configuration_does(
    tmp_path: Path, fakes: type[FakeClockHelper]
) -> None:
    path = tmp_path / "profile.csv"
    save_profile(profile(2), path)
    with pytest.raises(
        ConfigError, match=r"^perseus\.profiling\.blocking_power_w: missing; .*allowed: a number above 0"
    ):
        start(tmp_path, profiling={"load": str(path)})
    rows = [(s, kind, replace(m, blocking_power_w=60.0 + 10 * s)) for s, kind, m in profile(2).rows()]
    save_profile(Profile.from_rows(rows), path)
    survey = start(tmp_path, profiling={"load": str(path)}).job.known.survey
    assert survey is not None
    assert survey.profile.waiting_power(1, 1.0).lowest_w == 70.0
    assert survey.blocking_power_w == pytest.approx(65.0)


def test_a_wrong_setting_found_late_leaves_no_helper_behind(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    with pytest.raises(ConfigError):
        start(tmp_path, profiling={"warmup_steps": 0})
    for helper in fakes.started:
        assert helper.calls[-1][0] == "close"


def test_who_gives_up_while_the_helper_starts_leaves_none_behind(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    class Interrupted(fakes):  # type: ignore[misc,valid-type]
        def wait_ready(self, timeout_s: float) -> DeviceFacts | None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(parse_config(block(tmp_path)), placement(), exchange=LocalExchange(), start_helper=Interrupted.start)
    (helper,) = fakes.started
    assert helper.calls[-1][0] == "close"


class NoEvents(str):
    """A device on which boundaries cannot be told: a session is the last that asks of which sort it is."""

    def startswith(self, prefix: str | tuple[str, ...], *more: Any) -> bool:
        if prefix == "cuda":
            raise OSError("no event could be made")
        return super().startswith(prefix, *more)


def test_a_session_that_cannot_be_built_leaves_nothing_running(
    tmp_path: Path, fakes: type[FakeClockHelper], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    tried = "perseus_plugin.planning.planner"  # before anything is built
    python.write_text(f'#!/bin/sh\n[ "$2" = {tried} ] || cat\n')
    python.chmod(0o755)
    publisher = InMemoryPublisher()
    monkeypatch.setattr(publishers_module, "PUBLISHERS", [lambda config, facts: publisher])
    with pytest.raises(OSError, match="no event could be made"):
        start_session(
            parse_config(block(tmp_path, planner={"python": str(python)})),
            placement(world_size=1).model_copy(update={"device": NoEvents("cpu")}),
            exchange=LocalExchange(),
            start_helper=fakes.start,  # type: ignore[arg-type]
        )
    assert not processes_naming(str(python), ["perseus_plugin.planning.process"])
    assert publisher.closed
    (helper,) = fakes.started
    assert [what for what, _ in helper.calls][-2:] == ["request", "close"], "full clocks first"


def test_a_kept_iteration_of_the_sweep_knows_its_clock(rank: Rank) -> None:
    directives = [rank.iterate().directive for _ in range(4)]  # type: ignore[union-attr]
    assert directives[2] == Sweep(0, 1410, kept=True)


# What no sweep could lead to.


@pytest.mark.parametrize(
    ("facts", "profiling", "text"),
    [
        ({"clocks_mhz": (1410,)}, {}, "there is nothing to choose between its SM clocks (1410 MHz)"),
        ({"counter": "the energy counter did not move within 1.5 s"}, {}, "so no energies can be measured"),
        ({}, {"clocks_mhz": [1400, 1390]}, "[1400, 1390] are all 1410 MHz on this GPU"),
    ],
)
def test_what_cannot_be_planned_for_is_said_before_any_sweep(
    tmp_path: Path,
    fakes: type[FakeClockHelper],
    caplog: pytest.LogCaptureFixture,
    facts: dict[str, Any],
    profiling: dict[str, Any],
    text: str,
) -> None:
    fakes.facts = replace(FACTS, **facts)
    made = start(tmp_path, profiling=profiling)
    assert made.link.timetable.sweep.clocks_mhz == ()
    assert made.helper is None
    assert [call[0] for call in fakes.started[0].calls] == ["start", "close"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("observing only, no clock will be set: ")
    assert text in line


def test_a_sweep_that_came_to_nothing_is_not_repeated(
    tmp_path: Path, fakes: type[FakeClockHelper], caplog: pytest.LogCaptureFixture
) -> None:
    first = start(tmp_path)
    profiling = parse_config(block(tmp_path)).profiling
    save_failure("no energy was measured", profiled_as(profiling, first.job.known.fingerprint), tmp_path / "out")
    again = start(tmp_path)
    assert again.helper is None
    assert again.link.timetable.sweep.clocks_mhz == ()
    assert (
        "observing only, no clock will be set: an earlier sweep of this job came to nothing: no energy" in caplog.text
    )
    assert "profile-failed.json to try again" in caplog.text
    assert start(tmp_path, profiling={"steps_per_clock": 9}).helper is not None, "profiled another way it may succeed"


def test_with_a_profile_no_energy_need_be_measured(tmp_path: Path, fakes: type[FakeClockHelper]) -> None:
    save_profile(profile(2), tmp_path / "p.csv")
    fakes.facts = replace(FACTS, counter="the energy counter cannot be read (not supported)")
    made = start(tmp_path, profiling={"load": str(tmp_path / "p.csv"), "blocking_power_w": 80.0})
    assert made.helper is not None


# Schedules that change with every iteration.


def test_at_one_clock_iterations_are_undisturbed_whatever_their_schedule(rank: Rank) -> None:
    disturbed = []
    for key in "ABABABA":
        finished = rank.iterate(key)
        assert finished is not None
        disturbed.append(not finished.record.undisturbed)
    assert disturbed == [True, True, False, False, True, False, False], "only the first of its sort follows a change"
    assert rank.helper.requests()[-1] == 810


def test_under_a_set_of_plans_each_schedule_follows_its_own(rank: Rank) -> None:
    rank.follow(1, first=0)
    (part,) = rank.link.parts.values()
    other = part.model_copy(update={"version": 2, "schedule": "B", "clocks_mhz": (1410, 1110)})
    rank.link.use_parts({(1, "A"): part, (1, "B"): other})
    asked, undisturbed = [], []
    for key in "ABBAC":
        finished = rank.iterate(key)
        assert finished is not None
        asked.append(rank.helper.requests())
        undisturbed.append(finished.record.undisturbed)
    assert asked == [[810, 1410], [1410, 1110], [1410, 1110], [810, 1410], [None]]
    assert undisturbed == [False, True, True, True, False], "the last one has no plan: it is none under the plans"
    finished = rank.iterate("A")
    assert finished is not None
    assert finished.record.undisturbed, "the one before it has left the clock as one under a plan does"


@pytest.mark.parametrize("enabled", [True, False])
def test_all_objects_are_looked_through_before_training_unless_the_job_has_turned_that_off(
    tmp_path: Path, enabled: bool
) -> None:
    seen: list[int] = []

    def note(phase: str, facts: dict[str, int]) -> None:
        if phase == "stop" and facts["generation"] == 2:
            seen.append(facts["collected"])

    config = parse_config({"output_dir": str(tmp_path), "gpu": {"backend": "off"}})
    gc.callbacks.append(note)
    try:
        if not enabled:
            gc.disable()
        session = start_session(config, placement(world_size=1), exchange=LocalExchange())
        assert bool(seen) == enabled
        assert gc.isenabled() == enabled
        session.close()
    finally:
        gc.enable()
        gc.callbacks.remove(note)


# Several sessions in one process.

TWO_SESSIONS = """
import json, sys
from pathlib import Path
from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.session.start import start_session

out = Path(sys.argv[1])
block = {
    "output_dir": str(out),
    "gpu": {"backend": "emulated"},
    "emulation": {"forward_time_s": [0.01, 0.01], "backward_time_s": [0.02, 0.02]},
}
place = Placement(rank=0, world_size=1, stage=0, stages=2, replica=0, local_rank=0, device="cpu")

def start():
    return start_session(parse_config(block), place)

first, second = start(), start()
print(first.folder == out, second.folder == out / "session-2")
print(first.controller is not None, second.controller is not None)
first.close()
third = start()
print(third.folder == out, third.controller is not None)
second.close()
third.close()
print(json.loads((out / "summary.json").read_text())["state"])
start()
raise KeyError("the script's own")
"""


def test_sessions_of_one_process_have_folders_of_their_own_and_one_controls_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_SESSIONS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split("\n") == ["True True", "True False", "True True", "finished", ""], done.stderr
    assert "another session of this process controls this GPU" in done.stderr
    assert "another job" not in done.stderr
    assert (tmp_path / "session-2" / "summary.json").is_file()
    assert (tmp_path / "session-2" / "records" / "rank-0.jsonl").is_file()
    assert json.loads((tmp_path / "session-2" / "summary.json").read_text())["state"] == "finished"
    assert json.loads((tmp_path / "summary.json").read_text())["state"] == "crashed"


# A script that changes its folder.

ELSEWHERE = """
import os, sys
from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.session.start import start_session

block = {
    "output_dir": "../job/out",
    "gpu": {"backend": "emulated"},
    "emulation": {"forward_time_s": [0.01], "backward_time_s": [0.02]},
    "prometheus": {"textfile": "metrics.prom"},
}
place = Placement(rank=0, world_size=1, stage=0, stages=1, replica=0, local_rank=0, device="cpu")
session = start_session(parse_config(block), place)
os.chdir(sys.argv[1])
for _ in range(3):
    session.begin_iteration()
    session.end_iteration()
session.close()
"""


def test_all_files_are_where_the_job_began_wherever_the_script_goes(tmp_path: Path) -> None:
    begun, gone = tmp_path / "job", tmp_path / "gone"
    begun.mkdir()
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(gone)],
        cwd=begun,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" not in done.stderr
    assert not list(gone.iterdir())
    assert (begun / "out" / "records" / "rank-0.jsonl").is_file()
    assert json.loads((begun / "out" / "summary.json").read_text())["state"] == "finished"
    assert not (begun / "out" / "stragglers.sock").exists()
