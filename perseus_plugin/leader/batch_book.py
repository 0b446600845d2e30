"""What is known on rank 0 of batches to come, which of them there is time to plan for, and whether plans hold. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from perseus_plugin.exchange.messages import AnnouncedWork
from perseus_plugin.planning.batch_process import Works

_KEPT = 400  # iterations that have run, whose works may still be asked for
_MOST = 2000  # iterations in all
_SOON = 3  # iterations that there is time to plan for, and are
_TIMES = 8  # iterations that say how long one takes
_JUDGED = 8  # iterations under plans of their own that a verdict takes at least
_LATEST = 24  # and at most
_REFERENCES = 2
_ERRORS = 3.0  # standard errors by which they have to be longer than they may be: they are looked at after each
_MISTAKEN = 0.15  # share by which instructions may be shorter or longer than predicted, all together


class BatchBook:
    """Works of batches, by iteration and replica.

    Args:
        replicas: how many there are.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._works: dict[int, dict[int, tuple[float, ...]]] = {}
        self._ended: deque[float] = deque(maxlen=_TIMES + 1)
        self._running = 0

    def take(self, announced: AnnouncedWork) -> None:
        """A batch has been announced; ranks of one replica that say different things are taken by the last."""
        if announced.replica < self._replicas:
            self._works.setdefault(announced.iteration, {})[announced.replica] = announced.work
        for number in sorted(self._works)[:-_MOST]:
            del self._works[number]

    def ended(self, number: int, end_s: float) -> None:
        """An iteration has ended on rank 0."""
        self._ended.append(end_s)
        self._running = number + 1
        for old in [one for one in self._works if one < number - _KEPT]:
            del self._works[old]

    @property
    def known(self) -> bool:
        """Whether anything has been announced lately."""
        return bool(self._works)

    def of(self, iteration: int, microbatches: int) -> Works | None:
        """The works of an iteration, per replica; None where some are missing, or of another number of microbatches."""
        known = self._works.get(iteration, {})
        if len(known) < self._replicas or any(len(work) != microbatches for work in known.values()):
            return None
        return [known[replica] for replica in range(self._replicas)]

    @property
    def means(self) -> dict[tuple[int, int], float]:
        """By replica and iteration the mean work of a microbatch."""
        return {
            (replica, iteration): statistics.fmean(work)
            for iteration, of in self._works.items()
            for replica, work in of.items()
        }

    def counts(self, iteration: int) -> set[int]:
        """How many numbers were announced for an iteration."""
        return {len(work) for work in self._works.get(iteration, {}).values()}

    def next_in_time(self, microbatches: int, after: int, now_s: float, takes_s: float) -> int | None:
        """The next iteration whose works are known and that begins late enough for a plan to reach all ranks by then.

        One that begins much later has time: by then more is known, and ranks keep few plans.

        Args:
            microbatches: of the schedule.
            after: iterations up to this one have been planned for.
            now_s: by the clock of the iterations' ends.
            takes_s: until a plan has been made and heard of.
        """

        def is_in_time(iteration: int) -> bool:
            return iteration > self._running and self.begins_s(iteration) >= now_s + takes_s

        for iteration in sorted(self._works):
            if iteration > after and is_in_time(iteration) and self.of(iteration, microbatches):
                return None if is_in_time(iteration - _SOON) else iteration
        return None

    def begins_s(self, iteration: int) -> float:
        """When an iteration begins at the earliest, going by the shortest of the last ones; -inf: not known."""
        if len(self._ended) < 2:
            return -math.inf
        shortest_s = min(after_s - before_s for before_s, after_s in pairwise(self._ended))
        return self._ended[-1] + (iteration - self._running) * shortest_s


class BatchWatch:
    """Whether iterations under plans of their own take what they were to take.

    Their times are held against the pace that the works make, just as those of references at full clocks: what all of
    them have in common is the machine's, or the model's. Where times vary, as on a busy machine, a few of them say
    little, and the verdict is for good: they have to be longer by more than that. Instructions that take clearly more
    or less than predicted speak against the works, too.

    Args:
        tolerance: share by which iterations may be longer.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._planned: deque[float] = deque(maxlen=_LATEST)
        self._references: deque[float] = deque(maxlen=_LATEST)
        self._instructions: deque[float] = deque(maxlen=_JUDGED)
        self.iterations = 0

    def saw(self, time_s: float, pace_s: float, *, reference: bool) -> None:
        """An iteration whose pace is known has run, under a plan of its own or at full clocks."""
        (self._references if reference else self._planned).append(time_s / pace_s)
        self.iterations += not reference

    def timed(self, durations_s: Sequence[float], predicted_s: Sequence[float]) -> None:
        """Instructions of one rank under such a plan."""
        self._instructions.append(sum(durations_s) / sum(predicted_s))

    @property
    def against(self) -> str:
        """What speaks against such plans; empty: nothing does."""
        if len(self._planned) >= _JUDGED:
            planned, error = _typical(self._planned)
            usual, its_error = _typical(self._references) if len(self._references) >= _REFERENCES else (1.0, 0.0)
            longer = planned / usual - 1
            if longer - _ERRORS * planned / usual * math.hypot(error, its_error) > self._tolerance:
                return f"iterations planned by announced works take {100 * longer:.1f} % longer than these make them"
        if len(self._instructions) == _JUDGED:
            ratio = statistics.median(self._instructions)
            if not 1 / (1 + _MISTAKEN) <= ratio <= 1 + _MISTAKEN:
                return f"instructions take {ratio:.2f} times as long as the announced works make them"
        return ""


def _typical(ratios: Sequence[float]) -> tuple[float, float]:
    """Their median, and its standard error as a share of it, going by how far they lie from it; 0 where they do not."""
    median = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(ratio - median) for ratio in ratios)  # a normal distribution's deviation
    return median, math.sqrt(math.pi / 2 / len(ratios)) * spread / median
