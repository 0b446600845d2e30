from __future__ import annotations

from perseus_plugin.control.helper.pausing import SUSPENDED_S, Pauses


def test_a_trainer_that_is_heard_of_goes_on() -> None:
    pauses = Pauses(0.0)
    assert pauses.why(1e6, False) == "", "nothing was said of silence"
    pauses.free_after(10.0)
    pauses.heard(1e6)
    assert pauses.why(1e6 + 9, False) == ""
    assert "asked for nothing for 10 s" in pauses.why(1e6 + 11, False)
    pauses.heard(1e6 + 12)
    assert pauses.why(1e6 + 13, False) == ""


def test_the_silence_of_one_that_was_stopped_counts_from_when_it_goes_on() -> None:
    pauses = Pauses(0.0)
    pauses.free_after(10.0)
    assert "was stopped" in pauses.why(1.0, True)
    assert "was stopped" in pauses.why(100.0, True)
    assert pauses.why(101.0, False) == ""
    assert pauses.why(110.0, False) == ""
    assert "asked for nothing" in pauses.why(112.0, False)


def test_an_announced_suspension_that_does_not_come_is_forgotten() -> None:
    pauses = Pauses(0.0)
    pauses.suspend(1.0)
    assert "suspended" in pauses.why(2.0, False)
    pauses.resume()
    assert pauses.why(2.0, False) == ""
    pauses.suspend(3.0)
    assert pauses.why(3.0 + SUSPENDED_S, False) == ""
