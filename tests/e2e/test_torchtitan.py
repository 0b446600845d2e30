"""torchtitan's own trainer and debug model on the CPU, in an environment of its own (`make titan`)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.again import hold
from tests.e2e.launching import REPOSITORY, perseus_block, started_ranks

PYTHON = REPOSITORY / ".titan" / "bin" / "python"
PATH = os.pathsep.join(map(str, (REPOSITORY / "tests" / "titan_support", REPOSITORY)))
TRAINING = (
    *("-m", "titan_on_cpu", "--module", "titan_on_cpu", "--config", "debug_model"),
    *("--training.disable_cuda_graphs", "--training.seq_len", "32", "--training.local_batch_size", "4"),
    *("--training.steps", "1000", "--debug.seed", "42", "--debug.deterministic"),
    *("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_schedule", "1F1B"),
)
TIMEOUT_S = 900.0
OVERRIDE = "perseus_plugin.integrations.torchtitan.perseus"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.repeated,
    pytest.mark.skipif(not PYTHON.exists(), reason="torchtitan is not installed here: make titan"),
]


def train(folder: Path, *words: str, **environment: str) -> tuple[list[list[Any]], str]:
    """What is the same whenever the training is, step by step, and all that was said.

    These are the hash of every rank's parameters, and loss and gradient norm as torchtitan logs them.
    """
    job = started_ranks(2, folder, *TRAINING, *words, torchrun=True, python=PYTHON, PYTHONPATH=PATH, **environment)
    with job as started:
        said = re.sub(r"\x1b\[[0-9;]*m", "", started.wait(TIMEOUT_S).check().output)
    logged = re.findall(r"step: +(\d+) +loss: +([\d.]+) +grad_norm: +([\d.]+)", said)
    parameters = [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(2)]
    return [sorted(logged, key=lambda one: int(one[0])), *parameters], said


def test_training_is_bit_identical_and_the_plan_is_followed(tmp_path: Path) -> None:
    """A flag turns it on, or a variable."""
    trained = []
    for way in ("flag", "variable"):
        folder, file = tmp_path / way, tmp_path / f"{way}.json"
        file.write_text(json.dumps(perseus_block(folder / "out", 2)))
        words = ("--override.imports", f'{OVERRIDE}={{"config": "{file}"}}') if way == "flag" else ()
        environment = {} if way == "flag" else {"PERSEUS_CONFIG": str(file)}
        with_plugin, said = train(folder, "--until-said", "plan 1 for", *words, **environment)
        trained.append(with_plugin)
        summary = json.loads((folder / "out" / "summary.json").read_text())
        assert summary["state"] == "finished"
        assert summary["ranks_reporting"] == 2
        assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
        assert "Broken pipe" not in said
    steps = [min(map(len, one)) for one in trained]
    assert min(steps) > 20
    without, _ = train(tmp_path / "without", "--end-after", str(max(steps)))
    for with_plugin in trained:
        as_without = [same[: len(one)] for one, same in zip(with_plugin, without, strict=True)]
        hold(with_plugin == as_without, "training is what it is without the plugin")
