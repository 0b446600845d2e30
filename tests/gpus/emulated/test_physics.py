from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from perseus_plugin.gpus.emulated.physics import (
    BACKWARD_LIKE,
    FORWARD_LIKE,
    MODELS,
    OTHER,
    WAITING,
    GpuModel,
    load_class,
)

EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence"
MODEL_LIST = list(MODELS.values())


def test_kinds_map_to_classes_of_load() -> None:
    assert load_class("forward") == FORWARD_LIKE
    assert {load_class(kind) for kind in ("backward", "input_backward", "weight_backward")} == {BACKWARD_LIKE}
    assert load_class("forward_backward_1") == BACKWARD_LIKE
    assert load_class("optimizer") == OTHER


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
def test_clocks_fall_in_steps_from_the_highest_to_the_lowest(model: GpuModel) -> None:
    clocks = model.clocks_mhz()
    assert clocks[0] == model.max_clock_mhz
    assert clocks[-1] == model.min_clock_mhz
    assert {a - b for a, b in itertools.pairwise(clocks)} == {model.clock_step_mhz}


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
@pytest.mark.parametrize("load", [FORWARD_LIKE, BACKWARD_LIKE])
def test_lower_clocks_take_longer_and_draw_less(model: GpuModel, load: int) -> None:
    clocks = model.clocks_mhz()
    stretches = [model.stretch(load, clock) for clock in clocks]
    powers = [model.power_w(load, clock) for clock in clocks]
    assert stretches[0] == 1.0
    assert powers[0] == pytest.approx(model.static_w + model.load(load).dynamic_w)
    assert stretches == sorted(stretches)
    assert powers == sorted(powers, reverse=True)
    assert powers[-1] > model.power_w(WAITING, clocks[-1])


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
@pytest.mark.parametrize("load", [FORWARD_LIKE, BACKWARD_LIKE])
def test_least_energy_lies_between_the_extreme_clocks(model: GpuModel, load: int) -> None:
    energy = {clock: model.stretch(load, clock) * model.power_w(load, clock) for clock in model.clocks_mhz()}
    best = min(energy, key=lambda clock: energy[clock])
    assert model.min_clock_mhz < best < model.max_clock_mhz


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
def test_waiting_draws_more_at_higher_clocks_and_less_than_work_at_each(model: GpuModel) -> None:
    clocks = model.clocks_mhz()
    waiting = [model.power_w(WAITING, clock) for clock in clocks]
    assert waiting[0] == model.blocking_w
    assert waiting == sorted(set(waiting), reverse=True)
    for load in (FORWARD_LIKE, BACKWARD_LIKE, OTHER):
        assert all(model.power_w(load, clock) > w for clock, w in zip(clocks, waiting, strict=True))


@pytest.mark.parametrize(
    ("name", "clock", "power_w"),
    [
        ("a100", 1050, 67.6),
        ("a100", 1140, 72.5),
        ("a100", 1410, 87.5),
        ("a40", 1155, 66.0),
        ("a40", 1395, 72.0),
        ("a40", 1605, 77.0),
        ("a40", 1740, 92.0),
    ],
)
def test_waiting_is_near_what_measured_runs_show(name: str, clock: int, power_w: float) -> None:
    assert MODELS[name].power_w(WAITING, clock) == pytest.approx(power_w, rel=0.03)


def test_a100_is_near_published_points() -> None:
    # GPT-3 175B forward and backward, SOSP'24: time over time at 1410 MHz, and watts.
    model = MODELS["a100"]
    for load, clock, stretch, power_w in (
        (FORWARD_LIKE, 1410, 1.0, 474.6),
        (FORWARD_LIKE, 1170, 1.145, 323.2),
        (FORWARD_LIKE, 930, 1.428, 250.3),
        (BACKWARD_LIKE, 1290, 1.044, 413.2),
        (BACKWARD_LIKE, 1050, 1.247, 281.1),
    ):
        assert model.stretch(load, clock) == pytest.approx(stretch, rel=0.01)
        assert model.power_w(load, clock) == pytest.approx(power_w, rel=0.03)


@pytest.mark.parametrize(("name", "file"), [("h100", "verify-h100.json"), ("h200", "verify-h200.json")])
def test_at_its_limit_a_card_runs_at_the_clocks_that_were_read_back_from_a_real_one(name: str, file: str) -> None:
    model, measured = MODELS[name], json.loads((EVIDENCE / file).read_text())
    assert measured["machine"]["clocks_mhz"] == [model.min_clock_mhz, model.max_clock_mhz]
    assert measured["machine"]["clock_count"] == len(model.clocks_mhz())
    assert measured["machine"]["power_limit_w"] == model.limit_w
    waits_w = [one["power_w"] for one in measured["waiting"]]
    assert model.blocking_w == pytest.approx(sum(waits_w) / len(waits_w), rel=0.02)
    assert model.tick_period_s == pytest.approx(measured["counter"]["period_ms"] / 1000, rel=0.01)
    assert model.tick_lag_s == pytest.approx(measured["counter"]["lag_ms"] / 1000, rel=0.05)
    assert model.energy_call_s == pytest.approx(measured["calls_us"]["energy counter"]["median"] * 1e-6, rel=0.25)
    for one in measured["at_the_limit"]["kinds"]:
        load = load_class(one["kind"])
        held_mhz = model.held_mhz(load, model.max_clock_mhz)
        assert abs(held_mhz - one["steady_clock_mhz"]) <= model.clock_step_mhz / 2
        assert model.power_w(load, held_mhz) == pytest.approx(one["steady_w"], rel=0.02)


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
def test_work_is_held_at_the_highest_clock_that_keeps_the_limit(model: GpuModel) -> None:
    for load, clock in itertools.product(range(4), model.clocks_mhz()):
        held_mhz = model.held_mhz(load, clock)
        assert held_mhz <= clock
        assert model.power_w(load, held_mhz) <= model.limit_w
        above_mhz = held_mhz + model.clock_step_mhz
        assert above_mhz > clock or model.power_w(load, above_mhz) > model.limit_w


@pytest.mark.parametrize("model", MODEL_LIST, ids=lambda m: m.name)
def test_a_clock_change_takes_5_to_30_ms_whatever_the_clock(model: GpuModel) -> None:
    for clock in model.clocks_mhz():
        assert all(0.005 <= time_s <= 0.030 for time_s in model.switch_times_s(clock))
