"""What is made of replays of a CUDA graph."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.cli.verification.graphs import Replay, figures_of

PLACES_S = (0.1, 0.25, 0.3, 0.5)


def replay(number: int, pace: float = 1.0, late_s: float = 0.0, read_s: float = 0.0) -> Replay:
    """One that begins 0.2 ms after its call, takes half a second, and is longer while it is read."""
    called_s, read = 10.0 * number, number % 2 == 1
    launched_s, pace = called_s + 2e-4, pace + read * read_s / 0.5
    passed_s = [launched_s, *(launched_s + pace * at_s + late_s for at_s in PLACES_S)]
    return Replay(called_s, called_s + 1e-4, launched_s, passed_s, launched_s + 0.5 * pace, read)


def test_replays_that_are_alike_are_where_they_were() -> None:
    found = figures_of([replay(number) for number in range(20)])
    assert (found.replays, found.marks, found.within_percent) == (20, 4, 100)
    assert found.replay_ms.median == pytest.approx(500)
    assert (found.call_us.median, found.begin_us.median) == pytest.approx((100, 200))
    assert found.jitter_percent == pytest.approx(0, abs=1e-9)
    assert found.where_us.highest == pytest.approx(0, abs=1e-3)
    assert (found.read_percent, found.read_se_percent) == pytest.approx((0, 0), abs=1e-9)


def test_what_a_read_makes_longer_is_told_apart() -> None:
    found = figures_of([replay(number, read_s=0.001) for number in range(20)])
    assert found.read_percent == pytest.approx(0.2, rel=0.01)
    assert found.read_percent > 2 * found.read_se_percent


@given(st.floats(0.8, 1.25))
def test_a_stretch_of_all_replays_is_followed(pace: float) -> None:
    """From the third one after it on, as the last eight tell; meanwhile half of them are off by most of it."""
    found = figures_of([replay(number, 1.0 if number < 4 else pace) for number in range(60)])
    assert found.where_us.median == pytest.approx(0, abs=1e-3)
    assert found.within_percent > 80


def test_a_gpu_that_is_elsewhere_than_its_time_says_is_seen() -> None:
    found = figures_of([replay(number, late_s=0.02 * (number % 3)) for number in range(40)])
    assert found.where_us.p95 >= 20_000
    assert found.within_percent < 95
    assert found.jitter_percent == pytest.approx(0, abs=1e-9), "the whole of it takes as long as ever"
