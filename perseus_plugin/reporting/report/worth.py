"""What energy is worth: kWh at the meter, money and operational carbon, so far and projected. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from perseus_plugin.errors import ConfigError
from perseus_plugin.planning.power.budget import NodeOverhead
from perseus_plugin.planning.targets import Prices
from perseus_plugin.reporting.record.iterations import PLAN, PROFILING, Stretch
from perseus_plugin.reporting.record.records import Series

WORLD_INTENSITY_G = 445.0
"""Grams of CO2 per kWh of electricity, world average of 2024 (IEA, Electricity 2025)."""
AVERAGE_PUE = 1.54
"""Power usage effectiveness, weighted average of 2025 (Uptime Institute, Global Data Center Survey 2025)."""
HOURS_PER_YEAR = 8760.0
_J_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Rates:
    """What a kWh costs and emits.

    Attributes:
        price: of a kWh, in `currency`; None: no money is stated (prices differ too much for a default).
        currency: for people.
        intensity_g: grams of CO2 per kWh.
        pue: energy of the whole site for one unit of energy of its computers.
        gpu_hour: price of an hour of one GPU, whatever it draws; None: nothing is said of what costs least.

    Raises:
        ConfigError: on construction, for a value that cannot be.
    """

    price: float | None = None
    currency: str = "USD"
    intensity_g: float = WORLD_INTENSITY_G
    pue: float = AVERAGE_PUE
    gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ConfigError(f"--price: got {self.price}; allowed: a number from 0, per kWh")
        if not (math.isfinite(self.intensity_g) and 0 <= self.intensity_g <= 5000):
            raise ConfigError(f"--intensity: got {self.intensity_g}; allowed: a number from 0 to 5000, grams per kWh")
        if not (math.isfinite(self.pue) and 1 <= self.pue <= 10):
            raise ConfigError(f"--pue: got {self.pue}; allowed: a number from 1 to 10")
        if self.gpu_hour is not None:
            if not (math.isfinite(self.gpu_hour) and self.gpu_hour >= 0):
                raise ConfigError(f"--price-gpu-hour: got {self.gpu_hour}; allowed: a number from 0")
            if not self.price:
                raise ConfigError(f"--price-gpu-hour: got {self.gpu_hour}; allowed: beside a --price above 0")

    @property
    def prices(self) -> Prices | None:
        """What time and energy at the meter cost; None: not both are known."""
        if self.price is None or self.gpu_hour is None:
            return None
        return Prices(self.price, self.gpu_hour, NodeOverhead(share=self.pue - 1))


@dataclass(frozen=True, slots=True)
class Amount:
    """An energy and what it is worth; negative where something is lost.

    Attributes:
        energy_j: of the GPUs.
        site_kwh: at the site's meter.
        money: None without a price.
        carbon_kg: CO2, operational.
    """

    energy_j: float
    site_kwh: float
    money: float | None
    carbon_kg: float


def amount(energy_j: float, rates: Rates) -> Amount:
    """What this energy of GPUs is worth."""
    site_kwh = energy_j / _J_PER_KWH * rates.pue
    money = None if rates.price is None else site_kwh * rates.price
    return Amount(energy_j, site_kwh, money, site_kwh * rates.intensity_g / 1000)


@dataclass(frozen=True, slots=True)
class PerIteration:
    """Energy and time of an iteration of the whole job.

    Attributes:
        full_j, full_s: at full clocks.
        plan_j, plan_s: under the plan; measured, or as predicted where it did not run yet.
        predicted: the latter.
        saved_percent_between: 95 % interval of the energy saved; None: not known.
    """

    full_j: float
    full_s: float
    plan_j: float
    plan_s: float
    predicted: bool
    saved_percent_between: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class SoFar:
    """The run so far. None: not known, as an energy is missing.

    Attributes:
        iterations: recorded ones.
        hours: they took.
        used_j: energy of all GPUs.
        saved_j: under plans, against the same number of iterations of the same schedule at full clocks. Iterations at
            a straggler's pace are not in it: what full clocks would have taken then was not measured.
        left_out: iterations under plans that are not in `saved_j`, as full clocks are not known for their schedule.
        profiling_j: what profiling took more than full clocks, negative: less.
        profiling_s: the same for time.
    """

    iterations: int
    hours: float
    used_j: float | None
    saved_j: float | None
    left_out: int
    profiling_j: float | None
    profiling_s: float | None


@dataclass(frozen=True, slots=True)
class FullClocks:
    """Energy and time of an iteration of the whole job at full clocks, in one schedule."""

    energy_j: float
    time_s: float


def so_far(run: Series, full: Mapping[str, FullClocks]) -> SoFar:
    """Add up what was recorded.

    Args:
        run: the job's iterations.
        full: what an iteration at full clocks takes, by schedule as far as known.
    """
    pairs = list(zip(run.stretches, run.energy_j.tolist(), strict=True))
    seconds = math.fsum(stretch.count * stretch.time_s for stretch, _ in pairs)
    planned, profiled = run.of(PLAN), run.of(PROFILING)
    left_out = sum(stretch.count for stretch, _ in planned if stretch.sort.schedule not in full)
    extra_j = _against(full, profiled)
    return SoFar(
        iterations=sum(stretch.count for stretch, _ in pairs),
        hours=seconds / 3600,
        used_j=_total(pairs),
        saved_j=_negative(_against(full, planned)),
        left_out=left_out if full else 0,
        profiling_j=extra_j,
        profiling_s=None
        if extra_j is None
        else math.fsum(
            stretch.count * (stretch.time_s - full[stretch.sort.schedule].time_s)
            for stretch, _ in profiled
            if stretch.sort.schedule in full
        ),
    )


def _against(full: Mapping[str, FullClocks], pairs: Sequence[tuple[Stretch, float]]) -> float | None:
    """What these took more than full clocks, where those are known; None where that holds for none of them."""
    known = [(s, energy_j - full[s.sort.schedule].energy_j) for s, energy_j in pairs if s.sort.schedule in full]
    return _total(known) if known or (full and not pairs) else None


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value  # nothing is not negative


def _total(pairs: Sequence[tuple[Stretch, float]]) -> float | None:
    """Energy times iterations; iterations without a figure count as the others' mean, None where none has one."""
    if not pairs:
        return 0.0
    known = [(stretch.count, energy_j) for stretch, energy_j in pairs if not math.isnan(energy_j)]
    if not known:
        return None
    share = sum(count for count, _ in known) / sum(stretch.count for stretch, _ in pairs)
    return math.fsum(count * energy_j for count, energy_j in known) / share


@dataclass(frozen=True, slots=True)
class Projection:
    """The same job on `gpus` GPUs for `hours`: what full clocks take, and what the plan saves of it.

    Both do the same number of iterations: as many as the plan does in `hours`.
    """

    hours: float
    gpus: int
    full: Amount
    saved: Amount


def project(per: PerIteration, ranks: int, hours: float, gpus: int, rates: Rates) -> Projection:
    """Project savings.

    Args:
        per: of the job that ran.
        ranks: GPUs it ran on.
        hours, gpus: to project to; more GPUs mean more of the same pipelines.
        rates: of a kWh.

    Raises:
        ConfigError: no hours, or no GPU.
    """
    if not (math.isfinite(hours) and hours > 0):
        raise ConfigError(f"--hours: got {hours}; allowed: a number above 0")
    if gpus < 1:
        raise ConfigError(f"--gpus: got {gpus}; allowed: a whole number from 1")
    iterations = hours * 3600 / per.plan_s * gpus / ranks
    return Projection(
        hours, gpus, amount(iterations * per.full_j, rates), amount(iterations * (per.full_j - per.plan_j), rates)
    )
