"""Tables of operations: what is read of them, and what is refused."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perseus_plugin.cli.simulation.traces.command import is_trace
from perseus_plugin.cli.simulation.traces.findings import explained, faulty_replicas, spreads, stragglers
from perseus_plugin.cli.simulation.traces.table import is_table, load_table
from perseus_plugin.cli.simulation.traces.traced import GivenSchedule
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from tests.cli.simulation.traces.made import rows_of, uneven, write_table


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved-1f1b"])
def test_schedule_durations_and_places_are_found(tmp_path: Path, schedule: str) -> None:
    path = write_table(tmp_path / "ops.csv.gz", rows_of(uneven, schedule=schedule, stages=4, microbatches=8))
    assert is_table(path)
    job = load_table(path)
    assert (job.schedule, job.stages, job.microbatches, job.in_order) == (schedule, 4, 8, 1.0)
    assert (job.steps, job.replicas, job.left_out) == (tuple(range(6)), (0, 1), ())
    for node, one in enumerate(job.graph.instructions):
        assert one is not None
        for step in range(6):
            for replica in range(2):
                wanted = uneven(step, replica, one.stage, one.kind, one.microbatch)
                assert job.durations_s[step, replica, node] == pytest.approx(wanted)


def test_parquet_is_read_as_the_same_table_as_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    csv_path = write_table(tmp_path / "ops.csv", rows_of(uneven))
    path = tmp_path / "ops.parquet"
    # Python reads the floats: older releases of pandas get some a last digit wrong.
    pandas.read_csv(csv_path, converters=dict.fromkeys(("duration", "start_ts"), float)).to_parquet(path)
    assert is_trace([path])
    job, same = load_table(path), load_table(csv_path)
    assert (job.schedule, job.steps, job.replicas) == (same.schedule, same.steps, same.replicas)
    assert np.array_equal(job.durations_s, same.durations_s)
    assert np.array_equal(job.times_s, same.times_s)
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"ops\.parquet: cannot be read"):
        load_table(path)


def test_without_pandas_parquet_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"needs pandas, .*perseus-plugin\[parquet\]"):
        load_table(path)


def test_ranks_that_do_the_same_work_are_averaged(tmp_path: Path) -> None:
    rows = rows_of(uneven, replicas=1)
    twins = [{**row, "rank": 100, "duration": 3 * float(row["duration"])} for row in rows if row["mb_id"] != -1]
    job = load_table(write_table(tmp_path / "ops.csv", rows + twins))
    alone = load_table(write_table(tmp_path / "alone.csv", rows))
    assert np.allclose(job.durations_s, 2 * alone.durations_s)


def test_a_table_without_starts_is_in_the_order_of_its_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rows_of(uneven, stages=4, transfer_s=0.001)
    without = [{k: v for k, v in row.items() if k not in ("start_ts", "mc", "rank")} for row in rows]
    job = load_table(write_table(tmp_path / "ops.csv", sorted(without, key=lambda row: row["step"])))
    assert job.schedule == "1f1b"
    assert np.isnan(job.times_s).all()


def test_a_step_that_lacks_something_is_left_out(tmp_path: Path) -> None:
    rows = rows_of(uneven)
    rows = [row for row in rows if not (row["step"] == 2 and row["mb_id"] == 3 and row["stage"] == 1)]
    rows = [row for row in rows if not (row["step"] == 4 and row["dp_rank"] == 1)]
    job = load_table(write_table(tmp_path / "ops.csv", rows))
    assert (job.steps, job.left_out) == ((0, 1, 3, 5), (2, 4))


def test_a_step_in_which_a_replica_takes_no_time_is_left_out(tmp_path: Path) -> None:
    rows = rows_of(uneven)
    idle = [{**row, "duration": 0.0} if (row["step"], row["dp_rank"]) == (2, 1) else row for row in rows]
    job = load_table(write_table(tmp_path / "ops.csv", idle))
    assert (job.steps, job.left_out) == ((0, 1, 3, 4, 5), (2,))
    assert explained(job).error_worst < 0.01


def test_an_iteration_that_is_lost_in_the_float_of_its_starts_is_not_timed(tmp_path: Path) -> None:
    rows = [{**row, "start_ts": 1e6, "duration": 1e-12} for row in rows_of(uneven) if row["mb_id"] != -1]
    job = load_table(write_table(tmp_path / "ops.csv", rows), GivenSchedule("1f1b", SCHEDULES["1f1b"]))
    assert np.isnan(job.times_s).all()


def test_the_graph_finds_transfers_and_what_is_there_once(tmp_path: Path) -> None:
    rows = rows_of(uneven, stages=4, microbatches=8, transfer_s=0.01, end_s=0.2)
    explains = explained(load_table(write_table(tmp_path / "ops.csv", rows)))
    assert explains.transfer_s == pytest.approx(0.01, rel=0.05)
    assert explains.end_s == pytest.approx(0.2, rel=0.05)
    assert explains.error_worst < 0.002


def test_who_is_slow_is_found(tmp_path: Path) -> None:
    def slow(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        factor = 2.0 if (replica, stage, kind) == (2, 1, "backward") else 1.0
        return factor * uneven(step, 0, stage, kind, microbatch)

    job = load_table(write_table(tmp_path / "ops.csv", rows_of(slow, replicas=4)))
    found = stragglers(job, explained(job))
    assert (found.sort, found.slowest, found.work) == ("same", {2: 1.0}, (1, "backward"))
    (one,) = found.stages
    assert (one.replica, one.stage, one.steps, one.lasts) == (2, 1, 1.0, True)
    assert one.kinds == {"forward": pytest.approx(1.0), "backward": pytest.approx(2.0)}
    assert faulty_replicas(job).tolist() == [False, False, True, False]


def test_stragglers_that_change_are_rotating_and_equals_are_none(tmp_path: Path) -> None:
    def rotating(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        return (1.5 if step % 4 == replica else 1.0) * uneven(step, 0, stage, kind, microbatch)

    job = load_table(write_table(tmp_path / "ops.csv", rows_of(rotating, replicas=4, steps=8)))
    found = stragglers(job, explained(job))
    assert (found.sort, sorted(found.slowest)) == ("rotating", [0, 1, 2, 3])
    assert found.behind == pytest.approx(0.5)
    assert not any(stage.lasts for stage in found.stages)
    assert not faulty_replicas(job).any()
    alike = load_table(write_table(tmp_path / "alike.csv", rows_of(lambda *where: 0.1, replicas=4)))
    assert stragglers(alike, explained(alike)).sort == "none"


def test_spread_within_an_iteration_is_apart_from_that_between_iterations(tmp_path: Path) -> None:
    rows = rows_of(lambda step, replica, stage, kind, m: (1 + step) * (0.1 if m % 2 else 0.3 if stage else 0.1))
    first, second = (
        next(
            one
            for one in spreads(load_table(write_table(tmp_path / "o.csv", rows)))
            if (one.stage, one.kind) == (s, "forward")
        )
        for s in (0, 1)
    )
    assert first.within == pytest.approx(0.0, abs=1e-9)
    assert first.p90_s > 2 * first.p10_s
    assert second.within == pytest.approx(0.5)


def test_a_schedule_that_is_given_is_taken_and_an_unknown_order_needs_one(tmp_path: Path) -> None:
    rows = rows_of(uneven, stages=4)
    for row in rows:
        if row["mb_id"] != -1:
            row["start_ts"] = -float(row["start_ts"])
    path = write_table(tmp_path / "ops.csv", rows)
    with pytest.raises(ConfigError, match=r"--schedule: missing; ops\.csv has 4 stages and 4 microbatches"):
        load_table(path)
    given = GivenSchedule("mine", SCHEDULES["1f1b"])
    job = load_table(path, given)
    assert (job.schedule, job.in_order) == ("mine", 0.0)
    with pytest.raises(ConfigError, match="--schedule: got 3 stages; allowed: the 4"):
        load_table(path, GivenSchedule("mine", lambda stages, microbatches: SCHEDULES["1f1b"](3, microbatches)))


def test_all_chunks_of_a_table_have_a_place_in_the_schedule_that_is_given(tmp_path: Path) -> None:
    path = write_table(tmp_path / "ops.csv", rows_of(uneven, replicas=1, chunk_times=(1.0, 1.0, 1.0, 2.0)))
    found = load_table(path)
    interleaved = GivenSchedule("interleaved-1f1b", SCHEDULES["interleaved-1f1b"], OF_CHUNKS["interleaved-1f1b"])
    for given, chunks in ((None, 4), (interleaved, None), (interleaved, 4)):
        job = load_table(path, given, chunks)
        assert (job.schedule, job.in_order) == ("interleaved-1f1b", 1.0)
        assert np.array_equal(job.durations_s, found.durations_s)
    for given in (None, interleaved):
        with pytest.raises(ConfigError, match=r"--chunks: got 2; allowed: 4, as ops\.csv has"):
            load_table(path, given, 2)
    for schedule, got in (("zbv", "2 chunks"), ("gpipe", "1 chunk")):
        with pytest.raises(ConfigError, match=rf"--schedule: got {got}; allowed: the 4 of ops\.csv"):
            load_table(path, GivenSchedule(schedule, SCHEDULES[schedule]))


def test_no_work_is_left_out_of_the_schedule_that_is_given(tmp_path: Path) -> None:
    path = write_table(tmp_path / "ops.csv", rows_of(uneven, schedule="early-recomputation-1f1b"))
    with pytest.raises(ConfigError, match=r"got 1f1b, which has no recompute of microbatch 0 and chunk 0 in stage 0; "):
        load_table(path, GivenSchedule("1f1b", SCHEDULES["1f1b"]))
    fewer = SCHEDULES["early-recomputation-1f1b"](2, 3)
    with pytest.raises(ConfigError, match=r"--schedule: got 3 microbatches; allowed: the 4 of ops\.csv"):
        load_table(path, GivenSchedule("mine", lambda stages, microbatches: fewer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": "-1"}, r"line 2: duration: got '-1'; allowed: a number from 0 to 1e\+06"),
        ({"duration": "nan"}, "line 2: duration: got 'nan'"),
        ({"stage": "x"}, "line 2: stage: got 'x'"),
        ({"mb_id": "1000000000"}, "got 5 microbatches up to number 1000000000; allowed: all from 0"),
        ({"stage": "9000"}, "got 3 stages up to number 9000; allowed: all from 0"),
        ({"step": "1e99"}, "line 2: step: got '1e99'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rows = rows_of(uneven)
    rows[0].update(change)
    with pytest.raises(ConfigError, match=message):
        load_table(write_table(tmp_path / "ops.csv", rows))


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv.gz"
    path.write_bytes(gzip.compress(b"stage,step\n0,0\n"))
    assert not is_table(path)
    with pytest.raises(ConfigError, match="dp_rank: missing; allowed: a table with the columns dp_rank, stage"):
        load_table(path)
    path.write_bytes(gzip.compress(b"\xff\xfe"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_table(path)
    path.write_bytes(b",".join(name.encode() for name in ("dp_rank", "stage", "step", "optype", "mb_id", "duration")))
    with pytest.raises(ConfigError, match="got no iteration; allowed"):
        load_table(path)
    path.write_bytes(path.read_bytes() + b"\n0,0\n")
    with pytest.raises(ConfigError, match="line 2: got 2 columns; allowed: the 6 of line 1"):
        load_table(path)
