"""Real jobs with PyTorch's own pipelines on the CPU: profile, plan, enforcement, bit-identical; GPUs are emulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.again import hold
from tests.e2e.launching import REPOSITORY, Finished, perseus_block, run_ranks

SCRIPT = REPOSITORY / "tests" / "e2e" / "pipelining_job.py"
ORDERS = REPOSITORY / "tests" / "e2e" / "pipelining_orders.py"
IMPORTS = ("pipelining_job", "torch._dynamo")
PLANNED = "plan 1 for"

# Forks of one process that has imported torch.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("PyTorch's pipelines")]

# Ranks, and arguments of the script.
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1F1B-torchrun": (2, ("--evaluate-every", "10", "--microbatches", "4")),
    "ZBVZeroBubble": (2, ("--schedule", "ZBVZeroBubble", "--microbatches", "4")),
    "1F1B-pp4": (4, ()),
    "Interleaved1F1B-pp4": (4, ("--schedule", "Interleaved1F1B", "--microbatches", "4")),
    "InterleavedZeroBubble-pp4": (4, ("--schedule", "InterleavedZeroBubble", "--microbatches", "4")),
    "ZBVZeroBubble-pp4": (4, ("--schedule", "ZBVZeroBubble", "--microbatches", "4")),
    "DualPipeV-pp4": (4, ("--schedule", "DualPipeV")),
    "1F1B-pp2-fsdp2": (4, ("--shards", "2", "--microbatches", "4")),
    "1F1B-accumulation": (2, ("--accumulate", "2", "--microbatches", "4")),
}
# Plans for graphs of this size with limits on clock changes take seconds of a core, which four ranks leave to nobody.
NO_LIMITS = {"limits": {"min_dwell_s": 0.0, "switch_latency_s": 0.0}}
# Others run streams that integrations/torch_pipelining/test_orders.py holds, planned as in session/test_one_job.py.
FIRST = ("1F1B-torchrun",)


def run(ranks: int, folder: Path, *arguments: str, torchrun: bool = False, **environment: str) -> Finished:
    words = (str(SCRIPT), *arguments)
    return run_ranks(ranks, folder, *words, imports=IMPORTS, torchrun=torchrun, **environment).check()


def facts(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=[] if one in FIRST else [pytest.mark.repeated]) for one in CASES]
)
def test_training_is_bit_identical_and_the_plan_is_followed(case: str, tmp_path: Path) -> None:
    """The script knows nothing of us: a variable turns it on."""
    ranks, arguments = CASES[case]
    stages = ranks // 2 if "fsdp" in case else ranks
    file = tmp_path / "perseus.json"
    file.write_text(json.dumps(perseus_block(tmp_path / "out", stages, **(NO_LIMITS if ranks == 4 else {}))))
    done = run(
        ranks,
        tmp_path,
        *arguments,
        *("--until-said", PLANNED),
        torchrun="torchrun" in case,
        PERSEUS_CONFIG=str(file),
    )
    with_plugin = facts(tmp_path, ranks)
    steps = str(len(with_plugin[0]["parameters"]))
    run(ranks, tmp_path / "without", *arguments, "--steps", steps)
    hold(with_plugin == facts(tmp_path / "without", ranks), "training is what it is without the plugin")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == ranks
    assert summary["stages"] == stages
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert summary["plan"]["saving_percent"] > 0
    assert summary["energy_j"]["measured"] > 0
    # The session ends before the group: nobody is asked that has gone.
    assert "Broken pipe" not in done.output
    assert "the summary may be incomplete" not in done.output


def test_a_step_that_becomes_a_graph_follows_its_plan_by_host_time_and_is_bit_identical(tmp_path: Path) -> None:
    """On emulated GPUs, where a run of the schedule stands for the replay of its graph."""
    file, plan = tmp_path / "perseus.json", tmp_path / "out" / "plan.json"
    block = perseus_block(tmp_path / "out", 2, cuda_graph=True)
    file.write_text(json.dumps(block))
    few = ("--microbatches", "4")
    words = (*few, "--graph-once", str(plan), "--until-said", PLANNED)
    done = run(2, tmp_path, *words, PERSEUS_CONFIG=str(file))
    with_plugin = facts(tmp_path, 2)
    run(2, tmp_path / "without", *few, "--steps", str(len(with_plugin[0]["parameters"])))
    hold(with_plugin == facts(tmp_path / "without", 2), "training is what it is without the plugin")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert "became a CUDA graph before" not in done.output
    assert "perseus is off" not in done.output


@pytest.mark.repeated
def test_every_rank_runs_its_stream_with_every_schedule(tmp_path: Path) -> None:
    """All of PyTorch's schedules, with evaluation, with FSDP, and with one function for overlapped pairs."""
    done = run_ranks(4, tmp_path, str(ORDERS), imports=IMPORTS).check()
    found = next(json.loads(line) for line in done.output.splitlines() if line.startswith("{"))
    assert len(found) >= 12
    assert {case: said for case, said in found.items() if said != [True] * 4} == {}


def test_wrong_settings_end_the_job_when_the_schedule_is_built(tmp_path: Path) -> None:
    file = tmp_path / "perseus.yaml"
    file.write_text("slowdwn: 0.1\n")
    done = run_ranks(2, tmp_path, str(SCRIPT), imports=IMPORTS, PERSEUS_CONFIG=str(file))
    assert done.status != 0
    assert done.output.count("slowdwn") == 1
    assert not (tmp_path / "facts0.json").exists()


@pytest.mark.repeated
def test_without_the_variable_enable_does_and_a_group_that_is_left_is_no_trouble(tmp_path: Path) -> None:
    file = tmp_path / "perseus.json"
    file.write_text(json.dumps(perseus_block(tmp_path / "out", 2)))
    words = ("--microbatches", "4", "--enable", str(file), "--leave-the-group", "--steps", "12")
    run(2, tmp_path, *words, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ranks_reporting"] == 2
    assert sum(summary["iterations"].values()) >= 8
