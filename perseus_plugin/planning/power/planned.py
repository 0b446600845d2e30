"""What a plan says of power: what it draws of each budget, its peaks, and how much faster another one could be."""

from __future__ import annotations

from dataclasses import dataclass

from perseus_plugin.planning.power.budget import Peaks

ROUNDED = 1e-9
"""Share of a budget that is no more than an error of rounding."""


@dataclass(frozen=True, slots=True)
class PlannedPeaks:
    """The highest averages over any window of `window_s` that a plan predicts, in watts.

    Attributes:
        window_s: how long the window is.
        job_w, node_w: of all nodes together, and of that where it is highest.
        gpu_w: of the GPU where it is highest, without its node.
    """

    window_s: float
    job_w: float
    node_w: float
    gpu_w: float

    def over(self, allowed: Peaks) -> dict[str, float]:
        """The limits that are broken, each in words, with what is drawn as a multiple of what may be."""
        sides = (
            ("the job", self.job_w, allowed.job_w),
            ("a node", self.node_w, allowed.node_w),
            ("a GPU", self.gpu_w, allowed.gpu_w),
        )
        return {
            _draws_more(who, watts, most_w, f" over {self.window_s:g} s"): watts / most_w
            for who, watts, most_w in sides
            if most_w is not None and watts > most_w * (1 + ROUNDED)
        }


@dataclass(frozen=True, slots=True)
class PlannedBudget:
    """One budget under a plan, in watts at the nodes.

    Attributes:
        name: whose.
        allowed_w, planned_w: the budget, and the average over an iteration that the plan predicts.
    """

    name: str
    allowed_w: float
    planned_w: float


@dataclass(frozen=True, slots=True)
class PlannedPower:
    """What a plan for a power budget says of it.

    Attributes:
        job_w: of all GPUs of the job at their nodes, averaged over an iteration.
        budgets: those that were given.
        peaks: that it predicts.
        time_lower_bound_s: no plan that keeps the budgets is faster, whatever clocks it has.
        converged: whether that is the best such bound that the planner's relaxation can give.
    """

    job_w: float
    budgets: tuple[PlannedBudget, ...]
    peaks: PlannedPeaks
    time_lower_bound_s: float
    converged: bool

    def exceeded(self, peaks: Peaks) -> str:
        """What of the budgets and of these limits on peaks is not kept, for people; empty: all is."""
        averages = [
            _draws_more(one.name, one.planned_w, one.allowed_w)
            for one in self.budgets
            if one.planned_w > one.allowed_w * (1 + ROUNDED)
        ]
        return ", ".join([*averages, *self.peaks.over(peaks)])


def _draws_more(who: str, watts: float, allowed_w: float, over: str = "") -> str:
    return f"{who} draws {watts:.1f} W{over}, and may draw {allowed_w:.1f} W"
