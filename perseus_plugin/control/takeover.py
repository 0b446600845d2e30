"""Becoming the one process that controls a GPU: its lock file, a backend that may set clocks, and a free
clock."""

from __future__ import annotations

import os

from perseus_plugin.control.ownership import Ownership, describe, lock_path
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu
from perseus_plugin.gpus.opening import candidate_specs, open_gpu

TAKEOVER_WAIT_S = 1.5
"""How long to wait for the helper of a run that is just ending."""


def take_over(
    spec: str, owner_pid: int, *, wait_s: float = TAKEOVER_WAIT_S
) -> tuple[Gpu, Ownership | None, DeviceFacts]:
    """Become the one that controls a GPU and free its clock, or find out why not.

    Returns the GPU, the held lock file (None: it can only be read), and the facts.

    Raises:
        GpuError: it cannot even be read.
    """
    candidates = candidate_specs(spec)
    gpu = open_gpu(candidates[0])
    backend, refusals, leftover = "", [], ""
    ownership = None
    try:
        ownership = Ownership(lock_path(spec, gpu.uuid), owner_pid, wait_s=wait_s)
    except GpuError as error:
        refusals.append(str(error))
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
        pid=os.getpid(),
        backend=backend,
        driver=gpu.driver,
    )
    return gpu, ownership, facts
