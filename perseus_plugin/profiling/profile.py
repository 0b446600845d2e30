"""The profile: time and energy of each (stage, instruction kind) at each SM clock, and its CSV file.

The CSV begins with exactly the columns `stage,instruction,frequency,time,energy` (the format of Zeus's pipeline
frequency optimizer), so profiles of that tool load unchanged. Further columns may follow.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from perseus_plugin.errors import ProfileError
from perseus_plugin.files import write_atomically

REQUIRED_COLUMNS = ("stage", "instruction", "frequency", "time", "energy")
OPTIONAL_COLUMNS = ("samples", "time_se", "energy_se")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Time and energy of one instruction at one clock, on one GPU.

    Attributes:
        frequency_mhz: SM clock that was locked.
        time_s: duration of the instruction.
        energy_j: energy of the GPU while it ran.
        samples: how many executions stand behind the figures (0: unknown).
        time_se_s, energy_se_j: standard errors (NaN: unknown).
    """

    frequency_mhz: int
    time_s: float
    energy_j: float
    samples: int = 0
    time_se_s: float = math.nan
    energy_se_j: float = math.nan


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
        """Instruction kinds of stage 0, which every stage has."""
        return tuple(kind for stage, kind in self.table if stage == 0)

    def rows(self) -> Iterator[tuple[int, str, Measurement]]:
        """All rows as (stage, kind, measurement)."""
        for (stage, kind), measurements in self.table.items():
            for measurement in measurements:
                yield stage, kind, measurement

    def scaled(self, factor: float) -> Profile:
        """The same profile with every time and energy multiplied by `factor`."""
        if not (math.isfinite(factor) and factor > 0):
            raise ProfileError(f"scale: got {factor}; allowed: a finite number above 0")
        return Profile(
            {
                key: tuple(
                    replace(
                        m,
                        time_s=m.time_s * factor,
                        energy_j=m.energy_j * factor,
                        time_se_s=m.time_se_s * factor,
                        energy_se_j=m.energy_se_j * factor,
                    )
                    for m in measurements
                )
                for key, measurements in self.table.items()
            }
        )

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, str, Measurement]]) -> Profile:
        """Build from (stage, kind, measurement) triples in any order."""
        table: dict[tuple[int, str], list[Measurement]] = {}
        for stage, kind, measurement in rows:
            table.setdefault((stage, kind), []).append(measurement)
        return cls({key: tuple(measurements) for key, measurements in table.items()})


def load_profile(path: Path | str) -> Profile:
    """Read a profile CSV.

    Raises:
        ProfileError: naming file, row and reason, for a file that cannot be read or planned on.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot read the profile: {error}") from error
    reader = csv.DictReader(io.StringIO(text), restkey="__extra__", strict=True)
    try:
        columns = tuple(reader.fieldnames or ())
    except csv.Error as error:
        raise ProfileError(f"{path}: row 1: {error}") from error
    if columns[: len(REQUIRED_COLUMNS)] != REQUIRED_COLUMNS:
        raise ProfileError(
            f"{path}: row 1: columns are {','.join(columns) or '(none)'}; "
            f"they must begin with {','.join(REQUIRED_COLUMNS)}"
        )
    rows: list[tuple[int, str, Measurement]] = []
    seen: dict[tuple[int, str, int], int] = {}
    try:
        for record in reader:
            where = f"{path}: row {reader.line_num}"
            stage, kind, measurement = _parse_record(record, where)
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
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(REQUIRED_COLUMNS + OPTIONAL_COLUMNS)
    for stage, kind, m in profile.rows():
        extras = ["" if math.isnan(value) else repr(value) for value in (m.time_se_s, m.energy_se_j)]
        writer.writerow([stage, kind, m.frequency_mhz, repr(m.time_s), repr(m.energy_j), m.samples, *extras])
    write_atomically(Path(path), out.getvalue())


def _parse_record(record: Mapping[str, str | None], where: str) -> tuple[int, str, Measurement]:
    if "__extra__" in record or any(record[column] is None for column in REQUIRED_COLUMNS):
        raise ProfileError(f"{where}: wrong number of columns")
    kind = (record["instruction"] or "").strip()
    if not kind:
        raise ProfileError(f"{where}: instruction is empty")

    def number(column: str, default: float | None = None) -> float:
        text = (record.get(column) or "").strip()
        if not text and default is not None:
            return default
        try:
            return float(text)
        except ValueError:
            raise ProfileError(f"{where}: {column}: got {text!r}; allowed: a number") from None

    def whole(column: str, lowest: int, default: float | None = None) -> int:
        value = number(column, default)
        if not math.isfinite(value) or value != int(value) or value < lowest:
            raise ProfileError(f"{where}: {column}: got {record[column]!r}; allowed: a whole number from {lowest}")
        return int(value)

    measurement = Measurement(
        frequency_mhz=whole("frequency", 1),
        time_s=number("time"),
        energy_j=number("energy"),
        samples=whole("samples", 0, 0.0),
        time_se_s=number("time_se", math.nan),
        energy_se_j=number("energy_se", math.nan),
    )
    for column, value in (("time", measurement.time_s), ("energy", measurement.energy_j)):
        if not (math.isfinite(value) and value > 0):
            raise ProfileError(f"{where}: {column}: got {record[column]!r}; allowed: a finite number above 0")
    return whole("stage", 0), kind, measurement


def _validate(table: Mapping[tuple[int, str], tuple[Measurement, ...]]) -> None:
    if not table:
        raise ProfileError("the profile has no rows")
    stages = 1 + max(stage for stage, _ in table)
    kinds = sorted({kind for _, kind in table})
    for stage in range(stages):
        clocks_of_kind: dict[str, set[int]] = {}
        for kind in kinds:
            rows = table.get((stage, kind), ())
            if not rows:
                raise ProfileError(f"stage {stage} has no row for instruction {kind!r}")
            clocks = {m.frequency_mhz for m in rows}
            if len(clocks) != len(rows):
                raise ProfileError(f"stage {stage} {kind}: two rows for one frequency")
            for m in rows:
                if not (math.isfinite(m.time_s) and m.time_s > 0 and math.isfinite(m.energy_j) and m.energy_j > 0):
                    raise ProfileError(
                        f"stage {stage} {kind} at {m.frequency_mhz} MHz: time {m.time_s} and energy {m.energy_j} "
                        "must be finite numbers above 0"
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
