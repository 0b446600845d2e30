"""Where a running job's figures go beside its summary and the framework's monitor: the seam, and the ones there are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from perseus_plugin.config import PerseusConfig
from perseus_plugin.reporting.live.prometheus import PrometheusPublisher

logger = logging.getLogger(__name__)

Event = tuple[str, float]


class Publisher(Protocol):
    """Publishes a job's figures somewhere; only rank 0 has one.

    Called on a thread that does nothing else as urgent: it may take some milliseconds, and waits for nobody. What it
    raises is said once, and it is told no more figures; training is not affected.
    """

    def __call__(self, events: Sequence[Event]) -> None:
        """Figures that are new: names as `Perseus/energy_j/measured` (`docs/metrics.md`), values in the name's unit.

        A name that comes again replaces what was said before; NaN: there is no such figure any more.
        """
        ...

    def close(self) -> None:
        """The job is over: give back what was opened. Idempotent."""
        ...


MakePublisher = Callable[[PerseusConfig, Mapping[str, Any]], Publisher | None]

PUBLISHERS: list[MakePublisher] = [
    lambda config, facts: PrometheusPublisher(config.prometheus, facts),
]
"""Each makes a publisher of a job, or None where its configuration asks for none. A new one is one line here; a
training script appends its own before it starts."""


class InMemoryPublisher:
    """Implements `Publisher`: keeps what it is told, for tests.

    Attributes:
        newest: figures by name.
        closed: whether the job is over.
    """

    def __init__(self) -> None:
        self.newest: dict[str, float] = {}
        self.closed = False

    def __call__(self, events: Sequence[Event]) -> None:
        """Keep them."""
        self.newest.update(events)

    def close(self) -> None:
        """Note that."""
        self.closed = True


class Publishers:
    """All of a job as one. Never raises.

    Args:
        config: of the job.
        facts: what it runs on (GPU, backend, whether it is emulated, ranks).
    """

    def __init__(self, config: PerseusConfig, facts: Mapping[str, Any]) -> None:
        self._all: list[Publisher] = []
        self._failed: list[Publisher] = []
        for make in PUBLISHERS:
            try:
                made = make(config, facts)
            except Exception as error:
                _off(make, error)
                continue
            if made is not None:
                self._all.append(made)

    def __call__(self, events: Sequence[Event]) -> None:
        """See `Publisher`."""
        for one in self._all:
            if one not in self._failed:
                self._try(one, functools.partial(one, events))

    def close(self) -> None:
        """See `Publisher`; one that has failed is closed too, as it may have a port open."""
        for one in self._all:
            self._try(one, one.close)

    def _try(self, one: Publisher, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if one not in self._failed:
                self._failed.append(one)
                _off(one, error)


def _off(publisher: object, error: Exception) -> None:
    name = getattr(publisher, "__qualname__", type(publisher).__qualname__)
    logger.warning("figures are not published by %s any more: %r; training goes on", name, error)
