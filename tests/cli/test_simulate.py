"""`perseus simulate` as a user runs it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from perseus_plugin.planning.plan import load_plan
from perseus_plugin.profiling.profile import save_profile
from tests.cli.commands import Perseus
from tests.planning.jobs import bundled_profile

MODEL = "layers: 6\nhidden: 64\nsequence_length: 32\nmicrobatch_size: 2\nvocabulary: 1000\n"


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    save_profile(bundled_profile(4), tmp_path / "profile.csv")
    return tmp_path / "profile.csv"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(MODEL)
    return tmp_path / "model.yaml"


def test_the_table_and_the_files_say_what_perseus_plan_says(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    job = (profile, "--blocking-power", 60, "--scale", 10, "--latency", 0.002)
    options = ("--microbatches", 2, "--microbatches", 3, "--slowdown", 0, "--slowdown", 0.1, "--straggler", 1.2)
    as_json, as_csv = tmp_path / "out.json", tmp_path / "out.csv"
    done = perseus("simulate", *job, *options, "-o", as_json, "-o", as_csv)
    assert done.returncode == 0, done.stderr
    data = json.loads(as_json.read_text())
    assert (data["schema"], data["version"], data["modelled"]) == ("perseus-simulation", 1, False)
    assert len(data["outcomes"]) == 6
    for row in data["outcomes"]:
        target = ("--slowdown", row["slowdown_allowed"])
        if row["straggler"] is not None:
            target = ("--straggler", f"{row['deadline_s']!r}s")
        made = perseus("plan", *job, "--microbatches", row["microbatches"], *target, "-o", tmp_path / "plan.json")
        assert made.returncode == 0, made.stderr
        plan = load_plan(tmp_path / "plan.json")
        assert (row["iteration_s"], row["energy_j"], row["bound_j"], row["full_clock_j"], row["saving"]) == (
            plan.iteration_time_s,
            plan.energy_j,
            plan.energy_lower_bound_j,
            plan.baseline_energy_j,
            plan.saving,
        )
        assert f"{plan.saving:.3%}" in done.stdout
    with as_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["energy_j"]) for row in rows] == [row["energy_j"] for row in data["outcomes"]]


def test_a_model_is_simulated_on_several_gpus_and_splits(perseus: Perseus, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = perseus(
        "simulate", model, "--gpu", "a100", "--gpu", "a40", "--stages", 2, "--split", "3,2,1", "--microbatches", 6,
        "--schedule", "1f1b", "--schedule", "interleaved-1f1b", "--min-dwell", 0, "-o", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a model, no measurement" in " ".join(done.stdout.split())
    data = json.loads(out.read_text())
    assert data["modelled"] is True
    assert [(row["gpu"], row["split"], row["schedule"]) for row in data["outcomes"]] == [
        (gpu, split, schedule)
        for gpu in ("emulated A100-SXM4-80GB", "emulated A40-48GB")
        for split in ("3-3", "3-2-1")
        for schedule in ("1f1b", "interleaved-1f1b")
    ]
    assert all(0 < row["saving"] < 1 for row in data["outcomes"])


def test_another_split_of_a_profile(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--blocking-power", 60, "--microbatches", 4, "--layers", "3,3,3,3", "-o", out)
    done = perseus("simulate", profile, *options, "--split", "3,3,3,3", "--split", "4,3,3,2", "--stages", 6)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["outcomes"]
    assert [row["split"] for row in rows] == ["2-2-2-2-2-2", "3-3-3-3", "4-3-3-2"]
    made = perseus("plan", profile, "--blocking-power", 60, "--microbatches", 4, "-o", tmp_path / "plan.json")
    assert made.returncode == 0
    assert rows[1]["energy_j"] == load_plan(tmp_path / "plan.json").energy_j


def test_what_is_not_possible_is_said_beside_what_is(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    job = (profile, "--blocking-power", 60, "--schedule", "interleaved-1f1b", "-o", out)
    done = perseus("simulate", *job, "--microbatches", 4, "--microbatches", 6)
    assert done.returncode == 0
    assert "not possible: 4 stages, interleaved-1f1b, 6 microbatches" in done.stdout
    assert "multiple of stages" in list(csv.DictReader(out.open()))[1]["error"]
    refused = perseus("simulate", *job, "--microbatches", 6)
    assert refused.returncode == 2
    assert "no scenario can be planned; the first one: interleaved 1F1B" in refused.stderr


@pytest.mark.parametrize("counts", [(2,), (2, 3)])
def test_it_is_drawn(perseus: Perseus, profile: Path, tmp_path: Path, counts: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    several = [part for count in counts for part in ("--microbatches", count)]
    options = ("--blocking-power", 60, *several, "--slowdown", 0, "--slowdown", 0.1)
    done = perseus("simulate", profile, *options, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("profile", ("--microbatches", "4"), "--blocking-power: missing; "),
        ("profile", ("--blocking-power", "60"), "--microbatches: missing; the schedule 1f1b needs it"),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "--gpu", "a100"), "--gpu: got 'a100'"),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "--stages", "2"), "--layers: missing"),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "--straggler", "0.9"), "--straggler: got '0.9'"),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "--slowdown", "-1"), '--slowdown: got "-1"'),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "-o", "out.txt"), "--output: got out.txt"),
        ("profile", ("--blocking-power", "60", "--microbatches", "4", "--profile-chunks", "0"), "--profile-chunks"),
        ("profile", ("--blocking-power", "60", "--schedule", "none"), "--schedule: got 'none'; allowed: 1f1b"),
        ("model", ("--microbatches", "4"), "--stages: missing"),
        ("model", ("--microbatches", "4", "--stages", "7"), "stages: got 7; allowed: from 1 to the number of layers"),
        ("model", ("--microbatches", "4", "--split", "a,b"), "--split: got 'a,b'"),
        ("model", ("--microbatches", "4", "--stages", "2", "--gpu", "v9"), "--gpu: got 'v9'; allowed: a100, a40"),
        ("model", ("--microbatches", "4", "--blocking-power", "60"), "--blocking-power: got 60; allowed: nothing"),
        ("job.toml", (), "allowed: a job's output folder, a profile (.csv), or a model description"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(
    perseus: Perseus, profile: Path, model: Path, source: str, arguments: tuple[str, ...], message: str
) -> None:
    path = {"profile": profile, "model": model}.get(source, Path(source))
    done = perseus("simulate", path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_steps_that_are_one_graph_have_a_column_and_figures(perseus: Perseus, profile: Path, tmp_path: Path) -> None:
    job = ("simulate", profile, "--blocking-power", 60, "--microbatches", 4, "--max-changes", 6)
    done = perseus(*job, "--cuda-graph", "1%", "-o", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert 0 < row["graph_saving"] < 1.01 * row["saving"]
    assert f"{row['graph_saving']:.3%}, {row['graph_slowdown']:.3%}" in done.stdout
    for options, problem in (
        (("--cuda-graph", "30%"), "--cuda-graph: got 30%; allowed: from 0 to 0.2, such as 0.01 or 1%"),
        (("--cuda-graph", "1%", "--lower-while-waiting"), "--lower-while-waiting: got it; allowed: nothing with"),
    ):
        refused = perseus(*job, *options)
        assert refused.returncode == 2
        assert problem in refused.stderr
