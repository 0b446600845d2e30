"""Which GPUs a command is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perseus_plugin.errors import ConfigError

DEFAULT_ZEUSD_SOCKET = "/run/zeusd/zeusd.sock"


def gpu_specs(uuids: Sequence[str], emulated: Sequence[Path], zeusd_socket: str) -> list[str]:
    """Specs (see `gpus.opening`) of the GPUs named; of all that NVML sees if none is named.

    Raises:
        GpuError: NVML is not there.
        ConfigError: a file that is no emulated GPU.
    """
    for path in emulated:
        if not path.is_file():
            raise ConfigError(f"--emulated: got {str(path)!r}; allowed: the state file of an emulated GPU")
    if not uuids and not emulated:
        uuids = all_uuids()
    return [*(f"auto:{zeusd_socket}:{uuid}" for uuid in uuids), *(f"emulated:{path.absolute()}" for path in emulated)]


def all_uuids() -> list[str]:
    """UUIDs of the GPUs that NVML sees.

    Raises:
        GpuError: NVML is not there or fails.
    """
    from perseus_plugin.gpus.nvml import load_nvml, text_of, translate

    nvml = load_nvml()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [text_of(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except nvml.NVMLError as error:
        raise translate(error, "NVML: cannot list the GPUs") from error
    finally:
        nvml.nvmlShutdown()
