"""Schedules that split the backward and run several model chunks per rank, as lists like PyTorch's. Pure.

A backward's weight gradient has no one waiting for it, so it fills the time in which a rank would wait. With the chunks
of a V, rank r of n has stages r and 2n - 1 - r of the model, so that the last rank has its middle and the first both
its ends.
"""

from __future__ import annotations

from collections import Counter, deque

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.actions import Action, Step, check_size

_FORWARDS = "F"
_BACKWARDS = "BI"


class _Rank:
    """A rank's list, written down in order; each stage takes microbatches one after the other."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._counts: Counter[tuple[int, str]] = Counter()
        self._weights: deque[Action] = deque()

    def do(self, stage: int, types: str) -> None:
        """Actions of a stage on its next microbatch: `F`, `B`, `I`, or `IW`, whose weight gradient follows at once."""
        action = self._next(stage, types[0])
        self.steps.append((action,))
        if types == "I":
            self._weights.append(Action(stage, "W", action.microbatch))
        elif types == "IW":
            self.steps.append((Action(stage, "W", action.microbatch),))

    def do_pair(self, forward: int, backward: int) -> None:
        """A forward of one stage and a backward of another, which may overlap."""
        self.steps.append((self._next(forward, "F"), self._next(backward, "B")))

    def weight(self, stage: int | None = None) -> bool:
        """The weight gradient that has been due for longest, of any or of one stage; whether there was one."""
        due = next((action for action in self._weights if stage in (None, action.stage)), None)
        if due is not None:
            self._weights.remove(due)
            self.steps.append((due,))
        return due is not None

    def count(self, stage: int, types: str) -> int:
        """How many microbatches the stage has taken."""
        return self._counts[stage, types]

    def _next(self, stage: int, type_: str) -> Action:
        types = _FORWARDS if type_ == "F" else _BACKWARDS
        self._counts[stage, types] += 1
        return Action(stage, type_, self._counts[stage, types] - 1)


def interleaved_zero_bubble(stages: int, microbatches: int, chunks: int = 2) -> list[list[Step]]:
    """Interleaved 1F1B with split backwards (ZB1P; Qi et al., ICLR 2024): rank r has stages r, n + r, 2n + r, ...

    Raises:
        ScheduleError: fewer than one stage, microbatch or chunk, or microbatches that do not make whole rounds.
    """
    check_size(stages, microbatches, max(1, chunks))
    rounds = max(1, microbatches // stages)
    if chunks < 1 or microbatches % rounds:
        raise ScheduleError(
            f"interleaved zero bubble: got {stages} stages, {chunks} chunks, {microbatches} microbatches; allowed: "
            f"chunks from 1, and microbatches that are a multiple of the {rounds} rounds that they make"
        )
    at_once, total = microbatches // rounds, microbatches * chunks
    lists: list[list[Step]] = []
    for rank in range(stages):
        made = _Rank()
        ahead = min((chunks - 1) * at_once + stages - 1 - rank, total)
        for step in range(ahead + total):
            if step < total:
                made.do(step // at_once % chunks * stages + rank, "F")
            if step >= ahead:
                made.do((chunks - 1 - (step - ahead) // at_once % chunks) * stages + rank, "I")
                # The later a rank, the earlier its last backward: it has time then for what it puts off here.
                if step - ahead >= rank:
                    made.weight()
        while made.weight():
            pass
        lists.append(made.steps)
    return lists


def zbv(stages: int, microbatches: int) -> list[list[Step]]:
    """ZB-V (Qi et al., ICLR 2024, section 6): split backwards, two chunks per rank in a V.

    Raises:
        ScheduleError: fewer than one stage or microbatch.
    """
    check_size(stages, microbatches)
    # What there is for fewer microbatches is what is left without the others.
    enough = max(2 * stages - 1, microbatches)
    lists: list[list[Step]] = []
    for rank in range(stages):
        down, up = rank, 2 * stages - 1 - rank
        made = _Rank()
        for _ in range(2 * (stages - rank) - 1):
            made.do(down, "F")
        for _ in range(rank):
            made.do(up, "F")
            made.do(down, "F")
        for _ in range(stages - rank):
            made.do(up, "F")
            made.do(up, "IW")
        while made.count(up, _FORWARDS) < enough:
            if made.count(down, _FORWARDS) < enough:
                made.do(down, "F")
            made.do(down, "IW")
            made.do(up, "F")
            made.do(up, "IW")
        for _ in range(rank):
            made.do(down, "I")
            made.do(up, "I")
        for _ in range(stages - rank):
            made.do(down, "I")
            made.weight(down)
        for stage in (up, down):
            while made.weight(stage):
                pass
        lists.append([step for step in made.steps if step[0].microbatch < microbatches])
    return lists


def dualpipev(stages: int, microbatches: int) -> list[list[Step]]:
    """DualPipeV (after DeepSeek-V3's DualPipe): two chunks per rank in a V, forwards and backwards in pairs.

    The parts of a pair run one after the other here, as in PyTorch without a function that overlaps them.

    Raises:
        ScheduleError: fewer than one stage, or fewer microbatches than two per stage.
    """
    check_size(stages, microbatches)
    if microbatches < 2 * stages:
        raise ScheduleError(
            f"DualPipeV: got {stages} stages, {microbatches} microbatches; allowed: at least two microbatches per stage"
        )
    lists: list[list[Step]] = []
    for rank in range(stages):
        down, up = rank, 2 * stages - 1 - rank
        after = stages - rank - 1
        made = _Rank()
        for _ in range(2 * after):
            made.do(down, "F")
        for _ in range(rank + 1):
            made.do(down, "F")
            made.do(up, "F")
        for _ in range(after):
            made.do(up, "I")
            made.weight()
            made.do(up, "F")
        for turn in range(microbatches - 2 * stages + rank + 1):
            if turn == 0 and rank == stages - 1:
                made.do(down, "F")  # the end of the V has nothing to overlap with yet
                made.do(up, "B")
            else:
                made.do_pair(down, up)
            made.do_pair(up, down)
        for _ in range(after):
            made.do(up, "B")
            made.do_pair(up, down)
        # From the middle on, backwards are split.
        for half in range(2 * (rank + 1)):
            made.do(down if half % 2 else up, "B" if half <= rank else "I")
        for _ in range(after):
            made.weight()
            made.do(down, "I")
        while made.weight():
            pass
        lists.append(made.steps)
    return lists
