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
from perseus_plugin.gpus.emulated.physics import MODELS
from perseus_plugin.gpus.registry import AUTO, EMULATED, OFF, backend, backends, one_of, spec_of

logger = logging.getLogger(__name__)

POLLS_PER_TICK = 4
_REAL_COUNTER_PERIOD_S = 0.02


@dataclass(frozen=True)
class Selection:
    """A rank's GPU.

    Attributes:
        backend: who sets clocks, by its name in `gpus.registry`; "off": nobody.
        spec: for the helper process (see `gpus.registry`); None: observe only.
        name: for people.
        clocks_mhz: clocks that can be locked; empty when none can.
        poll_interval_s: how often to poll the energy counter while profiling.
        emulated_gpu: where this rank's work is stretched to an emulated GPU's.
        why_not: why clocks cannot be set, and what would help; empty when they can.
        driver: version of the GPU's driver, empty if there is none.
        busy: another session or job sets this GPU's clock.
        power_limit_w: the most that the card may be set to draw (0: not known).
        enforced_limit_w: the power limit in force (0: not known).
    """

    backend: str
    spec: str | None
    name: str
    clocks_mhz: tuple[int, ...] = ()
    poll_interval_s: float = _REAL_COUNTER_PERIOD_S / POLLS_PER_TICK
    emulated_gpu: EmulatedGpu | None = None
    why_not: str = ""
    driver: str = ""
    busy: bool = False
    power_limit_w: float = 0.0
    enforced_limit_w: float = 0.0

    @property
    def emulated(self) -> bool:
        """Whether figures are a model's and not a GPU's."""
        return self.emulated_gpu is not None


def emulates(config: PerseusConfig, placement: Placement) -> bool:
    """Whether this rank's work is stretched to an emulated GPU's: only work of the CPU ever is."""
    chosen = config.gpu.backend
    if chosen == OFF or not placement.device.startswith("cpu"):
        return False
    return chosen == AUTO or (found := backend(chosen)).emulated or "cpu" not in found.devices


def select_gpu(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    """Choose the GPU of this rank as configured; the emulated one is made here.

    Raises:
        ConfigError: what is configured is not there.
        GpuError: the emulated GPU cannot be made or opened, or a backend cannot be loaded.
    """
    chosen = config.gpu.backend
    if chosen == OFF:
        return Selection(OFF, None, "GPU" if placement.device.startswith("cuda") else "CPU")
    emulating = chosen != AUTO and backend(chosen).emulated
    if emulating and not placement.device.startswith("cpu"):
        real = [name for name, found in backends() if not found.emulated]
        raise ConfigError(
            f'perseus.gpu.backend: got "{chosen}"; allowed: {one_of([AUTO, *real, OFF])} for work on '
            f"{placement.device}: only work of the CPU can be stretched to an emulated GPU's time"
        )
    if not emulates(config, placement):
        return _real(config, placement)
    if config.emulation.gpus is not None:
        return _given(config, placement, config.emulation.gpus)
    if chosen != AUTO and not emulating:
        emulators = [name for name, found in backends() if "cpu" in found.devices]
        raise ConfigError(
            f'perseus.gpu.backend: got "{chosen}"; allowed: {one_of([AUTO, *emulators, OFF])} where torch has no CUDA '
            "device"
        )
    if chosen == AUTO and placement.leads:
        logger.warning(
            "no NVIDIA GPU here: an emulated %s stands in for it, and every instruction is stretched to its time "
            '("gpu": {"backend": "off"} turns that off)',
            config.emulation.model,
        )
    return _emulated(config, placement, output_dir)


def with_facts(selection: Selection, facts: DeviceFacts | None, problem: str = "") -> Selection:
    """The selection with what the helper found out; without a spec when it cannot set clocks.

    Args:
        selection: as chosen.
        facts: what the helper found out; None: it is not there.
        problem: why, where it has said so.
    """
    if facts is None:
        why = problem or "the clock helper did not answer in time"
        return replace(selection, spec=None, clocks_mhz=(), why_not=why)
    if not facts.can_lock:
        return replace(selection, name=facts.name, spec=None, clocks_mhz=(), why_not=facts.why_not, busy=facts.busy)
    return replace(
        selection,
        backend=facts.backend or selection.backend,
        name=facts.name,
        clocks_mhz=facts.clocks_mhz,
        power_limit_w=facts.power_limit_w,
        enforced_limit_w=facts.enforced_limit_w,
    )


def _emulated(config: PerseusConfig, placement: Placement, output_dir: Path) -> Selection:
    emulation = config.emulation
    model, limit_w = MODELS[emulation.model.lower()], emulation.power_limit_w
    if limit_w is not None and not model.static_w < limit_w <= model.most_w:
        raise ConfigError(
            f"perseus.emulation.power_limit_w: got {limit_w:g}; allowed: above {model.static_w:g} and at most "
            f"{model.most_w:g} for an emulated {emulation.model}"
        )
    path = output_dir.absolute() / "emulated_gpus" / f"rank{placement.rank}"
    gpu = EmulatedGpu.create(
        path,
        model,
        power_limit_w=limit_w,
        switch_latency_s=emulation.switch_latency_s,
        tick_period_s=emulation.counter_period_s,
    )
    return _of_emulated(gpu, EMULATED, f"{EMULATED}:{path}")


def _given(config: PerseusConfig, placement: Placement, paths: tuple[str, ...]) -> Selection:
    if placement.local_rank >= len(paths):
        raise ConfigError(
            f"perseus.emulation.gpus: got {len(paths)} paths; allowed: one per local rank, and there is a local rank "
            f"{placement.local_rank}"
        )
    path, chosen = paths[placement.local_rank], config.gpu.backend
    gpu = EmulatedGpu(path)
    if chosen == EMULATED:
        return _of_emulated(gpu, EMULATED, f"{EMULATED}:{path}")
    # Behind a driver that is simulated.
    return _of_emulated(gpu, chosen, spec_of(chosen, gpu.uuid, config.gpu.zeusd_socket))


def _of_emulated(gpu: EmulatedGpu, backend: str, spec: str) -> Selection:
    return Selection(
        backend,
        spec,
        gpu.name,
        poll_interval_s=gpu.tables.tick_period_s / POLLS_PER_TICK,
        emulated_gpu=gpu,
    )


def _real(config: PerseusConfig, placement: Placement) -> Selection:
    """The GPU behind the rank's device, by the first of the backends in question that has it."""
    chosen, device = config.gpu.backend, placement.device
    asked = backends() if chosen == AUTO else [(chosen, backend(chosen))]
    makers = []
    for name, one in asked:
        found = one.find(device) if device.partition(":")[0] in one.devices else None
        if found is not None:
            spec = spec_of(name, found.uuid, config.gpu.zeusd_socket, auto=chosen == AUTO)
            return Selection(chosen, spec, found.name)
        if not one.emulated:
            makers.append(one.maker or name)
    can_be_set = f"only clocks of {' and '.join(dict.fromkeys(makers))} GPUs can be set"
    name, maker = _described(device)
    if maker:
        why_not = f"{name} is an {maker}, and {can_be_set}; nothing needs to be done"
    else:
        why_not = f"{can_be_set}, and {name} is none; nothing needs to be done"
    return Selection(chosen, None, name, why_not=why_not)


def _described(device: str) -> tuple[str, str]:
    """A device that no backend has: its name, and who made it where that is known."""
    if not device.startswith("cuda"):
        return device, ""
    import torch

    name, hip = torch.cuda.get_device_name(torch.device(device).index), getattr(torch.version, "hip", None)
    return name, f"AMD GPU (ROCm {hip})" if hip else ""  # torch calls AMD's GPUs cuda, too
