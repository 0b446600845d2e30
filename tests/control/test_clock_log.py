from __future__ import annotations

from perseus_plugin.control.clock_log import ClockLog


def log(*applied: tuple[float, int | None], read: tuple[tuple[float, int], ...] = ()) -> ClockLog:
    made = ClockLog(1410)
    for time_s, mhz in applied:
        made.applied(time_s, mhz)
    for time_s, mhz in read:
        made.read(time_s, mhz)
    return made


def test_a_clock_that_was_applied_and_read_back_is_confirmed() -> None:
    assert log((1.0, 810), read=((2.0, 805),)).confirms(810, 2.0, 3.0)


def test_a_clock_that_never_reached_the_driver_is_not() -> None:
    assert not log(read=((2.5, 810),)).confirms(810, 2.0, 3.0)
    assert not log((2.1, 810), read=((2.5, 810),)).confirms(810, 2.0, 3.0), "it came too late"
    assert not log((1.0, 810), (1.5, None), read=((2.5, 810),)).confirms(810, 2.0, 3.0)


def test_a_change_in_its_course_contradicts() -> None:
    assert not log((1.0, 810), (2.5, 1410), read=((2.1, 810),)).confirms(810, 2.0, 3.0)
    assert log((1.0, 810), (2.5, 810), read=((2.1, 810),)).confirms(810, 2.0, 3.0)
    assert log((1.0, 810), (3.5, 1410), read=((2.1, 810),)).confirms(810, 2.0, 3.0)


def test_without_a_reading_nothing_is_confirmed_below_the_top() -> None:
    assert not log((1.0, 810)).confirms(810, 2.0, 3.0)
    assert not log((1.0, 810), read=((1.5, 810), (3.5, 810))).confirms(810, 2.0, 3.0)


def test_a_lock_that_is_not_honoured_is_seen() -> None:
    assert not log((1.0, 810), read=((2.1, 810), (2.9, 1410))).confirms(810, 2.0, 3.0)
    assert not log((1.0, 1110), read=((2.1, 900), (2.9, 900))).confirms(1110, 2.0, 3.0), "capped below it"


def test_below_the_clock_asked_for_a_gpu_is_where_its_power_limit_holds_it() -> None:
    made = log((1.0, 1110), read=((1.9, 900),))
    for time_s, capped_s in ((2.1, 5.0), (2.9, 5.7)):
        made.read(time_s, 900, capped_s)
    assert made.held(2.5)
    assert made.confirms(1110, 2.0, 3.0)
    assert not made.confirms(1110, 2.5, 3.0), "one reading does not tell"
    made.read(3.1, 900, 5.7)
    made.read(3.9, 900, 5.7)
    assert made.held(3.5) is False
    assert made.held(3.9) is None, "nothing was read after it"
    assert not made.confirms(1110, 3.0, 4.0), "something else holds it"
    made.read(4.1, 1400, 5.8)
    made.read(4.9, 1400, 6.8)
    assert not made.confirms(1110, 4.0, 5.0), "no limit makes a GPU faster"


def test_an_idle_gpu_that_clocks_down_is_no_contradiction() -> None:
    assert log((1.0, 810), read=((2.0, 210), (2.5, 810))).confirms(810, 2.0, 3.0)


def test_at_the_top_a_capped_gpu_is_as_full_as_it_gets() -> None:
    assert log((1.0, 1410), read=((2.1, 1000),)).confirms(1410, 2.0, 3.0)
    assert log((1.0, 810), (1.5, None), read=((2.1, 1000),)).confirms(None, 2.0, 3.0)
    assert log().confirms(None, 2.0, 3.0), "without any request there is no lock of ours"
    assert not log((1.0, 810)).confirms(None, 2.0, 3.0)
