from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.control import wire
from perseus_plugin.exchange.messages import PlanPart
from perseus_plugin.iteration.timetable import WARM_UP as WARMING_UP
from perseus_plugin.iteration.timetable import Follow, FullClock, Round, Timetable
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.reporting.record import recorder as recorder_module
from perseus_plugin.reporting.record.iterations import FULL, PLAN, Sort
from perseus_plugin.reporting.record.recorder import Recorder, record_path, samples_path, schedule_path
from perseus_plugin.reporting.record.records import load_record
from tests.factories import placement, record, stream_of

TABLE = Timetable(Round(1, (1410,)), settle_steps=1, steps_per_clock=1).switched(4, Follow(1))
ABOUT: dict[str, Any] = {"gpu": "test GPU", "backend": "nvml", "emulated": False, "facts": {"model": "x"}}


def recorder(folder: Path, *, measures_energy: bool = True, enabled: bool = True) -> Recorder:
    return Recorder(folder, placement(1), ABOUT, measures_energy, enabled)


def run(made: Recorder, first: int, count: int, *, energies: bool = True, table: Timetable = TABLE) -> None:
    for number in range(first, first + count):
        seen = record(number, begin_s=100.0 + number)
        made.iteration(table.at(number), seen, table, {})
        if energies:
            made.energy(number, 10.0 + number)
        made.step()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step writes."""
    monkeypatch.setattr(recorder_module, "_WRITE_EVERY_S", 0.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record_path(folder, 1).read_text().splitlines()]


def test_the_record_is_there_before_the_first_iteration_and_grows_with_each(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    made.step()
    header = lines(tmp_path)[0]
    assert (header["schema"], header["version"]) == ("perseus-record", 1)
    assert header["placement"] == placement(1).model_dump()
    assert {name: header[name] for name in ABOUT} == ABOUT
    for number in range(5):
        run(made, number, 1)
        assert [row["first"] for row in lines(tmp_path)[1:]] == list(range(number + 1))
    assert [row["state"] for row in lines(tmp_path)[1:]] == ["warm-up", "profiling", "profiling", "full", "plan"]
    assert [row["energy_j"] for row in lines(tmp_path)[1:]] == [10.0, 11.0, 12.0, 13.0, 14.0]


def test_a_machine_s_name_need_not_be_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "caf\udce9")
    run(recorder(tmp_path), 0, 2)
    assert lines(tmp_path)[0]["host"] == r"caf\udce9"
    assert load_record(tmp_path, 1).header.host == r"caf\udce9"
    assert len(lines(tmp_path)) == 3


def test_lines_are_appended_not_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorder(tmp_path)
    run(made, 0, 1)
    written: list[Path] = []
    monkeypatch.setattr(recorder_module, "write_atomically", lambda path, text: written.append(path))
    run(made, 1, 2)
    assert written == []
    assert len(lines(tmp_path)) == 4


def test_a_long_run_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_MAX_STRETCHES", 20)
    made = recorder(tmp_path)
    run(made, 0, 500)
    made.step(final=True)
    read = load_record(tmp_path, 1)
    assert len(read.stretches) <= 20
    assert sum(stretch.count for stretch in read.stretches) == 500
    assert sum(stretch.count * stretch.energy_j for stretch in read.stretches) == pytest.approx(
        sum(10.0 + number for number in range(500))
    )


def test_an_energy_that_does_not_come_holds_up_nothing_for_long(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    run(made, 0, 1)
    run(made, 1, 1, energies=False)
    run(made, 2, 5)
    assert len(lines(tmp_path)) == 2
    run(made, 7, 12)
    rows = lines(tmp_path)[1:]
    assert rows[1]["energy_j"] is None
    assert rows[2]["energy_j"] == 12.0


def test_without_a_counter_iterations_have_no_energy(tmp_path: Path) -> None:
    made = recorder(tmp_path, measures_energy=False)
    run(made, 0, 2, energies=False)
    assert [row["energy_j"] for row in lines(tmp_path)[1:]] == [None, None]


def test_at_the_end_everything_is_written(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    run(made, 0, 7, energies=False)
    assert len(lines(tmp_path)) == 1
    made.step(final=True)
    assert len(lines(tmp_path)) == 8
    assert [one.number for one in load_record(tmp_path, 1).samples] == [2, 6]


def test_samples_hold_what_the_helper_told(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    made.helper_event(wire.Applied(1, 810, 102.0, 0.0, 102.0, 102.001))
    made.helper_event(wire.Applied(2, None, 102.0, 0.0, 102.0, 102.002))
    made.helper_event(wire.Tick(102.0, 102.005, 7.0, 815, 0.0))
    made.helper_event(wire.Mark(1, 102.006, 8.0, 1, 0.0))
    run(made, 0, 3)
    made.step(final=True)
    sample = load_record(tmp_path, 1).samples[0]
    assert [request.clock_mhz for request in sample.requests] == [810, 0]
    assert [(reading.clock_mhz, reading.energy_j) for reading in sample.readings] == [(815, 0.0)]


def test_deviations_are_recorded_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_DEVIATIONS", 3)
    made = recorder(tmp_path)
    for number in range(9):
        made.helper_event(wire.Deviation(50.0 + number, 1110, 900))
        made.step()
    assert [(d.asked_mhz, d.read_mhz) for d in load_record(tmp_path, 1).deviations] == [(1110, 900)] * 3


def test_the_counter_is_polled_for_iterations_kept_whole_only(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    assert [number for number in range(4, 16) if made.wants_readings(TABLE, number)] == [5, 6, 7, 8, 11, 12]
    assert not recorder(tmp_path, enabled=False).wants_readings(TABLE, 6)


def test_rank_0_writes_the_schedule(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    made.use_schedule("1F1B", stream_of(2, 3), 2)
    assert load_streams(tmp_path / "schedule.json") == [list(stream_of(2, 3)(stage)) for stage in range(2)]


def test_a_run_does_not_inherit_what_an_earlier_one_kept(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    run(first, 0, 7)
    first.step(final=True)
    assert samples_path(tmp_path, 1).exists()
    recorder(tmp_path).step()
    assert not samples_path(tmp_path, 1).exists()
    assert len(lines(tmp_path)) == 1


def test_nothing_is_written_when_turned_off(tmp_path: Path) -> None:
    made = recorder(tmp_path, enabled=False)
    made.use_schedule("1F1B", stream_of(2, 3), 2)
    run(made, 0, 7)
    made.step(final=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "perseus_plugin")
    (tmp_path / "records").write_text("in the way")
    made = recorder(tmp_path)
    run(made, 0, 7)
    made.step(final=True)
    assert [message for message in caplog.messages if "nothing more is recorded" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_iterations_that_could_not_follow_their_plan_ran_at_full_clocks(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    part = PlanPart(version=1, schedule="other", clocks_mhz=(810, 810), times_s=(0.01, 0.02))
    seen_parts: list[dict[tuple[int, str], PlanPart]] = [{(1, "other"): part}, {}, {(1, "1F1B"): part}]
    for number, parts in enumerate(seen_parts, 4):
        seen = record(number, begin_s=100.0 + number)
        seen.applied = number == 6
        made.iteration(Follow(1), seen, TABLE, parts)
    made.step(final=True)
    read = load_record(tmp_path, 1)
    assert [stretch.sort for stretch in read.stretches] == [
        Sort(FULL, reason="there was no plan for this schedule", schedule="1F1B"),
        Sort(FULL, reason="plan 1 was not there yet", schedule="1F1B"),
        Sort(PLAN, plan=1, schedule="1F1B"),
    ]
    assert [(s.state, s.operations[1].asked_mhz) for s in read.samples] == [("plan", 810)]


def test_a_sample_of_a_plan_that_was_not_followed_asked_for_no_clock(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    seen = record(6, begin_s=106.0)
    seen.applied = False
    part = PlanPart(version=1, schedule="other", clocks_mhz=(810, 810), times_s=(0.01, 0.02))
    made.iteration(Follow(1), seen, TABLE, {(1, "other"): part})
    made.step(final=True)
    (sample,) = load_record(tmp_path, 1).samples
    assert sample.state == "full"
    assert {one.asked_mhz for one in sample.operations} == {0}


def test_lines_are_written_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_WRITE_EVERY_S", 3600.0)
    monkeypatch.setattr(recorder_module, "_MAX_STRETCHES", 8)
    made = recorder(tmp_path)
    made.step()
    assert len(lines(tmp_path)) == 1, "the header is written at once"
    run(made, 0, 50)  # neighbours are joined meanwhile
    assert len(lines(tmp_path)) == 1
    made.step(final=True)
    assert sum(stretch.count for stretch in load_record(tmp_path, 1).stretches) == 50


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("iteration", (FullClock("planning"), None, TABLE, {})),
        ("energy", ([], 1.0)),
        ("helper_event", (wire.Deviation(None, 1, 1),)),  # type: ignore[arg-type]
        ("wants_readings", (None, 1)),
        ("use_schedule", ("key", None, 2)),
    ],
)
def test_a_fault_ends_recording_with_one_line_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, arguments: tuple[Any, ...]
) -> None:
    caplog.set_level(logging.WARNING, "perseus_plugin")
    made = recorder(tmp_path)
    assert not getattr(made, name)(*arguments)
    assert not getattr(made, name)(*arguments)
    run(made, 0, 3)
    assert len(caplog.messages) == 1
    assert "nothing more is recorded, training goes on" in caplog.messages[0]
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_writing_ends_recording_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "perseus_plugin")
    made = recorder(tmp_path)
    monkeypatch.setattr(made, "_settle", lambda final: 1 // 0)
    made.step()
    made.step(final=True)
    assert len(caplog.messages) == 1


def test_every_schedule_that_ran_is_kept(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    for key, microbatches in (("Train/2x3", 3), ("Train/2x5", 5), ("Train/2x3", 3)):
        made.use_schedule(key, stream_of(2, microbatches), 2)
    for key, microbatches in (("Train/2x3", 3), ("Train/2x5", 5)):
        kept = load_streams(schedule_path(tmp_path, key))
        assert kept == [list(stream_of(2, microbatches)(stage)) for stage in range(2)]
    assert load_streams(tmp_path / "schedule.json") == load_streams(schedule_path(tmp_path, "Train/2x3"))


def test_an_iteration_without_an_end_is_left_out(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    seen = record(0)
    seen.end_s = float("nan")
    made.iteration(WARMING_UP, seen, TABLE, {})
    made.step(final=True)
    assert len(lines(tmp_path)) == 1
