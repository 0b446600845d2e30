"""Naming a GPU across a process boundary: a spec string, and the `Gpu` it opens.

    emulated:PATH               an emulated GPU's state file
    nvml:UUID                   a GPU through NVML
    zeusd:SOCKET:INDEX:UUID     clocks through the zeusd daemon, readings through NVML

Backends are imported only when one is opened: the helper process starts with as little as it needs.
"""

from __future__ import annotations

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu


def open_gpu(spec: str) -> Gpu:
    """Open the GPU that `spec` names.

    Raises:
        GpuError: a spec of no known form, or a GPU that cannot be opened.
    """
    backend, _, rest = spec.partition(":")
    if backend == "emulated" and rest:
        from perseus_plugin.gpus.emulated.device import EmulatedGpu

        return EmulatedGpu(rest)
    if backend == "nvml" and rest:
        from perseus_plugin.gpus.nvml import NvmlGpu

        return NvmlGpu(rest)
    if backend == "zeusd" and rest.count(":") >= 2:
        from perseus_plugin.gpus.zeusd import ZeusdGpu

        socket, index, uuid = rest.rsplit(":", 2)
        if index.isdigit():
            return ZeusdGpu(socket, int(index), uuid)
    raise GpuError(f"GPU {spec!r}: allowed: emulated:PATH, nvml:UUID, zeusd:SOCKET:INDEX:UUID")
