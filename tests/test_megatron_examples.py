"""The Megatron example and the CPU stand-ins: flags exist, settings load, training is the same in every layout."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from perseus_plugin.config import load_config
from tests.e2e.launching import run_ranks
from tests.megatron_support.versions import REPOSITORY, python_path, versions

EXAMPLE = REPOSITORY / "examples" / "megatron_gpt"
SUPPORT = REPOSITORY / "tests" / "megatron_support"
SCRIPTS = sorted(EXAMPLE.glob("*.sh"))
NEWEST = list(versions(with_training=True))[-1:]

# Forks of the process that jobs of e2e/test_megatron.py are forks of.
of_the_newest = pytest.mark.xdist_group("newest Megatron")
IMPORTS = ("pretrain_gpt", "torch._dynamo")

# All flags of Megatron's parser and ours, as a script would have them.
_LIST_FLAGS = """
import argparse
import cuda_on_cpu
cuda_on_cpu.install()
from megatron.training.arguments import add_megatron_arguments
from perseus_plugin.integrations.megatron import add_arguments
parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser()))
print("FLAGS", *parser._option_string_actions)
"""


@pytest.mark.parametrize("name", ["perseus.yaml", "cpu.yaml"])
def test_settings_load(name: str) -> None:
    assert load_config(EXAMPLE / name).enabled


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "model.sh" or os.access(script, os.X_OK)


@pytest.mark.e2e
@of_the_newest
@pytest.mark.parametrize("version", NEWEST)
def test_scripts_use_flags_that_exist(version: str, tmp_path: Path) -> None:
    script = tmp_path / "list_flags.py"
    script.write_text(_LIST_FLAGS)
    path = python_path(versions()[version], REPOSITORY)
    done = run_ranks(1, tmp_path, str(script), imports=IMPORTS, PYTHONPATH=path).check()
    known = set(next(line for line in done.output.splitlines() if line.startswith("FLAGS")).split())
    torchrun = {"--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
    # Comments and torchrun's own flags aside, `run_on_cpu.sh` has only flags of the common kind.
    code = "\n".join(line for script in SCRIPTS for line in script.read_text().splitlines() if line[:1] != "#")
    used = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*|(?<=\()--[a-z][a-z0-9-]*", code))
    assert {"--perseus", "--perseus-config", "--mock-data", "--num-virtual-stages-per-pipeline-rank"} <= used
    assert used - torchrun - known == set()


@pytest.mark.e2e
@of_the_newest
@pytest.mark.parametrize("version", NEWEST)
def test_stand_ins_train_alike_in_every_layout(version: str, tmp_path: Path) -> None:
    """With gloo, wrongly matched sends give wrong gradients without a word."""
    losses = []
    for ranks, stages, chunks in ((1, 1, 1), (2, 2, 1), (2, 2, 2)):
        results = tmp_path / f"{stages}x{chunks}.json"
        words = [str(SUPPORT / "core_job.py"), "--pipeline-model-parallel-size", str(stages), "--chunks", str(chunks)]
        words += ["--train-iters", "8", "--results", str(results)]
        path = python_path(versions()[version], REPOSITORY)
        run_ranks(ranks, tmp_path, *words, imports=IMPORTS, PYTHONPATH=path).check()
        losses.append([loss for row in json.loads(results.read_text())["ranks"][-1]["losses"] for loss in row])
    assert losses[0][0] != losses[0][-1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
