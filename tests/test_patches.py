"""The patches: applied to the installed packages' files, and real jobs from the patched copies."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import JOB_TIMEOUT_S, Probe, perseus_block
from tests.megatron_support.flags import flags
from tests.megatron_support.versions import REPOSITORY, python_path, versions

PATCHES = REPOSITORY / "patches"
ARGUMENTS = Path("megatron/training/arguments.py")
DEEPSPEED = Path("deepspeed/__init__.py")
TOOLS = {"git": ("git", "apply"), "patch": ("patch", "-p1", "-i")}
SCRIPT = REPOSITORY / "tests" / "megatron_support" / "pretrain_gpt.py"
NEWEST = max(versions(with_training=True).items(), key=lambda item: list(map(int, item[0].split("."))), default=None)
needs_megatron = pytest.mark.skipif(NEWEST is None, reason="megatron-core with megatron.training is not installed")


def package_folder(name: str) -> Path:
    return Path(str(importlib.metadata.distribution(name).locate_file("")))


def apply(patch: str, folder: Path, tool: str) -> None:
    done = subprocess.run([*TOOLS[tool], str(PATCHES / patch)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def patched_text(patch: str, package: Path, file: Path, folder: Path, tool: str) -> tuple[list[str], list[str]]:
    """Lines of the file before and after."""
    (folder / file).parent.mkdir(parents=True)
    shutil.copy(package / file, folder / file)
    before = (folder / file).read_text().splitlines()
    apply(patch, folder, tool)
    after = (folder / file).read_text()
    compile(after, str(file), "exec")
    return before, after.splitlines()


def patched_copy(patch: str, package: Path, file: Path, folder: Path) -> Path:
    """A copy of the whole package in which the file is patched, and the rest are links, to what is compiled too."""
    name = file.parts[0]
    shutil.copytree(package / name, folder / name, copy_function=os.symlink)
    (folder / file).unlink()
    shutil.copy(package / file, folder / file)
    apply(patch, folder, "git")
    return folder


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("version", versions(with_training=True))
def test_megatron_patch_adds_its_line_where_the_parser_is_complete(version: str, tool: str, tmp_path: Path) -> None:
    package = versions()[version]
    before, after = patched_text("megatron.patch", package, ARGUMENTS, tmp_path, tool)
    at = next(number for number, line in enumerate(after) if "perseus_plugin" in line)
    assert after[:at] + after[at + 1 :] == before
    assert after[at - 1].strip() == "parser = extra_args_provider(parser)"
    assert "parse_args()" in "".join(after[at + 1 : at + 8])


@pytest.mark.parametrize("tool", TOOLS)
def test_deepspeed_patch_adds_its_line_after_the_engines(tool: str, tmp_path: Path) -> None:
    before, after = patched_text("deepspeed.patch", package_folder("deepspeed"), DEEPSPEED, tmp_path, tool)
    at = next(number for number, line in enumerate(after) if "perseus_plugin" in line)
    assert after[:at] + after[at + 1 :] == before
    assert any("import PipelineEngine" in line for line in after[:at])


@pytest.mark.e2e
@pytest.mark.parametrize("is_patched", [True, pytest.param(False, marks=pytest.mark.repeated)])
def test_deepspeed_job_where_entry_points_are_off(is_patched: bool, tmp_path: Path) -> None:
    """Only the patch can have brought the session in: without it there is none."""
    path = python_path()
    if is_patched:
        path = python_path(patched_copy("deepspeed.patch", package_folder("deepspeed"), DEEPSPEED, tmp_path / "copy"))
    folder = tmp_path / "job"
    job = Probe(folder, perseus_block(folder / "out", stages=2), arguments=("--steps", "3"))
    job.run(PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD="0").check()
    for facts in job.facts():
        assert ("_perseus_session" in facts["looks"][0]["on_engine"]) == is_patched


def run_megatron(folder: Path, path: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Megatron without the launcher and with the entry points off: only the patch can bring the flags in."""
    environment = {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=JOB_TIMEOUT_S,
    )


@needs_megatron
@pytest.mark.e2e
@pytest.mark.repeated  # the patched parser alone: below; jobs with its flags: e2e/test_megatron.py
def test_megatron_job_through_the_patched_parser(tmp_path: Path) -> None:
    assert NEWEST is not None
    copy = patched_copy("megatron.patch", NEWEST[1], ARGUMENTS, tmp_path / "copy")
    block: dict[str, Any] = perseus_block(tmp_path / "out", stages=2)
    (tmp_path / "perseus.json").write_text(json.dumps(block))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT))
    switches = ("--perseus", "--perseus-config", "perseus.json", "--results", "results.json")
    until = ("--until", "plan 1 for")
    done = run_megatron(tmp_path, python_path(copy), *torchrun, *flags(2, train_iters=300), *switches, *until)
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["plan"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["ranks"][1]["losses"][39]


@needs_megatron
@pytest.mark.e2e
@pytest.mark.repeated
def test_the_unpatched_parser_does_not_know_the_flags(tmp_path: Path) -> None:
    assert NEWEST is not None
    done = run_megatron(tmp_path, python_path(NEWEST[1]), str(SCRIPT), *flags(1), "--perseus")
    assert done.returncode == 2
    assert "unrecognized arguments: --perseus" in done.stdout


@pytest.mark.e2e
@pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=[pytest.mark.matrix] if number else [])
        for number, version in enumerate(versions(with_training=True))
    ],
)
def test_every_patched_version_checks_the_flags(version: str, tmp_path: Path) -> None:
    copy = patched_copy("megatron.patch", versions()[version], ARGUMENTS, tmp_path / "copy")
    done = run_megatron(tmp_path, python_path(copy), str(SCRIPT), *flags(1), "--perseus-slowdown", "0.1")
    assert done.returncode == 2
    assert "error: --perseus-slowdown: needs --perseus" in done.stdout, done.stdout[-3000:]
