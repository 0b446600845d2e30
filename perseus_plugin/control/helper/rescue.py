"""Freeing the clock in the place of a helper that is dead, stopped, or hangs in a driver call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from perseus_plugin.control.helper.parent import is_stopped
from perseus_plugin.control.helper.resetting import free_clock, not_free, reset_until_confirmed
from perseus_plugin.control.helper.takeover import restore_foreign, take_over
from perseus_plugin.control.ownership import HELPER_MODULE, lock_path, read_record
from perseus_plugin.errors import GpuError, os_problem
from perseus_plugin.gpus.registry import candidate_specs, open_gpu

RESET_LIMIT_S = 10.0
_KILLED_WITHIN_S = 0.5
_DRIVER_HANGS_S = 3600.0
"""How long to wait for a helper that not even SIGKILL ends yet: its driver call may still lock the clock."""


def rescue(
    spec: str, parent: int, *, instead_of: int, grace_s: float, locked_mhz: int | None, tell: Callable[[str], None]
) -> None:
    """Free a GPU's clock, confirmed by reading it back where the lock is known.

    Args:
        spec: which GPU.
        parent: the process on whose behalf.
        instead_of: the helper process whose task this is; it is ended. 0: it has ended.
        grace_s: how long that one may still take to end by itself.
        locked_mhz: the lock that was made last, None if that is not known.
        tell: called as soon as it is known, and once more if that changes: why the clock is not known to be free, with
            what frees it; with nothing if it is free, or is somebody else's by now.
    """
    problem: str | None = None
    if not _ends_within(instead_of, grace_s, hopeless=is_stopped):
        with suppress(OSError):  # it ends just now
            os.kill(instead_of, signal.SIGKILL)
        if not _ends_within(instead_of, _KILLED_WITHIN_S):
            problem = _by_force(spec, instead_of, locked_mhz)
            tell(problem)
            if not _ends_within(instead_of, _DRIVER_HANGS_S):
                return
    after = _properly(spec, parent, locked_mhz)
    if after != problem:
        tell(after)


def _properly(spec: str, parent: int, locked_mhz: int | None) -> str:
    try:
        gpu, ownership, facts = take_over(spec, parent, examine=False)
    except (GpuError, OSError) as error:
        return not_free(spec, _uuid(spec), locked_mhz, os_problem(error) if isinstance(error, OSError) else str(error))
    if ownership is None:
        return "" if facts.busy else not_free(spec, facts.uuid, locked_mhz, facts.why_not)
    outcome = free_clock(gpu, ownership, locked_mhz, limit_s=RESET_LIMIT_S)
    if not outcome.confirmed:
        return not_free(spec, gpu.uuid, locked_mhz, outcome.problem)
    restore_foreign(gpu, ownership)
    ownership.release()
    return ""


def _by_force(spec: str, holder: int, locked_mhz: int | None) -> str:
    """Free the clock although that process, which cannot be ended, holds its lock file; as `rescue`."""
    problem = ""
    for candidate in candidate_specs(spec):
        try:
            gpu = open_gpu(candidate)
        except GpuError as error:
            problem = problem or str(error)
            continue
        with suppress(GpuError):  # no lock file: then nobody else has it either
            if read_record(lock_path(spec, gpu.uuid)).get("helper_pid") != holder:
                return ""
        outcome = reset_until_confirmed(gpu, locked_mhz, limit_s=RESET_LIMIT_S)
        if outcome.confirmed:
            return ""
        problem = problem or outcome.problem
    return not_free(spec, _uuid(spec), locked_mhz, problem)


def _uuid(spec: str) -> str:
    return spec.rpartition(":")[2]


def _ends_within(helper: int, limit_s: float, hopeless: Callable[[int], bool] = lambda pid: False) -> bool:
    """Whether this helper process has ended by then, or until it is hopeless; 0: it has."""
    end_s = time.monotonic() + limit_s
    while helper and _is_helper(helper):
        if time.monotonic() >= end_s or hopeless(helper):
            return False
        time.sleep(0.02)
    return True


def _is_helper(pid: int) -> bool:
    """Whether it is a helper that has not ended: one that has shows no command line."""
    with suppress(OSError):
        return HELPER_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
