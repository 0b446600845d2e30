"""One helper per GPU: a lock file that names its holder, and that tells what a dead one left behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from perseus_plugin.errors import GpuError, os_problem
from perseus_plugin.gpus.registry import lock_file

LOCK_DIR_VARIABLE = "PERSEUS_LOCK_DIR"
DEFAULT_LOCK_DIR = "/tmp/perseus-locks"
"""The same for all users and jobs of a machine, so not the job's own TMPDIR."""

HELPER_MODULE = "perseus_plugin.control.helper"
_SETTLED_S = 5.0  # a helper that lives for so long controls its GPU: one that may not has ended


class GpuBusyError(GpuError):
    """Another live process controls this GPU; the message names it."""


def lock_path(spec: str, uuid: str) -> Path:
    """The lock file of a GPU: where its backend has it, else in the machine's lock folder."""
    return lock_file(spec) or Path(os.environ.get(LOCK_DIR_VARIABLE, DEFAULT_LOCK_DIR)) / f"{uuid}.lock"


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
        try:
            self._fd = _open(path)
        except OSError as error:
            raise GpuError(_cannot_open(path, error)) from error
        end_s = time.monotonic() + wait_s
        while not self._try_lock():
            if time.monotonic() >= end_s:
                holder = read_record(path)
                os.close(self._fd)
                raise GpuBusyError(f"{self._holder_is(holder)}: {describe(holder)} (lock file {path})")
            time.sleep(0.02)
        before = read_record(path)
        self.leftover = before if before.get("clock") == "locked" else None
        self.locked = self.leftover is not None
        found_mhz = before.get("found_mhz")
        self.found_mhz = found_mhz if isinstance(found_mhz, int) else 0  # also of one that died at full clocks
        self._write()

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

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            os.close(self._fd)
            raise GpuError(_cannot_lock(self._path, error)) from error
        return True

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
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise GpuError(_cannot_open(path, error)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_record(path)
    except OSError as error:
        raise GpuError(_cannot_lock(path, error)) from error
    finally:
        os.close(fd)
    return None


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
        if spec.endswith(f":{uuid}") and _has_lock_elsewhere(entry.parent, lock):
            return _record_of(entry.parent, arguments)
    return None


def _has_lock_elsewhere(process: Path, lock: Path) -> bool:
    """Whether a helper has another lock file of this name than ours; where its files are hidden, its age must tell."""
    with suppress(OSError):
        ours = lock.stat()
        for opened in (process / "fd").iterdir():
            with suppress(OSError):
                name, theirs = opened.readlink().name, opened.stat()
                if name == lock.name:
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
    with suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return {}


def describe(record: dict[str, Any]) -> str:
    """A holder, for people."""
    if not record:
        return "a process that left no record"
    return (
        f"process {record.get('pid')} of user id {record.get('user_id')} on {record.get('host')} since "
        f"{record.get('since')} ({record.get('command') or 'command unknown'})"
    )


_LOCK_REMEDY = f"set {LOCK_DIR_VARIABLE} to a folder on a local disk that every user of the GPUs can write to"


def _cannot_open(path: Path, error: OSError) -> str:
    return f"{path}: cannot open the GPU's lock file: {error.strerror or error}; {_LOCK_REMEDY}"


def _cannot_lock(path: Path, error: OSError) -> str:
    return f"{path}: its file system cannot lock the GPU's lock file: {error.strerror or error}; {_LOCK_REMEDY}"


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    # Without O_CREAT first: the kernel refuses O_CREAT on another user's file in a folder that all may write
    # to.
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            path.parent.chmod(0o1777)
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(path, flags)
    with suppress(OSError):
        os.fchmod(fd, 0o666)  # other users' jobs must be able to take it later, whatever our umask
    return fd


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
