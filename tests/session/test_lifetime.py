from __future__ import annotations

import logging

import pytest

from perseus_plugin.errors import ClockNotFreeError, GpuError
from perseus_plugin.exchange.store import ExchangeError
from perseus_plugin.session.lifetime import Lifetime


class Clock:
    """Counts how often it was given up, and whether anybody had been told by then."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.seen = told, list[int]()

    def retire(self) -> None:
        self.seen.append(len(self.told))


def test_the_clock_is_given_up_before_anybody_is_told_and_once() -> None:
    told: list[str] = []
    clock = Clock(told)
    lifetime = Lifetime(clock)
    lifetime.on_end(told.append)
    assert not lifetime.ended
    assert lifetime.end()
    assert lifetime.ended
    assert not lifetime.end()
    lifetime.fail(RuntimeError("too late"))
    assert (clock.seen, told) == ([0], [""])


@pytest.mark.parametrize(
    ("error", "level", "text"),
    [
        (GpuError("the GPU is lost"), logging.WARNING, "run `perseus doctor`"),
        (ExchangeError("the store is gone"), logging.WARNING, "a restart of the job tries again"),
        (ZeroDivisionError(), logging.ERROR, "This is a fault of perseus_plugin"),
        (ClockNotFreeError("it is held"), logging.ERROR, "it is held. Training goes on, at that clock until then"),
    ],
)
def test_a_failure_is_said_once_with_what_to_do(
    error: Exception, level: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    lifetime = Lifetime(None)
    lifetime.on_end(told.append)
    lifetime.fail(error)
    lifetime.fail(GpuError("another"))
    (line,) = caplog.records
    assert line.levelno == level
    assert text in line.getMessage()
    assert told == [str(error) or repr(error)]


def test_that_a_clock_is_not_free_is_said_of_a_session_that_has_ended_too(caplog: pytest.LogCaptureFixture) -> None:
    lifetime = Lifetime(None)
    lifetime.fail(ExchangeError("the store is gone"))
    lifetime.fail(ClockNotFreeError("the SM clock may still be locked"))
    said = [line.getMessage() for line in caplog.records]
    assert "Training goes on at full clocks" in said[0]
    assert said[1:] == ["training goes on, but not at full clocks: the SM clock may still be locked"]


def test_who_comes_too_late_is_told_at_once() -> None:
    told: list[str] = []
    lifetime = Lifetime(None)
    lifetime.fail(GpuError("it is lost"))
    lifetime.on_end(told.append)
    assert told == ["it is lost"]


@pytest.mark.parametrize("failed", [False, True])
def test_what_cannot_be_put_back_is_said_and_reaches_nobody(failed: bool, caplog: pytest.LogCaptureFixture) -> None:
    def broken(reason: str) -> None:
        raise KeyError("an engine's attribute")

    told: list[str] = []
    lifetime = Lifetime(None)
    for callback in (broken, told.append):
        lifetime.on_end(callback)
    if failed:
        lifetime.fail(GpuError("it is lost"))
    else:
        assert lifetime.end()
    assert told == ["it is lost" if failed else ""], "whoever comes after it"
    lifetime.on_end(broken)
    said = [line for line in caplog.records if "not everything of perseus could be taken out" in line.getMessage()]
    assert len(said) == 2
    assert all(line.exc_info is not None and line.exc_info[0] is KeyError for line in said)
