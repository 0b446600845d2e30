"""When a training iteration is over in a script that calls `schedule.step` and then its optimizers. Pure.

Nothing in `torch.distributed.pipelining` knows of optimizers. A rank has one per model chunk or one for all; with
gradient accumulation they step once in several runs of the schedule, and some scripts step them within the backward.
What the script did last time is what it is expected to do next time.
"""

from __future__ import annotations

NOT_KNOWN = -1


class OptimizerSteps:
    """How many steps of optimizers follow a run of the schedule, learned from run to run.

    A run is known by how many have run since the optimizers have stepped last. What differs from what was learned (a
    step left out as a gradient has overflowed) is not known until it has been seen again.
    """

    def __init__(self) -> None:
        self._follow: dict[int, int] = {}
        self._position = NOT_KNOWN
        self._after = 0
        self._runs = self._stepped = self._is_elsewhere = False

    def run_begins(self) -> None:
        """The schedule begins to run: what there was since it ran last is all that followed it."""
        if self._position != NOT_KNOWN and self._after != self.expected:
            differs = self._follow.get(self._position, NOT_KNOWN) != NOT_KNOWN
            self._follow[self._position] = NOT_KNOWN if differs else self._after
        self._position = 0 if self._stepped or self._position == NOT_KNOWN else self._position + 1
        self._after = 0
        self._runs, self._stepped, self._is_elsewhere = True, False, False

    def run_ended(self) -> None:
        """The schedule has run."""
        self._runs = self._is_elsewhere = False

    def run_failed(self) -> None:
        """It has raised: what follows says nothing of other runs."""
        self._runs, self._position = False, NOT_KNOWN

    def stepped(self) -> None:
        """An optimizer of this process has stepped."""
        self._stepped = True
        if not self._runs and not self._is_elsewhere:
            self._after += 1

    def elsewhere(self) -> None:
        """Something else runs: steps that follow may be of another model, and no iteration waits for them."""
        self._is_elsewhere = True

    @property
    def expected(self) -> int:
        """Steps that will follow this run; `NOT_KNOWN` at first."""
        known = [position for position in self._follow if position <= self._position]
        return self._follow[max(known)] if known else NOT_KNOWN

    @property
    def all_stepped(self) -> bool:
        """Whether those have followed that were expected; false where that is not known."""
        return not self._runs and self._after == self.expected
