"""Rank 0's side of targets: what is said of them comes in here, by socket, from ranks and from a file.

What follows from it is decided in `leader.decide`; what is said is weighed in `target_book`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perseus_plugin.errors import PerseusError, os_problem
from perseus_plugin.exchange.messages import TARGETS
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.files import parse_json, read_text
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.leader.target_book import (
    EVERYONE,
    Entry,
    Goal,
    Standing,
    TargetBook,
    TargetError,
    check_say,
)
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.reporting.live.power import Drawn

logger = logging.getLogger(__name__)

REQUESTS = ("target", "targets", "clear_target")
"""What `do` may be in a request of the socket."""
SIGNALS = "signals"
"""Source of what `perseus.signals` ask for at their hour."""
FILE = "target file"
"""Source of what the watched file says."""
_LOOK_EVERY_S = 0.5
_MOST_BYTES = 65_536


class TargetDesk:
    """See the module's docstring. `request` may be called from any thread, everything else from the worker's.

    Args:
        exchange: to all ranks.
        signals: what is asked for by time, None: nothing is.
        complete: a limit with what the configuration says beside it.
        file: that is watched, None: none is.
        wake: called when a request has brought something new.
        now: Unix time.
        monotonic: a clock that never goes back.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        signals: SignalDesk | None = None,
        complete: Callable[[PowerBudget], PowerBudget] = lambda limit: limit,
        file: Path | None = None,
        wake: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchange, self._signals, self._complete = exchange, signals, complete
        self._file, self._wake = file, wake
        self._now, self._monotonic = now, monotonic
        self._lock = threading.Lock()
        self._said: list[Entry] = []
        self._number = 0
        self._look_due_s = float("-inf")
        self._file_seen: object = None
        self._file_says = False
        self._shown: tuple[TargetBook, Goal, str, int, float] | None = None
        self._drawn: Drawn | None = None
        self._drawn_until = 0.0

    @property
    def looks_every_s(self) -> float:
        """From one call of `collect` to the next, at most: a file is looked at by the clock."""
        return math.inf if self._file is None else _LOOK_EVERY_S

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request of the command line (see `leader.job_socket`).

        Raises:
            PerseusError: it is refused.
        """
        match request:
            case {"do": "target", "target": said, **more} if not more:
                return {"number": self._enter(said)}
            case {"do": "clear_target", "source": str() | None as source} if source != "":
                return {"number": self._take(Entry(0, source or EVERYONE, Standing.COMMAND))}
            case {"do": "targets"}:
                with self._lock:
                    waiting = [entry.to_dict() for entry in self._said]
                drawn, until = self._drawn, self._drawn_until
                told = None if drawn is None else {**asdict(drawn), "until": until}
                return {**self._told(), "drawn": told, "heard": waiting}
        raise TargetError("malformed request: allowed: target with its target, targets, or clear_target with a source")

    def collect(self) -> Sequence[Entry]:
        """What was said since the last call, in its order.

        Raises:
            ExchangeError: the store fails.
        """
        for value in self._exchange.take_new(TARGETS):
            try:
                self._enter(value)
            except TargetError as error:
                logger.warning("a target was refused: %s; correct it and say it again", error)
        asked = None if self._signals is None else self._signals.look()
        if asked is not None:
            # Nobody is there to be refused: it is followed as far as it can be.
            limit = None if asked.limit is None else replace(asked.limit, or_nearest=True)
            self._take(Entry(0, SIGNALS, Standing.SIGNAL, asked.wish, limit))
        if self._file is not None and self._monotonic() >= self._look_due_s:
            self._look_due_s = self._monotonic() + _LOOK_EVERY_S
            self._look_at(self._file)
        with self._lock:
            said, self._said = self._said, []
        return said

    def show(self, book: TargetBook, in_force: Goal, phase: str, iteration: int, draws: float = 1.0) -> None:
        """What `targets` is answered with from now on; the book stays as it is."""
        self._shown = book, in_force, phase, iteration, draws

    def _told(self) -> dict[str, Any]:
        # Made when it is asked for: there may be hundreds of outcomes.
        if self._shown is None:
            return {}
        book, in_force, phase, iteration, draws = self._shown
        return {
            "in_force": {"says": str(in_force), "phase": phase, **in_force.to_dict()},
            "aimed_at": str(book.goal),
            "iteration": iteration,
            "draws": draws,
            "entries": [entry.to_dict() for entry in book.entries],
            "outcomes": [asdict(outcome) for outcome in book.outcomes.values()],
        }

    def measured(self, drawn: Drawn | None) -> None:
        """What the job has drawn until now, or until before; `targets` is answered with it. None: not known."""
        if drawn is not self._drawn:
            self._drawn, self._drawn_until = drawn, self._now()

    def _enter(self, value: Any) -> int:
        now_s = self._now()
        said = check_say(value, now_s)
        until = said.until if said.for_s is None else now_s + said.for_s
        return self._take(Entry(0, said.source, Standing.COMMAND, said.wish, said.power_budget_w, now_s, until))

    def _take(self, entry: Entry) -> int:
        limit = None if entry.limit is None else self._complete(entry.limit)
        with self._lock:
            self._number += 1
            self._said.append(replace(entry, number=self._number, since=self._now(), limit=limit))
            number = self._number
        self._wake()
        return number

    def _look_at(self, file: Path) -> None:
        """Take what the file says where it has changed; what it said last stays if it says nothing that can be read."""
        try:
            status = file.stat()
        except FileNotFoundError:
            seen: object = None
        except OSError as error:
            seen = os_problem(error)
        else:
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._file_seen:
            return
        self._file_seen = seen
        try:
            if seen is None:
                if self._file_says:
                    self._take(Entry(0, FILE, Standing.COMMAND))
                self._file_says = False
                return
            said = parse_json(read_text(file, _MOST_BYTES, regular=True))
            if not isinstance(said, dict):
                raise TargetError(f'got {type(said).__name__}; allowed: an object such as {{"slowdown": 0.1}}')
            self._enter({**said, "source": FILE})
            self._file_says = True
        except (OSError, ValueError, PerseusError) as error:
            why = os_problem(error) if isinstance(error, OSError) else str(error)
            logger.warning("%s: %s. What it said before stays; correct the file, it is read again then", file, why)
