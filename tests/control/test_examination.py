from __future__ import annotations

import pytest

from perseus_plugin.control.examination import COUNTER_WATCH_S, counter_problem, why_not_obeyed, why_not_planned
from perseus_plugin.control.wire import SwitchLatency
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import EnergyReading

from .conftest import ScriptedGpu


def test_a_counter_that_moves_is_no_problem_and_known_at_once(scripted: ScriptedGpu) -> None:
    assert counter_problem(scripted, now=scripted.now, sleep=scripted.sleep) == ""
    assert scripted.now_s < 0.1


@pytest.mark.parametrize(("value", "text"), [(0.0, "read 0 J for"), (4711.0, "did not move within")])
def test_a_counter_that_stands_still_is(scripted: ScriptedGpu, value: float, text: str) -> None:
    scripted.read_energy = lambda: EnergyReading(scripted.now_s, value)  # type: ignore[method-assign]
    assert text in counter_problem(scripted, now=scripted.now, sleep=scripted.sleep)
    assert scripted.now_s < COUNTER_WATCH_S + 0.1


def test_one_that_cannot_be_read_is(scripted: ScriptedGpu) -> None:
    def refused() -> EnergyReading:
        raise GpuError("not supported")

    scripted.read_energy = refused  # type: ignore[method-assign]
    assert counter_problem(scripted, now=scripted.now, sleep=scripted.sleep) == (
        "the energy counter cannot be read (not supported)"
    )


def test_what_a_plan_needs() -> None:
    assert why_not_planned((1410, 810), "") == ""
    assert "(1410 MHz)" in why_not_planned((1410,), "")
    assert "(none MHz)" in why_not_planned((), "")
    assert "perseus.profiling.load" in why_not_planned((1410, 810), "the energy counter stands still")
    assert why_not_planned((1410, 810), "the energy counter stands still", has_profile=True) == ""
    assert why_not_planned((1410,), "", has_profile=True) != ""


@pytest.mark.parametrize(("samples", "timeouts", "obeys"), [(8, 0, True), (8, 3, True), (0, 0, True), (3, 3, False)])
def test_a_gpu_whose_clock_never_followed_is_none_to_plan_for(samples: int, timeouts: int, obeys: bool) -> None:
    why_not = why_not_obeyed(SwitchLatency(0.005, 0.006, samples, timeouts))
    assert (why_not == "") == obeys
    assert obeys or "the driver takes locks but the clock does not follow" in why_not
