"""A machine whose clocks are set through NVML: the simulated library in the driver's place, pynvml unmodified."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.e2e.launching import Probe, perseus_block
from tests.nvml_simulator.building import environment


class Simulation:
    """A machine with simulated GPUs.

    Args:
        library: the simulated NVML.
        folder: for the GPUs' states and locks.
        count: how many GPUs.
    """

    def __init__(self, library: Path, folder: Path, count: int) -> None:
        self.paths = [folder / "gpus" / str(index) for index in range(count)]
        # Who holds a GPU is looked for on the whole machine, where other tests run beside.
        self.uuids = [f"GPU-{uuid.uuid4()}" for _ in self.paths]
        self.gpus = [EmulatedGpu.create(path, uuid=name) for path, name in zip(self.paths, self.uuids, strict=True)]
        added = environment(library, self.paths)
        self.environment = {name: added[name] for name in ("LD_LIBRARY_PATH", "PERSEUS_SIMULATED_GPUS")}
        self.environment["PERSEUS_LOCK_DIR"] = str(folder / "locks")

    def job(self, folder: Path, *do: tuple[str, str], steps: int = 400, **changes: Any) -> Probe:
        """One with a stage on each GPU; `changes` are to its block."""
        block = perseus_block(folder / "out", len(self.paths), gpu={"backend": "nvml"}, **changes)
        block["emulation"]["gpus"] = [str(path) for path in self.paths]
        stages = len(self.paths)
        arguments = ("--stages", str(stages), "--steps", str(steps), "--gpus", str(self.paths[0].parent / "{}"))
        return Probe(folder, block, do, arguments, stages)

    def locked(self) -> list[int | None]:
        """The clock that every GPU is locked at."""
        return [gpu.locked_mhz() for gpu in self.gpus]

    def lowered(self) -> bool:
        """Whether any clock is locked below the highest."""
        return any(mhz not in (None, 1410) for mhz in self.locked())

    def free(self) -> bool:
        """Whether no clock is locked."""
        return all(mhz is None for mhz in self.locked())
