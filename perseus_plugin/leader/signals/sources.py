"""The signals that come with the plugin: a schedule of targets, prices, and carbon intensities, each from a CSV."""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from perseus_plugin.errors import ConfigError, PlanError, os_problem, validation_problem
from perseus_plugin.files import read_text
from perseus_plugin.iteration.bounds import MOST_SLOWDOWN
from perseus_plugin.leader.signals.steps import Reading, Steps, steps_from_csv
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.bill import Worth

_POWER_W = {"power_budget_w": 1.0, "power_budget_kw": 1e3, "power_budget_mw": 1e6}
_SLOWDOWN = {"slowdown": 1.0, "slowdown_percent": 0.01}
_PRICE = {"price_per_kwh": 1.0, "price_per_mwh": 1e-3}
_CARBON = {"grams_per_kwh": 1.0}
_MOST_BYTES = 16 * 2**20
_ZONES = 'a name of the IANA time zone database, such as "Europe/Berlin", or null for this machine\'s time zone'
_BANDS = (
    "a list of [from, to, slowdown] of which each begins where the one before ends, such as "
    f"[[0, 80, 0.0], [80, 200, 0.05]], with slowdowns from 0 to {MOST_SLOWDOWN:g}, or null"
)


def _setting(allowed: str, default: Any = ..., **constraints: Any) -> Any:
    return Field(default=default, json_schema_extra={"allowed": allowed}, **constraints)


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(_ZONES) from None
    return name


def _checked_bands(bands: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    rise = all(len(band) == 3 and band[0] < band[1] and 0 <= band[2] <= MOST_SLOWDOWN for band in bands)
    if not rise or any(one[1] != after[0] for one, after in pairwise(bands)):
        raise ValueError(_BANDS)
    return bands


class _Options(BaseModel):
    """What every signal from a CSV takes.

    Attributes:
        file: the CSV.
        column: name of its values' column, where that does not tell what is in it.
        means: what is in that column then.
        time_column: name of its times' column.
        time_zone: of times without an offset; None: that of the machine of rank 0.
        after_last: whether the last value holds on, or for as long as the one before it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    holds: ClassVar[Literal["hold", "end"]]

    file: str = _setting("a path of a CSV", min_length=1)
    column: str | None = _setting("a name in its header, or null", None, min_length=1)
    means: str | None = _setting("a column name whose meaning is known, or null", None, min_length=1)
    time_column: str = _setting("a name in its header", "time", min_length=1)
    time_zone: Annotated[str, AfterValidator(_zone)] | None = _setting(_ZONES, None)
    after_last: Literal["hold", "end"] | None = _setting('"hold", "end" or null', None)

    def steps(
        self, known: Mapping[str, float], where: str, check: Callable[[str, float], object] = lambda means, value: None
    ) -> tuple[Steps, str]:
        """Read the file."""
        how = Reading(
            known=known,
            column=self.column,
            means=self.means,
            time_column=self.time_column,
            zone=None if self.time_zone is None else zoneinfo.ZoneInfo(self.time_zone),
            holds=(self.after_last or self.holds) == "hold",
            check=check,
        )
        try:
            text = read_text(self.file, _MOST_BYTES, regular=True)
        except (OSError, ValueError) as error:
            why = os_problem(error) if isinstance(error, OSError) else f"{self.file}: {error}"
            raise ConfigError(f"{where}.file: cannot be read: {why}") from error
        return steps_from_csv(text, how, f"{where}.file: {self.file}")


class _ScheduleOptions(_Options):
    holds = "hold"


class _RateOptions(_Options):
    """Of what a kWh costs or emits.

    Attributes:
        stretch: [from, to, slowdown] by rising values; None: nothing is asked of the job.
    """

    holds = "end"

    stretch: (
        Annotated[tuple[tuple[float, ...], ...], BeforeValidator(_as_tuples), AfterValidator(_checked_bands)] | None
    ) = _setting(_BANDS, None, min_length=1)


class _PriceOptions(_RateOptions):
    currency: str = _setting("a text of at most 16 characters", "", max_length=16)


@dataclass(frozen=True)
class StepSignal:
    """What follows from a value that changes from time to time; see `Signal`.

    Attributes:
        files: that it was made from.
        steps: the values.
        target_of, worth_of: what follows from a value, None: from there being none.
    """

    files: Sequence[Path]
    steps: Steps
    target_of: Callable[[float | None], Target | None]
    worth_of: Callable[[float | None], Worth] = lambda value: Worth()

    def target(self, unix_s: float) -> Target | None:
        """See `Signal`."""
        return self.target_of(self.steps.at(unix_s))

    def worth(self, unix_s: float) -> Worth:
        """See `Signal`."""
        return self.worth_of(self.steps.at(unix_s))

    def next_change(self, unix_s: float) -> float:
        """See `Signal`."""
        return self.steps.next_change(unix_s)


def schedule_signal(options: Mapping[str, Any], where: str) -> StepSignal:
    """Power budgets or slowdowns by time, such as those of the day ahead; see `SignalKind`."""
    told = _checked(_ScheduleOptions, options, where)

    def target_of(means: str, value: float) -> Target:
        return Target.power_budget(value * _POWER_W[means]) if means in _POWER_W else _slowdown(value, means)

    steps, means = told.steps({**_POWER_W, **_SLOWDOWN}, where, target_of)
    return StepSignal((Path(told.file),), steps, lambda value: None if value is None else target_of(means, value))


def price_signal(options: Mapping[str, Any], where: str) -> StepSignal:
    """Prices by time, and how far to stretch iterations at which of them; see `SignalKind`."""
    told = _checked(_PriceOptions, options, where)
    steps, means = told.steps(_PRICE, where)

    def worth_of(value: float | None) -> Worth:
        return Worth() if value is None else Worth(value * _PRICE[means], currency=told.currency)

    return StepSignal((Path(told.file),), steps, _stretching(told), worth_of)


def carbon_signal(options: Mapping[str, Any], where: str) -> StepSignal:
    """Carbon intensities by time, and how far to stretch iterations at which of them; see `SignalKind`."""
    told = _checked(_RateOptions, options, where)
    steps, _ = told.steps(_CARBON, where)
    return StepSignal((Path(told.file),), steps, _stretching(told), lambda value: Worth(grams_per_kwh=value))


def _slowdown(value: float, means: str) -> Target:
    slowdown = value * _SLOWDOWN[means]
    if not 0 <= slowdown <= MOST_SLOWDOWN:
        raise PlanError(f"slowdown: got {slowdown:g}; allowed: a share from 0 to {MOST_SLOWDOWN:g}")
    return Target.slowdown(slowdown)


def _stretching(told: _RateOptions) -> Callable[[float | None], Target | None]:
    """By the band that a value is in; below the first it counts as in that, above the last as in that one."""
    bands = told.stretch

    def target_of(value: float | None) -> Target | None:
        if value is None or not bands:
            return None
        return Target.slowdown(next((slowdown for _, high, slowdown in bands if value < high), bands[-1][2]))

    return target_of


def _checked(model: Any, options: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(validation_problem(error, model, where)) from None
