"""Every rank's side of stragglers: watch its own instruction times, and send what there is to say to rank 0."""

from __future__ import annotations

from collections.abc import Sequence

from perseus_plugin.config import StragglersConfig
from perseus_plugin.exchange.messages import STRAGGLERS, PaceOf, Placement, pace_key, receive
from perseus_plugin.exchange.parts import Parts, part_for
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Follow
from perseus_plugin.stragglers.book import DETECTION, Report
from perseus_plugin.stragglers.detection import (
    OwnPast,
    Paces,
    StragglerDetector,
    against_pipeline,
    against_replicas,
    iteration_slowdown,
)

_SANE = 1e-3  # an instruction that took less than this of its time was not timed
_TOLD = 48  # iterations that a rank tells of
_EVERY_S = 1.0
_RANKS_TO_TELL, _RANKS_TO_LOOK = 256.0, 64.0  # once a second in jobs of so many ranks, more rarely in larger ones
_OTHER_REPLICAS = 2
_NO_CHANGE = 1.001


class StragglerSensing:
    """Looks at finished iterations; says something only when this rank has become slow, or normal again.

    Once a second a rank publishes how its latest iterations compare with the profile. Others read that only when they
    seem slow themselves, to see whether it is they or the work.

    Args:
        config: the `stragglers` block.
        placement: of this rank.
        exchange: to all ranks.
    """

    def __init__(self, config: StragglersConfig, placement: Placement, exchange: Exchange) -> None:
        self._placement, self._exchange = placement, exchange
        self._looks = config.enabled and config.detect
        self._threshold = config.threshold
        self._among_stages = StragglerDetector(config.threshold, config.window, config.min_duration)
        self._among_replicas = StragglerDetector(config.threshold, config.window, config.min_duration)
        self._judged = {self._among_stages: -1, self._among_replicas: -1}
        self._past = {self._among_stages: OwnPast(config.window), self._among_replicas: OwnPast(config.window)}
        self._own: dict[int, float] = {}
        self._rough: dict[int, int] = {}
        self._version = 0
        self._told_up_to = -1
        self._tell_due_s = self._look_due_s = 0.0
        self._level = 1.0
        others = [replica for replica in range(placement.replicas) if replica != placement.replica]
        # Those beside it, so that no replica is looked at by all.
        start = placement.replica % len(others) if others else 0
        self._other_replicas = (others[start:] + others[:start])[:_OTHER_REPLICAS]

    def saw(self, directive: Directive, record: IterationRecord, parts: Parts) -> None:
        """An iteration has ended on this rank."""
        if not self._looks or not isinstance(directive, Follow) or not record.undisturbed:
            return
        part = part_for(parts, directive, record)
        found = None if part is None else iteration_slowdown(record, part)
        if part is None or found is None:
            return
        slowdown, is_steady = found
        # A part made for a slow stage has nothing to do with the rank's own past.
        self.add(record.number, slowdown, None if is_steady or part.slowdown != 1 else part.version)

    def add(self, iteration: int, slowdown: float, rough_under: int | None = None) -> None:
        """This rank took so many times as long for its work as in the profile.

        Args:
            iteration: number.
            slowdown: how many times.
            rough_under: version of the plan under which the clock changed with nearly every instruction; None: it did
                not.
        """
        self._own[iteration] = slowdown
        if rough_under is not None:
            self._rough[iteration] = rough_under
        self._version = rough_under or self._version
        if len(self._own) > _TOLD:
            oldest = next(iter(self._own))
            del self._own[oldest]
            self._rough.pop(oldest, None)

    def look(self, now_s: float) -> None:
        """Tell others, and judge where there is reason to.

        Raises:
            ExchangeError: the store fails.
        """
        if not self._own:
            return
        place = self._placement
        newest = next(reversed(self._own))
        if newest > self._told_up_to and now_s >= self._tell_due_s:
            self._tell_due_s = now_s + _EVERY_S * max(1.0, place.world_size / _RANKS_TO_TELL)
            self._told_up_to = newest
            paces = {number: round(pace, 5) for number, pace in self._own.items() if _SANE < pace < 1 / _SANE}
            told = PaceOf(pace=paces, rough=tuple(self._rough))
            self._exchange.publish(pace_key(place.replica, place.stage), told.model_dump())
        if now_s >= self._look_due_s and self._seems_slow:
            self._look_due_s = now_s + _EVERY_S * max(1.0, place.world_size / _RANKS_TO_LOOK)
            self._judge()

    @property
    def _seems_slow(self) -> bool:
        """Whether it is worth asking the others; not where every iteration is as in the profile."""
        return self._level > 1 or max(self._own.values()) > 1 + self._threshold

    def _judge(self) -> None:
        place = self._placement
        stages = self._paces(place.replica)
        others = [self._paces(replica) for replica in self._other_replicas]
        others = [paces for paces in others if place.stage in paces]
        rough = {number for paces in (stages, *others) for told in paces.values() for number in told.rough}
        rough.update(self._rough)
        # What has been judged is not held against others again.
        after = self._judged[self._among_stages]
        relative = against_pipeline(_later(self._own, after), _without(stages, place.stage))
        if others:  # with one pipeline nothing tells work that grows in one stage from a GPU that is slow
            counterparts = [_later(paces[place.stage].pace, after) for paces in others]
            shapes = [
                against_pipeline(pace, _without(paces, place.stage))
                for pace, paces in zip(counterparts, others, strict=True)
            ]
            # Both: a rank whose counterpart's neighbour is slow stands out in the second comparison only.
            relative = {
                number: min(relative[number], against) for number, against in against_replicas(relative, shapes).items()
            }
        self._follow(self._among_stages, relative, rough)
        own = _later(self._own, self._judged[self._among_replicas])
        same_stage = against_replicas(own, [paces[place.stage].pace for paces in others])
        self._follow(self._among_replicas, same_stage, rough)
        level = max(self._among_stages.level, self._among_replicas.level)
        if not 1 / _NO_CHANGE < level / self._level < _NO_CHANGE:
            self._level = level
            self.send([Report(rank=place.rank, slowdown=level, source=DETECTION)])

    def _follow(self, detector: StragglerDetector, relative: dict[int, float], rough: set[int]) -> None:
        for number in sorted(number for number in relative if number > self._judged[detector]):
            self._judged[detector] = number
            pace: float | None = relative[number]
            if number in rough:
                version = self._rough.get(number, self._version)
                pace = self._past[detector].correct(relative[number], version)
            if pace is not None:
                detector.add(pace)

    def _paces(self, replica: int) -> dict[int, PaceOf]:
        """What the stages of a replica have told, by stage; without this rank, and without those that never have."""
        place = self._placement
        found: dict[int, PaceOf] = {}
        for stage in range(place.stages):
            if (replica, stage) != (place.replica, place.stage):
                value = self._exchange.fetch(pace_key(replica, stage))
                if value is not None:
                    found[stage] = receive(PaceOf, value)
        return found

    def send(self, reports: Sequence[Report]) -> None:
        """To rank 0.

        Raises:
            ExchangeError: the store fails.
        """
        for report in reports:
            self._exchange.append(STRAGGLERS, report.model_dump())


def _later(paces: Paces, after: int) -> dict[int, float]:
    return {number: pace for number, pace in paces.items() if number > after}


def _without(paces: dict[int, PaceOf], stage: int) -> list[dict[int, float]]:
    return [told.pace for other, told in paces.items() if other != stage]
