"""What a plan says of power: what it draws of each budget, its peaks, and how much faster another one could be."""

from __future__ import annotations

from dataclasses import dataclass


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
