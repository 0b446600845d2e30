"""torchtitan's own trainer and debug model on the CPU, in an environment of its own (`make titan`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.launching import REPOSITORY, perseus_block
from tests.titan_support.titan_on_cpu import make_assets

PYTHON = REPOSITORY / ".titan" / "bin" / "python"
SUPPORT = REPOSITORY / "tests" / "titan_support"
STEPS = 120
OVERRIDE = "perseus_plugin.integrations.torchtitan.perseus"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.repeated,
    pytest.mark.skipif(not PYTHON.exists(), reason="torchtitan is not installed here: make titan"),
]


def train(folder: Path, *words: str) -> tuple[list[tuple[str, str]], str]:
    """Loss and gradient norm of every step, as torchtitan logs them, and all that was said."""
    folder.mkdir(exist_ok=True)
    make_assets(folder)
    command = [str(PYTHON), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["titan_on_cpu", "--module", "titan_on_cpu", "--config", "debug_model"]
    command += ["--training.disable_cuda_graphs", "--training.seq_len", "64", "--training.local_batch_size", "4"]
    command += ["--training.steps", str(STEPS), "--debug.seed", "42", "--debug.deterministic"]
    command += ["--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_schedule", "1F1B"]
    path = os.pathsep.join(map(str, (SUPPORT, REPOSITORY)))
    done = subprocess.run(
        [*command, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LOG_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    return re.findall(r"step: +\d+ +loss: +([\d.]+) +grad_norm: +([\d.]+)", said), said


def test_one_flag_turns_it_on_and_training_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "perseus.json"
    file.write_text(json.dumps(perseus_block(tmp_path / "out", 2)))
    with_plugin, said = train(tmp_path / "with", "--override.imports", f'{OVERRIDE}={{"config": "{file}"}}')
    without, _ = train(tmp_path / "without")
    assert len(with_plugin) >= STEPS
    assert with_plugin == without
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == 2
    assert summary["iterations"]["plan"] >= 2, "the plan was never followed"
    assert "Broken pipe" not in said
