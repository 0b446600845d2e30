"""What a rank's worker leaves in the output folder for `perseus report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perseus_plugin.iteration.timetable import Follow, FullClock
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.reporting.record.recorder import record_path
from perseus_plugin.reporting.record.records import RankRecord, load_record
from tests.factories import stream_of
from tests.session.test_worker import TABLE, Ranks, heard, publish_news, ranks
from tests.waiting import came_true

__all__ = ["heard", "ranks"]  # fixtures


def read(folder: Path, rank: int = 1) -> RankRecord:
    return load_record(folder, rank)


def test_every_iteration_is_recorded_with_its_energy(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    assert came_true(lambda: record_path(ranks.folder, 1).exists() and len(read(ranks.folder).stretches) == 10)
    record = read(ranks.folder)
    assert [s.sort.state for s in record.stretches] == ["warm-up", *["profiling"] * 9]
    assert [s.sort.clock_mhz for s in record.stretches] == [0, *[1410] * 3, *[810] * 3, *[1410] * 3]
    assert [s.energy_j for s in record.stretches] == pytest.approx([9.0] * 10)
    assert [s.time_s for s in record.stretches] == pytest.approx([0.036] * 10)
    assert record.header.gpu == "test GPU"


def test_a_rank_without_control_records_times(ranks: Ranks) -> None:
    rank = ranks(with_helper=False)
    rank.iterate(3)
    assert came_true(lambda: record_path(ranks.folder, 1).exists() and len(read(ranks.folder).stretches) == 3)
    assert [s.read for s in read(ranks.folder).stretches] == [0, 0, 0]


def test_on_a_gpu_whose_clock_another_session_sets_nothing_counts_as_full_clocks(ranks: Ranks) -> None:
    """That session may hold any clock between its own iterations."""
    rank = ranks(rank=0, world_size=1, with_helper=False, busy=True)
    rank.iterate(3, directive=FullClock("observing"))
    rank.close()
    assert {s.sort.state for s in read(ranks.folder, 0).stretches} == {"unknown"}
    summary = json.loads((ranks.folder / "summary.json").read_text())
    assert summary["iterations"]["full_clock"] == 0
    assert summary["iteration_time_s"]["full_clock"] is None
    assert read(ranks.folder, 0).samples == ()


def test_planned_iterations_are_kept_whole_with_the_clocks_of_the_plan(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    publish_news(rank.exchange, sequence=1, switch=12, action="follow", version=3)
    assert came_true(lambda: rank.link.timetable.at(12) == Follow(3))
    rank.iterate(2)
    assert came_true(lambda: rank.helper.polling[-1] is None)
    rank.iterate(1)
    assert came_true(lambda: rank.helper.polling[-1] == 0.005), "the counter is polled for iteration 14"
    rank.iterate(2)
    rank.close()
    full, planned = read(ranks.folder).samples
    assert (full.number, full.state) == (9, "full")
    assert (planned.number, planned.state, planned.plan) == (14, "plan", 3)
    assert [one.asked_mhz for one in planned.operations] == [0, 810, 1410, 0]
    assert [(one.name, one.microbatch) for one in planned.instructions] == [("forward", 0), ("backward", 0)]


def test_rank_0_records_the_schedule(ranks: Ranks) -> None:
    rank = ranks(rank=0)
    rank.link.use_schedule("1F1B/2x3", stream_of(2, 3))
    rank.iterate(1)
    assert came_true((ranks.folder / "schedule.json").exists)
    assert load_streams(ranks.folder / "schedule.json") == [list(stream_of(2, 3)(stage)) for stage in range(2)]


def test_a_folder_that_cannot_be_written_does_not_end_the_session(ranks: Ranks) -> None:
    (ranks.folder / "records").write_text("in the way")
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    rank.fetch("estimate/0/1")
    assert rank.failures == []
