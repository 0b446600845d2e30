from __future__ import annotations

from perseus_plugin.control.helper.resetting import reset_until_confirmed
from tests.control.conftest import ScriptedGpu


def locked(gpu: ScriptedGpu, mhz: int) -> ScriptedGpu:
    gpu.lock_clock(mhz)
    gpu.sleep(1.0)
    gpu.calls.clear()
    return gpu


def test_one_call_is_enough_when_the_clock_leaves_the_locked_value(scripted: ScriptedGpu) -> None:
    gpu = locked(scripted, 1005)
    outcome = reset_until_confirmed(gpu, 1005, limit_s=5.0, now=gpu.now, sleep=gpu.sleep)
    assert (outcome.confirmed, outcome.problem, gpu.calls) == (True, "", [0])
    assert gpu.read_clock_mhz() == 1410


def test_failing_calls_are_repeated(scripted: ScriptedGpu) -> None:
    gpu = locked(scripted, 1005)
    gpu.failures = 4
    outcome = reset_until_confirmed(gpu, 1005, limit_s=5.0, now=gpu.now, sleep=gpu.sleep)
    assert (outcome.confirmed, gpu.calls) == (True, 5 * [0])


def test_a_reset_without_effect_is_repeated(scripted: ScriptedGpu) -> None:
    gpu = locked(scripted, 1005)
    gpu.deaf = 2
    outcome = reset_until_confirmed(gpu, 1005, limit_s=5.0, now=gpu.now, sleep=gpu.sleep)
    assert (outcome.confirmed, gpu.calls) == (True, 3 * [0])


def test_it_gives_up_in_time_and_says_what_is_wrong(scripted: ScriptedGpu) -> None:
    gpu = locked(scripted, 1005)
    gpu.failures = 10_000
    before_s = gpu.now()
    outcome = reset_until_confirmed(gpu, 1005, limit_s=5.0, now=gpu.now, sleep=gpu.sleep)
    assert (outcome.confirmed, outcome.problem) == (False, "driver says no")
    assert 4.0 < gpu.now() - before_s <= 5.0
    assert len(gpu.calls) < 30
    gpu.failures, gpu.deaf = 0, 10_000
    outcome = reset_until_confirmed(gpu, 1005, limit_s=2.0, now=gpu.now, sleep=gpu.sleep)
    assert outcome.problem == "the driver accepted the reset but the clock still reads 1005 MHz"


def test_a_lock_at_the_top_cannot_be_told_from_none(scripted: ScriptedGpu) -> None:
    for mhz in (None, 1410):
        scripted.calls.clear()
        outcome = reset_until_confirmed(scripted, mhz, limit_s=5.0, now=scripted.now, sleep=scripted.sleep)
        assert (outcome.confirmed, scripted.calls) == (True, [0])
    assert scripted.now() == 0.0
