"""Becoming the one process that controls a GPU: its lock file, a backend that may set clocks, and a free
clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from perseus_plugin.control.clock_log import DEVIATION_MHZ
from perseus_plugin.control.examination import counter_problem
from perseus_plugin.control.helper.heartbeat import with_heartbeat
from perseus_plugin.control.helper.resetting import READ_BACK_S
from perseus_plugin.control.ownership import GpuBusyError, Ownership, describe, helper_elsewhere, lock_path
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu, enforced_limit_w
from perseus_plugin.gpus.registry import candidate_specs, open_gpu
from perseus_plugin.iteration.bounds import MOST_W

TAKEOVER_WAIT_S = 1.5
"""How long to wait for the helper of a run that is just ending."""

_HIGHEST_IDLE = 0.4
"""Share of the highest clock that an idle GPU stays below."""


def take_over(
    spec: str,
    owner_pid: int,
    *,
    wait_s: float = TAKEOVER_WAIT_S,
    examine: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Gpu, Ownership | None, DeviceFacts]:
    """Become the one that controls a GPU and free its clock, or find out why not.

    Args:
        spec: which GPU.
        owner_pid: the process on whose behalf.
        wait_s: how long to wait for the helper of a run that is just ending.
        examine: whether to watch the energy counter, too; for up to 1.5 s where it does not move.
        beat: called between driver calls, now and later, see `with_heartbeat`.

    Returns the GPU, the held lock file (None: it can only be read), and the facts.

    Raises:
        GpuError: it cannot even be read.
    """
    candidates = candidate_specs(spec)
    gpu = with_heartbeat(open_gpu(candidates[0]), beat)
    backend, refusals, leftover, foreign = "", [], "", ""
    ownership, busy = None, False
    try:
        lock = lock_path(spec, gpu.uuid)
        ownership = Ownership(lock, owner_pid, wait_s=wait_s)
        _wait_for_helpers(gpu.uuid, lock, wait_s)
    except GpuError as error:
        refusals.append(str(error))
        busy = isinstance(error, GpuBusyError)
        if ownership is not None:
            ownership.release()
            ownership = None
    else:
        for candidate in candidates:
            try:
                controller = gpu if candidate == candidates[0] else with_heartbeat(open_gpu(candidate), beat)
                lock_mhz, before_mhz = controller.lock_mhz(), controller.read_clock_mhz()
                controller.reset_clock()
            except GpuError as error:
                refusals.append(str(error))
                continue
            gpu, backend = controller, candidate.partition(":")[0]
            if ownership.leftover is not None:
                leftover = f"left locked by {describe(ownership.leftover)}"
            elif lock_mhz:
                ownership.found(lock_mhz)
                foreign = f"was locked at {lock_mhz} MHz by somebody else; it is locked so again when the job ends"
            elif lock_mhz is None and examine and _leaves(controller, before_mhz):
                foreign = (
                    f"read {before_mhz} MHz until it was freed: somebody else may have locked it there. The driver "
                    "does not tell locks, so it stays free when the job ends; `nvidia-smi -lgc` locks it again"
                )
            ownership.mark(locked=False)
            break
    if ownership is not None and not backend:
        ownership.release()
        ownership = None
    facts = DeviceFacts(
        name=gpu.name,
        uuid=gpu.uuid,
        emulated=gpu.emulated,
        clocks_mhz=gpu.supported_clocks_mhz(),
        can_lock=ownership is not None,
        why_not="" if ownership is not None else "; and ".join(refusals),
        leftover=leftover,
        foreign=foreign,
        counter=counter_problem(gpu) if examine and ownership is not None else "",
        pid=os.getpid(),
        backend=backend,
        driver=gpu.driver,
        busy=busy,
        power_limit_w=_told(gpu.power_limit_w()),
        enforced_limit_w=_told(enforced_limit_w(gpu)),
    )
    return gpu, ownership, facts


def _told(limit_w: float) -> float:
    return limit_w if 0 < limit_w <= MOST_W else 0.0


def only_read(spec: str) -> tuple[Gpu, None, DeviceFacts]:
    """A GPU that is to be left as it is, and its facts; see `take_over`.

    Raises:
        GpuError: it cannot be read.
    """
    gpu = open_gpu(candidate_specs(spec)[0])
    facts = DeviceFacts(
        name=gpu.name,
        uuid=gpu.uuid,
        emulated=gpu.emulated,
        clocks_mhz=gpu.supported_clocks_mhz(),
        can_lock=False,
        why_not="it is only read, as was asked for",
        leftover="",
        pid=os.getpid(),
        driver=gpu.driver,
    )
    return gpu, None, facts


def _leaves(gpu: Gpu, before_mhz: int) -> bool:
    """Whether the clock, now free, leaves what it read before, upwards: then it was held there.

    A suspicion and no knowledge; none at all from a clock as idle GPUs have it, which wake up as their job starts.
    """
    try:
        if before_mhz < _HIGHEST_IDLE * gpu.supported_clocks_mhz()[0]:
            return False
        end_s = time.monotonic() + READ_BACK_S
        while time.monotonic() < end_s:
            if gpu.read_clock_mhz() > before_mhz + DEVIATION_MHZ:
                return True
            time.sleep(0.01)
    except GpuError:  # the clock is reset already, and a suspicion is no reason to go without control
        pass
    return False


def restore_foreign(gpu: Gpu, ownership: Ownership) -> bool:
    """Make the lock again that somebody else had made; whether that was done, or there was none.

    The clock is free of ours before.
    """
    if ownership.found_mhz:
        try:
            gpu.lock_clock(ownership.found_mhz)
        except GpuError:
            return False
        ownership.found(0)
    return True


def _wait_for_helpers(uuid: str, lock: Path, wait_s: float) -> None:
    """See that no helper of another job, whose lock file is elsewhere, controls the GPU.

    Raises:
        GpuBusyError: one does.
    """
    end_s = time.monotonic() + wait_s
    while (holder := helper_elsewhere(uuid, lock)) is not None:
        if time.monotonic() >= end_s:
            raise GpuBusyError(
                f"another job controls this GPU: {describe(holder)} (its helper is process {holder['helper_pid']}; its "
                "lock file is in another folder, or was removed)"
            )
        time.sleep(0.05)
