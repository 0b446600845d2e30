"""When a training iteration is over in a script that calls `schedule.step` and then its optimizers. Pure.

Nothing in `torch.distributed.pipelining` knows of optimizers. A rank has one per model chunk or one for all; with
gradient accumulation they step once in several runs of the schedule, and some scripts step them within the backward.
What the script did last time is what it is expected to do next time.
"""

from __future__ import annotations

NOT_KNOWN = -1


class OptimizerSteps:
    """How many steps of optimizers follow a run of the schedule, learned from run to run.

    A run is known by how many have run since the optimizers have stepped last.
    """

    def __init__(self) -> None:
        self._follow: dict[int, int] = {}
        self._position = NOT_KNOWN
        self._within = self._after = 0
        self._runs = False

    def run_begins(self) -> None:
        """The schedule begins to run: what there was since it ran last is all that followed it."""
        if self._position != NOT_KNOWN and self._after != self.expected:
            self._follow[self._position] = self._after
        stepped = self._after or self._within or self._position == NOT_KNOWN
        self._position = 0 if stepped else self._position + 1
        self._within = self._after = 0
        self._runs = True

    def run_ended(self) -> None:
        """The schedule has run."""
        self._runs = False

    def stepped(self) -> None:
        """An optimizer of this process has stepped."""
        if self._runs:
            self._within += 1
        else:
            self._after += 1

    @property
    def expected(self) -> int:
        """Steps that will follow this run; `NOT_KNOWN` at first."""
        known = [position for position in self._follow if position <= self._position]
        return self._follow[max(known)] if known else NOT_KNOWN

    @property
    def all_stepped(self) -> bool:
        """Whether those have followed that were expected; false where that is not known."""
        return not self._runs and self._after == self.expected
