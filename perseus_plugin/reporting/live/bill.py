"""What the energy of a run was worth, at the value of each moment. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from perseus_plugin.exchange.messages import RankStats, Totals
from perseus_plugin.reporting.live.account import EVERY, UNDER_PLANS
from perseus_plugin.reporting.record.summary import ValuedSection, WorthSection

_J_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Worth:
    """What a kWh costs and emits; None: nobody has told.

    Attributes:
        per_kwh: price, in any one currency; may be negative.
        grams_per_kwh: of CO2.
        currency: of the price, for people.
    """

    per_kwh: float | None = None
    grams_per_kwh: float | None = None
    currency: str = ""


@dataclass(slots=True)
class _Valued:
    """Sums of energies, each times its value."""

    known_j: float = 0.0
    total: float = 0.0
    under_plans: float = 0.0
    iterations: float = 0.0  # those under plans, times the value


@dataclass(slots=True)
class Bill:
    """Adds up a run as it goes on, all ranks together."""

    _currency: str = ""
    _energy_j: float = 0.0
    _planned_j: float = 0.0
    _planned: int = 0
    _money: _Valued = field(default_factory=_Valued)
    _carbon: _Valued = field(default_factory=_Valued)

    def add(self, stats: Sequence[RankStats], worths: Sequence[tuple[float, Worth]]) -> None:
        """Account for what ranks have told since the last time.

        Args:
            stats: of all ranks heard of, from the beginning of the run.
            worths: what held since the last time, each with its share of that time.
        """
        energy_j, planned_j = _all_j(stats, EVERY), _all_j(stats, UNDER_PLANS)
        if energy_j is None:
            return
        planned_j = planned_j or 0.0
        planned = max((of_rank.totals.get(UNDER_PLANS, Totals()).iterations for of_rank in stats), default=0)
        for share, worth in worths:
            self._currency = worth.currency or self._currency
            for valued, value in ((self._money, worth.per_kwh), (self._carbon, worth.grams_per_kwh)):
                if value is not None:
                    of_kwh = share * value / _J_PER_KWH
                    valued.known_j += share * (energy_j - self._energy_j)
                    valued.total += of_kwh * (energy_j - self._energy_j)
                    valued.under_plans += of_kwh * (planned_j - self._planned_j)
                    valued.iterations += of_kwh * (planned - self._planned)
        self._energy_j, self._planned_j, self._planned = energy_j, planned_j, planned

    def section(self, full_j: float | None, between_j: tuple[float, float] | None) -> WorthSection:
        """For the summary.

        Args:
            full_j: energy of an iteration at full clocks, all GPUs; None: not known.
            between_j: between what that lies, with 95 % confidence; None: not known.
        """

        def valued(of: _Valued, unit: float) -> ValuedSection:
            if of.known_j <= 0:
                return ValuedSection()
            low, high = sorted(of.iterations * at_j / unit for at_j in between_j) if between_j else (0.0, 0.0)
            return ValuedSection(
                total=of.total / unit,
                under_plans=of.under_plans / unit,
                full_clocks=None if full_j is None else of.iterations * full_j / unit,
                full_clocks_between=(low, high) if between_j else None,
                known_percent=100 * of.known_j / self._energy_j,
            )

        return WorthSection(
            energy_kwh=self._energy_j / _J_PER_KWH if self._energy_j else None,
            currency=self._currency,
            money=valued(self._money, 1.0),
            carbon_kg=valued(self._carbon, 1000.0),
        )


def _all_j(stats: Sequence[RankStats], sort: str) -> float | None:
    """Energy of all iterations of a sort and all GPUs, those that could not be read as the mean; None: not known."""
    energies_j = []
    for of_rank in stats:
        totals = of_rank.totals.get(sort)
        if totals is not None and totals.mean_energy_j is None:
            return None
        energies_j.append(0.0 if totals is None else totals.iterations * (totals.mean_energy_j or 0.0))
    return math.fsum(energies_j)
