from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from perseus_plugin.control.ownership import (
    LOCK_DIR_VARIABLE,
    GpuBusyError,
    Ownership,
    helper_elsewhere,
    holder_of,
    lock_path,
    read_record,
)
from perseus_plugin.errors import GpuError


def test_a_second_owner_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "gpu.lock"
    first = Ownership(path, os.getpid())
    with pytest.raises(GpuBusyError, match=rf"another job controls this GPU: process {os.getpid()} of user id"):
        Ownership(path, os.getppid(), wait_s=0.05)
    record = holder_of(path)
    assert record is not None
    assert (record["pid"], record["helper_pid"], record["clock"]) == (os.getpid(), os.getpid(), "free")
    first.release()
    assert holder_of(path) is None
    assert Ownership(path, os.getpid()).leftover is None


def test_another_job_is_said_of_another_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    path = tmp_path / "gpu.lock"
    first = Ownership(path, os.getpid())
    with pytest.raises(GpuBusyError, match=r"^another session of this process controls this GPU"):
        Ownership(path, os.getpid())
    with pytest.raises(GpuBusyError, match=r"^another rank of this job controls this GPU; give each rank a GPU"):
        Ownership(path, os.getppid())
    monkeypatch.setenv("MASTER_PORT", "29501")
    with pytest.raises(GpuBusyError, match=r"^another job controls this GPU"):
        Ownership(path, os.getppid())
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(GpuBusyError, match=r"^another job controls this GPU"):
        Ownership(path, os.getppid())
    first.release()


def test_a_clock_left_locked_is_found_by_the_next_owner(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    dead = Ownership(path, 4711)
    dead.mark(locked=True)
    dead.release()  # as the kernel does when a process dies
    next_one = Ownership(path, os.getpid())
    assert next_one.leftover is not None
    assert next_one.leftover["pid"] == 4711
    assert read_record(path)["clock"] == "locked"  # until it is really freed
    next_one.mark(locked=False)
    next_one.release()
    assert Ownership(path, os.getpid()).leftover is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "gpu.lock").touch()
    monkeypatch.setattr("fcntl.flock", flock)
    for look in (lambda: Ownership(tmp_path / "gpu.lock", os.getpid()), lambda: holder_of(tmp_path / "gpu.lock")):
        with pytest.raises(GpuError) as error:
            look()
        text = str(error.value)
        assert text.startswith(f"{tmp_path / 'gpu.lock'}: its file system cannot lock the GPU's lock file: ")
        assert text.endswith(
            "set PERSEUS_LOCK_DIR to a folder on a local disk that every user of the GPUs can write to"
        )
        assert "Errno" not in text


def test_other_users_can_take_the_file_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        Ownership(tmp_path / "locks" / "gpu.lock", os.getpid())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "locks" / "gpu.lock").stat().st_mode) == 0o666
    assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o1777


def test_a_link_or_an_unusable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(GpuError, match="cannot open the GPU's lock file"):
        Ownership(tmp_path / "link", os.getpid())
    assert (tmp_path / "target").read_text() == "precious"
    with pytest.raises(GpuError, match="cannot open the GPU's lock file"):
        Ownership(tmp_path / "target" / "gpu.lock", os.getpid())


def test_a_record_that_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "gpu.lock").write_text("{half a rec")
    owner = Ownership(tmp_path / "gpu.lock", os.getpid())
    assert owner.leftover is None
    assert read_record(tmp_path / "gpu.lock")["clock"] == "free"


def test_lock_files_lie_where_all_jobs_of_the_machine_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCK_DIR_VARIABLE, raising=False)
    assert lock_path("nvml:GPU-1", "GPU-1") == Path("/tmp/perseus-locks/GPU-1.lock")
    assert lock_path("zeusd:/run/z:0:GPU-1", "GPU-1") == Path("/tmp/perseus-locks/GPU-1.lock")
    assert lock_path("emulated:/x/gpu0", "E-1") == Path("/x/gpu0.lock")
    monkeypatch.setenv(LOCK_DIR_VARIABLE, "/var/lock/ours")
    assert lock_path("nvml:GPU-1", "GPU-1") == Path("/var/lock/ours/GPU-1.lock")


@pytest.mark.parametrize(("age_s", "found"), [(60, True), (1, False)])
def test_a_helper_whose_files_are_hidden_is_told_by_its_own_age(tmp_path: Path, age_s: int, found: bool) -> None:
    """Not by that of its folder, which is made when somebody looks."""
    process, lock = tmp_path / "proc" / "4711", tmp_path / "GPU-1.lock"
    process.mkdir(parents=True)
    lock.touch()
    (process / "cmdline").write_text("python\0-m\0perseus_plugin.control.helper\0nvml:GPU-1\0--parent\0" + "12\0")
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age_s) * os.sysconf("SC_CLK_TCK"))
    (process / "stat").write_text(f"4711 (python (x)) S {' '.join(18 * '0')} {ticks} 0")
    holder = helper_elsewhere("GPU-1", lock, tmp_path / "proc")
    assert (holder is not None) == found
    if holder is not None:
        assert holder["since"] <= time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age_s + 5))


def test_a_record_that_cannot_be_written_is_said_once_and_control_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = Ownership(tmp_path / "gpu.lock", os.getpid())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    owner.mark(locked=True)
    owner.mark(locked=False)
    told = capsys.readouterr().err
    assert told.count("cannot write") == 1
    assert f"{tmp_path / 'gpu.lock'}: No space left on device" in told
    assert "Clocks are set all the same" in told
    owner.release()
