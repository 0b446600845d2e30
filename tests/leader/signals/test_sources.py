"""The signals that come with the plugin, and how they are found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import parse_config, with_whole_paths
from perseus_plugin.errors import ConfigError
from perseus_plugin.leader.signals.base import SignalInMemory
from perseus_plugin.leader.signals.registry import SIGNALS, make_signal
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.bill import Worth

HOURS = "time,{}\n2026-08-03T10:00Z,{}\n2026-08-03T11:00Z,{}\n2026-08-03T12:00Z,{}\n"
BANDS = [[0, 80, 0.0], [80, 200, 0.05], [200, 300, 0.2]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "day.csv"


def at(hour: int, minute: int = 0) -> float:
    return datetime(2026, 8, 3, hour, minute, tzinfo=timezone.utc).timestamp()


def signal(path: Path, text: str, **told: Any) -> Any:
    path.write_text(text)
    return make_signal({"file": str(path), **told}, "perseus.signals[0]")


def test_a_schedule_of_budgets(file: Path) -> None:
    made = signal(file, HOURS.format("power_budget_kw", 180, "", 120.5), source="schedule")
    assert [made.target(at(hour)) for hour in (9, 10, 11, 23)] == [
        None,
        Target.power_budget(180_000.0),
        None,
        Target.power_budget(120_500.0),
    ]
    assert made.next_change(at(10)) == at(11)
    assert made.worth(at(10)) == Worth()
    assert list(made.files) == [file]


def test_a_schedule_of_slowdowns(file: Path) -> None:
    made = signal(file, HOURS.format("slowdown_percent", 0, 5, 10), source="schedule", after_last="end")
    assert [made.target(at(hour)) for hour in (10, 11, 12, 13)] == [
        Target.slowdown(0.0),
        Target.slowdown(0.05),
        Target.slowdown(0.1),
        None,
    ]


def test_prices_are_worths_and_stretch_iterations(file: Path) -> None:
    text = HOURS.format("price_per_mwh", -20, 79.9, 80)
    made = signal(file, text, source="price", stretch=BANDS, currency="EUR")
    assert [made.target(at(hour)) for hour in (9, 10, 11, 12, 13)] == [
        None,
        Target.slowdown(0.0),
        Target.slowdown(0.0),
        Target.slowdown(0.05),
        None,
    ]
    assert [made.worth(at(hour)) for hour in (9, 12, 13)] == [Worth(), Worth(0.08, currency="EUR"), Worth()]


def test_without_a_rule_a_price_asks_for_nothing(file: Path) -> None:
    made = signal(file, HOURS.format("price_per_kwh", 0.1, 0.2, 0.3), source="price")
    assert made.target(at(10)) is None
    assert made.worth(at(10)) == Worth(0.1)


def test_carbon_above_the_last_band_counts_as_in_it(file: Path) -> None:
    made = signal(file, HOURS.format("grams_per_kwh", 80, 250, 900), source="carbon", stretch=BANDS)
    assert [made.target(at(hour)) for hour in (10, 11, 12)] == [
        Target.slowdown(0.05),
        Target.slowdown(0.2),
        Target.slowdown(0.2),
    ]
    assert made.worth(at(11)) == Worth(grams_per_kwh=250.0)


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    carbon: dict[str, Any] = {"source": "carbon"}
    yield {}, 'perseus.signals[0].source: got null; allowed: one of "schedule", "price", "carbon"'
    yield {"source": "weather"}, 'got "weather"; allowed: one of'
    yield {**carbon, "file": "/nowhere/day.csv"}, "perseus.signals[0].file: cannot be read: /nowhere/day.csv"
    yield {**carbon, "files": "x"}, "did you mean 'file'?"
    yield {**carbon, "time_zone": "Europe/Berlinn"}, 'perseus.signals[0].time_zone: got "Europe/Berlinn"; allowed: a'
    yield {**carbon, "after_last": "stay"}, 'got "stay"; allowed: "hold", "end" or null'
    for bands in ([], [[0, 80, 0.0], [70, 200, 0.1]], [[0, 80, 0.0], [90, 200, 0.1]], [[80, 80, 0.0]], [[0, 80]]):
        yield {**carbon, "stretch": bands}, "allowed: a list of [from, to, slowdown] of which each begins"
    yield {**carbon, "stretch": [[0, 80, 11.0]]}, "with slowdowns from 0 to 1,"


@pytest.mark.parametrize(("told", "said"), wrong())
def test_what_is_wrong_is_named(file: Path, told: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        signal(file, HOURS.format("grams_per_kwh", 80, 250, 900), **told)


@pytest.mark.parametrize(("column", "value"), [("power_budget_w", 0), ("slowdown", -0.1), ("slowdown_percent", 1001)])
def test_a_target_that_cannot_be_is_found_before_its_hour(file: Path, column: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"perseus.signals\[0\].file: .*day.csv, line 4: .*; allowed: "):
        signal(file, HOURS.format(column, 1, 1, value), source="schedule")


def test_a_kind_of_signal_that_fails_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(options: Any, where: str) -> SignalInMemory:
        raise KeyError("region")

    monkeypatch.setitem(SIGNALS, "grid", fails)
    with pytest.raises(ConfigError, match=r"perseus.signals\[0\]: the signal 'grid' cannot be made: KeyError"):
        make_signal({"source": "grid"}, "perseus.signals[0]")


def test_a_relative_file_begins_where_the_script_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = [{"source": "carbon", "file": "day.csv"}, {"source": "grid", "file": 3}]
    config = with_whole_paths(parse_config({"signals": told}))
    assert config.signals == ({"source": "carbon", "file": str(tmp_path / "day.csv")}, {"source": "grid", "file": 3})


def test_the_signal_in_memory() -> None:
    made = SignalInMemory([(1.0, Target.full()), (3.0, None)], [(2.0, Worth(0.1))])
    assert [made.target(at_s) for at_s in (0.5, 1.0, 3.0)] == [None, Target.full(), None]
    assert [made.worth(at_s) for at_s in (1.0, 2.5)] == [Worth(), Worth(0.1)]
    assert [made.next_change(at_s) for at_s in (0.0, 1.0, 2.0)] == [1.0, 2.0, 3.0]
    assert made.next_change(3.0) == float("inf")
