from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_plugin.control.ownership import (
    MAX_RECORD,
    GpuBusyError,
    Ownership,
    describe,
    helper_elsewhere,
    holder_of,
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
            "set PERSEUS_LOCK_DIR to a folder on a local disk that is yours and that nobody else can write to"
        )
        assert "Errno" not in text


def test_nobody_else_can_write_the_file_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Ownership(tmp_path / "locks" / "gpu.lock", os.getpid())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "locks" / "gpu.lock").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o700


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


# What somebody else has put where the lock file is to be.


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


def nested(path: Path) -> None:
    path.write_text("[" * MAX_RECORD)


def not_a_record(path: Path) -> None:
    path.write_text(json.dumps({"clock": "locked", "pid": ["12"], "found_mhz": 1e300}))


def absurd_clock(path: Path) -> None:
    path.write_text(json.dumps({"clock": "locked", "found_mhz": 10**9}))


@pytest.mark.parametrize("planted", [sparse, nested, not_a_record, absurd_clock])
def test_what_is_no_record_is_none_and_costs_nothing(tmp_path: Path, planted: Callable[[Path], None]) -> None:
    path = tmp_path / "gpu.lock"
    planted(path)
    tracemalloc.start()
    assert read_record(path) == {}
    assert holder_of(path) is None
    owner = Ownership(path, os.getpid())
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert (owner.leftover, owner.found_mhz) == (None, 0)
    assert path.stat().st_size < MAX_RECORD
    assert read_record(path)["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        (fifo, "it is no regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.hardlink_to(path.parent / "precious"), "it is another file, too (a hard link)"),
    ],
)
def test_what_is_no_lock_file_is_refused_at_once_and_left_alone(
    tmp_path: Path, planted: Callable[[Path], None], problem: str
) -> None:
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "gpu.lock"
    planted(path)
    for look in (lambda: Ownership(path, os.getpid(), wait_s=1.0), lambda: holder_of(path)):
        with pytest.raises(GpuError, match=re.escape(problem)):
            look()
    assert read_record(path) == {}
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's files")
def test_another_users_lock_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.lock").touch()
    os.chown(tmp_path / "gpu.lock", 65534, 65534)
    with pytest.raises(GpuError, match="it belongs to user 65534"):
        Ownership(tmp_path / "gpu.lock", os.getpid())


def test_a_file_of_ours_that_others_could_write_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "gpu.lock").touch()
    (tmp_path / "gpu.lock").chmod(0o666)
    Ownership(tmp_path / "gpu.lock", os.getpid())
    assert stat.S_IMODE((tmp_path / "gpu.lock").stat().st_mode) == 0o644


def test_a_record_is_printed_in_one_line_without_codes_for_a_terminal() -> None:
    text = describe({"pid": 1, "command": "x\n\x1b[2K\rGPU-1: free", "host": "a\u202eb", "user_id": 0, "since": ""})
    assert text.isprintable()
    assert "x\\n\\x1b[2K\\rGPU-1: free" in text


# A lock file that is removed while it is held.


def test_the_lock_holds_on_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    owner = Ownership(path, os.getpid())
    assert owner.kept()
    path.unlink()
    assert owner.kept()
    with pytest.raises(GpuBusyError):
        Ownership(path, os.getpid())
    path.unlink()
    other = Ownership(path, os.getpid())
    assert not owner.kept()
    other.release()


def test_a_file_that_is_replaced_between_opening_and_locking_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.lock"
    path.touch()
    flock, once = fcntl.flock, [True]

    def replaced_first(fd: int, operation: int) -> None:
        if once.pop() if once else False:
            path.unlink()
            path.touch()
        flock(fd, operation)

    monkeypatch.setattr("fcntl.flock", replaced_first)
    owner = Ownership(path, os.getpid(), wait_s=1.0)
    assert os.fstat(owner._fd).st_ino == path.stat().st_ino


def test_a_helper_whose_lock_file_was_removed_is_seen(tmp_path: Path) -> None:
    process, lock = tmp_path / "proc" / "4711", tmp_path / "GPU-1.lock"
    (process / "fd").mkdir(parents=True)
    (process / "cmdline").write_text("python\0x.py\0perseus_plugin.control.helper\0nvml:GPU-1\0--parent\0" + "12\0")
    (process / "stat").write_text(f"4711 (python) S {' '.join(18 * '0')} 0 0")
    (tmp_path / "GPU-1.lock (deleted)").touch()  # a link into /proc leads to the file all the same
    (process / "fd" / "7").symlink_to(tmp_path / "GPU-1.lock (deleted)")
    lock.touch()
    holder = helper_elsewhere("GPU-1", lock, tmp_path / "proc")
    assert holder is not None
    assert holder["helper_pid"] == 4711


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
