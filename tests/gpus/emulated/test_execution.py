from __future__ import annotations

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.execution import EmulatedExecution
from perseus_plugin.gpus.emulated.physics import A100, BACKWARD_LIKE, FORWARD_LIKE
from tests.gpus.conftest import VirtualClock


@pytest.fixture
def execution(gpu: EmulatedGpu, clock: VirtualClock) -> EmulatedExecution:
    return EmulatedExecution(gpu, now=clock.now, sleep=clock.sleep)


def test_finish_waits_until_the_emulated_work_is_done(execution: EmulatedExecution, clock: VirtualClock) -> None:
    start_s = execution.begin("forward", 0.05)
    clock.sleep(0.01)  # the real work
    done = execution.finish()
    assert done.start_s == start_s
    assert done.end_s == pytest.approx(start_s + 0.05)
    assert not done.overran
    assert clock.now() == pytest.approx(done.end_s, abs=1e-4)
    assert done.late_s < 1e-4


def test_a_clock_change_by_somebody_else_is_noticed_while_waiting(
    execution: EmulatedExecution, gpu: EmulatedGpu, clock: VirtualClock
) -> None:
    other = EmulatedGpu(gpu.state.path, now=clock.now)
    start_s = execution.begin("backward", 0.1)

    def somebody() -> None:
        if clock.now() > start_s + 0.03 and other.locked_mhz() is None:
            other.lock_clock(1005)

    clock.on_sleep = somebody
    done = execution.finish()
    asked_s = gpu.events()[0].time_s
    full_s = asked_s + 0.005 - start_s
    expected_s = full_s + (0.1 - full_s) * A100.stretch(BACKWARD_LIKE, 1005)
    assert done.end_s - done.start_s == pytest.approx(expected_s, abs=1e-6)
    assert clock.now() == pytest.approx(done.end_s, abs=1e-4)


def test_real_work_that_takes_too_long_is_reported(
    execution: EmulatedExecution, gpu: EmulatedGpu, clock: VirtualClock
) -> None:
    start_s = execution.begin("forward", 0.05)
    clock.sleep(0.08)
    done = execution.finish()
    assert done.overran
    assert done.end_s == pytest.approx(start_s + 0.08)
    # The emulated GPU itself was done in time and waited.
    assert gpu.exact_energy_j() == pytest.approx(0.05 * A100.power_w(FORWARD_LIKE, 1410) + 0.03 * A100.blocking_w)


def test_late_wake_ups_do_not_add_up_over_back_to_back_instructions(
    execution: EmulatedExecution, clock: VirtualClock
) -> None:
    clock.on_sleep = lambda: setattr(clock, "now_s", clock.now_s + 0.004)  # every sleep ends 4 ms late
    first_s = execution.begin("forward", 0.05)
    done = execution.finish()
    for _ in range(9):
        assert done.late_s > 0.001
        start_s = execution.begin("forward", 0.05)
        assert start_s == pytest.approx(done.end_s, abs=1e-9)
        done = execution.finish()
    assert done.end_s - first_s == pytest.approx(0.5, abs=1e-9)


def test_lateness_is_not_carried_over_a_gap_or_when_not_wanted(
    execution: EmulatedExecution, clock: VirtualClock
) -> None:
    clock.on_sleep = lambda: setattr(clock, "now_s", clock.now_s + 0.004)
    execution.begin("forward", 0.05)
    execution.finish()
    clock.sleep(0.003)
    assert execution.begin("forward", 0.05) == clock.now()
    execution.finish()
    assert execution.begin("forward", 0.05, carry=False) == clock.now()


def test_gpu_waits_after_the_work(execution: EmulatedExecution, gpu: EmulatedGpu) -> None:
    execution.begin("forward", 0.05)
    assert gpu.peek().power_w(gpu.tables) == pytest.approx(A100.power_w(FORWARD_LIKE, 1410))
    execution.finish()
    assert gpu.peek().power_w(gpu.tables) == pytest.approx(A100.blocking_w)


def test_an_injected_straggler_takes_longer(execution: EmulatedExecution, gpu: EmulatedGpu) -> None:
    gpu.set_slowdown(1.2)
    execution.begin("forward", 0.05)
    done = execution.finish()
    assert done.end_s - done.start_s == pytest.approx(0.06)
