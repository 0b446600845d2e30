"""One stage's operations, written down as its Python runs. Pure.

For schedules that post sends and receives in groups and wait for a whole group before they go on, or post early and
wait late. Both are said with non-blocking sends: who posts a receive sends the sender word that it is ready, and who
waits for its send waits for that word.
"""

from __future__ import annotations

from collections.abc import Iterable

from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StreamOp

ACTIVATION, GRADIENT = "activation", "gradient"
"""The channels: to the next stage in a ring, and to the one before."""


class StageProgram:
    """The operations of one stage so far.

    Args:
        stages: pipeline ranks.
        stage: which of them.
    """

    def __init__(self, stages: int, stage: int) -> None:
        self.operations: list[StreamOp] = []
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self._next, self._previous = (stage + 1) % stages, (stage - 1) % stages

    def compute(self, kind: str, microbatch: int, chunk: int = 0) -> None:
        """Run an instruction."""
        self.operations.append(Compute(kind, microbatch, chunk))

    def constant(self, name: str) -> None:
        """Do what takes a constant time."""
        self.operations.append(Constant(name))

    def post_send(self, channel: str) -> None:
        """Begin to send."""
        self.operations.append(Send(self._to(channel), blocking=False, channel=channel))

    def wait_send(self, channel: str) -> None:
        """Wait until a send that was posted has been received."""
        self.operations.append(Receive(self._to(channel), f"ready for {channel}"))

    def post_receive(self, channel: str) -> None:
        """Begin to receive."""
        self.operations.append(Send(self._from(channel), blocking=False, channel=f"ready for {channel}"))

    def wait_receive(self, channel: str) -> None:
        """Wait for what a receive that was posted brings."""
        self.operations.append(Receive(self._from(channel), channel))

    def exchange(self, sends: Iterable[str], receives: Iterable[str]) -> None:
        """Post all, then wait for all."""
        sends, receives = list(sends), list(receives)
        for channel in sends:
            self.post_send(channel)
        for channel in receives:
            self.post_receive(channel)
        for channel in receives:
            self.wait_receive(channel)
        for channel in sends:
            self.wait_send(channel)

    def _to(self, channel: str) -> int:
        return self._next if channel == ACTIVATION else self._previous

    def _from(self, channel: str) -> int:
        return self._previous if channel == ACTIVATION else self._next
