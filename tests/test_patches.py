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

from tests.e2e.launching import BASE_CONFIG, PROBE, perseus_block, run_job
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
    """A copy of the whole package in which the file is patched, and the rest are links."""
    name = file.parts[0]
    shutil.copytree(
        package / name, folder / name, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
    )
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
@pytest.mark.parametrize("is_patched", [False, True])
def test_deepspeed_job_where_entry_points_are_off(is_patched: bool, tmp_path: Path) -> None:
    """Only the patch can have brought the session in: without it there is none."""
    path = python_path()
    if is_patched:
        path = python_path(patched_copy("deepspeed.patch", package_folder("deepspeed"), DEEPSPEED, tmp_path / "copy"))
    folder = tmp_path / "job"
    config = {**BASE_CONFIG, "perseus": perseus_block(folder / "out", stages=2)}
    run_job(PROBE, 2, config, folder, "--steps", "3", PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD="0").check()
    for rank in range(2):
        facts = json.loads((folder / f"facts{rank}.json").read_text())
        assert ("_perseus_session" in facts["at_start"]["on_engine"]) == is_patched


def run_megatron(folder: Path, path: str, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script without the launcher, with the entry points off."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    environment = {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )


@needs_megatron
@pytest.mark.e2e
def test_megatron_job_through_the_patched_parser(tmp_path: Path) -> None:
    assert NEWEST is not None
    folder = tmp_path / "job"
    copy = patched_copy("megatron.patch", NEWEST[1], ARGUMENTS, tmp_path / "copy")
    block: dict[str, Any] = perseus_block(folder / "out", stages=2)
    folder.mkdir()
    (folder / "perseus.json").write_text(json.dumps(block))
    train = flags(2, train_iters=40)
    done = run_megatron(
        folder, python_path(copy), 2, *train, "--perseus", "--perseus-config", "perseus.json", "--results", "on.json"
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads((folder / "out" / "summary.json").read_text())["phases"]
    # The untouched parser does not know the flag; without it, both train alike.
    done = run_megatron(folder, python_path(NEWEST[1]), 2, *train, "--perseus")
    assert done.returncode != 0
    assert "unrecognized arguments: --perseus" in done.stdout
    done = run_megatron(folder, python_path(NEWEST[1]), 2, *train, "--results", "off.json")
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads((folder / "on.json").read_text()) == json.loads((folder / "off.json").read_text())


@pytest.mark.e2e
@pytest.mark.parametrize("version", versions(with_training=True))
def test_the_flags_are_in_the_help_of_every_patched_version(version: str, tmp_path: Path) -> None:
    package = versions()[version]
    copy = patched_copy("megatron.patch", package, ARGUMENTS, tmp_path / "copy")
    done = run_megatron(tmp_path, python_path(copy), 1, "--help")
    assert "--perseus-config" in done.stdout, done.stdout[-3000:]
    assert "--perseus-config" not in run_megatron(tmp_path, python_path(package), 1, "--help").stdout
