"""Figures that rank 0 has, brought to the rank whose framework can write them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

from perseus_plugin.exchange.messages import Figures, receive
from perseus_plugin.exchange.store import Exchange

_FIGURES = "figures"  # of rank 0's, for the one rank that listens
_LISTENER = "listener"
_LOOK_EVERY_S = 5.0
_BATCHES = 16  # that may come between two looks

Events = list[tuple[str, float]]


class FigureRelay:
    """One end of the relay; runs on the worker's thread.

    Args:
        exchange: to the other end.
        takers: who takes figures on this rank.
        leads: whether the figures are made on this rank.
        writes: whether this rank's framework can write figures.
    """

    def __init__(
        self, exchange: Exchange, takers: Sequence[Callable[[Events], None]], leads: bool, writes: bool
    ) -> None:
        self._exchange, self._takers = exchange, takers
        self._listens = writes and not leads
        self._announced = False
        self._count = 0
        self._batches: deque[Events] = deque(maxlen=_BATCHES)
        self._due_s = 0.0

    def tell(self, events: Events) -> None:
        """On rank 0: there are new figures.

        Raises:
            ExchangeError: the store fails.
        """
        self._hand_over(events)
        if not self._announced:
            self._announced = self._exchange.told(_LISTENER) is not None
        if self._announced:
            self._count += 1
            self._batches.append(events)
            told = Figures(count=self._count, batches=tuple(map(tuple, self._batches)))
            self._exchange.publish(_FIGURES, told.model_dump())

    def look(self) -> None:
        """On the rank that writes, if that is not rank 0: take what is new.

        Raises:
            ExchangeError: the store fails.
        """
        if not self._listens or monotonic() < self._due_s:
            return
        self._due_s = monotonic() + _LOOK_EVERY_S
        if not self._announced:
            self._exchange.tell(_LISTENER, True)
            self._announced = True
        value = self._exchange.fetch(_FIGURES)
        if value is None:
            return
        figures = receive(Figures, value)
        new = figures.count - self._count
        self._count = figures.count
        for events in figures.batches[-new:] if new > 0 else ():
            self._hand_over(list(events))

    def _hand_over(self, events: Events) -> None:
        for take in self._takers:
            take(events)
