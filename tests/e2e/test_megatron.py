"""Real Megatron jobs on the CPU: `--perseus` profiles, plans and enforces, and training is bit-identical.

Megatron's own argument parser, training loop, schedules and communication (gloo); GPUs are emulated.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.e2e.launching import (
    REPOSITORY,
    Finished,
    perseus_block,
    processes_naming,
    run_ranks,
    started_ranks,
    wait_until,
)
from tests.megatron_support.flags import flags
from tests.megatron_support.versions import python_path, versions

SUPPORT = REPOSITORY / "tests" / "megatron_support"
SCRIPT = SUPPORT / "pretrain_gpt.py"
CORE_JOB = SUPPORT / "core_job.py"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or not versions(with_training=True),
        reason="megatron-core with megatron.training is not installed here (0.17 or later)",
    ),
]


def uneven(folder: Path, stages: int, forward_s: float = 0.02) -> list[str]:
    """Flags of a job whose last stage takes 1.4 times as long as the others."""
    file = folder / "perseus.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    times_s = [forward_s] * (stages - 1) + [1.4 * forward_s]
    times = {"forward_time_s": times_s, "backward_time_s": [2 * time_s for time_s in times_s]}
    file.write_text(json.dumps(perseus_block(folder / "out", stages, emulation=times)))
    return ["--perseus", "--perseus-config", str(file)]


def run_megatron(ranks: int, folder: Path, words: list[str], *, launcher: bool = True) -> tuple[dict[str, Any], str]:
    """Run the script; returns its losses and parameter hashes, and what it said."""
    start = ["-m", "perseus_plugin.megatron"] if launcher else []
    # Without the entry point the launcher alone must do.
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if launcher else {}
    results = folder / "results.json"
    done = run_ranks(
        ranks,
        folder,
        *(*start, str(SCRIPT), *words, "--results", str(results)),
        PYTHONPATH=python_path(REPOSITORY),
        **environment,
    ).check()
    content: dict[str, Any] = json.loads(results.read_text())
    return content, done.output


def check_followed(out: Path, ranks: int) -> dict[str, Any]:
    """The plan was made and followed, keeps to the full-clock time, and saves energy.

    Times are asserted as predicted only: what a busy machine adds to an iteration, or a plan that is made anew because
    of it, is not the plugin's doing.
    """
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == summary["ranks"] == ranks
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert summary["plan"]["saving_percent"] > 0
    assert summary["slowdown_percent"]["predicted"] <= 0.5, "what a replay may be longer"
    instructions = summary["overhead"]["emulated_instructions"]
    assert instructions > 0
    overrun_percent = 100 * summary["overhead"]["emulated_instructions_overrun"] / instructions
    saved_percent = {"predicted": summary["plan"]["saving_percent"], "measured": summary["saving_percent"]["measured"]}
    what = f"energy saved: {saved_percent} %, with {overrun_percent:.1f} % of the emulated instructions too slow"
    if overrun_percent > MOST_OVERRUN_PERCENT:
        warnings.warn(f"not asserted: {what}", stacklevel=2)
    else:
        # On a quiet machine 9 to 12; where times vary, plans leave more room, and save less for it.
        assert min(saved for saved in saved_percent.values() if saved is not None) >= 3, what
    return summary


MICROBATCHES = 6
# Beyond that the profile, and all energies with it, are the busy machine's and not the emulated GPU's.
MOST_OVERRUN_PERCENT = 3
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "pp2": (2, 2, {}),
    "pp4": (4, 4, {}),
    "pp2-dp2": (4, 2, {"replicas": 2}),
    "pp2-vp2": (2, 2, {"num_layers_per_virtual_pipeline_stage": 1}),
    "pp2-tp2": (4, 2, {"tensor_model_parallel_size": 2}),
}
# Two chunks are twice as many instructions; tensor parallel ranks wait for each other's CPU within each of them.
FORWARD_S = {"pp2-vp2": 0.012, "pp2-tp2": 0.04}
SCHEDULES = {"pp4": "1F1B/4x6", "pp2-vp2": "interleaved-1F1B-overlap-waits/2x6x2g2"}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_and_saves_energy(case: str, tmp_path: Path) -> None:
    ranks, stages, changes = CASES[case]
    words = flags(stages, MICROBATCHES, train_iters=32, log_interval=4, **changes)
    without, _ = run_megatron(ranks, tmp_path / "off", words, launcher=False)
    with_plugin, said = run_megatron(ranks, tmp_path, [*words, *uneven(tmp_path, stages, FORWARD_S.get(case, 0.02))])
    assert with_plugin == without
    check_followed(tmp_path / "out", ranks)
    assert SCHEDULES.get(case, "1F1B/2x6") in said
    # In Megatron's own log, from the rank that prints it.
    assert re.search(r"perseus at iteration \d+: .* per iteration", said)


def test_evaluation_and_a_changing_batch_size(tmp_path: Path) -> None:
    """In through the entry point alone; each number of microbatches has a plan of its own."""
    changes: dict[str, Any] = {"train_iters": None, "global_batch_size": None, "eval_iters": 1, "eval_interval": 7}
    words = flags(2, train_samples=190, step_batch_size_schedule="0:2 2240:4", **changes)
    without, _ = run_megatron(2, tmp_path / "off", words, launcher=False)
    with_plugin, said = run_megatron(2, tmp_path, [*words, *uneven(tmp_path, 2)], launcher=False)
    assert with_plugin == without
    for schedule in ("1F1B/2x2", "1F1B/2x4"):
        assert len(re.findall(rf"plan \d+ for {schedule} ready", said)) == 1, said[-3000:]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["microbatches"] == 4
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["plan"] >= 2


def test_training_goes_on_when_a_helper_dies(tmp_path: Path) -> None:
    words = flags(2, train_iters=40)
    without, _ = run_megatron(2, tmp_path / "off", words, launcher=False)
    out, results = tmp_path / "out", tmp_path / "results.json"
    gpus = [out / "emulated_gpus" / f"rank{rank}" for rank in range(2)]

    def lowered() -> bool:
        return gpus[1].exists() and EmulatedGpu(gpus[1]).locked_mhz() not in (None, 1410)

    command = ("-m", "perseus_plugin.megatron", str(SCRIPT), *words, *uneven(tmp_path, 2), "--results", str(results))
    output: list[str] = []
    with started_ranks(2, tmp_path, *command, PYTHONPATH=python_path(REPOSITORY)) as job:
        # Megatron says more than a pipe holds.
        reader = threading.Thread(target=lambda: output.append(job.communicate(timeout=240)[0]))
        reader.start()
        assert wait_until(lowered, 120, 0.002), "no clock was ever lowered"
        (helper,) = processes_naming(str(gpus[1]))
        os.kill(helper, signal.SIGKILL)
        reader.join()
        done = Finished(job.returncode, output[0]).check()
    assert json.loads(results.read_text()) == without
    said = [line for line in done.output.splitlines() if "perseus is off from here on" in line]
    assert len(said) == 1
    assert "the clock helper ended" in said[0]
    assert [EmulatedGpu(gpu).locked_mhz() for gpu in gpus] == [None, None]
    assert not processes_naming(str(out))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--perseus", "--perseus-slowdown", "-1"], "perseus.slowdown: got -1.0; allowed: a number from 0 to 10"),
        (["--perseus-output", "x"], "--perseus-output: needs --perseus"),
    ],
)
def test_a_wrong_flag_ends_the_job_at_once_with_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = run_ranks(
        2, tmp_path, "-m", "perseus_plugin.megatron", str(SCRIPT), *flags(2), *words, PYTHONPATH=python_path(REPOSITORY)
    )
    assert done.status != 0
    assert len([line for line in done.output.splitlines() if message in line]) == 1
    assert "iteration" not in done.output


@pytest.mark.parametrize("version", [v for v in versions() if v not in versions(with_training=True)])
def test_older_versions_without_a_training_loop(version: str, tmp_path: Path) -> None:
    """The schedules of megatron-core alone, in a loop that is not Megatron's, with virtual stages and evaluation."""
    words = [str(CORE_JOB), "--train-iters", "30", "--evaluate-every", "8", "--chunks", "2"]
    words += ["--microbatches", str(MICROBATCHES)]
    path = python_path(versions()[version], REPOSITORY)
    for folder, added in ((tmp_path / "off", []), (tmp_path, uneven(tmp_path, 2))):
        results = folder / "results.json"
        run_ranks(2, folder, *words, *added, "--results", str(results), PYTHONPATH=path).check()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(
        (tmp_path / "off/results.json").read_text()
    )
    check_followed(tmp_path / "out", 2)


@pytest.mark.parametrize("version", list(versions(with_training=True))[:-1])
def test_other_versions_with_their_training_loop(version: str, tmp_path: Path) -> None:
    words = [str(SCRIPT), *flags(2, MICROBATCHES, train_iters=30)]
    path = python_path(versions()[version], REPOSITORY)
    for folder, added in ((tmp_path / "off", []), (tmp_path, uneven(tmp_path, 2))):
        results = folder / "results.json"
        run_ranks(2, folder, *words, *added, "--results", str(results), PYTHONPATH=path).check()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(
        (tmp_path / "off/results.json").read_text()
    )
    check_followed(tmp_path / "out", 2)
