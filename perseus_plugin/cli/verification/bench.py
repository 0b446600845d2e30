"""What runs work on the GPU that is looked at: real kernels on a CUDA device, or the emulated GPU's own time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from perseus_plugin.cli.verification.arithmetic import Step
from perseus_plugin.cli.verification.captured import CapturedStep
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.execution import EmulatedExecution
from perseus_plugin.gpus.nvml import cuda_gpu
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD

KINDS = (FORWARD, BACKWARD)


class Bench(Protocol):
    """Runs work. Where the GPU is real, calls return before it is done.

    Attributes:
        device: torch device, for `control.boundaries.boundaries_for`.
        about: where the work runs, for people.
        software: versions of what it runs on.
        waits: ways of waiting that it can make itself, by name: each waits so many seconds.
    """

    device: str
    about: str
    software: dict[str, str]
    waits: dict[str, Callable[[float], None]]

    def queue(self, kind: str) -> None:
        """Have one instruction run; returns early, but is never more than a few instructions ahead."""
        ...

    def capture(self, steps: Sequence[Step]) -> CapturedStep | None:
        """These instructions, with their waits, as one CUDA graph; None: no kernels run here."""
        ...

    def queue_short(self) -> None:
        """Have something run that the GPU does faster than the CPU can ask for it."""
        ...

    def queue_wait(self, seconds: float) -> None:
        """Have the GPU wait as it does for a peer."""
        ...

    def occupy(self, seconds: float) -> None:
        """Keep the GPU waiting as above beside what follows on the CPU, where that makes a difference."""
        ...

    def settle(self) -> None:
        """Return once all work is done."""
        ...

    def done_s(self) -> float:
        """Wait for all work, as closely as can be, and say when it was done (`time.monotonic()`)."""
        ...

    def drift(self, seconds: float) -> float | None:
        """By what share the GPU's clock runs faster than the host's, watched so long; None: there is one clock only."""
        ...

    def heavier(self) -> Bench | None:
        """The same with work that takes the GPU to its power limit, if anything does; None: there is no such work."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class EmulatedBench:
    """Work on an emulated GPU: it takes the emulated time, and the caller waits for it.

    Args:
        gpu: which.
        times_s: full-clock time of an instruction of each kind.
    """

    device = "cpu"
    about = "an emulated GPU, no kernels"

    def __init__(self, gpu: EmulatedGpu, times_s: Mapping[str, float]) -> None:
        self.software: dict[str, str] = {}
        self.waits: dict[str, Callable[[float], None]] = {"no work": time.sleep}
        self._execution = EmulatedExecution(gpu)
        self._times_s = times_s
        self._done_s = 0.0

    def queue(self, kind: str) -> None:
        """See `Bench`."""
        self._execution.begin(kind, self._times_s[kind])
        self._done_s = self._execution.finish().end_s

    def capture(self, steps: Sequence[Step]) -> CapturedStep | None:
        """It runs no kernels."""
        return None

    def queue_short(self) -> None:
        """Nothing: only what the CPU does remains."""

    def queue_wait(self, seconds: float) -> None:
        """See `Bench`."""
        time.sleep(seconds)

    def occupy(self, seconds: float) -> None:
        """It waits anyway."""

    def settle(self) -> None:
        """It is done already."""

    def done_s(self) -> float:
        """By the emulation's own account."""
        return self._done_s

    def drift(self, seconds: float) -> float | None:
        """The host's clock is its clock."""
        return None

    def heavier(self) -> Bench | None:
        """Its work is what its model was fitted to."""
        return None

    def close(self) -> None:
        """The GPU is the caller's."""


_SIDE = 4096  # of the matrices: 0.2 ms each product on a H100
_ELEMENTS = 1 << 27  # of what is read and written: several times any cache
_AHEAD = 4  # instructions: enough that the GPU never waits for Python, and few enough to end soon
_MANY = 16  # about as many blocks as a collective of NCCL has


@dataclass(frozen=True)
class Mix:
    """What an instruction is made of, in turns of less than a millisecond, over which no counter sees single parts.

    Attributes:
        products, others: matrix products and memory-bound operations of a turn.
        duty: share of the time that they take; the rest is waiting, which keeps the mean power down.
    """

    products: int
    others: int
    duty: float = 1.0


_LIGHT = {FORWARD: Mix(1, 0, 0.3), BACKWARD: Mix(2, 0, 0.5)}
"""Kinds that differ in power and stay below the limit: at the limit a GPU has no power and no clock of its own."""
_HEAVY = {FORWARD: Mix(1, 1), BACKWARD: Mix(4, 1)}


class CudaBench:
    """Matrix products and memory-bound operations on a CUDA device.

    Args:
        device: e.g. "cuda:0".
        times_s: about how long an instruction of each kind is to take.
        mixes: what an instruction of each kind is made of.

    Raises:
        GpuError: it has not the memory.
    """

    def __init__(self, device: str, times_s: Mapping[str, float], mixes: Mapping[str, Mix] = _LIGHT) -> None:
        import torch

        self._torch: Any = torch
        self._times_s, self._mixes = times_s, mixes
        self.device = device
        self.about = f"{device}: bf16 products of {_SIDE} x {_SIDE} with pauses in between, by kernels"
        self.software = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
        self.waits: dict[str, Callable[[float], None]] = {
            "no work": time.sleep,
            "one spinning thread": lambda seconds: self._spin(seconds, 1),
            f"{_MANY} spinning kernels": lambda seconds: self._spin(seconds, _MANY),
        }
        torch.cuda.set_device(device)
        try:
            generator = torch.Generator(device=device).manual_seed(1)
            shape = (_SIDE, _SIDE)
            self._left, self._right = (
                torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2)
            )
            self._product = torch.empty_like(self._left)
            self._vector = torch.randn(_ELEMENTS, device=device, dtype=torch.bfloat16, generator=generator)
            self._small = torch.zeros(1024, device=device)
            torch.cuda.synchronize()
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            raise GpuError(f"verify: {device}: cannot get 0.5 GB of memory for the work: {what}") from error
        self._ahead: deque[Any] = deque()
        self._turns = dict.fromkeys(KINDS, 1)
        self._pause_s = dict.fromkeys(KINDS, 0.0)
        self._cycles_per_s = self._time_cycles()
        for kind in KINDS:
            busy_s = self._time_of_a_turn_s(kind)
            turn_s = busy_s / mixes[kind].duty
            self._pause_s[kind] = turn_s - busy_s
            self._turns[kind] = max(1, round(times_s[kind] / turn_s))

    def queue(self, kind: str) -> None:
        """See `Bench`."""
        self._launch(kind)
        event = self._torch.cuda.Event(blocking=True)
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > _AHEAD:
            self._ahead.popleft().synchronize()

    def _launch(self, kind: str) -> None:
        mix, pause_s = self._mixes[kind], self._pause_s[kind]
        for _ in range(self._turns[kind]):
            for _ in range(mix.products):
                self._torch.mm(self._left, self._right, out=self._product)
            for _ in range(mix.others):
                self._vector.neg_()
            if pause_s > 0:
                self.queue_wait(pause_s)

    def capture(self, steps: Sequence[Step]) -> CapturedStep | None:
        """See `Bench`."""

        def run(step: Step) -> None:
            if step.wait_s > 0:
                self.queue_wait(step.wait_s)
            self._launch(step.kind)

        self.settle()
        return CapturedStep(self.device, [partial(run, step) for step in steps])

    def queue_short(self) -> None:
        """See `Bench`: ten of the smallest kernels."""
        for _ in range(10):
            self._small.add_(1.0)

    def queue_wait(self, seconds: float) -> None:
        """One thread of one block that looks at the clock until it is time, as a receive looks for its data."""
        self._torch.cuda._sleep(int(seconds * self._cycles_per_s))

    def occupy(self, seconds: float) -> None:
        """See `Bench`."""
        self.queue_wait(seconds)

    def settle(self) -> None:
        """See `Bench`."""
        self._ahead.clear()
        event = self._torch.cuda.Event(blocking=True)
        event.record()
        event.synchronize()

    def done_s(self) -> float:
        """By an event that is spun on, so that waking up takes no time."""
        event = self._torch.cuda.Event()
        event.record()
        event.synchronize()
        return time.monotonic()

    def drift(self, seconds: float) -> float | None:
        """See `Bench`."""
        first, last = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.settle()
        first.record()
        begin_s = self.done_s()
        time.sleep(seconds)
        last.record()
        end_s = self.done_s()
        return 1e-3 * float(first.elapsed_time(last)) / (end_s - begin_s) - 1

    def heavier(self) -> Bench | None:
        """Without pauses, and with memory-bound operations."""
        return CudaBench(self.device, self._times_s, _HEAVY)

    def close(self) -> None:
        """Give the memory back."""
        self.settle()
        del self._left, self._right, self._product, self._vector, self._small
        self._torch.cuda.empty_cache()

    def _spin(self, seconds: float, kernels: int) -> None:
        streams = [self._torch.cuda.Stream() for _ in range(kernels)]
        for stream in streams:
            with self._torch.cuda.stream(stream):
                self.queue_wait(seconds)
        for stream in streams:
            stream.synchronize()

    def _time_of_a_turn_s(self, kind: str) -> float:
        for _ in range(10):
            self.queue(kind)
        begin_s, count = self.done_s(), 50
        for _ in range(count):
            self.queue(kind)
        return (self.done_s() - begin_s) / count

    def _time_cycles(self) -> float:
        cycles = 20_000_000
        self._torch.cuda._sleep(cycles)
        begin_s = self.done_s()
        self._torch.cuda._sleep(cycles)
        return cycles / (self.done_s() - begin_s)


def cuda_device(uuid: str) -> str:
    """The torch device that is this GPU.

    Raises:
        GpuError: torch is not here, has no CUDA, or does not see it.
    """
    try:
        import torch
    except ImportError as error:
        raise GpuError("verify: needs torch with CUDA to run work on the GPU; torch is not installed") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        found = cuda_gpu(f"cuda:{index}")
        if found is not None and found.uuid == uuid:
            return f"cuda:{index}"
    raise GpuError(
        f"verify: needs torch with CUDA to run work on GPU {uuid}; torch {torch.__version__} sees {count} GPUs, not "
        "this one"
    )
