"""A GPU through NVML (module `pynvml` of the package nvidia-ml-py)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.gpus.base import (
    EnergyReading,
    FoundGpu,
    GpuBackend,
    GpuLostError,
    GpuPermissionError,
    ListedGpu,
)
from perseus_plugin.gpus.visible import ORDER_VARIABLE, VARIABLE, has_indices, visible_positions

PERMISSION_REMEDY = (
    "run as root, or with CAP_SYS_ADMIN (containers: --cap-add SYS_ADMIN), or let a zeusd daemon on the host do it"
)

# Numbers of nvml.h: older releases of the package have not all the names.
_FIELD_POWER_CAP_TIME, _FIELD_ENERGY, _FIELD_POWER_INSTANT = 74, 83, 186
_NO_PERMISSION, _NOT_SUPPORTED, _NOT_FOUND, _LIBRARY_NOT_FOUND = 4, 3, 6, 12
_DRIVER_NOT_LOADED, _GPU_IS_LOST, _RESET_REQUIRED = 9, 15, 16
_UINT_KINDS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal"}


class NvmlGpu:
    """One NVIDIA GPU. Implements `perseus_plugin.gpus.base.Gpu`; its memory clocks are never touched.

    Args:
        uuid: as `nvidia-smi -L` or torch tell it, with or without the prefix `GPU-`.

    Raises:
        GpuError: NVML is not there, no such GPU, or it is (part of) a MIG partition.
    """

    emulated = False

    def __init__(self, uuid: str) -> None:
        if uuid.startswith("MIG-"):
            raise GpuError(f"GPU {uuid}: a MIG partition has no clock of its own; allowed: a whole GPU")
        self.uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._nvml = load_nvml()
        self.name = self.uuid
        self.driver = ""
        try:
            with self._calling("find"):
                # Some releases take text and some bytes.
                self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self.uuid.encode())
                self.name = text_of(self._nvml.nvmlDeviceGetName(self._handle))
                self.driver = text_of(self._nvml.nvmlSystemGetDriverVersion())
            if self.mig_enabled():
                raise GpuError(
                    f"{self.name} {self.uuid}: MIG is enabled, its partitions share one clock; "
                    "disable it with `nvidia-smi -mig 0`"
                )
            self._clocks = self._supported_clocks()
        except BaseException:
            self.close()
            raise

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, falling."""
        return self._clocks

    def lock_clock(self, frequency_mhz: int) -> None:
        """Ask for a clock; success means that the driver has taken the request."""
        with self._calling("lock the SM clock"):
            self._nvml.nvmlDeviceSetGpuLockedClocks(self._handle, frequency_mhz, frequency_mhz)

    def reset_clock(self) -> None:
        """Give up the lock, also one that another process made."""
        with self._calling("reset the SM clock"):
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._handle)

    def read_clock_mhz(self) -> int:
        """The SM clock now."""
        with self._calling("read the SM clock"):
            return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def read_energy(self) -> EnergyReading:
        """The energy counter, and the time under the power cap where the GPU tells it; one driver call."""
        with self._calling("read the energy counter"):
            try:
                fields = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_FIELD_ENERGY, _FIELD_POWER_CAP_TIME])
                energy_mj, capped_ns = (_field_value(field) for field in fields)
            except self._nvml.NVMLError as error:
                if isinstance(translate(error, ""), GpuLostError):
                    raise
                energy_mj = capped_ns = None
            if energy_mj is None:  # a driver that knows the counter only by its own function
                energy_mj = float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        capped_s = math.nan if capped_ns is None else capped_ns * 1e-9
        return EnergyReading(time.monotonic(), energy_mj * 1e-3, capped_s)

    def read_power_w(self) -> float:
        """Power at this instant: `nvmlDeviceGetPowerUsage` is the mean over a second on most GPUs since Ampere."""
        with self._calling("read the power"):
            (field,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_FIELD_POWER_INSTANT])
            power_mw = _field_value(field)
        return math.nan if power_mw is None else power_mw * 1e-3

    def lock_mhz(self) -> int | None:
        """NVML has no call that tells."""
        return None

    def power_limit_w(self) -> float:
        """The highest power limit that can be set: the one in force may be changed while a job runs."""
        try:
            _, most_mw = self._nvml.nvmlDeviceGetPowerManagementLimitConstraints(self._handle)
        except (self._nvml.NVMLError, TypeError, AttributeError):
            return math.nan
        return 1e-3 * float(most_mw)

    def enforced_limit_w(self) -> float:
        """The power limit in force."""
        try:
            return 1e-3 * float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle))
        except (self._nvml.NVMLError, TypeError, AttributeError):
            return math.nan

    def mig_enabled(self) -> bool:
        """Whether the GPU is partitioned."""
        try:
            with self._calling("read the MIG mode"):
                return int(self._nvml.nvmlDeviceGetMigMode(self._handle)[0]) == 1
        except GpuLostError:
            raise
        except GpuError:
            return False  # a GPU that knows no MIG

    def pci_address(self) -> str:
        """Domain, bus, device and function as `lspci -D` prints them."""
        with self._calling("read the PCI address"):
            bus_id = text_of(self._nvml.nvmlDeviceGetPciInfo(self._handle).busId).lower()
        domain, _, rest = bus_id.partition(":")
        return f"{domain[-4:]}:{rest}"

    def close(self) -> None:
        """Shut NVML down for this handle; does not reset the clock."""
        with_errors: Any = self._nvml.NVMLError
        try:
            self._nvml.nvmlShutdown()
        except with_errors:
            return

    def _supported_clocks(self) -> tuple[int, ...]:
        with self._calling("list the SM clocks"):
            memory = self._nvml.nvmlDeviceGetSupportedMemoryClocks(self._handle)
            clocks = self._nvml.nvmlDeviceGetSupportedGraphicsClocks(self._handle, max(memory)) if memory else []
        if not clocks:  # some GPUs answer with an empty list instead of an error
            raise GpuError(f"{self.name} {self.uuid}: the driver lists no SM clocks that can be locked")
        return tuple(sorted({int(clock) for clock in clocks}, reverse=True))

    @contextmanager
    def _calling(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            raise translate(error, f"{self.name} {self.uuid}: cannot {doing}") from error


class NvmlBackend(GpuBackend):
    """NVIDIA GPUs through the driver's own library."""

    maker = "NVIDIA"

    def open(self, rest: str) -> NvmlGpu:
        """By UUID."""
        return NvmlGpu(rest)

    def find(self, device: str) -> FoundGpu | None:
        """See `cuda_gpu`."""
        return cuda_gpu(device)

    def listed(self) -> list[ListedGpu]:
        """One by one, so that a GPU that is lost does not hide the others."""
        nvml = load_nvml()
        try:
            found: list[ListedGpu] = []
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    uuid = text_of(nvml.nvmlDeviceGetUUID(handle))
                    found.append(ListedGpu(index, uuid, text_of(nvml.nvmlDeviceGetName(handle))))
                except nvml.NVMLError as error:
                    found.append(ListedGpu(index, problem=str(translate(error, f"GPU {index}"))))
            return found
        except nvml.NVMLError as error:
            raise translate(error, "NVML: cannot list the GPUs") from error
        finally:
            nvml.nvmlShutdown()

    def visible(self, listed: Sequence[ListedGpu]) -> list[ListedGpu]:
        """Those that CUDA_VISIBLE_DEVICES leaves."""
        value = os.environ.get(VARIABLE)
        by_pci = os.environ.get(ORDER_VARIABLE) == "PCI_BUS_ID"
        if has_indices(value) and not by_pci and len({gpu.model for gpu in listed if gpu.model}) > 1:
            raise ConfigError(
                f"{VARIABLE}: got {value!r}; allowed with GPUs of different models: UUIDs, or indices with "
                f"{ORDER_VARIABLE}=PCI_BUS_ID (else CUDA counts the fastest first, which NVML does not know); or name "
                "them with --gpu"
            )
        return [listed[position] for position in visible_positions(value, [gpu.uuid for gpu in listed])]

    def software(self) -> dict[str, str]:
        """The driver's version, or why there is none."""
        try:
            nvml = load_nvml()
        except GpuError as error:
            return {"driver": str(error)}
        try:
            return {"driver": text_of(nvml.nvmlSystemGetDriverVersion())}
        except nvml.NVMLError as error:
            return {"driver": str(error)}
        finally:
            nvml.nvmlShutdown()


def cuda_gpu(device: str) -> FoundGpu | None:
    """The NVIDIA GPU behind a torch device; None for one of AMD, which torch calls cuda, too."""
    import torch

    if getattr(torch.version, "hip", None):
        return None
    index = torch.device(device).index
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return FoundGpu(uuid, torch.cuda.get_device_name(index))


def load_nvml() -> Any:
    """The initialised `pynvml` module.

    Raises:
        GpuError: the package, the library or the driver is not there.
    """
    try:
        import pynvml
    except ImportError as error:
        raise GpuError("NVML: the package nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise translate(error, "NVML") from error
    return pynvml


def translate(error: Exception, what: str) -> GpuError:
    """An `NVMLError` as one of ours, with the remedy where there is one."""
    code = getattr(error, "value", None)
    if code == _NO_PERMISSION:
        return GpuPermissionError(f"{what}: no permission; {PERMISSION_REMEDY}")
    if code in (_LIBRARY_NOT_FOUND, _DRIVER_NOT_LOADED):
        return GpuError(f"{what}: no NVIDIA driver here (libnvidia-ml.so.1; containers: --gpus or the NVIDIA runtime)")
    if code in (_GPU_IS_LOST, _RESET_REQUIRED):
        return GpuLostError(f"{what}: {error}; see `nvidia-smi` and the kernel log for Xid errors")
    if code == _NOT_FOUND:
        return GpuError(f"{what}: no such GPU is visible here; see `nvidia-smi -L`")
    if code == _NOT_SUPPORTED:
        return GpuError(f"{what}: this GPU or driver does not support it")
    return GpuError(f"{what}: {error}")


def text_of(value: str | bytes) -> str:
    """Text that older releases of the package give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _field_value(field: Any) -> float | None:
    if field.nvmlReturn != 0:
        return None
    return float(getattr(field.value, _UINT_KINDS[field.valueType]))
