"""Errors that a user is meant to read: one sentence, naming the thing, the value and what is allowed."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many files open",
    errno.ENOSPC: "free space there, or give another folder",
    errno.EDQUOT: "free space in the quota, or give another folder",
    errno.EROFS: "it is read-only: give a folder that can be written",
    errno.EACCES: "see to its permissions, or give another folder",
    errno.EPERM: "see to its permissions, or give another folder",
    errno.ENOLCK: "its file system has no locks: give a folder on a local disk",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENOMEM: "the machine has no memory left",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "a part of the path is a file: give another folder",
    errno.ESTALE: "the network file system has lost it: mount it again",
    errno.EIO: "the disk or the network file system fails: see the kernel log",
}


def os_problem(error: OSError) -> str:
    """A system error for people: the file, what is wrong, and what would help."""
    text = error.strerror or str(error) or type(error).__name__
    file = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{file}{text}" + (f" ({remedy})" if remedy else "")


class PerseusError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PerseusError):
    """A wrong key or value in the `perseus` block or on a command line."""


class ProfileError(PerseusError):
    """A profile that cannot be planned on (missing rows, wrong values, wrong columns)."""


class ScheduleError(PerseusError):
    """Instruction streams that do not form a pipeline schedule (unmatched sends, cycles, deadlock)."""


class PlanError(PerseusError):
    """A plan that cannot be made (deadline too short) or a plan file that cannot be read."""


class GpuError(PerseusError):
    """A GPU that cannot be read or controlled: no permission, lost, not supported."""


class ReportError(PerseusError):
    """An output folder that cannot be reported on: foreign or damaged."""
