"""Which GPU a rank uses, and who sets its clock."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.messages import Placement

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
    """

    backend: str
    spec: str | None
    name: str
    clocks_mhz: tuple[int, ...] = ()
    poll_interval_s: float = _REAL_COUNTER_PERIOD_S / _POLLS_PER_TICK
    emulated_gpu: EmulatedGpu | None = None
    why_not: str = ""

    @property
    def emulated(self) -> bool:
        """Whether figures are a model's and not a GPU's."""
        return self.emulated_gpu is not None


def select_gpu(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    """Choose the GPU of this rank as configured; the emulated one is made here.

    Raises:
        GpuError: the emulated GPU cannot be made.
    """
    on_cuda = placement.device.startswith("cuda")
    backend = config.gpu.backend
    if backend == "auto" and not on_cuda:
        backend = "emulated"
        if placement.rank == 0:
            logger.warning(
                "no NVIDIA GPU here: an emulated %s stands in for it, and every instruction is stretched to its time "
                '("gpu": {"backend": "off"} turns that off)',
                config.emulation.model,
            )
    if backend == "off":
        return Selection("off", None, "GPU" if on_cuda else "CPU")
    if backend == "emulated":
        return _emulated(config, placement, output_dir)
    return _real(config, placement)


def with_facts(selection: Selection, facts: DeviceFacts | None) -> Selection:
    """The selection with what the helper found out; without a spec when it cannot set clocks."""
    if facts is not None and facts.can_lock:
        return _replaced(selection, facts.name, selection.spec, facts.clocks_mhz, "")
    why = "the clock helper did not start" if facts is None else facts.why_not
    return _replaced(selection, selection.name if facts is None else facts.name, None, (), why)


def _replaced(
    selection: Selection, name: str, spec: str | None, clocks_mhz: tuple[int, ...], why_not: str
) -> Selection:
    return Selection(
        selection.backend, spec, name, clocks_mhz, selection.poll_interval_s, selection.emulated_gpu, why_not
    )


def _emulated(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    emulation = config.emulation
    path = output_dir.absolute() / "emulated_gpus" / f"rank{placement.rank}"
    gpu = EmulatedGpu.create(
        path,
        switch_latency_s=emulation.switch_latency_s,
        tick_period_s=emulation.counter_period_s,
    )
    return Selection(
        "emulated",
        f"emulated:{path}",
        gpu.name,
        poll_interval_s=emulation.counter_period_s / _POLLS_PER_TICK,
        emulated_gpu=gpu,
    )


def _real(config: PerseusConfig, placement: Placement) -> Selection:
    import torch

    index = torch.device(placement.device).index
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return Selection("nvml", f"nvml:{uuid}", torch.cuda.get_device_name(index))
