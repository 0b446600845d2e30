"""What plans are worth in traced jobs whose answer is known, and `perseus simulate` of them as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.cli.simulation.description import gpu_named, profile_on, waiting_on
from perseus_plugin.cli.simulation.traces.findings import explained
from perseus_plugin.cli.simulation.traces.table import load_table
from perseus_plugin.cli.simulation.traces.worth import Asked, Worth, mean_times_s, profile_from, worth
from perseus_plugin.errors import ConfigError
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import save_profile
from tests.cli.commands import Perseus
from tests.cli.simulation.traces.made import Duration, rows_of, uneven, write_table

GPU = gpu_named("a100")


def plain(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
    """Uneven stages, and nothing varies."""
    return uneven(0, 0, stage, kind, microbatch)


def slow_replica(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
    """The first stage of replica 1 is twice as slow."""
    return (2.0 if (replica, stage) == (1, 0) else 1.0) * plain(step, replica, stage, kind, microbatch)


def worth_of(folder: Path, duration: Duration, **size: Any) -> Worth:
    job = load_table(write_table(folder / "ops.csv", rows_of(duration, **size)))
    profile = profile_on(GPU, mean_times_s(job), waiting_on(GPU))
    return worth(job, explained(job), profile, Asked((GPU.blocking_w,) * job.stages))


def test_where_nothing_varies_the_bloat_is_what_the_planner_saves(tmp_path: Path) -> None:
    found = worth_of(tmp_path, plain)
    job = load_table(tmp_path / "ops.csv")
    planner = Planner(
        job.graph,
        profile_on(GPU, mean_times_s(job), waiting_on(GPU)),
        blocking_power_w=GPU.blocking_w,
        switch_latency_s=0.01,
    )
    plan = planner.plan(Target.slowdown(0.0))
    assert found.bloat.intrinsic.mean == pytest.approx(plan.saving, abs=0.003)
    assert found.bloat.full_j.mean == pytest.approx(plan.baseline_energy_j, rel=1e-3)
    assert found.bloat.extrinsic.mean == pytest.approx(0.0, abs=0.003)
    (static,) = found.rides
    assert static.saving.mean == pytest.approx(plan.saving, abs=0.01)
    assert static.time_ratio <= 1.002
    assert set(found.planned_on).isdisjoint(found.replayed_over)


def test_a_slow_replica_is_left_out_of_the_static_plan_and_answered_by_the_other(tmp_path: Path) -> None:
    found = worth_of(tmp_path, slow_replica, replicas=3)
    static, aware = found.rides
    assert found.left_out == (1,)
    assert found.bloat.extrinsic.low > 0.05
    assert (static.name, aware.name) == ("static", "straggler-aware")
    assert aware.full_j == pytest.approx(static.full_j, rel=1e-6)
    assert aware.saving.mean > static.saving.mean + 0.05
    assert aware.time_ratio <= 1.01
    # No plan that knows less removes more than plans for every single iteration.
    assert aware.saving.mean <= found.bloat.intrinsic.high + found.bloat.extrinsic.high + 0.005
    assert aware.clocks_mhz[0] == aware.clocks_mhz[2] != aware.clocks_mhz[1]


@pytest.mark.parametrize("chunk_times", [(0.2, 0.4), (0.4, 0.2)])
def test_chunks_of_one_replica_keep_their_own_times(tmp_path: Path, chunk_times: tuple[float, ...]) -> None:
    found = worth_of(tmp_path, plain, steps=2, replicas=1, microbatches=2, chunk_times=chunk_times)
    # A single replica waits for no other one, and at full clocks it draws the same however plans are made.
    assert found.bloat.extrinsic_j.mean == pytest.approx(0.0, abs=1e-6 * found.bloat.full_j.mean)
    assert found.bloat.full_j.mean == pytest.approx(found.rides[0].full_j, rel=0.01)


def test_a_replica_that_is_slow_by_chance_gets_no_plan_of_its_own(tmp_path: Path) -> None:
    def rotating(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        return (1.5 if step % 4 == replica else 1.0) * plain(step, replica, stage, kind, microbatch)

    found = worth_of(tmp_path, rotating, replicas=4, steps=12)
    assert [ride.name for ride in found.rides] == ["static"]
    assert found.bloat.extrinsic.low > 0.05


def test_few_steps_are_planned_and_replayed_alike(tmp_path: Path) -> None:
    found = worth_of(tmp_path, plain, steps=2, replicas=1)
    assert found.planned_on == found.replayed_over == (0, 1)


def test_a_profile_gives_the_curves_and_the_trace_the_times(tmp_path: Path) -> None:
    job = load_table(write_table(tmp_path / "ops.csv", rows_of(plain)))
    times_s = mean_times_s(job)
    measured = profile_on(GPU, dict.fromkeys(times_s, 3.0), waiting_on(GPU))
    made = profile_from(measured, times_s, "profile.csv")
    wanted = profile_on(GPU, times_s, waiting_on(GPU))
    for key, rows in wanted.table.items():
        for row, other in zip(rows, made.table[key], strict=True):
            assert (other.time_s, other.energy_j) == (pytest.approx(row.time_s), pytest.approx(row.energy_j))
    with pytest.raises(ConfigError, match=r"--profile: p\.csv has no row for 'backward' in stage 1"):
        profile_from(profile_on(GPU, {(0, "forward"): 1.0, (0, "backward"): 1.0}, waiting_on(GPU)), times_s, "p.csv")


def test_the_command_says_and_writes_what_it_found(perseus: Perseus, tmp_path: Path) -> None:
    table = write_table(tmp_path / "ops.csv.gz", rows_of(slow_replica, replicas=3, steps=2, end_s=0.1))
    out, perfetto = tmp_path / "out.json", tmp_path / "trace.json"
    done = perseus("simulate", table, "--gpu", "h100", "-o", out, "--perfetto", perfetto)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert (data["schema"], data["version"]) == ("perseus-trace-simulation", 1)
    assert (data["schedule"], data["stages"], data["microbatches"], data["replicas"]) == ("1f1b", 2, 4, [0, 1, 2])
    assert data["stragglers"]["sort"] == "same"
    assert data["stragglers"]["slowest"] == [[1, 1.0]]
    assert data["explained"]["end_s"] == pytest.approx(0.1, rel=0.01)
    static, aware = data["plans"]
    text = " ".join(done.stdout.split())
    for told in (
        f"{static['saving']['mean']:.2%} (",
        f"{aware['time_ratio'] - 1:+.2%}",
        f"{data['bloat']['extrinsic_j']['mean']:.1f} J",
        "emulated H100",
        "replica 1, stage 0: 2.00 times as long",
    ):
        assert told in text
    events = json.loads(perfetto.read_text())["traceEvents"]
    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [title.split(",")[0] for title in titles] == ["full clocks"] * 3 + ["straggler-aware plan"] * 3
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 3 * 2 * 8
    before, after = ([e for e in spans if (e["pid"] < 3) is first and e["tid"] == 1] for first in (True, False))
    assert sum(e["dur"] for e in before) < sum(e["dur"] for e in after)
    assert {event["pid"] for event in events if event["ph"] == "C"} == {3, 4, 5}


def test_a_profile_instead_of_a_gpu(perseus: Perseus, tmp_path: Path) -> None:
    table = write_table(tmp_path / "ops.csv", rows_of(plain, steps=2))
    times_s = mean_times_s(load_table(table))
    save_profile(profile_on(gpu_named("a40"), times_s, waiting_on(gpu_named("a40"))), tmp_path / "a40.csv")
    saved = []
    for number, options in enumerate((("--gpu", "a40"), ("--profile", tmp_path / "a40.csv"))):
        out = tmp_path / f"{number}.json"
        done = perseus("simulate", table, *options, "-o", out)
        assert done.returncode == 0, done.stderr
        saved.append(json.loads(out.read_text())["plans"][0]["saving"]["mean"])
    assert saved[0] == pytest.approx(saved[1], abs=1e-4)


def test_short_instructions_keep_a_clock_for_two_changes_unless_told_otherwise(
    perseus: Perseus, tmp_path: Path
) -> None:
    def short(*which: Any) -> float:
        return plain(*which) / 10

    table = write_table(tmp_path / "ops.csv", rows_of(short, steps=1, replicas=1))
    saved = []
    for number, options in enumerate(((), ("--min-dwell", 0.02), ("--min-dwell", 0))):
        out = tmp_path / f"{number}.json"
        done = perseus("simulate", table, *options, "-o", out)
        assert done.returncode == 0, done.stderr
        saved.append(json.loads(out.read_text())["plans"][0]["saving"]["mean"])
    assert saved[0] == saved[1] != saved[2]


def test_a_schedule_in_whose_order_nothing_ran_is_said_above_all_figures(perseus: Perseus, tmp_path: Path) -> None:
    table = write_table(tmp_path / "ops.csv", rows_of(plain, steps=1, replicas=1, schedule="gpipe"))
    done = perseus("simulate", table, "--schedule", "1f1b", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    told = "Only 0% of the iterations ran in the order of 1f1b"
    assert done.stdout.startswith(told)
    # What rounds to nothing, as the extrinsic bloat of a single replica, is not negative.
    assert "extrinsic bloat (a slower replica is waited for): 0.0 J (0.0 to 0.0), 0.00% (0.00% to 0.00%)" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert 0 < page.find(told) < page.find("static plan saves")


@pytest.mark.parametrize("with_starts", [True, False])
def test_instructions_that_take_no_time_are_refused_in_one_line(
    perseus: Perseus, tmp_path: Path, with_starts: bool
) -> None:
    rows = [{**row, "duration": 0.0} for row in rows_of(plain, steps=2)]
    if not with_starts:
        rows = [{name: value for name, value in row.items() if name != "start_ts"} for row in rows]
    done = perseus("simulate", write_table(tmp_path / "ops.csv", rows))
    assert done.returncode == 2
    assert "ops.csv: got instructions that all take 0 s, of replica 0; allowed" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--microbatches", "4"), "--microbatches: got [4]; allowed: nothing with a trace, which says it"),
        (("--chunks", "2"), "--chunks: got 2; allowed: 1, as ops.csv has"),
        (("--chunks", "1", "--schedule", "gpipe"), "--chunks: got 1 with gpipe; allowed: with interleaved-1f1b or"),
        (("--blocking-power", "60"), "--blocking-power: got 60; allowed: nothing without --profile"),
        (("--gpu", "a100", "--profile", "p.csv"), "--gpu: got ['a100']; allowed: nothing with --profile"),
        (("--gpu", "a100", "--gpu", "a40"), "--gpu: got 2 of them; allowed: one"),
        (("--gpu", "v9"), "--gpu: got 'v9'; allowed: a100"),
        (("--schedule", "none"), "--schedule: got 'none'; allowed: 1f1b"),
        (("-o", "out.csv"), "--output: got out.csv; allowed: a path that ends in .json"),
        (("more.csv",), "got 2 files; allowed: one table"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(
    perseus: Perseus, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = perseus("simulate", write_table(tmp_path / "ops.csv", rows_of(plain, steps=1)), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
