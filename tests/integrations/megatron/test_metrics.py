from __future__ import annotations

import argparse
import math
import sys
from types import ModuleType
from typing import Any

import pytest

from perseus_plugin.integrations.megatron.metrics import Metrics, log_line, metrics_of
from tests.factories import placement

FIGURES = [
    ("Perseus/iteration_time_s/full_clock", 0.5),
    ("Perseus/energy_j/full_clock", 200.0),
    ("Perseus/iteration_time_s/measured", 0.502),
    ("Perseus/energy_j/measured", 170.0),
    ("Perseus/saving_percent/measured", 15.0),
    ("Perseus/slowdown_percent/measured", 0.4),
]


class Writer:
    """A SummaryWriter and a wandb at once."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.logged: list[tuple[dict[str, float], int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def test_the_newest_figures_are_written_at_the_log_interval(capsys: pytest.CaptureFixture[str]) -> None:
    writer, arguments = Writer(), argparse.Namespace(log_interval=2, curr_iteration=0)
    metrics = Metrics(arguments, lambda: writer, lambda: writer)
    for iteration in range(4):
        arguments.curr_iteration = iteration
        if iteration == 2:
            metrics([*FIGURES[:2], ("Perseus/power_budget_w/in_force", 900.0)])
            metrics([*FIGURES, ("Perseus/power_budget_w/in_force", math.nan)])
        metrics.after_iteration()
    assert writer.scalars == [(name, value, 4) for name, value in FIGURES]
    assert writer.logged == [(dict(FIGURES), 4)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        " perseus at iteration 4: 15.0 % less energy and +0.4 % time than at full clocks "
        "(170 J and 0.502 s per iteration)"
    )


def test_without_megatrons_count_it_counts_itself(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(argparse.Namespace(log_interval=3))
    metrics(FIGURES)
    for _ in range(6):
        metrics.after_iteration()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        " perseus at iteration 3",
        " perseus at iteration 6",
    ]


def test_a_writer_that_fails_is_said_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Writer):
        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise OSError("disk full")

    metrics = Metrics(argparse.Namespace(log_interval=1), Broken)
    metrics(FIGURES)
    for _ in range(3):
        metrics.after_iteration()
    assert len([text for text in caplog.messages if "disk full" in text]) == 1


def test_before_there_is_a_plan_the_line_says_what_is_known() -> None:
    assert log_line({}) == ""
    assert log_line({"Perseus/straggler/switches": 1.0}) == ""
    assert log_line(dict(FIGURES[:2])) == "200 J and 0.5 s per iteration at full clocks; the plan has no figures yet"


def test_the_last_rank_has_the_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    writer: Any = Writer()
    variables = ModuleType("megatron.training.global_vars")
    vars(variables).update(get_tensorboard_writer=lambda: writer, get_wandb_writer=lambda: None)
    for name in ("megatron", "megatron.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", variables)
    arguments = argparse.Namespace(log_interval=1)
    assert metrics_of(arguments, placement(0, 2)) is None
    metrics = metrics_of(arguments, placement(1, 2))
    assert metrics is not None
    metrics(FIGURES[:1])
    metrics.after_iteration()
    assert writer.scalars == [("Perseus/iteration_time_s/full_clock", 0.5, 1)]
    another: Any = Writer()
    vars(variables).update(get_tensorboard_writer=lambda: another)  # as after a restart within the process
    metrics.after_iteration()
    assert (len(writer.scalars), len(another.scalars)) == (1, 1)


def test_a_loop_of_ones_own_has_a_log_line_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", None)
    assert metrics_of(argparse.Namespace(), placement(1, 2)) is not None
