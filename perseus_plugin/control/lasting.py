"""A clock helper that is started once more when it has ended although nobody here has asked it to: killed, out of
memory, or ended by a clean-up. One that ends again is trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.wire import DeviceFacts, Event, SwitchLatency, Trouble


class LastingHelper:
    """As `ClockHelper`, whose calls it has; made by `start`. What holds is told to the second helper, too."""

    def __init__(self, spec: str, min_dwell_s: float | None, gives_way: bool) -> None:
        self._spec, self._min_dwell_s, self._gives_way = spec, min_dwell_s, gives_way
        self._helper = self._started(0.0)
        self._lock = threading.Lock()
        self._second = self._over = False
        self._told: list[Event] = []
        self._end: Trouble | None = None  # of the first helper, while the second is not ready yet
        self._asked: tuple[int | None] | None = None
        self._rounds = 0
        self._latency_s = 0.0
        self._poll_s: float | None = None
        self._silence_s: float | None = None
        self._on_end: Callable[[], None] = lambda: None

    @classmethod
    def start(cls, spec: str, *, min_dwell_s: float | None = None, gives_way: bool = False) -> LastingHelper:
        """See `ClockHelper.start`."""
        return cls(spec, min_dwell_s, gives_way)

    def wait_ready(self, timeout_s: float) -> DeviceFacts | None:
        """See `ClockHelper.wait_ready`; of the second helper, where the first has ended before."""
        facts = self._helper.wait_ready(timeout_s)
        if facts is None and not self._second:
            self._told += self.drain()
            if self._second:
                facts = self._helper.wait_ready(timeout_s)
        return facts

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """See `ClockHelper.request`."""
        with self._lock:
            # A clock that another one was to follow is not asked for again: too fast is better than too slow.
            self._asked = (frequency_mhz,) if apply_at_s <= 0.0 else None
            self._helper.request(frequency_mhz, apply_at_s)

    def retire(self) -> None:
        """See `ClockHelper.retire`."""
        with self._lock:
            self._over = True
            self._helper.retire()

    def poll_energy(self, interval_s: float | None) -> None:
        """See `ClockHelper.poll_energy`."""
        with self._lock:
            self._poll_s = interval_s
            self._helper.poll_energy(interval_s)

    def free_after(self, silence_s: float) -> None:
        """See `ClockHelper.free_after`."""
        with self._lock:
            self._silence_s = silence_s
            self._helper.free_after(silence_s)

    def mark(self, tag: int) -> None:
        """See `ClockHelper.mark`; while there is no helper there is no answer."""
        self._helper.mark(tag)

    def measure_latency(self, rounds: int = 8) -> None:
        """See `ClockHelper.measure_latency`."""
        with self._lock:
            self._rounds, self._asked = rounds, None
            self._helper.measure_latency(rounds)

    def on_end(self, ended: Callable[[], None]) -> None:
        """See `ClockHelper.on_end`; of the second helper, too."""
        with self._lock:
            self._on_end = ended
            helper = self._helper
        helper.on_end(ended)

    def drain(self) -> list[Event]:
        """See `ClockHelper.drain`; here the second helper is started, so it is to be called now and then."""
        told, self._told = self._told, []
        for event in self._helper.drain():
            if isinstance(event, SwitchLatency):
                self._rounds = 0
                self._latency_s = event.p95_s if event.p95_s > 0 else 0.0
            if isinstance(event, Trouble) and event.code == "helper_died" and event.free and self._may_start_again():
                self._second, self._end = True, event
                self._start_again()
            else:
                told.append(event)
        if self._end is not None and (facts := self._helper.wait_ready(0.0)) is not None:
            end, self._end = self._end, None
            if facts.can_lock:
                text = f"{end.text}, and a second helper sets it as before"
                told.append(Trouble("started_again", text, time.monotonic()))
            else:
                text = f"{end.text}; a second helper may not set it: {facts.why_not}"
                told.append(Trouble("helper_died", text, time.monotonic()))
        return told

    def close(self, timeout_s: float = 5.0) -> bool:
        """See `ClockHelper.close`."""
        with self._lock:
            self._over = True
        return self._helper.close(timeout_s)

    def _started(self, latency_s: float) -> ClockHelper:
        return ClockHelper.start(
            self._spec, min_dwell_s=self._min_dwell_s, gives_way=self._gives_way, latency_s=latency_s
        )

    def _may_start_again(self) -> bool:
        facts = self._helper.wait_ready(0.0)
        return (facts is None or facts.can_lock) and not (self._second or self._over)

    def _start_again(self) -> None:
        helper = self._started(self._latency_s)
        with self._lock:
            if self._over:
                helper.close(0.0)
                return
            self._helper = helper
            helper.on_end(self._on_end)
            if self._silence_s is not None:
                helper.free_after(self._silence_s)
            if self._poll_s is not None:
                helper.poll_energy(self._poll_s)
            if self._rounds:
                helper.measure_latency(self._rounds)
            if self._asked is not None:
                helper.request(self._asked[0])
