"""Naming a GPU across a process boundary: a spec string, and the `Gpu` it opens.

    emulated:PATH               an emulated GPU's state file
    nvml:UUID                   a GPU through NVML
    zeusd:SOCKET:INDEX:UUID     clocks through the zeusd daemon, readings through NVML; INDEX is the daemon's
    number of
                                the GPU and may be empty (found by its PCI address)
    auto:SOCKET:UUID            NVML where that is allowed, else zeusd where it answers on SOCKET

Backends are imported only when one is opened: the helper process starts with as little as it needs.
"""

from __future__ import annotations

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu


def open_gpu(spec: str) -> Gpu:
    """Open the GPU that `spec` names; for `auto` with what can at least be read: NVML.

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
        socket, index, uuid = rest.rsplit(":", 2)
        if socket and (index.isdigit() or not index) and uuid:
            from perseus_plugin.gpus.zeusd import ZeusdGpu

            return ZeusdGpu(socket, int(index) if index else None, uuid)
    if backend == "auto" and rest.count(":") >= 1:
        return open_gpu(candidate_specs(spec)[0])
    raise GpuError(f"GPU {spec!r}: allowed: emulated:PATH, nvml:UUID, zeusd:SOCKET:[INDEX]:UUID, auto:SOCKET:UUID")


def candidate_specs(spec: str) -> tuple[str, ...]:
    """The specs to try in this order for control of the GPU that `spec` names."""
    backend, _, rest = spec.partition(":")
    if backend != "auto":
        return (spec,)
    socket, _, uuid = rest.rpartition(":")
    return f"nvml:{uuid}", f"zeusd:{socket}::{uuid}"
