"""Rank 0 evaluates signals by the system's clock, whatever that does, and files that change are read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.errors import ConfigError
from perseus_plugin.leader.signals.base import SignalInMemory
from perseus_plugin.leader.signals.desk import Asked, SignalDesk
from perseus_plugin.leader.signals.registry import SIGNALS
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.bill import Worth
from perseus_plugin.session.worker import Timing


class Clock:
    def __init__(self) -> None:
        self.unix_s = 100.0
        self.monotonic_s = 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


def desk(clock: Clock, *signals: Any, monkeypatch: pytest.MonkeyPatch) -> SignalDesk:
    for number, signal in enumerate(signals):
        monkeypatch.setitem(SIGNALS, f"signal {number}", lambda options, where, made=signal: made)
    told = [{"source": f"signal {number}"} for number in range(len(signals))]
    return SignalDesk(told, now=lambda: clock.unix_s, monotonic=lambda: clock.monotonic_s)


def test_what_is_asked_for_is_told_when_it_changes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = SignalInMemory([(100.0, Target.slowdown(0.1)), (200.0, Target.power_budget(900.0)), (300.0, None)])
    made = desk(clock, signal, monkeypatch=monkeypatch)
    assert made.look() == Asked(Target.slowdown(0.1))
    assert made.look() is None
    clock.unix_s = 250.0
    assert made.look() == Asked(limit=PowerBudget(900.0))
    clock.unix_s = 300.0
    assert made.look() == Asked()


def test_a_clock_that_jumps_gets_what_holds_where_it_is(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = SignalInMemory([(100.0, Target.slowdown(0.1)), (200.0, Target.slowdown(0.2)), (300.0, Target.full())])
    made = desk(clock, signal, monkeypatch=monkeypatch)
    assert made.look() == Asked(Target.slowdown(0.1))
    clock.unix_s = 1000.0
    assert made.look() == Asked(Target.full())
    clock.unix_s = 150.0
    assert made.look() == Asked(Target.slowdown(0.1))


def test_the_first_that_says_something_of_a_matter_is_heard(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SignalInMemory([(100.0, Target.power_budget(900.0)), (200.0, None)], [(0.0, Worth(grams_per_kwh=5.0))])
    second = SignalInMemory([(0.0, Target.power_budget(500.0))], [(0.0, Worth(0.2, 7.0, "EUR"))])
    third = SignalInMemory([(0.0, Target.slowdown(0.3))])
    made = desk(clock, first, second, third, monkeypatch=monkeypatch)
    assert made.look() == Asked(Target.slowdown(0.3), PowerBudget(900.0))
    clock.unix_s = 200.0
    assert made.look() == Asked(Target.slowdown(0.3), PowerBudget(500.0))
    assert made.worths() == [(1.0, Worth(0.2, 5.0, "EUR"))]


def test_what_energy_was_worth_has_its_share_of_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = SignalInMemory(worths=[(110.0, Worth(1.0)), (140.0, Worth(2.0)), (1e9, Worth(3.0))])
    made = desk(clock, signal, monkeypatch=monkeypatch)
    clock.unix_s = 200.0
    shares = made.worths()
    assert [worth for _, worth in shares] == [Worth(), Worth(1.0), Worth(2.0)]
    assert [share for share, _ in shares] == pytest.approx([0.1, 0.3, 0.6])
    assert made.worths() == [(1.0, Worth(2.0))], "no time has gone by"
    clock.unix_s = 120.0
    assert made.worths() == [(1.0, Worth(1.0))], "the clock was put back"


def test_a_signal_that_fails_is_done_without(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SignalInMemory):
        def target(self, unix_s: float) -> Target | None:
            raise ConnectionError("gone")

    made = desk(clock, Broken(), SignalInMemory([(0.0, Target.slowdown(0.3))]), monkeypatch=monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert made.look() == Asked(Target.slowdown(0.3))
        assert made.look() is None
        clock.unix_s += 10.0
        assert made.worths() == [(1.0, Worth())]
    assert [record.message for record in caplog.records] == [
        "perseus.signals[0] has failed and is not listened to any more: ConnectionError('gone'); what stands behind it "
        "holds, and training goes on. Mend it, or give the target by `perseus target`"
    ]


def test_a_file_that_changes_is_read_again(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "day.csv"
    text = "time,power_budget_w\n1970-01-01T00:00Z,{}\n"
    file.write_text(text.format(900))
    told = [{"source": "schedule", "file": str(file)}]
    made = SignalDesk(told, now=lambda: clock.unix_s, monotonic=lambda: clock.monotonic_s)
    assert made.look() == Asked(limit=PowerBudget(900.0))
    file.write_text(text.format(50))
    assert made.look() is None, "it is not looked at all the time"
    looks = int(10.0 / Timing().rarely_s)
    for _ in range(looks):  # as seldom as a session looks
        assert made.look() is None
        clock.monotonic_s += 0.999 * Timing().rarely_s
    assert made.look() == Asked(limit=PowerBudget(50.0)), "within ten seconds"
    with caplog.at_level(logging.WARNING):
        for change in (lambda: file.write_text(text.format("many")), file.unlink):
            change()
            clock.monotonic_s += 10.0
            assert made.look() is None
            clock.monotonic_s += 10.0
            assert made.look() is None
    assert [record.message.partition("; allowed")[0] for record in caplog.records] == [
        f'perseus.signals[0].file: {file}, line 2: got "many"',
        f"perseus.signals[0].file: cannot be read: {file}: No such file or directory. What it said before stays; "
        "correct the file, it is read again then",
    ]
    file.write_text(text.format(70))
    os.utime(file, (1.0, 1.0))
    clock.monotonic_s += 10.0
    assert made.look() == Asked(limit=PowerBudget(70.0))


def test_what_cannot_be_made_ends_the_job_before_it_trains(tmp_path: Path) -> None:
    file = tmp_path / "day.csv"
    file.write_text("time,grams_per_kwh\n2026-08-03T10:00Z,80\n")
    with pytest.raises(ConfigError, match=r"perseus.signals\[1\].file"):
        SignalDesk([{"source": "carbon", "file": str(file)}, {"source": "carbon", "file": str(tmp_path / "x.csv")}])
