"""Which GPU a rank uses, and who sets its clock."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import ConfigError
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.gpus.emulated.device import EmulatedGpu

logger = logging.getLogger(__name__)

_POLLS_PER_TICK = 4
_REAL_COUNTER_PERIOD_S = 0.02


@dataclass(frozen=True)
class Selection:
    """A rank's GPU.

    Attributes:
        backend: who sets clocks: "nvml", "zeusd", "emulated" or "off".
        spec: for the helper process (see `gpus.opening`); None: observe only.
        name: for people.
        clocks_mhz: clocks that can be locked; empty when none can.
        poll_interval_s: how often to poll the energy counter while profiling.
        emulated_gpu: where this rank's work is stretched to an emulated GPU's.
        why_not: why clocks cannot be set, and what would help; empty when they can.
        driver: version of the GPU's driver, empty if there is none.
        busy: another session or job sets this GPU's clock.
    """

    backend: str
    spec: str | None
    name: str
    clocks_mhz: tuple[int, ...] = ()
    poll_interval_s: float = _REAL_COUNTER_PERIOD_S / _POLLS_PER_TICK
    emulated_gpu: EmulatedGpu | None = None
    why_not: str = ""
    driver: str = ""
    busy: bool = False

    @property
    def emulated(self) -> bool:
        """Whether figures are a model's and not a GPU's."""
        return self.emulated_gpu is not None


def emulates(config: PerseusConfig, placement: Placement) -> bool:
    """Whether this rank's work is stretched to an emulated GPU's: only work of the CPU ever is."""
    return config.gpu.backend != "off" and placement.device.startswith("cpu")


def select_gpu(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    """Choose the GPU of this rank as configured; the emulated one is made here.

    Raises:
        ConfigError: what is configured is not there.
        GpuError: the emulated GPU cannot be made or opened.
    """
    on_cuda = placement.device.startswith("cuda")
    backend = config.gpu.backend
    if backend == "off":
        return Selection("off", None, "GPU" if on_cuda else "CPU")
    if backend == "emulated" and not placement.device.startswith("cpu"):
        raise ConfigError(
            f'perseus.gpu.backend: got "emulated"; allowed: "auto", "nvml", "zeusd" or "off" for work on '
            f"{placement.device}: only work of the CPU can be stretched to an emulated GPU's time"
        )
    if on_cuda:
        return _real(config, placement)
    if not emulates(config, placement):
        why_not = f"only clocks of NVIDIA GPUs can be set, and {placement.device} is none; nothing needs to be done"
        return Selection(backend, None, placement.device, why_not=why_not)
    if config.emulation.gpus is not None:
        return _given(config, placement, config.emulation.gpus)
    if backend in ("nvml", "zeusd"):
        raise ConfigError(
            f'perseus.gpu.backend: got "{backend}"; allowed: "auto", "emulated" or "off" where torch has no CUDA device'
        )
    if backend == "auto" and placement.rank == 0:
        logger.warning(
            "no NVIDIA GPU here: an emulated %s stands in for it, and every instruction is stretched to its time "
            '("gpu": {"backend": "off"} turns that off)',
            config.emulation.model,
        )
    return _emulated(config, placement, output_dir)


def with_facts(selection: Selection, facts: DeviceFacts | None) -> Selection:
    """The selection with what the helper found out; without a spec when it cannot set clocks."""
    if facts is None:
        why = "the clock helper did not start; see its message above"
        return replace(selection, spec=None, clocks_mhz=(), why_not=why)
    if not facts.can_lock:
        return replace(selection, name=facts.name, spec=None, clocks_mhz=(), why_not=facts.why_not, busy=facts.busy)
    return replace(selection, backend=facts.backend or selection.backend, name=facts.name, clocks_mhz=facts.clocks_mhz)


def _emulated(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    emulation = config.emulation
    path = output_dir.absolute() / "emulated_gpus" / f"rank{placement.rank}"
    gpu = EmulatedGpu.create(
        path,
        switch_latency_s=emulation.switch_latency_s,
        tick_period_s=emulation.counter_period_s,
    )
    return _of_emulated(gpu, "emulated", f"emulated:{path}")


def _given(config: PerseusConfig, placement: Placement, paths: tuple[str, ...]) -> Selection:
    if placement.local_rank >= len(paths):
        raise ConfigError(
            f"perseus.emulation.gpus: got {len(paths)} paths; allowed: one per local rank, and there is a local rank "
            f"{placement.local_rank}"
        )
    path = paths[placement.local_rank]
    gpu = EmulatedGpu(path)
    if config.gpu.backend == "emulated":
        return _of_emulated(gpu, "emulated", f"emulated:{path}")
    return _of_emulated(gpu, config.gpu.backend, _spec(config, gpu.uuid))


def _of_emulated(gpu: EmulatedGpu, backend: str, spec: str) -> Selection:
    return Selection(
        backend,
        spec,
        gpu.name,
        poll_interval_s=gpu.tables.tick_period_s / _POLLS_PER_TICK,
        emulated_gpu=gpu,
    )


def _real(config: PerseusConfig, placement: Placement) -> Selection:
    import torch

    index = torch.device(placement.device).index
    if getattr(torch.version, "hip", None):  # torch calls AMD's GPUs cuda, too
        name = torch.cuda.get_device_name(index)
        return Selection(
            config.gpu.backend,
            None,
            name,
            why_not=f"{name} is an AMD GPU (ROCm {torch.version.hip}), and only clocks of NVIDIA GPUs can be set; "
            "nothing needs to be done",
        )
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return Selection(config.gpu.backend, _spec(config, uuid), torch.cuda.get_device_name(index))


def _spec(config: PerseusConfig, uuid: str) -> str:
    """The spec of a GPU behind NVML or zeusd, see `gpus.opening`."""
    socket = config.gpu.zeusd_socket
    return {"nvml": f"nvml:{uuid}", "zeusd": f"zeusd:{socket}::{uuid}"}.get(config.gpu.backend, f"auto:{socket}:{uuid}")
