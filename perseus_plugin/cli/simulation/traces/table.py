"""A table of operations: a row for each that a rank ran, as CSV (packed by gzip, or not) or parquet.

The columns are those of the artifact of "Understanding Stragglers in Large Model Training Using What-if Analysis"
(OSDI'25): `dp_rank`, `stage`, `step`, `optype`, `mb_id`, `duration` (seconds), and, where there are any, `rank`,
`start_ts` (seconds, on a clock that all ranks of the step share) and `mc` (model chunk of the rank). Of the operations
those count that are called `forward-compute`, `backward-compute` or another kind with `-compute`; the others make the
iteration as long as it was. Ranks that do the same work are averaged.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perseus_plugin.cli.simulation.traces.traced import GivenSchedule, Ran, TracedJob, traced_job
from perseus_plugin.errors import ConfigError, lacking
from perseus_plugin.files import read_bytes, read_unpacked
from perseus_plugin.iteration.bounds import MOST_COUNT, MOST_S, MOST_STAGES
from perseus_plugin.planning.solvers import keeping_the_interpreter

NEEDED = ("dp_rank", "stage", "step", "optype", "mb_id", "duration")
_MOST_ROWS = 10_000_000
_COMPUTE = "-compute"
PARQUET = ".parquet"

_Place = tuple[int, int, int]
"""Step, replica, stage."""


def is_table(path: Path) -> bool:
    """Whether a file is one, by the first line of what it holds.

    Raises:
        ConfigError: it cannot be read.
    """
    return set(NEEDED) <= set(next(csv.reader([_text(path).partition("\n")[0]]), []))


def load_table(path: Path, given: GivenSchedule | None = None, chunks: int | None = None) -> TracedJob:
    """Read a table.

    Args:
        path: of the file.
        given: the schedule; None: as the rows are in order.
        chunks: model chunks per stage that there have to be; None: as many as there are.

    Raises:
        ConfigError: naming the file, the line, the column, the value and what is allowed.
    """
    ran: dict[_Place, dict[tuple[str, int, int], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    whole: dict[int, tuple[float, float]] = {}
    timed = False
    for row in _rows(path):
        step, replica, stage, kind, microbatch, chunk, start_s, time_s = row
        if start_s is not None:
            timed = True
            since_s, until_s = whole.get(step, (math.inf, -math.inf))
            whole[step] = min(since_s, start_s), max(until_s, start_s + time_s)
        if kind.endswith(_COMPUTE):
            place, what = (step, replica, stage), (kind.removesuffix(_COMPUTE), microbatch, chunk)
            # Without a start the rows' order is all that there is.
            place_in_order = float(len(ran[place])) if start_s is None else start_s
            ran[place][what].append((place_in_order, time_s))
    iterations: dict[tuple[int, int], dict[int, list[Ran]]] = defaultdict(dict)
    for (step, replica, stage), by_what in ran.items():
        iterations[step, replica][stage] = [
            Ran(*what, float(np.mean([s for s, _ in seen])), float(np.mean([t for _, t in seen])))
            for what, seen in by_what.items()
        ]
    times_s = {step: until_s - since_s for step, (since_s, until_s) in whole.items()} if timed else {}
    return traced_job(path.name, iterations, times_s, given, chunks)


def _text(path: Path) -> str:
    """What a file holds, as CSV."""
    try:
        return _from_parquet(path) if path.suffix == PARQUET else read_unpacked(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_parquet(path: Path) -> str:
    try:
        import pandas
        import pyarrow  # noqa: F401 (pandas asks for it)
    except ImportError as error:
        raise ConfigError(f"{path}: {lacking(error)}") from error
    packed = io.BytesIO(read_bytes(path))
    with keeping_the_interpreter():
        return str(pandas.read_parquet(packed, engine="pyarrow").to_csv(index=False))


def _rows(path: Path) -> Iterator[tuple[int, int, int, str, int, int, float | None, float]]:
    """Step, replica, stage, operation, microbatch, chunk, start and duration of every row."""
    reader = csv.reader(io.StringIO(_text(path)))
    try:
        header = next(reader, [])
        missing = [name for name in NEEDED if name not in header]
        if missing:
            raise ConfigError(f"{path}: {missing[0]}: missing; allowed: a table with the columns {', '.join(NEEDED)}")
        at = {name: place for place, name in enumerate(header)}
        for line, row in enumerate(reader, start=2):
            if line > _MOST_ROWS:
                raise ConfigError(f"{path}: got more than {_MOST_ROWS} rows; allowed: so many")
            if not row:
                continue
            if len(row) != len(header):
                raise ConfigError(f"{path}, line {line}: got {len(row)} columns; allowed: the {len(header)} of line 1")

            def number(name: str, low: float, high: float, row: list[str] = row, line: int = line) -> float:
                try:
                    value = float(row[at[name]])
                except ValueError:
                    value = math.nan
                if not low <= value <= high:
                    raise ConfigError(
                        f"{path}, line {line}: {name}: got {row[at[name]][:80]!r}; allowed: a number from {low:g} to "
                        f"{high:g}"
                    )
                return value

            kind = row[at["optype"]]
            computes = kind.endswith(_COMPUTE)
            yield (
                int(number("step", 0, MOST_COUNT)),
                int(number("dp_rank", 0, MOST_COUNT)),
                int(number("stage", 0, MOST_STAGES)),
                kind,
                int(number("mb_id", 0 if computes else -1, MOST_COUNT)),
                int(number("mc", 0, MOST_STAGES)) if computes and "mc" in at else 0,
                number("start_ts", -MOST_S, MOST_S) if "start_ts" in at else None,
                number("duration", 0, MOST_S),
            )
    except csv.Error as error:
        raise ConfigError(f"{path}: not valid CSV: {error}") from error
