from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.requests import PendingRequests, Request


class Driver:
    """Applies requests in virtual time."""

    def __init__(self, min_dwell_s: float = 0.0) -> None:
        self.pending = PendingRequests(min_dwell_s)
        self.seq = 0
        self.applied: list[tuple[float, int | None]] = []

    def ask(self, mhz: int | None, apply_at_s: float = 0.0, now_s: float = 0.0) -> None:
        self.seq += 1
        self.pending.push(Request(self.seq, mhz, now_s, apply_at_s))

    def run(self, until_s: float, now_s: float = 0.0) -> None:
        """Serve what comes due up to `until_s`."""
        while True:
            request = self.pending.take(now_s)
            if request is not None:
                self.pending.set(request.frequency_mhz, now_s)
                self.applied.append((now_s, request.frequency_mhz))
            next_s = self.pending.next_s()
            if next_s is None or next_s > until_s:
                return
            now_s = max(now_s, next_s)


def test_requests_are_applied_at_their_time() -> None:
    driver = Driver()
    driver.ask(900, 1.0)
    driver.ask(1200, 2.0)
    driver.ask(None, 3.0)
    driver.run(2.5)
    assert driver.applied == [(1.0, 900), (2.0, 1200)]
    assert driver.pending.next_s() == 3.0


def test_a_request_replaces_those_for_the_same_time_or_later() -> None:
    driver = Driver()
    driver.ask(900, 1.0)
    driver.ask(1200, 2.0)
    driver.ask(1000, 1.0)
    driver.run(9.0)
    assert driver.applied == [(1.0, 1000)]


def test_an_immediate_request_replaces_everything() -> None:
    driver = Driver()
    driver.ask(900, 1.0)
    driver.ask(None)
    driver.ask(1005)
    driver.run(9.0)
    assert driver.applied == [(0.0, 1005)]


def test_of_several_due_only_the_last_is_applied() -> None:
    driver = Driver()
    driver.ask(900, 1.0)
    driver.ask(1200, 2.0)
    driver.run(5.0, now_s=4.0)
    assert driver.applied == [(4.0, 1200)]


def test_repeats_are_dropped() -> None:
    driver = Driver()
    driver.ask(None)
    driver.run(1.0)
    driver.ask(900, 1.0)
    driver.run(1.5, now_s=1.0)
    driver.ask(900, 2.0)
    driver.run(2.5, now_s=2.0)
    assert driver.applied == [(1.0, 900)]
    assert driver.pending.next_s() is None


def test_a_change_waits_until_the_dwell_is_over_and_the_newest_is_taken_then() -> None:
    driver = Driver(min_dwell_s=0.5)
    driver.ask(1200, 1.0)
    driver.run(1.0)
    driver.ask(900, 1.1)
    driver.ask(1005, 1.2)
    driver.run(9.0, now_s=1.1)
    assert driver.applied == [(1.0, 1200), (1.5, 1005)]


def test_a_rise_or_a_reset_never_waits_for_the_dwell() -> None:
    driver = Driver(min_dwell_s=10.0)
    driver.ask(900, 1.0)
    driver.ask(1200, 1.1)
    driver.ask(None, 1.2)
    driver.run(5.0)
    assert driver.applied == [(1.0, 900), (1.1, 1200), (1.2, None)]


asked = st.lists(
    st.tuples(st.sampled_from([None, 900, 1005, 1200]), st.floats(0, 5), st.floats(0, 0.4)), min_size=1, max_size=30
)


@given(asked, st.sampled_from([0.0, 0.3]))
def test_whatever_is_asked(history: list[tuple[int | None, float, float]], dwell_s: float) -> None:
    driver = Driver(dwell_s)
    now_s = 0.0
    for mhz, apply_at_s, pause_s in history:
        driver.ask(mhz, apply_at_s, now_s)
        driver.run(now_s + pause_s, now_s)
        now_s += pause_s
    driver.run(100.0, now_s)
    last = history[-1][0]
    at = [time_s for time_s, _ in driver.applied]
    values = [None, *(mhz for _, mhz in driver.applied)]
    assert values[-1] == last  # the newest request has the last word
    assert all(a != b for a, b in itertools.pairwise(values))
    for (a, b), (before, after) in zip(itertools.pairwise(at), itertools.pairwise(values[1:]), strict=True):
        # Only a lower clock waits: a rise or a reset that came late would slow training.
        lowers = after is not None and (before is None or after < before)
        assert b - a >= (dwell_s - 1e-9 if lowers else 0.0)
    assert driver.pending.next_s() is None
