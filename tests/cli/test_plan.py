"""`perseus plan` and `perseus frontier` as a user runs them."""

from __future__ import annotations

import ast
import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.cli import destinations
from perseus_plugin.cli.plan import cost_of_limits
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.plan import load_plan
from perseus_plugin.planning.planner import make_plan
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Prices, Target
from perseus_plugin.profiling.profile import Profile, save_profile
from tests.cli.commands import Perseus
from tests.iteration.pytorch_schedules import lists_of
from tests.planning.jobs import bundled_profile


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    save_profile(bundled_profile(2), tmp_path / "profile.csv")
    return tmp_path / "profile.csv"


def test_a_plan_is_made_printed_and_written(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out, zeus = tmp_path / "plan.json", tmp_path / "plan.py"
    done = perseus(
        "plan", profile, "--microbatches", 4, "--blocking-power", "60,70", "--scale", 10, "-o", out, "--zeus", zeus
    )
    assert done.returncode == 0, done.stderr
    plan = load_plan(out)
    assert plan.schedule == "1f1b"
    assert plan.microbatches == 4
    assert plan.iteration_time_s <= plan.baseline_time_s
    assert f"{plan.saving:.3%}" in done.stdout
    assert [len(stage) for stage in ast.literal_eval(zeus.read_text())] == [8, 8]


def test_the_other_targets_and_limits(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    job = (profile, "--microbatches", 4, "--blocking-power", 60, "-o", out)
    assert perseus("plan", *job, "--cheapest").returncode == 0
    cheapest = load_plan(out)
    done = perseus("plan", *job, "--slowdown", 0.05, "--max-changes", 2)
    assert done.returncode == 0
    assert "cost of the limits" in done.stdout
    limited = load_plan(out)
    assert max(limited.clock_changes(stage) for stage in range(2)) <= 2
    assert cheapest.energy_j <= limited.energy_j


def test_limits_cost_of_what_the_target_is_to_have_least_of() -> None:
    fast = make_plan(
        build_graph(one_f_one_b(2, 4)), bundled_profile(2), target=Target.slowdown(0.0), blocking_power_w=60.0
    )
    slow = replace(fast, iteration_time_s=fast.iteration_time_s + 0.25, energy_j=fast.energy_j - 10.0)
    budget = Target.power_budget(PowerBudget(job_w=1000.0))
    money = Target.money(Prices(per_kwh=3.6, per_gpu_hour=3.6))
    for target, costs, gains in (
        (Target.slowdown(0.1), "10.000 J", "0.000 J"),
        (Target.cheapest(), "10.000 J", "0.000 J"),
        (Target.energy_budget(500.0), "0.000000 s", "0.250000 s"),
        (budget, "0.000000 s", "0.250000 s"),
        (money, "0.0000 per 1,000 iterations", "0.4900 per 1,000 iterations"),
    ):
        assert cost_of_limits(target, fast, slow) == costs
        assert cost_of_limits(target, slow, fast) == gains


def test_a_plan_for_a_graph_is_chosen_for_how_durations_vary(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    job = ("plan", profile, "--microbatches", 3, "--blocking-power", 60, "-o", out, "--cuda-graph")
    done = perseus(*job, "3%")
    assert done.returncode == 0, done.stderr
    assert "as one CUDA graph: saving" in done.stdout
    assert "chosen: margin" in done.stdout
    within = perseus(*job, "3%", "--power-budget", "450W").stdout
    assert "as one CUDA graph: saving" in within
    assert "chosen" not in within, "a budget is kept by power"
    assert load_plan(out).waits == ()
    assert "allowed: from 0 to 0.2" in perseus(*job, "0.5").stderr
    assert "got measured; allowed: with a profile" in perseus(*job, "measured").stderr


def test_an_interleaved_schedule_takes_any_number_of_chunks(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    job = (profile, "--microbatches", 4, "--blocking-power", 60, "--schedule", "interleaved-1f1b")
    assert perseus("plan", *job, "--chunks", 3, "--scale", 1 / 3, "-o", out).returncode == 0
    plan = load_plan(out)
    assert [len(stage) for stage in plan.stages] == [24, 24]
    written = tmp_path / "out.csv"
    assert perseus("simulate", *job, "--chunks", 3, "-o", written).returncode == 0
    (row,) = csv.DictReader(written.open())
    assert float(row["energy_j"]) == pytest.approx(plan.energy_j)
    for command in ("plan", "simulate", "frontier"):
        refused = perseus(command, profile, "--microbatches", 4, "--blocking-power", 60, "--chunks", 3)
        assert refused.returncode == 2
        assert "--chunks: got 3 with 1f1b; allowed: with interleaved-1f1b or interleaved-zero-bubble" in refused.stderr


def test_clocks_are_kept_for_two_changes_where_instructions_are_shorter(
    perseus: Perseus, profile: Path, tmp_path: Path
) -> None:
    out, written = tmp_path / "plan.json", tmp_path / "out.csv"
    job = (profile, "--microbatches", 8, "--blocking-power", 60, "--scale", 0.1)
    most = {}
    for options in ([], ["--min-dwell", 0.02], ["--min-dwell", 0], ["--switch-latency", 0.002]):
        done = perseus("plan", *job, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        assert perseus("simulate", *job, "-o", written, *options).returncode == 0
        (row,) = csv.DictReader(written.open())
        plan = load_plan(out)
        assert float(row["energy_j"]) == pytest.approx(plan.energy_j)
        most[str(options)] = max(plan.clock_changes(stage) for stage in range(2)), plan.energy_j
        assert ("clocks are kept for at least" in done.stdout) == (options in ([], ["--min-dwell", 0.02]))
    kept, told, at_once, fast = most.values()
    assert kept == told
    assert at_once == fast
    assert kept[0] < at_once[0]


def test_gpus_wait_at_lower_clocks_unless_told_not_to(perseus: Perseus, tmp_path: Path) -> None:
    path, out = tmp_path / "profile.csv", tmp_path / "plan.json"
    rows = bundled_profile(2).rows()
    save_profile(Profile.from_rows((s, k, replace(m, blocking_power_w=m.frequency_mhz / 20)) for s, k, m in rows), path)
    plans = []
    for options in ([], ["--switch-latency", 0.04, "--min-dwell", 0], ["--no-lower-while-waiting"]):
        done = perseus("plan", path, "--microbatches", 4, "--blocking-power", 60, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        plans.append(load_plan(out))
        assert ("waits at a lower clock" in done.stdout) == bool(plans[-1].waits)
    quick, slow, never = plans
    assert len(quick.waits_of(1)) > len(slow.waits_of(1)) > 0
    assert never.waits == ()
    assert quick.energy_j < slow.energy_j < never.energy_j


def test_a_schedule_file_brings_its_own_microbatches(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    schedule, out = tmp_path / "mine.json", tmp_path / "plan.json"
    ops = [{"op": "compute", "kind": kind, "microbatch": m} for m in range(3) for kind in ("forward", "backward")]
    schedule.write_text(json.dumps({"schema": "perseus-schedule", "version": 1, "stages": [ops, ops]}))
    job = (profile, "--blocking-power", 60, "--schedule", schedule, "-o", out)
    assert perseus("plan", *job).returncode == 0
    assert load_plan(out).schedule == "mine"
    assert load_plan(out).microbatches == 3
    refused = perseus("plan", *job, "--microbatches", 3)
    assert refused.returncode == 2
    assert "--microbatches: not allowed with a schedule file" in refused.stderr


@pytest.mark.parametrize("communicates", [False, True])
def test_a_schedule_that_pytorch_wrote_is_planned(
    perseus: Perseus, profile: Path, tmp_path: Path, communicates: bool
) -> None:
    schedule, out = tmp_path / "zbv.csv", tmp_path / "plan.json"
    with schedule.open("w", newline="") as file:
        csv.writer(file).writerows(lists_of("ZBVZeroBubble", 2, 4)[communicates])
    job = (profile, "--blocking-power", 60, "--scale", 0.5, "-o", out)
    done = perseus("plan", *job, "--schedule", schedule)
    assert done.returncode == 0, done.stderr
    from_file = load_plan(out)
    assert perseus("plan", *job, "--schedule", "zbv", "--microbatches", 4).returncode == 0
    named = load_plan(out)
    assert (named.schedule, named.microbatches) == ("zbv", 4)
    assert named.baseline_energy_j == pytest.approx(from_file.baseline_energy_j)
    assert named.energy_j == pytest.approx(from_file.energy_j, rel=0.005)
    kinds = [{kind for kind, *_ in stage} for stage in json.loads(out.read_text())["stages"]]
    assert kinds[1] - kinds[0] == {"input_backward"}, "which the first stage does not compute"
    # A share of what is known is known as well.
    assert perseus("frontier", *job, "--schedule", schedule, "--tolerance", 0.05).returncode == 0
    assert perseus("plan", *job, "--schedule", schedule, "--input-share", 0.7).returncode == 0
    assert load_plan(out).baseline_time_s != from_file.baseline_time_s


def test_a_csv_of_no_schedule_is_refused_with_the_place(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    schedule = tmp_path / "mine.csv"
    job = ("plan", profile, "--blocking-power", 60, "--schedule", schedule)
    for content, message in (
        ("0F0,0B0\n1F0,1X0\n", "mine.csv: rank 1: got '1X0'; allowed: what PyTorch's schedules write"),
        ("0F0\n1F0,1B0\n", "mine.csv: stage 0, microbatch 0: got F; allowed: F and B, or F, I and W"),
        ('0F0,"0B0\n', "mine.csv: not valid CSV"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0\n", "stage 1 sends 0 times to stage 0 on channel '1SEND_B0'"),
        ("0F0,0B0\n", "mine.csv has 1 stages; allowed: 2, as the profile has"),
    ):
        schedule.write_text(content)
        refused = perseus(*job)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())


def test_a_frontier_is_written(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "frontier.json"
    done = perseus("frontier", profile, "--microbatches", 4, "--blocking-power", 60, "--tolerance", 0.01, "-o", out)
    assert done.returncode == 0, done.stderr
    points = json.loads(out.read_text())["points"]
    assert len(points) >= 3
    assert all(a["deadline_s"] < b["deadline_s"] for a, b in itertools.pairwise(points))


def test_a_frontier_is_drawn(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    job = (profile, "--microbatches", 2, "--blocking-power", 60, "--tolerance", 0.05, "-o", tmp_path / "f.json")
    picture = tmp_path / "frontier.png"
    assert perseus("frontier", *job, "--plot", picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_profile_that_says_what_waiting_draws_needs_no_option_for_it(perseus: Perseus, tmp_path: Path) -> None:
    path, out = tmp_path / "profile.csv", tmp_path / "out.json"
    rows = [(s, k, replace(m, blocking_power_w=60.0)) for s, k, m in bundled_profile(2).rows()]
    save_profile(Profile.from_rows(rows), path)
    job = (path, "--microbatches", 4, "-o", out)
    assert perseus("plan", *job).returncode == 0
    alone = load_plan(out)
    assert perseus("plan", *job, "--blocking-power", 99).returncode == 0
    assert load_plan(out) == alone, "what the profile says counts"
    assert perseus("frontier", *job, "--tolerance", 0.05).returncode == 0
    assert perseus("simulate", *job).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--blocking-power: missing; "),
        (("--blocking-power", "warm"), "--blocking-power: got 'warm'"),
        (("--blocking-power", "60", "--slowdown", "0.1", "--cheapest"), "got --slowdown and --cheapest"),
        (("--blocking-power", "60", "--deadline", "0.01"), "the shortest possible iteration takes"),
        (("--blocking-power", "60", "--slowdown", "-1"), '--slowdown: got "-1"; allowed: a share'),
        (("--blocking-power", "60", "--slowdown", "50"), "--slowdown: got 50; allowed: a share of the time at full"),
        (("--blocking-power", "83640"), "--blocking-power: got 83640; allowed: watts of one GPU, from 0 to 2000"),
        (("--blocking-power", "60", "--straggler", "soon"), "--straggler: got 'soon'; allowed: times full clocks"),
        (("--blocking-power", "60", "--straggler", "0.9x"), "--straggler: got '0.9x'; allowed: times full clocks"),
        (("--blocking-power", "60", "-o", "no/where.json"), "--output: got no/where.json; allowed: a path in a folder"),
        (("--blocking-power", "60", "--zeus", "no/plan.py"), "--zeus: got no/plan.py; allowed: a path in a folder"),
        (("--blocking-power", "60", "--json", "-o", "-"), "allowed: one of them, as there is one standard output"),
        (("--blocking-power", "60", "--schedule", "nonsense"), "--schedule: got 'nonsense'; allowed: 1f1b, gpipe"),
        (("--blocking-power", "60", "--effort", "heroic"), "--effort: got 'heroic'; allowed: quick"),
        (("--blocking-power", "60", "--schedule", "early-recomputation-1f1b"), "no row for 'recompute' in stage 0"),
        (("--blocking-power", "60", "--scale", "0"), "scale: got 0"),
        (
            ("--blocking-power", "60", "--input-share", "1"),
            "--input-share: got 1; allowed: a share above 0 and below 1",
        ),
        (
            ("--blocking-power", "60", "--switch-latency", "-1"),
            "--switch-latency: got -1.0; allowed: a number from 0 to 1\n",
        ),
        (
            ("--blocking-power", "60", "--switch-latency", "5"),
            "--switch-latency: got 5.0; allowed: a number from 0 to 1\n",
        ),
        (("--blocking-power", "60", "--min-dwell", "61"), "--min-dwell: got 61.0; allowed: a number from 0 to 60\n"),
        (("--blocking-power", "60", "--max-changes", "-1"), "--max-changes: got -1; allowed: a whole number from 0 to"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(
    perseus: Perseus, profile: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = perseus("plan", profile, "--microbatches", 4, "-o", tmp_path / "plan.json", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


def test_a_bad_profile_is_refused_with_row_and_reason(perseus: Perseus, tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    path.write_text("stage,instruction,frequency,time,energy\n0,forward,1400,0.1,-3\n")
    done = perseus("plan", path, "--microbatches", 4, "--blocking-power", 60)
    assert done.returncode == 2
    assert "row 2: energy: got '-3'" in done.stderr


def test_standard_output_and_input_stand_for_files(
    perseus: Perseus, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = ("--microbatches", 4, "--blocking-power", 60)
    piped = perseus("plan", profile, *job, "-o", "-")
    assert piped.returncode == 0, piped.stderr
    assert "saving" in piped.stderr
    assert "wrote" not in piped.stderr
    assert not (tmp_path / "-").exists()
    printed = perseus("plan", profile, *job, "--json")
    assert json.loads(printed.stdout) == json.loads(piped.stdout) == json.loads(Path("plan.json").read_text())
    monkeypatch.setattr(destinations, "_STDIN", profile)
    assert perseus("plan", "-", *job, "-o", "-").stdout == piped.stdout


def test_a_pipe_or_device_is_written_to_and_not_replaced(perseus: Perseus, profile: Path) -> None:
    assert perseus("plan", profile, "--microbatches", 2, "--blocking-power", 60, "-o", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()


def test_a_straggler_is_a_factor_and_a_number_alone_is_seconds_with_a_note(
    perseus: Perseus, profile: Path, tmp_path: Path
) -> None:
    job = ("plan", profile, "--microbatches", 2, "--blocking-power", 60, "-o", tmp_path / "plan.json")
    assert perseus(*job, "--straggler", "1.5x").returncode == 0
    factor = load_plan(tmp_path / "plan.json")
    assert factor.waits_until_s == pytest.approx(1.5 * factor.baseline_time_s)
    for text, note in (
        (f"{factor.waits_until_s!r}s", ""),
        (repr(factor.waits_until_s), "a number alone means seconds"),
    ):
        done = perseus(*job, "--straggler", text)
        assert done.returncode == 0
        assert note in done.stderr
        assert bool(note) == bool(done.stderr)
        assert load_plan(tmp_path / "plan.json") == factor
