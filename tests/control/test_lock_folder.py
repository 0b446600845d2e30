from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from perseus_plugin.control import lock_folder as module
from perseus_plugin.control.lock_folder import LOCK_DIR_VARIABLE, lock_folder
from perseus_plugin.control.ownership import lock_path
from perseus_plugin.errors import GpuError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's files")
NOBODY = 65534


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose folder for root is one of the test's, and where nothing is configured."""
    monkeypatch.setattr(module, "ROOTS_LOCK_DIR", str(tmp_path / "run" / "perseus"))
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv(LOCK_DIR_VARIABLE, raising=False)
    (tmp_path / "run").mkdir()
    return tmp_path


def test_lock_files_of_a_machine_lie_where_only_their_user_can_write(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folders / "run" / "perseus"
    assert lock_path("nvml:GPU-1", "GPU-1") == run / "GPU-1.lock"
    assert lock_path("zeusd:/run/z:0:GPU-1", "GPU-1") == run / "GPU-1.lock"
    assert lock_path("emulated:/x/gpu0", "E-1") == Path("/x/gpu0.lock")
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(folders / "ours" / "locks"))
    assert lock_path("nvml:GPU-1", "GPU-1") == folders / "ours" / "locks" / "GPU-1.lock"


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_the_next_job_uses_the_folder_that_the_first_one_made_whatever_the_umask(
    folders: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(folders / "a" / "b" / "locks"))
    before = os.umask(umask)
    try:
        assert [lock_folder(), lock_folder()] == 2 * [folders / "a" / "b" / "locks"]
    finally:
        os.umask(before)


@as_root
def test_other_users_have_a_folder_of_their_own(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home = Path(f"/tmp/perseus-{NOBODY}")
    runtime = folders / "runtime"
    for folder in (runtime, runtime / "perseus"):
        folder.mkdir(0o700)
        os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("HOME", str(folders / "home"))
    assert [folder for folder, _ in module._candidates()] == [home, folders / "home" / ".cache" / "perseus"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert lock_folder() == runtime / "perseus"


def plant_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def plant_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o1777)


def plant_theirs(folder: Path) -> None:
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)


def plant_in_theirs(folder: Path) -> None:
    folder.parent.chmod(0o777)
    folder.mkdir(0o700)


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (plant_link, "is a link"),
        (plant_open, "can be written by others"),
        pytest.param(plant_theirs, f"belongs to user {NOBODY}", marks=as_root),
        (plant_in_theirs, ", which can be written by others"),
        (Path.touch, "cannot be made or read: File exists"),
    ],
)
def test_a_folder_that_others_can_have_made_is_not_used_and_another_one_is_said(
    folders: Path,
    plant: object,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = folders / "somewhere" / "locks"
    given.parent.mkdir()
    plant(given)  # type: ignore[operator]
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(given))
    assert lock_folder() == lock_folder() == folders / "run" / "perseus"
    told = capsys.readouterr().err
    assert told.count("the GPU's lock file is in ") == 1
    assert problem in told


def test_without_any_folder_that_can_be_trusted_there_is_one_error(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_problem", lambda folder: "can be written by others")
    with pytest.raises(GpuError, match=r"there is no folder for the GPU's lock file, as .*run/perseus can be written"):
        lock_folder()
