from __future__ import annotations

import time
from pathlib import Path

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.session.emulation import EmulatedStage
from tests.factories import placement

GIVEN = {"forward_time_s": [0.02, 0.03], "backward_time_s": [0.04, 0.06]}


@pytest.fixture
def gpu(tmp_path: Path) -> EmulatedGpu:
    return EmulatedGpu.create(tmp_path / "gpu", switch_latency_s=0.0, switch_jitter_s=0.0)


def stage(gpu: EmulatedGpu, rank: int = 0, world_size: int = 2, **emulation: object) -> EmulatedStage:
    return EmulatedStage(gpu, parse_config({"emulation": emulation}).emulation, placement(rank, world_size))


def took_s(emulated: EmulatedStage, kind: str) -> float:
    """How long an instruction without real work takes."""
    time.sleep(0.003)  # or a late end of the one before would be made good
    begin_s = time.monotonic()
    emulated.begin(Compute(kind, 0))
    emulated.finish()
    return time.monotonic() - begin_s


def burn_cpu(seconds: float) -> None:
    begin_s = time.process_time()
    while time.process_time() - begin_s < seconds:
        pass


@pytest.mark.parametrize(
    ("rank", "kind", "expected_s"),
    [
        (0, "forward", 0.02),
        (1, "forward", 0.03),
        (0, "backward", 0.04),
        (1, "backward", 0.06),
        (1, "backward_1", 0.06),
        (0, "weight", 0.02),
        (1, "input_backward", 0.03),
        (1, "weight_backward_1", 0.03),
        (0, "weight_backward", 0.04),  # the first stage computes no gradient of its input
        (0, "weight_backward_1", 0.02),
        (1, "forward_backward_1", 0.081),
    ],
)
def test_given_times_hold_from_the_first_instruction(gpu: EmulatedGpu, rank: int, kind: str, expected_s: float) -> None:
    emulated = stage(gpu, rank, **GIVEN)
    assert not emulated.needs_calibration
    emulated.begin(Compute(kind, 0))
    assert gpu.peek().work_s == pytest.approx(expected_s)
    emulated.finish()
    assert took_s(emulated, kind) >= expected_s


def test_instructions_take_longer_at_a_low_clock(gpu: EmulatedGpu) -> None:
    emulated = stage(gpu, **GIVEN)
    gpu.lock_clock(705)
    assert took_s(emulated, "backward") > 0.045


def test_real_work_that_takes_longer_than_the_emulated_is_told(gpu: EmulatedGpu) -> None:
    emulated = stage(gpu, forward_time_s=[0.001] * 2, backward_time_s=[0.001] * 2)
    emulated.begin(Compute("forward", 0))
    time.sleep(0.02)
    assert emulated.finish() is True


def test_before_calibration_nothing_is_stretched(gpu: EmulatedGpu) -> None:
    emulated = stage(gpu)
    assert emulated.needs_calibration
    emulated.begin(Compute("forward", 0))
    assert gpu.peek().work_s == 0.0
    assert emulated.finish() is False


def test_calibrated_times_are_the_cpus_times_the_scale(gpu: EmulatedGpu) -> None:
    emulated = stage(gpu, world_size=1, time_scale=10)
    for _ in range(3):
        emulated.begin(Compute("forward", 0))
        burn_cpu(0.003)
        emulated.finish()
    exchange = LocalExchange()
    emulated.calibrate(exchange)
    assert not emulated.needs_calibration
    told_stage, times = exchange.fetch("calibration/0")  # type: ignore[misc]
    assert told_stage == 0
    assert times.keys() == {"forward"}
    assert times["forward"] >= 0.003
    assert took_s(emulated, "forward") >= 10 * times["forward"] * 0.999


def test_replicas_of_a_stage_take_the_same_times_whatever_other_stages_take(gpu: EmulatedGpu) -> None:
    exchange = LocalExchange()
    exchange.publish("calibration/1", [1, {"forward": 99.0}])
    exchange.publish("calibration/2", [0, {"forward": 0.004, "backward": 0.001}])
    exchange.publish("calibration/3", [1, {"forward": 99.0}])
    emulated = stage(gpu, rank=0, world_size=4, time_scale=5)
    emulated.begin(Compute("forward", 0))
    emulated.finish()
    emulated.calibrate(exchange)
    _, mine = exchange.fetch("calibration/0")  # type: ignore[misc]
    expected_s = 5 * (mine["forward"] + 0.004) / 2
    assert expected_s <= took_s(emulated, "forward") < 50
    assert took_s(emulated, "weight") >= expected_s, "a kind that first shows up later"
