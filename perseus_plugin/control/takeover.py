"""Becoming the one process that controls a GPU: its lock file, a backend that may set clocks, and a free
clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

from perseus_plugin.control.examination import counter_problem
from perseus_plugin.control.ownership import GpuBusyError, Ownership, describe, helper_elsewhere, lock_path
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu
from perseus_plugin.gpus.opening import candidate_specs, open_gpu

TAKEOVER_WAIT_S = 1.5
"""How long to wait for the helper of a run that is just ending."""


def take_over(
    spec: str, owner_pid: int, *, wait_s: float = TAKEOVER_WAIT_S, examine: bool = True
) -> tuple[Gpu, Ownership | None, DeviceFacts]:
    """Become the one that controls a GPU and free its clock, or find out why not.

    Args:
        spec: which GPU.
        owner_pid: the process on whose behalf.
        wait_s: how long to wait for the helper of a run that is just ending.
        examine: whether to watch the energy counter, too; for up to 1.5 s where it does not move.

    Returns the GPU, the held lock file (None: it can only be read), and the facts.

    Raises:
        GpuError: it cannot even be read.
    """
    candidates = candidate_specs(spec)
    gpu = open_gpu(candidates[0])
    backend, refusals, leftover = "", [], ""
    ownership = None
    lock = lock_path(spec, gpu.uuid)
    try:
        ownership = Ownership(lock, owner_pid, wait_s=wait_s)
        _wait_for_helpers(gpu.uuid, lock, wait_s)
    except GpuError as error:
        refusals.append(str(error))
        if ownership is not None:
            ownership.release()
            ownership = None
    else:
        for candidate in candidates:
            try:
                controller = gpu if candidate == candidates[0] else open_gpu(candidate)
                controller.reset_clock()
            except GpuError as error:
                refusals.append(str(error))
                continue
            gpu, backend = controller, candidate.partition(":")[0]
            if ownership.leftover is not None:
                leftover = f"left locked by {describe(ownership.leftover)}"
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
        counter=counter_problem(gpu) if examine and ownership is not None else "",
        pid=os.getpid(),
        backend=backend,
        driver=gpu.driver,
    )
    return gpu, ownership, facts


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
                "lock file is in another folder)"
            )
        time.sleep(0.05)
