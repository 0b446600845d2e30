"""What to plan for: the target, limits on clock changes, and how hard to try."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from perseus_plugin.errors import PlanError, validation_problem
from perseus_plugin.gpus.base import DWELL_LATENCIES
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget, check_number

if TYPE_CHECKING:
    from perseus_plugin.config import PerseusConfig

Effort: TypeAlias = Literal["quick", "normal", "thorough"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
"""Rising."""


def more_than(effort: Effort) -> Effort:
    """The next higher effort; the highest itself."""
    return EFFORTS[min(EFFORTS.index(effort) + 1, len(EFFORTS) - 1)]


@dataclass(frozen=True, slots=True)
class Prices:
    """What an iteration costs, in any one currency.

    Attributes:
        per_kwh: of energy.
        per_gpu_hour: of one GPU, whatever it draws: what it was bought for and what it earns.
        node: what nodes draw beside their GPUs, which is paid for too.
        gpus_per_node: that share its watts.
    """

    per_kwh: float
    per_gpu_hour: float
    node: NodeOverhead = field(default_factory=NodeOverhead)
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        check_number("price per kWh", self.per_kwh)
        check_number("price per GPU-hour", self.per_gpu_hour, allow_zero=True)
        if self.gpus_per_node < 1:
            raise PlanError(f"GPUs per node: got {self.gpus_per_node}; allowed: a whole number from 1")

    @property
    def gpu_w(self) -> float:
        """What a second of one GPU costs, as the GPU power that costs as much."""
        per_joule = self.per_kwh / 3.6e6
        beside_w = self.node.watts / self.gpus_per_node
        return (self.per_gpu_hour / 3600 / per_joule + beside_w) / (1 + self.node.share)

    def cost(self, time_s: float, energy_j: float, gpus: int) -> float:
        """What so many GPUs cost in `time_s` in which they take `energy_j` together."""
        return (energy_j + gpus * self.gpu_w * time_s) * (1 + self.node.share) * self.per_kwh / 3.6e6


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for; make one with the class methods.

    Attributes:
        kind: which of them.
        value: slowdown as a share, seconds, joules, or nothing.
        budget: of `power_budget`.
        prices: of `money`.
    """

    kind: Literal["slowdown", "deadline", "straggler", "cheapest", "energy_budget", "power_budget", "money", "full"]
    value: float = 0.0
    budget: PowerBudget | None = None
    prices: Prices | None = None

    def __post_init__(self) -> None:
        match self.kind:
            case "slowdown":
                check_number("slowdown", self.value, allow_zero=True)
            case "deadline" | "straggler" | "energy_budget":
                check_number(self.kind.replace("_", " "), self.value)
        for kind, given in (("power_budget", self.budget), ("money", self.prices)):
            if (self.kind == kind) != (given is not None):
                raise PlanError(f"target: kind {self.kind}; only {kind} has what it needs, and needs it")

    @classmethod
    def configured(cls, config: PerseusConfig) -> Target:
        """What the `perseus` block wishes for."""
        if config.price_per_kwh is None or config.price_per_gpu_hour is None:
            return cls.slowdown(config.slowdown)
        node = NodeOverhead(config.node_overhead_w, config.node_overhead_share)
        return cls.money(Prices(config.price_per_kwh, config.price_per_gpu_hour, node))

    @classmethod
    def slowdown(cls, share: float = 0.0) -> Target:
        """Least energy at an iteration at most `share` longer than with every instruction at full clock."""
        return cls("slowdown", share)

    @classmethod
    def deadline(cls, seconds: float) -> Target:
        """Least energy at an iteration of at most `seconds`; shorter than that if waiting would cost energy."""
        return cls("deadline", seconds)

    @classmethod
    def straggler(cls, seconds: float) -> Target:
        """Least energy when something else makes the iteration take `seconds` in any case.

        The energies of the plan, of its bound and of its baseline then count blocking power until `seconds`.
        """
        return cls("straggler", seconds)

    @classmethod
    def cheapest(cls) -> Target:
        """Least energy at any iteration time (T*: beyond it, blocking costs more than slower clocks save)."""
        return cls("cheapest")

    @classmethod
    def energy_budget(cls, joules: float) -> Target:
        """Shortest iteration found whose energy, one GPU per stage, blocking included, is at most `joules`."""
        return cls("energy_budget", joules)

    @classmethod
    def power_budget(cls, budget: PowerBudget | float) -> Target:
        """Shortest iteration found whose power keeps a budget; a number is watts of all GPUs of the job together."""
        return cls("power_budget", budget=budget if isinstance(budget, PowerBudget) else PowerBudget(budget))

    @classmethod
    def money(cls, prices: Prices) -> Target:
        """The iteration that costs least, given what energy and what a GPU's time costs."""
        return cls("money", prices=prices)

    @classmethod
    def full(cls) -> Target:
        """Full clocks; nothing is slowed."""
        return cls("full")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {name: value for name, value in asdict(self).items() if name == "kind" or value not in (None, 0.0)}

    @classmethod
    def from_dict(cls, data: object) -> Target:
        """Inverse of `to_dict`, whoever has written it.

        Raises:
            PlanError: naming what is wrong.
        """
        from pydantic import ConfigDict, ValidationError, create_model

        strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        told = create_model("told", __config__=strict, target=(cls, ...))
        try:
            found = told.model_validate_json(json.dumps({"target": data}))
        except ValidationError as error:
            raise PlanError(validation_problem(error, told)) from None
        return found.target  # type: ignore[attr-defined,no-any-return]


@dataclass(frozen=True, slots=True)
class ChangeLimits:
    """Limits on clock changes. A change from an iteration's last clock to its first counts.

    Attributes:
        max_changes: most clock changes per stage and iteration, None: any number.
        min_dwell_s: shortest time from one clock change of a stage to the next.
    """

    max_changes: int | None = None
    min_dwell_s: float = 0.0

    def __post_init__(self) -> None:
        if self.max_changes is not None and self.max_changes < 0:
            raise PlanError(f"max changes: got {self.max_changes}; allowed: a whole number from 0")
        check_number("min dwell", self.min_dwell_s, allow_zero=True)

    def keep(self, others: ChangeLimits) -> bool:
        """Whether what keeps these limits keeps the others too."""
        fewer = others.max_changes is None or (self.max_changes is not None and self.max_changes <= others.max_changes)
        return fewer and self.min_dwell_s >= others.min_dwell_s


def dwell_for(shortest_s: float, latency_s: float) -> float:
    """How long a clock is to be kept, where nobody says: two changes, if an instruction takes less; else 0, any time.

    Args:
        shortest_s: the shortest instruction at full clocks.
        latency_s: how long a clock change takes.
    """
    two_changes_s = DWELL_LATENCIES * latency_s
    return two_changes_s if shortest_s < two_changes_s else 0.0
