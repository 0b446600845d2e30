from __future__ import annotations

import math

import numpy as np
import pytest

from perseus_plugin.profiling.work_model import Observed, fitted

WORKS = np.linspace(100.0, 300.0, 40)
FORWARD, BACKWARD = (0, "forward"), (0, "backward")


def observed(noise: float = 0.0, seed: int = 0) -> Observed:
    draw = np.random.default_rng(seed)
    jitter = 1 + noise * draw.standard_normal((2, len(WORKS)))
    return {
        FORWARD: (WORKS, (0.004 + 0.0001 * WORKS) * jitter[0]),
        BACKWARD: (WORKS, (0.002 + 0.0001 * WORKS + 2e-6 * WORKS**2) * jitter[1]),
    }


def test_a_line_and_a_parabola_are_found() -> None:
    model = fitted(observed())
    assert model is not None
    assert len(model.of[BACKWARD].coefficients) == 3
    assert model.of[FORWARD].at(150.0) == pytest.approx(0.019, rel=1e-6)
    assert model.of[BACKWARD].at([100.0, 200.0]) == pytest.approx([0.032, 0.102], rel=1e-6)
    assert model.explains
    assert model.error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_its_error_is_what_the_works_leave(noise: float) -> None:
    model = fitted(observed(noise))
    assert model is not None
    assert 0.5 * noise < model.error < 2 * noise


def test_beyond_what_was_seen_the_time_goes_on_straight_and_stays_positive() -> None:
    model = fitted(observed())
    assert model is not None
    curve = model.of[BACKWARD]
    slope = (curve.at(300.0) - curve.at(299.9)) / 0.1
    assert curve.at(400.0) == pytest.approx(curve.at(300.0) + 100 * slope, rel=1e-3)
    assert curve.at(1e-9) > 0


def test_a_single_hiccup_changes_next_to_nothing() -> None:
    held_up = observed(0.01)
    held_up[FORWARD][1][7] *= 40
    model, plain = fitted(held_up), fitted(observed(0.01))
    assert model is not None
    assert plain is not None
    assert model.of[FORWARD].at(200.0) == pytest.approx(plain.of[FORWARD].at(200.0), rel=0.01)
    assert model.explains


def test_works_that_say_nothing_explain_nothing() -> None:
    times_s = 0.03 * (1 + 0.3 * np.random.default_rng(1).standard_normal(len(WORKS)))
    model = fitted({FORWARD: (WORKS, times_s)})
    assert model is not None
    assert not model.explains


def test_works_that_do_not_differ_explain_nothing() -> None:
    model = fitted({FORWARD: (np.full(40, 7.0), 0.03 + 0.001 * np.arange(40))})
    assert model is not None
    assert model.explained == -math.inf
    assert not model.explains


def test_what_held_once_and_does_not_any_more_is_seen() -> None:
    model = fitted(observed(0.01))
    assert model is not None
    works, times_s = observed(0.01, seed=3)[FORWARD]
    assert model.held_against({FORWARD: (works, times_s)})[0] > 0.9
    shuffled = np.random.default_rng(5).permutation(works)
    assert model.held_against({FORWARD: (shuffled, times_s)})[0] < 0.5


def test_too_few_durations_make_no_model() -> None:
    assert fitted({FORWARD: (WORKS[:5], WORKS[:5])}) is None
    assert fitted({}) is None
