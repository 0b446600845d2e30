from __future__ import annotations

import itertools

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

MODEL_LIST = list(MODELS.values())


def test_kinds_map_to_classes_of_load() -> None:
    assert load_class("forward") == FORWARD_LIKE
    assert {load_class(kind) for kind in ("backward", "input_backward", "weight_backward")} == {BACKWARD_LIKE}
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
