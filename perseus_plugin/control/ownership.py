"""One helper per GPU: a lock file that names its holder, and that tells what a dead one left behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from perseus_plugin.control.lock_folder import LOCK_DIR_VARIABLE as LOCK_DIR_VARIABLE
from perseus_plugin.control.lock_folder import LOCK_REMEDY, lock_folder
from perseus_plugin.errors import GpuError, os_problem, plain
from perseus_plugin.gpus.registry import lock_file

HELPER_MODULE = "perseus_plugin.control.helper"
MAX_RECORD = 4096
"""Bytes; a file that is larger holds no record."""
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DELETED = " (deleted)"  # what the kernel adds to the name of an opened file that is gone
_SETTLED_S = 5.0  # a helper that lives for so long controls its GPU: one that may not has ended


class GpuBusyError(GpuError):
    """Another live process controls this GPU; the message names it."""


def lock_path(spec: str, uuid: str) -> Path:
    """The lock file of a GPU: where its backend has it, else in the machine's lock folder.

    Raises:
        GpuError: there is no folder for it.
    """
    return lock_file(spec) or lock_folder() / f"{uuid}.lock"


class Ownership:
    """Holds a GPU's lock file (`flock`: the kernel frees it when the holder dies).

    Attributes:
        leftover: the record of a holder that died with the clock locked, or None.
        found_mhz: the lock that somebody else had made before the first holder came, to be made again at the end; 0
            for none that is known.

    Args:
        path: the lock file.
        owner_pid: the process on whose behalf (the trainer).
        wait_s: how long to wait for a holder that is about to end.

    Raises:
        GpuBusyError: somebody else holds it.
        GpuError: the file cannot be made or opened.
    """

    def __init__(self, path: Path, owner_pid: int, *, wait_s: float = 0.0) -> None:
        self._path = path
        self._owner_pid = owner_pid
        self._told = False  # that the record cannot be written
        end_s = time.monotonic() + wait_s
        while (fd := _locked(path)) is None:
            if time.monotonic() >= end_s:
                holder = read_record(path)
                raise GpuBusyError(f"{self._holder_is(holder)}: {describe(holder)} (lock file {path})")
            time.sleep(0.02)
        self._fd = fd
        before = _record_in(fd)
        self.leftover = before if before.get("clock") == "locked" else None
        self.locked = self.leftover is not None
        self.found_mhz: int = before.get("found_mhz", 0)  # also of one that died at full clocks
        self._write()

    def kept(self) -> bool:
        """Hold the file that is there, should somebody have removed ours; False if another process holds it by now."""
        if self._fd < 0 or _is_there(self._fd, self._path):
            return True
        try:
            fd = _locked(self._path)
        except GpuError:  # no folder any more, say: nobody else can hold a file there either
            return True
        if fd is None:
            return False
        os.close(self._fd)
        self._fd = fd
        self._write()
        return True

    def found(self, frequency_mhz: int) -> None:
        """Note somebody else's lock; also for whoever comes after a holder that died."""
        self.found_mhz = frequency_mhz
        self._write()

    def mark(self, *, locked: bool) -> None:
        """Note whether the clock may be locked, for whoever comes after a holder that died."""
        if locked != self.locked:
            self.locked = locked
            self._write()

    def release(self) -> None:
        """Let go of the file; the record of what state the clock is in stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _holder_is(self, holder: dict[str, Any]) -> str:
        """Who controls the GPU in relation to the process that asks, and what would help."""
        here = holder.get("host") == socket.gethostname()
        if here and holder.get("pid") == self._owner_pid:
            return "another session of this process controls this GPU, and this one only observes"
        job = _job()
        if here and job and holder.get("job") == job:
            return "another rank of this job controls this GPU; give each rank a GPU of its own"
        return "another job controls this GPU"

    def _write(self) -> None:
        record = {
            "schema": "perseus-gpu-lock/1",
            "clock": "locked" if self.locked else "free",
            "helper_pid": os.getpid(),
            "pid": self._owner_pid,
            "user_id": os.getuid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": _command_line(self._owner_pid),
            "job": _job(),
            "found_mhz": self.found_mhz,
        }
        content = json.dumps(record).encode()
        try:
            os.pwrite(self._fd, content, 0)
            os.ftruncate(self._fd, len(content))
        except OSError as error:  # a full disk must not keep a clock from being set or reset
            if not self._told:
                self._told = True
                sys.stderr.write(
                    f"perseus: cannot write {self._path}: {os_problem(error)}. Clocks are set all the same; should "
                    "this process be killed together with its trainer, the next job may not find that the clock is "
                    "locked: run `perseus reset` then\n"
                )


def holder_of(path: Path) -> dict[str, Any] | None:
    """The record of the live holder of a lock file; None if nobody holds it.

    Raises:
        GpuError: the file is there but cannot be opened.
    """
    fd = _opened(path, make=False)
    if fd is None:
        return None
    try:
        return None if _try_lock(fd, path) else _record_in(fd)
    finally:
        os.close(fd)


def helper_elsewhere(uuid: str, lock: Path, processes: Path = Path("/proc")) -> dict[str, Any] | None:
    """The helper process that controls a GPU by a lock file other than the one we see; None if none is seen.

    A job's lock folder may be its own (a private /tmp, another setting): then its lock file says nothing here, but its
    helper is among this machine's processes, unless it lives in another container.

    Args:
        uuid: of the GPU.
        lock: the lock file as we see it.
        processes: where the kernel shows processes.

    Returns:
        As much of a record (see `describe`) as the process tells.
    """
    for entry in processes.glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended, or is another user's where those are hidden
            continue
        if HELPER_MODULE not in arguments[:-1] or {"--reset-only", "--read-only"} & {*arguments}:
            continue
        spec = arguments[arguments.index(HELPER_MODULE) + 1]
        if _is_of(spec, uuid, lock) and _has_lock_elsewhere(entry.parent, lock):
            return _record_of(entry.parent, arguments)
    return None


def _is_of(spec: str, uuid: str, lock: Path) -> bool:
    """Whether a helper with this spec controls that GPU: specs without a UUID are of backends with own lock files."""
    if spec.endswith(f":{uuid}"):
        return True
    with suppress(GpuError):
        return lock_file(spec) == lock.absolute()
    return False


def _has_lock_elsewhere(process: Path, lock: Path) -> bool:
    """Whether a helper has another lock file of this name than ours; where its files are hidden, its age must tell."""
    with suppress(OSError):
        ours = lock.lstat()
        for opened in (process / "fd").iterdir():
            with suppress(OSError):
                name, theirs = opened.readlink().name, opened.stat()
                if name.removesuffix(_DELETED) == lock.name:
                    return (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino)
        return False  # it has none yet, or has given it up
    with suppress(OSError):
        return _age_s(process) > _SETTLED_S
    return False


def _age_s(process: Path) -> float:
    """Time since a process was started. The times of its folder tell when somebody first looked at it."""
    started_ticks = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def _record_of(process: Path, arguments: list[str]) -> dict[str, Any]:
    parent = arguments[arguments.index("--parent") + 1] if "--parent" in arguments[:-1] else "unknown"
    record: dict[str, Any] = {"helper_pid": int(process.name), "pid": parent, "host": socket.gethostname()}
    with suppress(OSError):
        record["user_id"] = process.stat().st_uid
        record["since"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - _age_s(process)))
    record["command"] = _command_line(int(parent)) if parent.isdigit() else ""
    return record


def read_record(path: Path) -> dict[str, Any]:
    """The record in a lock file; empty if there is none that can be read."""
    with suppress(GpuError):
        fd = _opened(path, make=False)
        if fd is not None:
            try:
                return _record_in(fd)
            finally:
                os.close(fd)
    return {}


def describe(record: dict[str, Any]) -> str:
    """A holder, for people."""
    if not record:
        return "a process that left no record"
    text = (
        f"process {record.get('pid')} of user id {record.get('user_id')} on {record.get('host')} since "
        f"{record.get('since')} ({record.get('command') or 'command unknown'})"
    )
    return plain(text)  # a command line is whatever its user wanted it to be


_KINDS: dict[str, type] = {
    "clock": str,
    "helper_pid": int,
    "pid": int,
    "user_id": int,
    "host": str,
    "since": str,
    "command": str,
    "job": str,
    "found_mhz": int,
}
_HIGHEST_MHZ = 100_000


def _record_in(fd: int) -> dict[str, Any]:
    """The record in an opened lock file; empty if there is none that is one."""
    try:
        content = os.pread(fd, MAX_RECORD + 1, 0)
        record = json.loads(content) if len(content) <= MAX_RECORD else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or record.get("clock") not in ("locked", "free"):
        return {}
    known = {key: record[key] for key in _KINDS if key in record}
    if any(type(value) is not _KINDS[key] for key, value in known.items()):
        return {}
    return known if 0 <= known.get("found_mhz", 0) <= _HIGHEST_MHZ else {}


def _locked(path: Path) -> int | None:
    """The lock file, opened and locked; None if somebody else has locked it.

    Raises:
        GpuError: it cannot be made or opened, or is none.
    """
    fd = _opened(path, make=True)
    assert fd is not None  # it was made
    try:
        # Between opening and locking somebody may have removed it, and somebody else have made another one.
        if _try_lock(fd, path) and _is_there(fd, path):
            kept, fd = fd, -1
            return kept
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def _try_lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise GpuError(
            f"{path}: its file system cannot lock the GPU's lock file: {error.strerror or error}; {LOCK_REMEDY}"
        ) from error
    return True


def _is_there(fd: int, path: Path) -> bool:
    """Whether an opened file is the one at this path."""
    try:
        there = path.lstat()
    except OSError:
        return False
    ours = os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _opened(path: Path, *, make: bool) -> int | None:
    """The lock file; None if it is not there and is not to be made.

    Raises:
        GpuError: it cannot be opened, or is something that only others than root and this user can have made.
    """
    try:
        fd = _made(path) if make else os.open(path, _FLAGS)
    except FileNotFoundError as error:
        if make:
            raise GpuError(_cannot_open(path, error)) from error
        return None
    except OSError as error:
        raise GpuError(_cannot_open(path, error)) from error
    status = os.fstat(fd)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "it is no regular file"
    elif status.st_uid not in (0, os.geteuid()):
        problem = f"it belongs to user {status.st_uid}"
    elif status.st_nlink > 1:
        problem = "it is another file, too (a hard link)"
    elif status.st_mode & _OTHERS_WRITE:
        try:
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
        except OSError:
            problem = "others can write it"
    if problem:
        os.close(fd)
        raise GpuError(f"{path}: cannot use the GPU's lock file: {problem}; remove it, or {LOCK_REMEDY}")
    return fd


def _cannot_open(path: Path, error: OSError) -> str:
    return f"{path}: cannot open the GPU's lock file: {error.strerror or error}; {LOCK_REMEDY}"


def _made(path: Path) -> int:
    # Without O_CREAT first: the kernel refuses O_CREAT on another user's file in a folder that all may write to.
    with suppress(FileNotFoundError):
        return os.open(path, _FLAGS)
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    try:
        return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, _FLAGS)


def _job() -> str:
    """What all ranks of a job on a machine have in common and no other job has; empty if that is not known."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return f"{address}:{port}" if port else ""


def _command_line(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:200]
