"""Which goal was in force for how many iterations. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_BEGINS_KEPT = 8  # the one in force, and those that iterations still to be counted may have run under
_GOALS_COUNTED = 256


class Reigns:
    """Counts iterations by the goal that was in force in them; see the module's docstring."""

    def __init__(self) -> None:
        self._begins: tuple[tuple[int, str], ...] = ()
        self._changes = 0
        self._iterations: Counter[str] = Counter()

    def copy(self) -> Reigns:
        """One that changes by itself."""
        made = Reigns()
        made._begins, made._changes, made._iterations = self._begins, self._changes, self._iterations.copy()
        return made

    def begin(self, iteration: int, goal: str) -> bool:
        """This goal is in force from this iteration on; returns whether it is another one than before."""
        changed = self.newest != goal
        self._changes += changed and bool(self._begins)
        kept = tuple(begin for begin in self._begins if begin[0] < iteration)
        self._begins = (*kept[-_BEGINS_KEPT:], (iteration, goal))
        return changed

    def count(self, iteration: int) -> None:
        """An iteration has ended; those before the first goal do not count."""
        goal = next((goal for begin, goal in reversed(self._begins) if begin <= iteration), None)
        if goal is not None and (goal in self._iterations or len(self._iterations) < _GOALS_COUNTED):
            self._iterations[goal] += 1

    @property
    def newest(self) -> str:
        """The goal that began last; empty before the first."""
        return self._begins[-1][1] if self._begins else ""

    @property
    def changes(self) -> int:
        """How often another goal came into force than was before."""
        return self._changes

    @property
    def iterations(self) -> Mapping[str, int]:
        """How many iterations each goal was in force for."""
        return self._iterations
