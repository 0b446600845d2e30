"""When the GPU really gets to an instruction boundary.

On a GPU, Python runs ahead: a middle stage's Python can be a whole batch ahead of its device. So a boundary is a CUDA
event recorded in the stream; a thread of ours waits for it and only then acts, and the training thread never waits.
Without CUDA the boundary is reached when Python is there. Both look the same to the caller.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol, TypeAlias

Action: TypeAlias = Callable[..., None]
"""Called with the time the boundary was reached (`time.monotonic()` seconds), then the arguments given."""


class Boundaries(Protocol):
    """Does things at points of the GPU's work."""

    def reach(self, action: Action, *arguments: Any) -> None:
        """Call `action(now_s, *arguments)` once all work submitted so far is done; returns at once."""
        ...

    def close(self, timeout_s: float = 1.0) -> None:
        """Do nothing any more; what was asked for before may still be done within `timeout_s`."""
        ...


class HostBoundaries:
    """Work is done when Python has done it (CPU, emulated GPU)."""

    def reach(self, action: Action, *arguments: Any) -> None:
        """See `Boundaries`."""
        action(monotonic(), *arguments)

    def close(self, timeout_s: float = 1.0) -> None:
        """See `Boundaries`."""


class Event(Protocol):
    """The part of `torch.cuda.Event` that is needed; made with timing, and blocking, so that waiting is no spinning."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class EventBoundaries:
    """Work is done when an event recorded after it has passed.

    Times come from the events' own time stamps: the waiter wakes up late by 0.1 to 0.5 ms (seen on H100 and H200), and
    by 5 when Python computes. They are tied to the host's clock anew every `REBASE_S`, by the wake-up that was the
    least late since: none comes before its event, so that the earliest tells most of where the event's clock stands.

    Args:
        make_event: makes an event.
        on_error: called with the exception when waiting or an action fails; nothing is done after that.
        prepare_thread: called first on the waiting thread.
    """

    REBASE_S = 1.0
    MOST_DRIFT = 1e-4
    """Share by which an event's clock may fall behind the host's: more than that is wake-ups that were all late."""

    def __init__(
        self,
        make_event: Callable[[], Event],
        on_error: Callable[[Exception], None],
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_event = make_event
        self._prepare_thread = prepare_thread
        self._on_error = on_error
        self._free: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[Event, Action, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._base: Event | None = None
        self._base_s = 0.0
        self._least_late_s = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._wait, name="perseus-boundaries", daemon=True)
        self._thread.start()

    def reach(self, action: Action, *arguments: Any) -> None:
        """See `Boundaries`."""
        if self._closed:
            return
        try:
            event = self._free.get_nowait()
        except queue.Empty:
            event = self._make_event()
        event.record()
        self._pending.put((event, action, arguments))

    def close(self, timeout_s: float = 1.0) -> None:
        """See `Boundaries`."""
        self._pending.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        self._closed = True

    def _wait(self) -> None:
        try:
            self._prepare_thread()
            while (item := self._pending.get()) is not None and not self._closed:
                event, action, arguments = item
                event.synchronize()
                if self._closed:
                    return
                action(self._time_of(event), *arguments)
        except Exception as error:
            self._closed = True
            self._on_error(error)

    def _time_of(self, event: Event) -> float:
        """Host time at which the event passed; takes the event into use as the new base or frees it."""
        now_s = monotonic()
        if self._base is None:
            self._base, self._base_s = event, now_s
            return now_s
        elapsed_s = 1e-3 * self._base.elapsed_time(event)
        passed_s = self._base_s + elapsed_s
        self._least_late_s = min(self._least_late_s, now_s - passed_s)
        if elapsed_s < self.REBASE_S:
            self._free.put(event)
        else:
            passed_s += min(self._least_late_s, self.MOST_DRIFT * elapsed_s)
            self._free.put(self._base)
            self._base, self._base_s, self._least_late_s = event, passed_s, math.inf
        return min(passed_s, now_s)


def boundaries_for(device: str, on_error: Callable[[Exception], None]) -> Boundaries:
    """Events on a CUDA device, the host's time elsewhere.

    Args:
        device: torch device, e.g. "cuda:0" or "cpu".
        on_error: see `EventBoundaries`.
    """
    if not device.startswith("cuda"):
        return HostBoundaries()
    import torch

    return EventBoundaries(
        lambda: torch.cuda.Event(enable_timing=True, blocking=True),
        on_error,
        # A new thread stands on device 0, and would make a context there in every rank that sees it.
        lambda: torch.cuda.set_device(device),
    )
