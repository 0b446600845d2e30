"""The schedules a job runs: which one is usual, and which ones plans are made for. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from perseus_plugin.iteration.instructions import StreamOf

MAX_PLANNED = 16
"""Schedules that have a plan at one time."""

_RECENT = 32  # iterations that say which schedule is usual
_FORGOTTEN_AFTER = 256  # iterations without a schedule, after which another one may take its place


@dataclass(frozen=True)
class _Seen:
    stream_of: StreamOf
    last: int


class JobSchedules:
    """Schedules by key, as iterations run them.

    Args:
        at_most: of them that are planned for at one time.
    """

    def __init__(self, at_most: int = MAX_PLANNED) -> None:
        self._at_most = at_most
        self._seen: dict[str, _Seen] = {}
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._newest = ""
        self._iteration = 0
        self._refused: set[str] = set()

    def copy(self) -> JobSchedules:
        """One that changes by itself."""
        made = JobSchedules(self._at_most)
        made._seen, made._recent, made._refused = dict(self._seen), self._recent.copy(), set(self._refused)
        made._newest, made._iteration = self._newest, self._iteration
        return made

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: str) -> bool:
        return key in self._seen

    @property
    def newest(self) -> str:
        """The one that iterations run; empty before the first."""
        return self._newest

    def use(self, key: str, stream_of: StreamOf) -> None:
        """Iterations run this schedule from now on."""
        if key not in self._seen:
            self._seen[key] = _Seen(stream_of, self._iteration)
        if key != self._newest:
            self._seen[key] = replace(self._seen[key], last=self._iteration)
            self._newest = key

    def ran(self, key: str, iteration: int) -> None:
        """An iteration has run this schedule."""
        self._iteration = max(self._iteration, iteration)
        self._recent.append(key)
        if key in self._seen:
            self._seen[key] = replace(self._seen[key], last=self._iteration)

    def stream_of(self, key: str) -> StreamOf:
        """The instruction stream of every stage, of a schedule that was used."""
        return self._seen[key].stream_of

    def usual(self, among: Collection[str], so_far: str | None = None) -> str | None:
        """The schedule that most of the latest iterations have run, of those `among`.

        Args:
            among: schedules to choose from.
            so_far: the usual one until now, which is kept while it runs at least half as often as any other.

        Returns:
            None if there is none to choose.
        """
        counts = Counter(dict.fromkeys(among, 0))
        counts.update(key for key in self._recent if key in among)
        if not counts:
            return None
        most = max(counts.values())
        if so_far is not None and so_far in counts and 2 * counts[so_far] >= max(1, most):
            return so_far
        if self._newest in counts and 2 * counts[self._newest] >= most:
            return self._newest
        return max(counts, key=counts.__getitem__)

    def refuse(self, key: str) -> None:
        """There is no plan for this schedule, and there is no use in asking again."""
        self._refused.add(key)

    def forget_refusals(self) -> None:
        """What plans are made on has changed."""
        self._refused.clear()

    def next_to_plan(self, planned: Sequence[str]) -> tuple[str, str | None] | None:
        """What to plan for next: a schedule, and the one whose plan it takes the place of, None where there is room.

        The newest comes first. A schedule that has not run for long makes room; where none has, further ones go without
        a plan.

        Args:
            planned: schedules that have a plan.
        """
        wanted = [key for key in self._seen if key not in planned and key not in self._refused]
        if not wanted:
            return None
        newest = max(wanted, key=lambda key: (key == self._newest, self._seen[key].last))
        if len(planned) < self._at_most:
            return newest, None
        oldest = min(planned, key=lambda key: self._seen[key].last)
        is_forgotten = self._iteration - self._seen[oldest].last > _FORGOTTEN_AFTER
        return (newest, oldest) if is_forgotten and self._seen[newest].last > self._seen[oldest].last else None

    @property
    def too_many(self) -> bool:
        """Whether more schedules have run of late than are planned for."""
        of_late = [s for s in self._seen.values() if self._iteration - s.last <= _FORGOTTEN_AFTER]
        return len(of_late) > self._at_most
