"""Real Megatron jobs on the CPU: `--perseus` profiles, plans and enforces, and training is bit-identical.

Megatron's own argument parser, training loop, schedules and communication (gloo); GPUs are emulated.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.again import hold
from tests.e2e.launching import (
    JOB_TIMEOUT_S,
    REPOSITORY,
    SLOWDOWN,
    Job,
    perseus_block,
    run_ranks,
)
from tests.megatron_support.flags import flags
from tests.megatron_support.versions import python_path, versions
from tests.waiting import came_true, processes_naming

SUPPORT = REPOSITORY / "tests" / "megatron_support"
SCRIPT = SUPPORT / "pretrain_gpt.py"
CORE_JOB = SUPPORT / "core_job.py"
PATH = python_path(REPOSITORY)
# As late as when they are made, a second of every rank.
OPTIMIZERS_IMPORT = ("torch._dynamo",)
# Iterations after a plan has been announced: some until all ranks follow it, some under it, references among them.
MORE = 12
AT_MOST = 300
PLANNED = "plan 1 for"
# In Megatron's own log, from the rank that prints it.
LOGGED = re.compile(rf"{PLANNED}.*perseus at iteration \d+: [^\n]* per iteration", re.DOTALL)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or not versions(with_training=True),
        reason="megatron-core with megatron.training is not installed here (0.17 or later)",
    ),
]


def uneven(folder: Path, stages: int, forward_s: float = 0.012) -> list[str]:
    """Flags of a job whose last stage takes 1.4 times as long as the others."""
    file = folder / "perseus.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    times_s = [forward_s] * (stages - 1) + [1.4 * forward_s]
    times = {"forward_time_s": times_s, "backward_time_s": [2 * time_s for time_s in times_s]}
    file.write_text(json.dumps(perseus_block(folder / "out", stages, emulation=times)))
    return ["--perseus", "--perseus-config", str(file)]


def run_megatron(
    ranks: int,
    folder: Path,
    words: list[str],
    *,
    launcher: bool = False,
    script: Path = SCRIPT,
    path: str = PATH,
    during: Callable[[Job], None] = lambda job: None,
) -> tuple[dict[str, Any], str]:
    """Run a script; returns its losses and parameter hashes, and what it said. `during` is done while it runs.

    With the launcher as a user starts it, under torchrun, and without the entry point: the launcher alone must do.
    """
    start = ["-m", "perseus_plugin.megatron"] if launcher else []
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if launcher else {}
    results = folder / "results.json"
    done = run_ranks(
        ranks,
        folder,
        *(*start, str(script), *words, "--results", str(results)),
        torchrun=launcher,
        during=during,
        imports=(script.stem, *OPTIMIZERS_IMPORT),
        PYTHONPATH=path,
        **environment,
    ).check()
    content: dict[str, Any] = json.loads(results.read_text())
    return content, done.output


def check_identical(
    ranks: int, folder: Path, words: list[str], plugin: list[str], until: str, **how: Any
) -> tuple[dict[str, Any], str]:
    """Train with the plugin until it has said something and for `MORE` iterations, then as far without it.

    Returns:
        The results, which are the same bit by bit, and what was said.
    """
    ending = ["--until", until, "--more", str(MORE)]
    with_plugin, said = run_megatron(ranks, folder, [*words, *plugin, *ending], **how)
    iterations = max(len(rank["losses"]) for rank in with_plugin["ranks"])
    how = {name: value for name, value in how.items() if name in ("script", "path")}
    without, _ = run_megatron(ranks, folder / "off", [*words, "--end-after", str(iterations)], **how)
    hold(with_plugin == without, "training is what it is without the plugin")
    return with_plugin, said


def check_followed(out: Path, ranks: int) -> dict[str, Any]:
    """The plan was made and followed, keeps to the time that is allowed, and saves energy.

    As predicted: what a busy machine adds to an iteration, or a plan that is made anew because of it, is not the
    plugin's doing. How much is saved, `benchmarks/` measures.
    """
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == summary["ranks"] == ranks
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert summary["plan"]["saving_percent"] > 0
    assert summary["slowdown_percent"]["predicted"] <= 100 * SLOWDOWN + 0.5, "what a replay may be longer"
    assert summary["overhead"]["emulated_instructions"] > 0
    return summary


MICROBATCHES = 4
VIRTUAL = {"num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "pp2": (2, 2, {}),
    "pp4": (4, 4, {}),
    "pp2-dp2": (4, 2, {"replicas": 2}),
    "pp2-vp2": (2, 2, VIRTUAL),
    "pp2-vp2-dp2": (4, 2, {**VIRTUAL, "replicas": 2}),
    "pp2-tp2": (4, 2, {"tensor_model_parallel_size": 2, "global_batch_size": 2}),
}
# What others have together, or with fewer stages.
REPEATED = ("pp2", "pp4", "pp2-dp2", "pp2-vp2")
# Tensor parallel ranks wait for each other's CPU within each instruction.
FORWARD_S = {"pp2-tp2": 0.024}
INTERLEAVED = "interleaved-1F1B-overlap-waits/2x4x2g2"
SCHEDULES = {"pp4": "1F1B/4x4", "pp2-tp2": "1F1B/2x2", "pp2-vp2": INTERLEAVED, "pp2-vp2-dp2": INTERLEAVED}


# Forks of one process that has imported the newest Megatron.
of_the_newest = pytest.mark.xdist_group("newest Megatron")


@of_the_newest
@pytest.mark.repeated  # by PyTorch's pipelines: test_pipelining.py
def test_an_iteration_that_is_one_graph_follows_its_plan_by_host_time_and_is_bit_identical(tmp_path: Path) -> None:
    """From its third iteration on, with a profile of the job without the graph; on emulated GPUs it runs once more."""
    eager = uneven(tmp_path / "eager", 2)
    words = flags(2, MICROBATCHES, num_layers=2, train_iters=AT_MOST, log_interval=4)
    run_megatron(2, tmp_path / "eager", [*words, *eager, "--until", PLANNED, "--more", "2"])
    plugin = uneven(tmp_path, 2)
    file = tmp_path / "perseus.yaml"
    block = json.loads(file.read_text())
    block["profiling"]["load"] = str(tmp_path / "eager" / "out" / "profile.csv")
    file.write_text(json.dumps(block))
    graph = [
        "--cuda-graph-impl",
        "full_iteration",
        "--cuda-graph-warmup-steps",
        "2",
        "--no-check-for-nan-in-loss-and-grad",
    ]
    _, said = check_identical(2, tmp_path, [*words, *graph], plugin, PLANNED)
    assert "perseus is off" not in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    for rank in range(2):
        locked = {one.mhz for one in EmulatedGpu(tmp_path / "out" / "emulated_gpus" / f"rank{rank}").events()}
        assert len(locked) > 2, "one to reset, and several of the plan"


@of_the_newest
@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=[pytest.mark.repeated] if one in REPEATED else []) for one in CASES]
)
def test_training_is_bit_identical_and_saves_energy(case: str, tmp_path: Path) -> None:
    ranks, stages, changes = CASES[case]
    words = flags(stages, MICROBATCHES, train_iters=AT_MOST, log_interval=4, **{"num_layers": stages, **changes})
    plugin = uneven(tmp_path, stages, FORWARD_S.get(case, 0.012))
    logged = tmp_path / "logged"

    def look_at_the_log(job: Job) -> None:
        came_true(lambda: bool(LOGGED.search(job.said())) or job.poll() is not None, JOB_TIMEOUT_S, 0.1)
        logged.touch()

    _, said = check_identical(ranks, tmp_path, words, plugin, str(logged), during=look_at_the_log)
    check_followed(tmp_path / "out", ranks)
    assert SCHEDULES.get(case, "1F1B/2x4") in said
    assert LOGGED.search(said)


@of_the_newest
def test_evaluation_a_changing_batch_size_and_a_helper_that_dies(tmp_path: Path) -> None:
    """Each number of microbatches has a plan of its own. The second is followed when the helper is killed.

    As users start it: under torchrun, by the launcher. The others come in through the entry point.
    """
    changes: dict[str, Any] = {"train_iters": None, "global_batch_size": None, "eval_iters": 1, "eval_interval": 7}
    # 40 iterations of 2 microbatches, more than it takes to profile and to plan, then 4.
    words = flags(2, num_layers=2, train_samples=4 * AT_MOST, step_batch_size_schedule="0:2 2560:4", **changes)
    out = tmp_path / "out"
    paths = [out / "emulated_gpus" / f"rank{rank}" for rank in range(2)]

    def kill_helper(job: Job) -> None:
        came_true(lambda: "for 1F1B/2x4 ready" in job.said() or job.poll() is not None, JOB_TIMEOUT_S)
        gpu = EmulatedGpu(paths[1])
        came_true(lambda: gpu.locked_mhz() not in (None, 1410) or job.poll() is not None, JOB_TIMEOUT_S, 0.002)
        for helper in processes_naming(str(paths[1])):
            os.kill(helper, signal.SIGKILL)

    again = "and a second helper sets it as before"
    _, said = check_identical(2, tmp_path, words, uneven(tmp_path, 2), again, during=kill_helper, launcher=True)
    for schedule in ("1F1B/2x2", "1F1B/2x4"):
        assert len(re.findall(rf"plan \d+ for {schedule} ready", said)) == 1, said[-3000:]
    assert json.loads((out / "summary.json").read_text())["iterations"]["plan"] >= 2
    # Not where Megatron prints its flags, what is waited for among them.
    told = [line for line in said.splitlines() if f"{again}. " in line]
    assert len(told) == 1
    assert "the clock helper ended" in told[0]
    assert "perseus is off from here on" not in said
    hold([EmulatedGpu(path).locked_mhz() for path in paths] == [None, None], "no clock stays locked")
    assert not processes_naming(str(out))


@of_the_newest
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--perseus", "--perseus-slowdown", "-1"], "perseus.slowdown: got -1.0; allowed: a number from 0 to 1"),
        (["--perseus-output", "x"], "--perseus-output: needs --perseus"),
    ],
)
def test_a_wrong_flag_ends_the_job_at_once_with_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    command = ("-m", "perseus_plugin.megatron", str(SCRIPT), *flags(2), *words)
    done = run_ranks(2, tmp_path, *command, imports=(SCRIPT.stem, *OPTIMIZERS_IMPORT), PYTHONPATH=PATH)
    assert done.status != 0
    assert len([line for line in done.output.splitlines() if message in line]) == 1
    assert "iteration" not in done.output


WITH_TRAINING = list(versions(with_training=True))
WITHOUT_TRAINING = [version for version in versions() if version not in WITH_TRAINING]


@pytest.mark.matrix  # their schedules alone: test_megatron_schedules.py
@pytest.mark.parametrize("version", [*WITHOUT_TRAINING, *WITH_TRAINING[:-1]])
def test_other_versions(version: str, tmp_path: Path) -> None:
    """With their training loop; where there is none the schedules alone, with virtual stages and evaluation."""
    path = python_path(versions()[version], REPOSITORY)
    if version in WITH_TRAINING:
        script, words = SCRIPT, flags(2, MICROBATCHES, num_layers=2, train_iters=AT_MOST)
    else:
        script, words = CORE_JOB, ["--train-iters", str(AT_MOST), "--evaluate-every", "8", "--chunks", "2"]
        words += ["--microbatches", str(MICROBATCHES)]
    check_identical(2, tmp_path, words, uneven(tmp_path, 2), PLANNED, script=script, path=path)
    check_followed(tmp_path / "out", 2)
