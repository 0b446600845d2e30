"""A session in memory, for tests of adapters: it sets no clock, and notes what it is told.

    with sessions_in_memory() as sessions:
        ...                                       # make the framework train under the adapter
    assert sessions[0].iterations[0].complete

Calls that are out of order, which a real session bears, are an `AssertionError` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from perseus_plugin.config import PerseusConfig
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.integrations import base
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.stragglers.external import ExternalFigures


@dataclass
class Iteration:
    """What a session was told of one training iteration.

    Attributes:
        schedule: key of the schedule; empty if none was begun.
        stream_of: its operations by stage.
        operations: those that the tap is to be called for, in program order.
        begun, ended: how many of them have.
        undisturbed: nothing else has run in it.
        over: whether the iteration has ended.
    """

    schedule: str = ""
    stream_of: Callable[[int], Sequence[StreamOp]] = lambda stage: ()
    operations: Sequence[Compute | Constant] = ()
    begun: int = 0
    ended: int = 0
    undisturbed: bool = True
    replayed: bool = False
    over: bool = False

    @property
    def complete(self) -> bool:
        """Whether every operation was seen, from beginning to end."""
        return bool(self.operations) and self.begun == self.ended == len(self.operations)


class _Tap:
    def __init__(self) -> None:
        self.iteration: Iteration | None = None

    def begin(self) -> None:
        if self.iteration is not None:
            assert self.iteration.begun == self.iteration.ended, "an operation begins within another one"
            assert self.iteration.begun < len(self.iteration.operations), "more operations than the stream has"
            self.iteration.begun += 1

    def end(self) -> None:
        if self.iteration is not None:
            assert self.iteration.begun == self.iteration.ended + 1, "an operation ends that has not begun"
            self.iteration.ended += 1


@dataclass
class InMemorySession:
    """Implements `base.PipelineSession`.

    Attributes:
        config, placement, monitor, facts, about, exchange: what it was started with.
        iterations: every training iteration, the running one last.
        full_clocks: how many times clocks were to be full for what is no training.
        took: figures of other straggler detectors.
        events: figures for the monitor, to be put there by a test; written when an iteration or the session ends.
    """

    config: PerseusConfig
    placement: Placement
    monitor: base.Monitor | None = None
    facts: Mapping[str, str] | None = None
    about: Mapping[str, str] | None = None
    exchange: Exchange | None = None
    iterations: list[Iteration] = field(default_factory=list)
    full_clocks: int = 0
    took: list[ExternalFigures] = field(default_factory=list)
    events: list[tuple[str, float]] = field(default_factory=list)
    closed: bool = False
    tap: _Tap = field(default_factory=_Tap)
    _on_close: list[Callable[[], None]] = field(default_factory=list)

    def on_close(self, callback: Callable[[], None]) -> None:
        """See the protocol, as for all that follows."""
        self._on_close.append(callback)

    def begin_iteration(self) -> None:
        if not self.closed:
            assert self._running is None, "an iteration begins within another one"
            self.iterations.append(Iteration())

    def begin_schedule(
        self, key: str, stream_of: Callable[[int], Sequence[StreamOp]], *, replayed: bool = False
    ) -> bool:
        if self.closed:
            return False
        running = self._running
        assert running is not None, "a schedule begins outside of an iteration"
        assert not running.schedule, "a second schedule begins in an iteration"
        streams = [stream_of(stage) for stage in range(self.placement.stages)]
        build_graph(streams, {})
        running.schedule, running.stream_of, running.replayed = key, stream_of, replayed
        running.operations = [op for op in streams[self.placement.stage] if isinstance(op, (Compute, Constant))]
        self.tap.iteration = running
        return True

    def end_schedule(self) -> None:
        self.tap.iteration = None

    def end_iteration(self) -> None:
        running, self.tap.iteration = self._running, None
        if running is not None:
            running.over = True
            self._write_events()

    def evaluation(self) -> None:
        if not self.closed:
            self.full_clocks += 1
            if self._running is not None:
                self._running.undisturbed = False

    def external_figures(self, figures: ExternalFigures) -> None:
        self.took.append(figures)

    def close(self) -> None:
        if not self.closed:
            self.closed, self.tap.iteration = True, None
            for callback in self._on_close:
                callback()
            self._write_events()

    def _write_events(self) -> None:
        events, self.events = self.events, []
        if self.monitor is not None and events:
            self.monitor(events)

    @property
    def _running(self) -> Iteration | None:
        return self.iterations[-1] if self.iterations and not self.iterations[-1].over else None


@contextmanager
def sessions_in_memory(error: Exception | None = None) -> Iterator[list[InMemorySession]]:
    """Within, every adapter is given sessions in memory, which are listed as they are made.

    Args:
        error: raised in the place of starting one.
    """
    made: list[InMemorySession] = []

    def start(*described: Any) -> InMemorySession:
        if error is not None:
            raise error
        made.append(InMemorySession(*described))
        return made[-1]

    base._stand_in.append((start, made))
    try:
        yield made
    finally:
        base._stand_in.pop()
