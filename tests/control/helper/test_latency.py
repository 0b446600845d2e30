from __future__ import annotations

import math

import pytest

from perseus_plugin.control.helper.latency import LatencyMeasurement, advance, percentile
from perseus_plugin.control.wire import SwitchLatency
from tests.control.conftest import ScriptedGpu


def measure_switch_latency(gpu: ScriptedGpu, rounds: int) -> SwitchLatency:
    measurement = LatencyMeasurement(gpu.supported_clocks_mhz(), rounds)
    while not measurement.done:
        advance(measurement, gpu, gpu.now)
        gpu.sleep(max(0.0, measurement.next_s - gpu.now()))
    return measurement.outcome()


def test_it_measures_the_latency_to_its_polling_interval(scripted: ScriptedGpu) -> None:
    found = measure_switch_latency(scripted, 3)
    assert (found.samples, found.timeouts) == (6, 0)
    assert found.p50_s == pytest.approx(0.004, abs=3e-4)
    assert found.p95_s == pytest.approx(0.004, abs=3e-4)
    assert scripted.calls == [1410, *[840, 1410] * 3]


def test_a_clock_that_never_follows_is_never_seen(scripted: ScriptedGpu) -> None:
    scripted.latency_s = None
    found = measure_switch_latency(scripted, 2)
    # It "goes up" at once as it never went down: that is no change that was seen.
    assert (found.samples, found.timeouts) == (2, 2)


def test_a_gpu_below_its_top_clock_is_timed_where_it_gets_to(scripted: ScriptedGpu) -> None:
    scripted.cap_mhz = 1000  # between two clocks, as a power limit is
    found = measure_switch_latency(scripted, 3)
    assert (found.samples, found.timeouts) == (6, 0)
    assert found.p95_s == pytest.approx(0.004, abs=3e-4)
    assert scripted.calls == [1410, 840, *[420, 840] * 3]


@pytest.mark.parametrize("rounds", [8, 1000])
def test_a_gpu_that_obeys_nothing_takes_seconds_only(scripted: ScriptedGpu, rounds: int) -> None:
    scripted.cap_mhz = 150
    found = measure_switch_latency(scripted, rounds)
    assert found.samples == found.timeouts <= 3
    assert math.isnan(found.p50_s)
    assert scripted.now_s < 5.0


def test_one_clock_gives_nothing_to_time() -> None:
    gpu = ScriptedGpu(clocks_mhz=(1410,))
    found = measure_switch_latency(gpu, 8)
    assert (found.samples, found.timeouts) == (0, 0)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(x) for x in range(1, 21)]
    assert percentile(values, 0.5) == 10.0
    assert percentile(values, 0.95) == 19.0
    assert percentile([3.0], 0.95) == 3.0
    assert math.isnan(percentile([], 0.5))
