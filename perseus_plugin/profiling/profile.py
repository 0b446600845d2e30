"""The profile: time and energy of each (stage, instruction kind) at each SM clock, and its CSV file.

The CSV begins with exactly the columns `stage,instruction,frequency,time,energy` (the format of Zeus's pipeline
frequency optimizer), so profiles of that tool load unchanged. Further columns may follow.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from perseus_plugin.errors import ProfileError
from perseus_plugin.files import read_text, write_atomically
from perseus_plugin.iteration.bounds import MOST_COUNT, MOST_J, MOST_MHZ, MOST_S, MOST_STAGES, MOST_W
from perseus_plugin.profiling.waiting import WaitingPower

REQUIRED_COLUMNS = ("stage", "instruction", "frequency", "time", "energy")
_UNCERTAIN_COLUMNS = (
    "time_se",
    "energy_se",
    "spread_within",
    "spread_within_se",
    "spread_between",
    "spread_between_se",
    "blocking_power",
    "blocking_power_se",
)
# After stage and instruction, the columns are the fields of `Measurement` in order.
COLUMNS = (*REQUIRED_COLUMNS, "samples", *_UNCERTAIN_COLUMNS)

_KIND_ALIASES = {"forwardpass": "forward", "fwd": "forward", "backwardpass": "backward", "bwd": "backward"}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Time and energy of one instruction at one clock, on one GPU.

    Attributes:
        frequency_mhz: SM clock that was locked.
        time_s: duration of the instruction.
        energy_j: energy of the GPU while it ran.
        samples: how many executions stand behind the figures (0: unknown).
        time_se_s, energy_se_j: standard errors (NaN: unknown). That of a time below the stage's highest clock is of
            its ratio to the time there: a scale that all rows share is no error of a comparison.
        spread_within, spread_within_se: standard deviation of the duration over the microbatches of one step about
            the step's mean, relative to it, and its standard error (NaN: unknown).
        spread_between, spread_between_se: the same of the steps' means about their mean.
        blocking_power_w, blocking_power_se_w: of a GPU of this stage that waits at this clock, and its standard error
            (NaN: unknown); of the stage and the clock, so that it is the same for all kinds of a stage.
    """

    frequency_mhz: int
    time_s: float
    energy_j: float
    samples: int = 0
    time_se_s: float = math.nan
    energy_se_j: float = math.nan
    spread_within: float = math.nan
    spread_within_se: float = math.nan
    spread_between: float = math.nan
    spread_between_se: float = math.nan
    blocking_power_w: float = math.nan
    blocking_power_se_w: float = math.nan

    def scaled(self, factor: float, added_w: float | None = None) -> Measurement:
        """Longer by a factor; relative errors of times and spread stay.

        Args:
            factor: above 0.
            added_w: power of waiting, as which the added time counts, where the measurement itself does not say; None:
                it counts as more of the instruction.
        """
        longer_j = self.energy_j * factor
        if added_w is not None:
            waiting_w = self.blocking_power_w if math.isfinite(self.blocking_power_w) else added_w
            longer_j = self.energy_j + waiting_w * self.time_s * (factor - 1)
        return replace(
            self,
            time_s=self.time_s * factor,
            energy_j=longer_j,
            time_se_s=self.time_se_s * factor,
            energy_se_j=self.energy_se_j * factor,
        )

    def to_row(self) -> list[float | None]:
        """Plain JSON data: the fields in order, NaN as null."""
        values = (getattr(self, field.name) for field in fields(self))
        return [None if value != value else value for value in values]

    @classmethod
    def from_row(cls, row: Sequence[float | None]) -> Measurement:
        """Inverse of `to_row`."""
        frequency_mhz, time_s, energy_j, samples, *others = (math.nan if value is None else value for value in row)
        return cls(int(frequency_mhz), time_s, energy_j, int(samples), *others)


_NOT_BELOW_0 = tuple(field.name for field in fields(Measurement) if field.name != "frequency_mhz")


@dataclass(frozen=True)
class Profile:
    """Measurements of every (stage, kind), each list sorted by falling clock.

    Attributes:
        table: `(stage, kind)` to its measurements; never empty lists.

    Raises:
        ProfileError: on construction, for an empty or inconsistent table (see `validate`).
    """

    table: Mapping[tuple[int, str], tuple[Measurement, ...]]

    def __post_init__(self) -> None:
        ordered = {key: tuple(sorted(rows, key=lambda m: -m.frequency_mhz)) for key, rows in sorted(self.table.items())}
        object.__setattr__(self, "table", ordered)
        _validate(ordered)

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return 1 + max(stage for stage, _ in self.table)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Instruction kinds of all stages, sorted; a stage has rows for those that it runs."""
        return tuple(sorted({kind for _, kind in self.table}))

    def rows(self) -> Iterator[tuple[int, str, Measurement]]:
        """All rows as (stage, kind, measurement)."""
        for (stage, kind), measurements in self.table.items():
            for measurement in measurements:
                yield stage, kind, measurement

    @property
    def says_waiting(self) -> bool:
        """Whether it holds what a waiting GPU draws, of every stage."""
        said = {stage for stage, _, m in self.rows() if math.isfinite(m.blocking_power_w)}
        return len(said) == self.stages

    def waiting_power(self, stage: int, default_w: float) -> WaitingPower:
        """What a waiting GPU of this stage draws, by clock.

        Args:
            stage: which.
            default_w: where no row of the stage says.
        """
        known = {
            m.frequency_mhz: m.blocking_power_w
            for (its_stage, _), rows in self.table.items()
            for m in rows
            if its_stage == stage and math.isfinite(m.blocking_power_w)
        }
        if not known:
            return WaitingPower.constant(default_w)
        clocks = tuple(sorted(known))
        return WaitingPower(clocks, tuple(known[clock] for clock in clocks))

    def scaled(
        self,
        factor: float | Mapping[tuple[int, str], float],
        *,
        below_top: bool = False,
        added_w: Sequence[float] | None = None,
    ) -> Profile:
        """The same profile with times multiplied by a factor, and energies with them.

        Args:
            factor: for all instructions, or by (stage, kind).
            below_top: leave the highest clock's rows as they are.
            added_w: power in the time that is added, by stage (0 W where the list ends); None: that of the instruction.

        Raises:
            ProfileError: a factor is no finite number above 0, or a figure becomes none.
        """
        factors = factor if isinstance(factor, Mapping) else dict.fromkeys(self.table, factor)
        for one in factors.values():
            if not (math.isfinite(one) and one > 0):
                raise ProfileError(f"scale: got {one}; allowed: a finite number above 0")

        def rows(key: tuple[int, str], measured: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
            if factors[key] == 1.0:
                return measured
            watts = None if added_w is None else added_w[key[0]] if key[0] < len(added_w) else 0.0
            return (*measured[:below_top], *(m.scaled(factors[key], watts) for m in measured[below_top:]))

        return Profile({key: rows(key, measured) for key, measured in self.table.items()})

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, str, Measurement]]) -> Profile:
        """Build from (stage, kind, measurement) triples in any order."""
        table: dict[tuple[int, str], list[Measurement]] = {}
        for stage, kind, measurement in rows:
            table.setdefault((stage, kind), []).append(measurement)
        return cls({key: tuple(measurements) for key, measurements in table.items()})


def load_profile(
    path: Path | str,
    blocking_power_w: float | Sequence[float] | None = None,
    power_limit_w: float | None = None,
    regular: bool = False,
) -> Profile:
    """Read a profile CSV.

    Names of instructions are taken without regard to case; `fwd`, `bwd` and DeepSpeed's `ForwardPass` and
    `BackwardPass` stand for `forward` and `backward`.

    Args:
        path: of the CSV.
        blocking_power_w: power of a GPU that waits, for all stages or one each, where it is known and a row does not
            say it itself: rows that draw less are refused.
        power_limit_w: the most that a GPU draws; rows that draw more are refused. None: 2000 W.
        regular: refuse pipes and devices.

    Raises:
        ProfileError: naming file, row and reason, for a file that cannot be read or planned on.
    """
    try:
        text = read_text(path, 2**26, regular)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot read the profile: {error}") from error
    return profile_from_csv(text, str(path), blocking_power_w, power_limit_w)


def profile_from_csv(
    text: str,
    path: str,
    blocking_power_w: float | Sequence[float] | None = None,
    power_limit_w: float | None = None,
) -> Profile:
    """As `load_profile`, of what stands in the file at `path`.

    Raises:
        ProfileError: as it.
    """
    reader = csv.DictReader(io.StringIO(text), restkey="__extra__", strict=True)
    try:
        columns = tuple(name.strip() for name in reader.fieldnames or ())
        reader.fieldnames = columns
    except csv.Error as error:
        raise ProfileError(f"{path}: row 1: {error}") from error
    if columns[: len(REQUIRED_COLUMNS)] != REQUIRED_COLUMNS:
        raise ProfileError(
            f"{path}: row 1: columns are {','.join(columns)[:200] or '(none)'}; "
            f"they must begin with {','.join(REQUIRED_COLUMNS)}"
        )
    rows: list[tuple[int, str, Measurement]] = []
    seen: dict[tuple[int, str, int], int] = {}
    try:
        for record in reader:
            where = f"{path}: row {reader.line_num}"
            stage, kind, measurement = _parse_record(record, where)
            _check_power(measurement, _power_of(stage, blocking_power_w), power_limit_w, where)
            key = (stage, kind, measurement.frequency_mhz)
            if key in seen:
                raise ProfileError(f"{where}: stage {stage} {kind} at {key[2]} MHz stands in row {seen[key]} already")
            seen[key] = reader.line_num
            rows.append((stage, kind, measurement))
    except csv.Error as error:
        raise ProfileError(f"{path}: row {reader.line_num}: {error}") from error
    if not rows:
        raise ProfileError(f"{path}: the profile has no rows")
    try:
        return Profile.from_rows(rows)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def save_profile(profile: Profile, path: Path | str) -> None:
    """Write the profile as CSV, through a temporary file and a rename."""
    write_atomically(Path(path), profile_to_csv(profile))


def profile_to_csv(profile: Profile) -> str:
    """What `load_profile` reads; every figure as it is."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([stage, kind, *measurement.to_row()] for stage, kind, measurement in profile.rows())
    return out.getvalue()


def _parse_record(record: Mapping[str, str | None], where: str) -> tuple[int, str, Measurement]:
    if "__extra__" in record or None in record.values():
        raise ProfileError(f"{where}: wrong number of columns")
    kind = (record["instruction"] or "").strip().lower()
    kind = _KIND_ALIASES.get(kind, kind)
    if not kind:
        raise ProfileError(f"{where}: instruction is empty")

    def got(column: str) -> str:
        return repr(str(record[column])[:80])

    def number(column: str, default: float | None = None) -> float:
        text = (record.get(column) or "").strip()
        if not text and default is not None:
            return default
        try:
            return float(text)
        except ValueError:
            raise ProfileError(f"{where}: {column}: got {got(column)}; allowed: a number") from None

    def whole(column: str, lowest: int, highest: int, default: float | None = None) -> int:
        value = number(column, default)
        if not (lowest <= value <= highest and value == int(value)):
            raise ProfileError(
                f"{where}: {column}: got {got(column)}; allowed: a whole number from {lowest} to {highest}"
            )
        return int(value)

    def uncertain(column: str) -> float:
        value = number(column, math.nan)
        if value < 0 or math.isinf(value):
            raise ProfileError(f"{where}: {column}: got {got(column)}; allowed: a number from 0, or nothing")
        return value

    measurement = Measurement(
        whole("frequency", 1, MOST_MHZ),
        number("time"),
        number("energy"),
        whole("samples", 0, MOST_COUNT, 0.0),
        *(uncertain(column) for column in _UNCERTAIN_COLUMNS),
    )
    for column, value, most in (("time", measurement.time_s, MOST_S), ("energy", measurement.energy_j, MOST_J)):
        if not 0 < value <= most:
            raise ProfileError(
                f"{where}: {column}: got {got(column)}; allowed: a finite number above 0, at most {most:g}"
            )
    return whole("stage", 0, MOST_STAGES), kind, measurement


def _power_of(stage: int, blocking_power_w: float | Sequence[float] | None) -> float | None:
    if not isinstance(blocking_power_w, Sequence):
        return blocking_power_w
    return blocking_power_w[stage] if stage < len(blocking_power_w) else None  # a short list is the planner's to refuse


def _check_power(row: Measurement, default_w: float | None, power_limit_w: float | None, where: str) -> None:
    """Refuse a row that no GPU can have."""
    power_w = row.energy_j / row.time_s
    blocking_power_w = default_w if math.isnan(row.blocking_power_w) else row.blocking_power_w
    if power_limit_w is not None and power_w > power_limit_w * (1 + 1e-9):
        allowed = f"at most the power limit, {power_limit_w:g} W"
    elif power_w > MOST_W:
        allowed = f"at most {MOST_W:.0f} W, which no GPU exceeds"
    elif blocking_power_w is not None and power_w < blocking_power_w * (1 - 1e-9):
        allowed = f"at least the blocking power, {blocking_power_w:g} W, as no work draws less than waiting"
    else:
        return
    raise ProfileError(
        f"{where}: energy: {row.energy_j:g} J in {row.time_s:g} s is {power_w:.4g} W; allowed: {allowed} (times are in "
        "seconds, energies in joules of one GPU)"
    )


def _validate(table: Mapping[tuple[int, str], tuple[Measurement, ...]]) -> None:
    if not table:
        raise ProfileError("the profile has no rows")
    stages = 1 + max(stage for stage, _ in table)
    if min(stage for stage, _ in table) == 1:
        raise ProfileError("stages begin at 1; they count from 0: subtract 1 from every stage")
    of_stages: dict[int, dict[str, tuple[Measurement, ...]]] = {}
    for (stage, kind), rows in table.items():
        of_stages.setdefault(stage, {})[kind] = rows
    for stage in range(stages):
        clocks_of_kind: dict[str, set[int]] = {}
        if stage not in of_stages:
            raise ProfileError(f"stage {stage} has no row, but stage {stages - 1} has")
        for kind, rows in of_stages[stage].items():
            if not rows:
                raise ProfileError(f"stage {stage} has no row for instruction {kind!r}")
            clocks = {m.frequency_mhz for m in rows}
            if len(clocks) != len(rows):
                raise ProfileError(f"stage {stage} {kind}: two rows for one frequency")
            for m in rows:
                if not (0 < m.time_s <= MOST_S and 0 < m.energy_j <= MOST_J):
                    raise ProfileError(
                        f"stage {stage} {kind} at {m.frequency_mhz} MHz: time {m.time_s} and energy {m.energy_j} "
                        f"must be finite numbers above 0, at most {MOST_S:g} s and {MOST_J:g} J"
                    )
                if any(getattr(m, name) < 0 for name in _NOT_BELOW_0) or not 0 < m.frequency_mhz <= MOST_MHZ:
                    raise ProfileError(
                        f"stage {stage} {kind} at {m.frequency_mhz} MHz: allowed: clocks up to {MOST_MHZ} MHz, and no "
                        "error, spread, power or count below 0"
                    )
            clocks_of_kind[kind] = clocks
        every = set().union(*clocks_of_kind.values())
        for kind, clocks in clocks_of_kind.items():
            missing = sorted(every - clocks)
            if missing:
                raise ProfileError(
                    f"stage {stage}: frequency {missing[0]} MHz has no row for {kind!r}; every instruction of a "
                    "stage must be measured at the same clocks"
                )
