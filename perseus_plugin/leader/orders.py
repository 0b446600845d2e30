"""Orders to all ranks: what to do from which iteration on, and when that may be. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from perseus_plugin.exchange.messages import News

_SWITCH_AHEAD = 2


@dataclass(frozen=True)
class Orders:
    """The orders that ranks follow now, or will: the one in force when the newest was given, and those after it."""

    told: tuple[News, ...] = ()

    @property
    def latest(self) -> News | None:
        """The newest order; None before the first."""
        return self.told[-1] if self.told else None

    @property
    def sequence(self) -> int:
        """Number of the newest order, 0 before the first."""
        return 0 if self.latest is None else self.latest.sequence

    @property
    def versions(self) -> list[int]:
        """Sets of plans that ranks follow, or followed until the newest order holds."""
        return [version for news in self.told for version in (news.version, *news.variants.values())]

    def given(
        self, iteration: int, iteration_time_s: float | None, news_take_s: float, *, anew: bool = False, **what: Any
    ) -> Orders:
        """With one more order.

        Args:
            iteration: the one running on rank 0.
            iteration_time_s: how long iterations take at full clocks, None if that is not known.
            news_take_s: until the slowest rank has heard of something.
            anew: plans are followed that were made on new measurements.
            what: the other fields of `News`.
        """
        switch = iteration + ahead(iteration_time_s, news_take_s)
        since = switch if anew or self.latest is None else self.latest.since
        begun = [news for news in self.told if news.switch <= iteration][-1:]
        # A rank that looks now and then hears of the newest order only, so that it has those before it.
        yet_to_begin = [
            news.model_copy(update={"earlier": ()}) for news in self.told if iteration < news.switch < switch
        ]
        news = News(sequence=self.sequence + 1, switch=switch, since=since, earlier=tuple(yet_to_begin), **what)
        return Orders((*begun, *yet_to_begin, news))


def ahead(iteration_time_s: float | None, news_take_s: float) -> int:
    """Iterations between saying and doing."""
    if iteration_time_s is None:
        return _SWITCH_AHEAD
    return max(_SWITCH_AHEAD, 1 + math.ceil(news_take_s / iteration_time_s))
