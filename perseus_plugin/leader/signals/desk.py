"""Rank 0's side of signals: evaluates them by the system's clock, and makes them anew where their files change.

What a signal asks for depends on nothing but the time of day that the system's clock shows when it is looked at, about
once a second. Where that clock jumps, forwards or back, the next look has what holds at the new time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perseus_plugin.errors import ConfigError
from perseus_plugin.leader.signals.base import Signal
from perseus_plugin.leader.signals.registry import make_signal, where_of
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.bill import Worth

logger = logging.getLogger(__name__)

_LOOK_AT_FILES_EVERY_S = 8.0  # such that a change is seen within ten, however rarely the desk itself is looked at
_MOST_CHANGES = 10_000  # looked at between two accounts


@dataclass(frozen=True)
class Asked:
    """What signals ask for together.

    Attributes:
        wish: how fast; None: nothing is said of that.
        limit: what the job may draw; None: nothing is said of that.
    """

    wish: Target | None = None
    limit: PowerBudget | None = None


class SignalDesk:
    """See the module's docstring. Of several signals the first that says something of a matter is heard.

    Args:
        told: what the configuration says of each, with its source.
        now: Unix time.
        monotonic: a clock that never goes back.

    Raises:
        ConfigError: one of them cannot be made.
    """

    def __init__(
        self,
        told: Sequence[Mapping[str, Any]],
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._told, self._now, self._monotonic = told, now, monotonic
        self._signals: dict[int, Signal] = {n: make_signal(one, where_of(n)) for n, one in enumerate(told)}
        self._seen = {number: _state(signal) for number, signal in self._signals.items()}
        self._look_due_s = monotonic() + _LOOK_AT_FILES_EVERY_S
        self._asked = Asked()
        self._accounted_s = now()

    def look(self) -> Asked | None:
        """What is asked for from now on; None: the same as before."""
        self._look_at_files()
        unix_s, wish, limit = self._now(), None, None
        for number in list(self._signals):
            target = self._of(number, lambda signal: signal.target(unix_s), None)
            if target is not None and target.kind == "power_budget":
                limit = limit or target.budget
            else:
                wish = wish or target
        asked, before = Asked(wish, limit), self._asked
        self._asked = asked
        return None if asked == before else asked

    def worths(self) -> list[tuple[float, Worth]]:
        """What energy was worth since the last call, each with its share of that time."""
        since_s, until_s = self._accounted_s, self._now()
        self._accounted_s = until_s
        if until_s <= since_s:  # the clock was put back
            return [(1.0, self._worth(until_s))]
        found, at_s = [], since_s
        for _ in range(_MOST_CHANGES):
            after_s = min(self._next_change(at_s), until_s)
            found.append(((after_s - at_s) / (until_s - since_s), self._worth(at_s)))
            at_s = after_s
            if at_s >= until_s:
                return found
        return [*found, ((until_s - at_s) / (until_s - since_s), self._worth(until_s))]

    def _worth(self, unix_s: float) -> Worth:
        told = [self._of(number, lambda signal: signal.worth(unix_s), Worth()) for number in list(self._signals)]
        priced = next((one for one in told if one.per_kwh is not None), Worth())
        grams = next((one.grams_per_kwh for one in told if one.grams_per_kwh is not None), None)
        return Worth(priced.per_kwh, grams, priced.currency)

    def _next_change(self, unix_s: float) -> float:
        changes = [
            self._of(number, lambda signal: signal.next_change(unix_s), math.inf) for number in list(self._signals)
        ]
        return min((one for one in changes if one > unix_s), default=math.inf)

    def _of(self, number: int, ask: Callable[[Signal], Any], otherwise: Any) -> Any:
        """What a signal says; one that fails is not asked again."""
        if number not in self._signals:
            return otherwise
        try:
            return ask(self._signals[number])
        except Exception as error:
            del self._signals[number]
            logger.warning(
                "%s has failed and is not listened to any more: %r; what stands behind it holds, and training goes on. "
                "Mend it, or give the target by `perseus target`",
                where_of(number),
                error,
            )
            return otherwise

    def _look_at_files(self) -> None:
        if self._monotonic() < self._look_due_s:
            return
        self._look_due_s = self._monotonic() + _LOOK_AT_FILES_EVERY_S
        for number, signal in list(self._signals.items()):
            state = _state(signal)
            if state == self._seen[number]:
                continue
            self._seen[number] = state
            try:
                self._signals[number] = make_signal(self._told[number], where_of(number))
            except ConfigError as error:
                logger.warning("%s. What it said before stays; correct the file, it is read again then", error)


def _state(signal: Signal) -> list[object]:
    """What tells that a signal's files have changed."""
    found: list[object] = []
    for file in signal.files:
        try:
            status = file.stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError as error:
            found.append(error.errno)
    return found
