"""The session's figures in Megatron's TensorBoard, W&B and log, at its log interval.

Megatron has its writers on the last rank only, and rank 0 has the figures: the session brings them there.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from typing import Any

from perseus_plugin.errors import figure
from perseus_plugin.exchange.messages import Placement

logger = logging.getLogger(__name__)


class Metrics:
    """Takes figures when the session has some, writes the newest ones when Megatron logs.

    Args:
        arguments: Megatron's own.
        tensorboard: says its `SummaryWriter`, or None; asked whenever something is written, as scripts put other
            writers in its place.
        wandb: says its `wandb`, or None.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        tensorboard: Callable[[], Any] = lambda: None,
        wandb: Callable[[], Any] = lambda: None,
    ) -> None:
        self._arguments = arguments
        self._tensorboard, self._wandb = tensorboard, wandb
        self._iterations = 0
        self._newest: dict[str, float] = {}
        self._broken = False

    def __call__(self, events: list[tuple[str, float]]) -> None:
        """New figures; the session's `monitor`."""
        self._newest.update(events)
        self._newest = {name: value for name, value in self._newest.items() if not math.isnan(value)}

    def after_iteration(self) -> None:
        """A training iteration has ended. Never raises."""
        self._iterations += 1
        # Set by Megatron before each iteration, and counted from 0.
        number = getattr(self._arguments, "curr_iteration", None)
        iteration = self._iterations if number is None else number + 1
        interval = getattr(self._arguments, "log_interval", None) or 100
        if not self._newest or iteration % interval or self._broken:
            return
        try:
            self._write(iteration)
        except Exception as error:
            self._broken = True
            logger.warning("figures are not written to Megatron's log any more: %r", error)

    def _write(self, iteration: int) -> None:
        tensorboard, wandb = self._tensorboard(), self._wandb()
        if tensorboard is not None:
            for name, value in self._newest.items():
                tensorboard.add_scalar(name, value, iteration)
        if wandb is not None:
            wandb.log(dict(self._newest), iteration)
        line = log_line(self._newest)
        if line:
            print(f" perseus at iteration {iteration}: {line}", flush=True)


def log_line(figures: dict[str, float]) -> str:
    """One line about the newest figures; empty if there is nothing to say yet."""
    time_s, energy_j = figures.get("Perseus/iteration_time_s/measured"), figures.get("Perseus/energy_j/measured")
    saving, slowdown = figures.get("Perseus/saving_percent/measured"), figures.get("Perseus/slowdown_percent/measured")
    if time_s is not None and energy_j is not None and saving is not None and slowdown is not None:
        return (
            f"{figure(saving, '.1f')} % less energy and {figure(slowdown, '+.1f')} % time than at full clocks "
            f"({energy_j:.4g} J and {time_s:.4g} s per iteration)"
        )
    time_s, energy_j = figures.get("Perseus/iteration_time_s/full_clock"), figures.get("Perseus/energy_j/full_clock")
    if time_s is None or energy_j is None:
        return ""
    return f"{energy_j:.4g} J and {time_s:.4g} s per iteration at full clocks; the plan has no figures yet"


def metrics_of(arguments: argparse.Namespace, placement: Placement) -> Metrics | None:
    """The metrics of a job, on the rank that has Megatron's writers and prints its log: the last one."""
    if placement.rank != placement.world_size - 1:
        return None
    try:
        from megatron.training import global_vars
    except ImportError:  # a loop of one's own
        return Metrics(arguments)
    return Metrics(arguments, lambda: global_vars.get_tensorboard_writer(), lambda: global_vars.get_wandb_writer())
