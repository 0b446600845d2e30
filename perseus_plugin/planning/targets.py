"""What to plan for: the target, limits on clock changes, and how hard to try."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from perseus_plugin.errors import PlanError

Effort: TypeAlias = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for; make one with the class methods.

    Attributes:
        kind: which of them.
        value: slowdown as a share, seconds, nothing, or joules.
    """

    kind: Literal["slowdown", "deadline", "straggler", "cheapest", "energy_budget"]
    value: float = 0.0

    @classmethod
    def slowdown(cls, share: float = 0.0) -> Target:
        """Least energy at an iteration at most `share` longer than with every instruction at full clock."""
        _check_number("slowdown", share, allow_zero=True)
        return cls("slowdown", share)

    @classmethod
    def deadline(cls, seconds: float) -> Target:
        """Least energy at an iteration of at most `seconds`; shorter than that if waiting would cost energy."""
        _check_number("deadline", seconds)
        return cls("deadline", seconds)

    @classmethod
    def straggler(cls, seconds: float) -> Target:
        """Least energy when something else makes the iteration take `seconds` in any case.

        The energies of the plan, of its bound and of its baseline then count blocking power until `seconds`.
        """
        _check_number("straggler", seconds)
        return cls("straggler", seconds)

    @classmethod
    def cheapest(cls) -> Target:
        """Least energy at any iteration time (T*: beyond it, blocking costs more than slower clocks save)."""
        return cls("cheapest")

    @classmethod
    def energy_budget(cls, joules: float) -> Target:
        """Shortest iteration found whose energy, one GPU per stage, blocking included, is at most `joules`."""
        _check_number("energy budget", joules)
        return cls("energy_budget", joules)


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
        _check_number("min dwell", self.min_dwell_s, allow_zero=True)


def _check_number(name: str, value: float, allow_zero: bool = False) -> None:
    if not (math.isfinite(value) and (value > 0 or (allow_zero and value == 0))):
        raise PlanError(f"{name}: got {value}; allowed: a finite number {'from' if allow_zero else 'above'} 0")
