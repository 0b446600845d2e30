"""Work captured as one CUDA graph, with flags in host memory that say how far a replay has got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from perseus_plugin.errors import GpuError

_LOOK_S = 2e-5  # between two looks: no other thread of this process would run while we spin
_LONGEST_S = 30.0


class CapturedStep:
    """Pieces of work, one after the other, as one CUDA graph on a device; made on the thread that replays it.

    At the begin of the graph and after each piece, the GPU copies the number of the run to a flag in page-locked host
    memory: so the host sees on its own clock how far the GPU is, as nothing else of a graph shows with every torch.

    Args:
        device: torch device.
        pieces: each launches kernels on the current stream.
    """

    def __init__(self, device: str, pieces: Sequence[Callable[[], None]]) -> None:
        import torch

        self._torch: Any = torch
        self._pieces = pieces
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._flags = torch.zeros(1 + len(pieces), dtype=torch.int64, pin_memory=True)
        self._seen = self._flags.numpy()
        self._runs = 1
        self._watcher: threading.Thread | None = None
        self._passed_s = list[float]()
        self._run()  # what is made at the first use of a kernel cannot be made in a capture
        torch.cuda.synchronize()
        self._graph: Any = torch.cuda.CUDAGraph()
        # As Megatron does: other threads may ask the driver for something meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._run()

    def _run(self) -> None:
        self._number.add_(1)
        self._mark(0)
        for at, piece in enumerate(self._pieces, 1):
            piece()
            self._mark(at)

    def _mark(self, at: int) -> None:
        self._flags[at : at + 1].copy_(self._number, non_blocking=True)

    def replay(self) -> None:
        """Launch one. Of many kernels the call lasts while the GPU is at the first ones already."""
        self._runs += 1
        self._passed_s = []
        self._watcher = threading.Thread(target=self._watch, name="perseus-replay", daemon=True)
        self._watcher.start()
        self._graph.replay()

    def _watch(self) -> None:
        end_s = time.monotonic() + _LONGEST_S
        while len(self._passed_s) < len(self._seen) and time.monotonic() < end_s:
            if self._seen[len(self._passed_s)] >= self._runs:
                self._passed_s.append(time.monotonic())
            else:
                time.sleep(_LOOK_S)

    def passed_s(self) -> list[float]:
        """When the host saw each flag (`time.monotonic()`), once the replay launched last has ended.

        Raises:
            GpuError: it does not end.
        """
        if self._watcher is not None:
            self._watcher.join()
        if len(self._passed_s) < len(self._seen):
            raise GpuError(f"a replay of the graph had not ended after {_LONGEST_S:.0f} s")
        return self._passed_s
