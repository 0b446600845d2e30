"""Times and values from CSVs as people and exchanges write them, and what is wrong with others."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from perseus_plugin.errors import ConfigError
from perseus_plugin.leader.signals.steps import Reading, Steps, steps_from_csv

BERLIN = ZoneInfo("Europe/Berlin")


def read(text: str, **how: Any) -> Steps:
    usual: dict[str, Any] = {
        "known": {"watts": 1.0, "kilowatts": 1e3},
        "column": None,
        "means": None,
        "time_column": "time",
        "zone": BERLIN,
        "holds": True,
    }
    return steps_from_csv(text, Reading(**{**usual, **how}), "day.csv")[0]


def unix(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()


def test_a_value_holds_until_the_next_line_and_an_empty_one_says_nothing() -> None:
    steps = read("time,watts\n2026-08-03T10:00Z,5\n2026-08-03T11:00+00:00,\n\n2026-08-03T14:00+02:00,7.5\n")
    assert [
        steps.at(unix(f"2026-08-03T{clock}")) for clock in ("09:59", "10:00", "10:59", "11:30", "12:00", "23:00")
    ] == [
        None,
        5.0,
        5.0,
        None,
        7.5,
        7.5,
    ]
    assert steps.next_change(0) == unix("2026-08-03T10:00")
    assert steps.next_change(unix("2026-08-03T10:00")) == unix("2026-08-03T11:00")
    assert steps.next_change(unix("2026-08-03T12:00")) == math.inf


def test_the_last_line_holds_for_as_long_as_the_one_before() -> None:
    steps = read("time,watts\n2026-08-03T10:00Z,5\n2026-08-03T11:00Z,6\n", holds=False)
    assert steps.at(unix("2026-08-03T11:59")) == 6.0
    assert steps.at(unix("2026-08-03T12:00")) is None
    assert read("time,watts\n2026-08-03T10:00Z,5\n", holds=False).at(unix("2030-01-01T00:00")) == 5.0


def test_lines_may_say_when_they_end() -> None:
    text = "time,until,watts\n2026-08-03T10:00Z,2026-08-03T11:00Z,5\n2026-08-03T11:00Z,2026-08-03T11:15Z,6\n"
    assert read(text, holds=False).next_change(unix("2026-08-03T11:00")) == unix("2026-08-03T11:15")
    assert read(text).next_change(unix("2026-08-03T11:00")) == math.inf


def test_steps_to_the_same_value_are_none() -> None:
    text = "time,watts\n2026-08-03T10:00Z,5\n2026-08-03T11:00Z,5.0\n2026-08-03T12:00Z,6\n"
    assert read(text).since == (unix("2026-08-03T10:00"), unix("2026-08-03T12:00"))


def test_times_without_offset_are_of_the_zone_that_is_named() -> None:
    assert read("time,watts\n2026-08-03T10:00,5\n").since == (unix("2026-08-03T08:00"),)
    assert read("time,watts\n2026-01-03 10:00,5\n").since == (unix("2026-01-03T09:00"),)


@pytest.fixture
def in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_new_york")
def test_times_without_offset_are_of_this_machine_where_no_zone_is_named() -> None:
    assert read("time,watts\n2026-08-03T10:00,5\n", zone=None).since == (unix("2026-08-03T14:00"),)


def test_the_hour_that_comes_twice_comes_twice() -> None:
    hours = ["01:00", "02:00", "02:30", "02:00", "02:30", "03:00"]
    steps = read("time,watts\n" + "".join(f"2026-10-25T{hour},{n}\n" for n, hour in enumerate(hours)))
    assert [(later - steps.since[0]) / 3600 for later in steps.since] == [0, 1, 1.5, 2, 2.5, 3]


def broken() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "", {}, "got columns [];"
    yield "time,watts\n", {}, "no line below the header"
    yield "when,watts\n1,2\n", {}, "'time'"
    yield "time,euros\n1,2\n", {}, "'watts' or 'kilowatts'"
    yield "time,watts,kilowatts\n1,2,3\n", {}, "'watts' or 'kilowatts'"
    yield "time,Load [W]\n2026-08-03T10:00Z,2\n", {"column": "Load [W]"}, "allowed: `means`, as one of watts, kilowatts"
    yield "time,watts\n10 o'clock,2\n", {}, 'line 2: got "10 o\'clock"; allowed: a time, ISO 8601'
    yield "time,watts\n2026-03-29T02:30,2\n", {}, "which no clock shows there that day"
    yield "time,watts\n2026-08-03T10:00Z,many\n", {}, 'line 2: got "many"; allowed: a number, or nothing'
    yield "time,watts\n2026-08-03T10:00Z,inf\n", {}, 'line 2: got "inf"'
    yield "time,watts\n2026-08-03T10:00Z,1\n2026-08-03T10:00Z,2\n", {}, "line 3: got"
    yield "time,watts\n2026-08-03T10:00Z,1\n2026-08-03T09:00Z,2\n", {}, "a time after that of the line before"
    yield "time,watts\n2026-08-03T10:00Z\n", {}, "line 2: got 1 values; allowed: 2"
    yield 'time,watts\n"2026', {}, "got no CSV"
    begins = "time,until,watts\n2026-08-03T10:00Z,2026-08-03T11:00Z,5\n"
    yield begins + "2026-08-03T10:30Z,2026-08-03T12:00Z,6\n", {}, "line 3: got an overlap with the line before"
    yield begins + "2026-08-03T11:30Z,2026-08-03T12:00Z,6\n", {}, "line 3: got a gap after the line before"
    yield "time,until,watts\n2026-08-03T10:00Z,2026-08-03T09:00Z,5\n", {}, "an end after its beginning"


@pytest.mark.parametrize(("text", "how", "said"), broken())
def test_what_is_wrong_is_named(text: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read(text, **how)


def test_a_foreign_column_is_told_by_name() -> None:
    text = "MTU,Day-ahead [W]\n2026-08-03T10:00Z,2\n"
    assert read(text, time_column="MTU", column="Day-ahead [W]", means="kilowatts").at(1e10) == 2.0
