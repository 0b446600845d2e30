"""Every rank's side of stragglers: watch its own instruction times, and send what there is to say to rank 0."""

from __future__ import annotations

from collections.abc import Sequence

from perseus_plugin.config import StragglersConfig
from perseus_plugin.exchange import Exchange
from perseus_plugin.link import Parts, part_for
from perseus_plugin.messages import STRAGGLERS
from perseus_plugin.straggler_detection import OwnPast, StragglerDetector, iteration_slowdown
from perseus_plugin.stragglers import DETECTION, Report
from perseus_plugin.tap import IterationRecord
from perseus_plugin.timetable import Directive, Follow


class StragglerSensing:
    """Looks at finished iterations; says something only when this rank has become slow, or normal again.

    Args:
        config: the `stragglers` block.
        rank: of this process.
        exchange: to rank 0.
    """

    def __init__(self, config: StragglersConfig, rank: int, exchange: Exchange) -> None:
        self._rank, self._exchange = rank, exchange
        self._looks = config.enabled and config.detect
        self._detector = StragglerDetector(config.threshold, config.window, config.min_duration)
        self._past = OwnPast(config.window)

    def saw(self, directive: Directive, record: IterationRecord, parts: Parts) -> None:
        """An iteration has ended on this rank.

        Raises:
            ExchangeError: the store fails.
        """
        if not self._looks or not isinstance(directive, Follow) or not record.undisturbed:
            return
        part = part_for(parts, directive, record)
        found = None if part is None else iteration_slowdown(record, part)
        if part is None or found is None:
            return
        slowdown, is_steady = found
        # A part made for a slow stage has nothing to do with the rank's own past.
        known = slowdown if is_steady or part.slowdown != 1 else self._past.correct(slowdown, part.version)
        level = None if known is None else self._detector.add(known)
        if level is not None:
            self.send([Report(rank=self._rank, slowdown=level, source=DETECTION)])

    def send(self, reports: Sequence[Report]) -> None:
        """To rank 0.

        Raises:
            ExchangeError: the store fails.
        """
        for report in reports:
            self._exchange.append(STRAGGLERS, report.model_dump())
