"""A value that changes from time to time, read from a CSV with a line per change. Pure.

The CSV has a header. A line's value holds from its `time` until the time of the next line, or until its own `until`
where there is such a column; one that is empty says that nothing holds.
"""

from __future__ import annotations

import bisect
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import pairwise

from perseus_plugin.errors import ConfigError, PlanError, shown

UNTIL = "until"
TIMES = "ISO 8601, such as 2026-08-03T14:00+02:00, or without offset in the signal's time zone"


@dataclass(frozen=True, slots=True)
class Steps:
    """A step function of time.

    Attributes:
        since: Unix times, rising.
        values: from each of them on; None: there is none.
    """

    since: tuple[float, ...]
    values: tuple[float | None, ...]

    def at(self, unix_s: float) -> float | None:
        """The value of this moment; None: there is none."""
        place = bisect.bisect_right(self.since, unix_s) - 1
        return None if place < 0 else self.values[place]

    def next_change(self, unix_s: float) -> float:
        """When the next line begins; infinity: none does."""
        place = bisect.bisect_right(self.since, unix_s)
        return self.since[place] if place < len(self.since) else math.inf


@dataclass(frozen=True, slots=True)
class Reading:
    """How a CSV is to be read.

    Attributes:
        known: column names that tell what is in them, each with what makes its unit the one of the values.
        column: name of the value's column; None: the one that is known.
        means: the known name of what is in it, where its own tells nothing.
        time_column: name of the times' column.
        zone: of times without offset; None: that of this machine.
        holds: whether the last value holds for ever, and not for as long as the one before.
        check: raises `PlanError` for a value that cannot be, given the known name of what it is.
    """

    known: Mapping[str, float]
    column: str | None
    means: str | None
    time_column: str
    zone: tzinfo | None
    holds: bool
    check: Callable[[str, float], object] = lambda means, value: None


def steps_from_csv(text: str, how: Reading, where: str) -> tuple[Steps, str]:
    """Read a CSV.

    Args:
        text: of the file.
        how: to read it.
        where: how the file is called in errors.

    Returns:
        The values, in the unit of the column, and the known name of that.

    Raises:
        ConfigError: naming the line, what is wrong there and what is allowed.
    """
    try:
        rows = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise ConfigError(f"{where}: got no CSV ({error}); allowed: lines of values with commas between") from None
    header = [name.strip() for name in rows[0]] if rows else []
    time_at, value_at, means = _columns(header, how, where)
    until_at = header.index(UNTIL) if UNTIL in header else None
    lines = [(number, row) for number, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    if not lines:
        raise ConfigError(f"{where}: got no line below the header; allowed: at least one")
    since: list[float] = []
    until: list[float] = []
    values: list[float | None] = []
    for number, row in lines:
        at = f"{where}, line {number}"
        if len(row) != len(header):
            raise ConfigError(f"{at}: got {len(row)} values; allowed: {len(header)}, as in the header")
        since.append(_moment(row[time_at], since[-1] if since else -math.inf, how.zone, at))
        if until_at is not None:
            until.append(_moment(row[until_at], since[-1], how.zone, f"{at}, {UNTIL}"))
            if until[-1] <= since[-1]:
                raise ConfigError(f"{at}, {UNTIL}: got {shown(row[until_at])}; allowed: an end after its beginning")
        values.append(_value(row[value_at], at))
        if values[-1] is not None:
            try:
                how.check(means, values[-1])
            except PlanError as error:
                raise ConfigError(f"{at}: {error}") from None
        if len(since) > 1 and since[-1] <= since[-2]:
            raise ConfigError(f"{at}: got {shown(row[time_at])}; allowed: a time after that of the line before")
        if len(until) > 1 and until[-2] != since[-1]:
            raise ConfigError(
                f"{at}: got {'an overlap with' if until[-2] > since[-1] else 'a gap after'} the line before; allowed: "
                "a line that begins where that ends, with an empty value where nothing is to hold"
            )
    if not how.holds:
        last_s = until[-1] if until else since[-1] + (since[-1] - since[-2]) if len(since) > 1 else math.inf
        if last_s < math.inf:
            since.append(last_s)
            values.append(None)
    return _joined(since, values), means


def _joined(since: Sequence[float], values: Sequence[float | None]) -> Steps:
    """Without steps to the value that holds already."""
    kept = [0, *(at + 1 for at, (before, after) in enumerate(pairwise(values)) if before != after)]
    return Steps(tuple(since[at] for at in kept), tuple(values[at] for at in kept))


def _columns(header: Sequence[str], how: Reading, where: str) -> tuple[int, int, str]:
    """Where times and values are, and what the values are."""
    if how.time_column not in header:
        raise ConfigError(f"{where}: got columns {shown(list(header))}; allowed: one of them is {how.time_column!r}")
    found = [name for name in ([how.column] if how.column is not None else how.known) if name in header]
    names = " or ".join(repr(name) for name in ([how.column] if how.column is not None else how.known))
    if len(found) != 1:
        raise ConfigError(f"{where}: got columns {shown(list(header))}; allowed: one of them is {names}")
    means = how.means or found[0]
    if means not in how.known:
        raise ConfigError(
            f"{where}: got column {found[0]!r}, whose name does not tell its unit; allowed: `means`, as one of "
            f"{', '.join(how.known)}"
        )
    return header.index(how.time_column), header.index(found[0]), means


def _moment(text: str, after_s: float, zone: tzinfo | None, where: str) -> float:
    """Unix seconds of a time."""
    told = text.strip()
    try:
        # Python 3.10 knows no Z.
        found = datetime.fromisoformat(told[:-1] + "+00:00" if told.endswith(("Z", "z")) else told)
        if found.tzinfo is not None:
            return found.timestamp()
        first = found.replace(tzinfo=zone).timestamp()
        if datetime.fromtimestamp(first, zone).replace(tzinfo=None) != found:
            raise ConfigError(f"{where}: got {shown(told)}, which no clock shows there that day; allowed: {TIMES}")
        # An hour that comes twice, as clocks go back: the second time where the first would not be later.
        return first if first > after_s else found.replace(tzinfo=zone, fold=1).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"{where}: got {shown(told)}; allowed: a time, {TIMES}") from None


def _value(text: str, where: str) -> float | None:
    told = text.strip()
    if not told:
        return None
    try:
        value = float(told)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: got {shown(told)}; allowed: a number, or nothing")
    return value
