"""How reports and detections leave a rank: the Python call, and the session's own look at its instruction times."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import perseus_plugin
from perseus_plugin.config import StragglersConfig
from perseus_plugin.exchange.messages import STRAGGLERS, PaceOf, PlanPart, pace_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Round, Timetable
from perseus_plugin.session.link import Link
from perseus_plugin.session.running import running_sessions, runs
from perseus_plugin.stragglers.book import DETECTION, check_report
from perseus_plugin.stragglers.sensing import StragglerSensing
from tests.factories import placement, record, session_of

PART = PlanPart(version=1, schedule="1F1B", clocks_mhz=(810, 1410), times_s=(0.010, 0.020))


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    logging.getLogger("perseus_plugin").propagate = True
    return caplog


# The Python call.


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link(Timetable(Round(1, ()), 1, 2))
    session = session_of(link, where=placement(1, 4))
    runs(session)
    yield link
    session.close()


def test_a_report_is_handed_to_the_worker(link: Link) -> None:
    until = time.time() + 60
    assert perseus_plugin.report_straggler(rank=3, slowdown=1.25, until=until, source="scheduler")
    assert perseus_plugin.report_straggler(rank=2, iteration_time_s=0.5)
    assert link.wake.is_set()
    first, second = link.take_reports()
    assert (first.rank, first.slowdown, first.until, first.source) == (3, 1.25, until, "scheduler")
    assert (second.rank, second.iteration_time_s, second.source) == (2, 0.5, "python")
    assert first.id != second.id


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"rank": 4, "slowdown": 1.25}, "rank: got 4; allowed: 0 to 3"),
        ({"rank": 1, "slowdown": 0.5}, "slowdown: got 0.5; allowed: 1 to 100"),
        ({"rank": 1}, "either slowdown or iteration_time_s"),
        ({"rank": "one", "slowdown": 1.25}, "malformed report: rank"),
        ({"rank": 1, "slowdown": 1.25, "source": DETECTION}, "which is the session's own"),
    ],
)
def test_what_is_wrong_is_logged_and_never_raised(
    link: Link, report: dict[str, Any], reason: str, heard: pytest.LogCaptureFixture
) -> None:
    assert not perseus_plugin.report_straggler(**report)
    assert reason in heard.text
    assert link.take_reports() == []


def test_turned_off_it_refuses(link: Link, heard: pytest.LogCaptureFixture) -> None:
    (session,) = running_sessions()
    session._stragglers = StragglersConfig(enabled=False)
    assert not perseus_plugin.report_straggler(rank=1, slowdown=1.25)
    assert "perseus.stragglers.enabled is false" in heard.text


def test_a_session_that_has_ended_takes_no_reports(link: Link, heard: pytest.LogCaptureFixture) -> None:
    (session,) = running_sessions()
    session.close()
    assert not perseus_plugin.report_straggler(rank=1, slowdown=1.25)
    assert "no session runs in this process" in heard.text


def test_without_a_session_nothing_is_loaded() -> None:
    code = "import sys, perseus_plugin; assert not perseus_plugin.report_straggler(rank=0, slowdown=2.0)\n"
    code += "assert not {'torch', 'pydantic', 'perseus_plugin.session.session'} & set(sys.modules)"
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


# The session's own look.


class Sensing:
    """Rank 2 of two replicas of two stages; the other stage of its replica is as in the profile."""

    def __init__(self, exchange: LocalExchange, **config: Any) -> None:
        self._exchange = exchange
        self._sensing = StragglerSensing(StragglersConfig(window=4, **config), placement(2, 4), exchange)
        self._number = 0

    def look(
        self,
        slowdown: float,
        count: int,
        directive: Directive | None = None,
        part: PlanPart = PART,
        undisturbed: bool = True,
        gap_s: float = 0.0,
    ) -> None:
        """Iterations end on all ranks; each takes a second."""
        times_s = [t / part.slowdown * slowdown for t in part.times_s]
        parts = {(part.version, part.schedule): part}
        for _ in range(count):
            seen = record(self._number, durations_s=(0.001, *times_s, 0.005), undisturbed=undisturbed, gap_s=gap_s)
            self._sensing.saw(directive or Follow(part.version), seen, parts)
            others = PaceOf(pace=dict.fromkeys(range(self._number + 1), 1.0))
            self._exchange.publish(pace_key(1, 1), others.model_dump())
            self._sensing.look(float(self._number))
            self._number += 1


def test_a_rank_tells_when_it_has_become_slow_and_when_it_recovers() -> None:
    exchange = LocalExchange()
    sense = Sensing(exchange)
    sense.look(1.0, 30)
    assert exchange.take_new(STRAGGLERS) == []
    sense.look(1.25, 30)
    (told,) = exchange.take_new(STRAGGLERS)
    report = check_report(told, 4, 100.0, time.time())
    assert (report.rank, report.slowdown, report.source) == (2, pytest.approx(1.25), DETECTION)
    sense.look(1.0, 30)
    (told,) = exchange.take_new(STRAGGLERS)
    assert check_report(told, 4, 100.0, time.time()).ends


def test_under_the_plan_made_for_it_a_slow_rank_is_as_slow_as_before() -> None:
    exchange = LocalExchange()
    sense = Sensing(exchange)
    sense.look(1.0, 10)
    sense.look(1.25, 10)
    exchange.take_new(STRAGGLERS)
    planned = PlanPart(version=2, schedule="1F1B", clocks_mhz=(1410, 1410), times_s=(0.0125, 0.025), slowdown=1.25)
    sense.look(1.25, 20, part=planned)
    assert exchange.take_new(STRAGGLERS) == []
    sense.look(1.0, 1, part=planned)
    assert [value["slowdown"] for value in exchange.take_new(STRAGGLERS)] == [1.0]


def test_waiting_is_nobodys_slowness() -> None:
    exchange = LocalExchange()
    sense = Sensing(exchange)
    sense.look(1.0, 10)
    sense.look(1.0, 30, gap_s=0.05)
    assert exchange.take_new(STRAGGLERS) == []


def test_only_undisturbed_iterations_under_a_plan_count() -> None:
    exchange = LocalExchange()
    sense = Sensing(exchange)
    sense.look(1.0, 10)
    sense.look(3.0, 30, directive=FullClock("planning"))
    sense.look(3.0, 30, undisturbed=False)
    sense.look(3.0, 30, directive=Follow(7))
    assert exchange.take_new(STRAGGLERS) == []


@pytest.mark.parametrize("off", [{"detect": False}, {"enabled": False}])
def test_turned_off_it_does_not_look(off: dict[str, bool]) -> None:
    exchange = LocalExchange()
    sense = Sensing(exchange, **off)
    sense.look(1.0, 10)
    sense.look(3.0, 30)
    assert exchange.take_new(STRAGGLERS) == []
