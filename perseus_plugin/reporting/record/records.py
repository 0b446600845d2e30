"""Reading the ranks' records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from perseus_plugin.errors import ReportError, validation_problem
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.files import ModelT, read_text
from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.reporting.record.iterations import Stretch
from perseus_plugin.reporting.record.lines import Deviation, Header, Row
from perseus_plugin.reporting.record.recorder import record_path, samples_path
from perseus_plugin.reporting.record.samples import Sample, load_samples


@dataclass(frozen=True)
class RankRecord:
    """What one rank has written.

    Attributes:
        header: who, where, since when.
        stretches: its iterations by rising number.
        deviations: the first ones.
        samples: iterations kept whole, by rising number.
        cut: the last line was not written to its end.
    """

    header: Header
    stretches: tuple[Stretch, ...]
    deviations: tuple[Deviation, ...] = ()
    samples: tuple[Sample, ...] = ()
    cut: bool = False

    @property
    def placement(self) -> Placement:
        """Of the rank."""
        return self.header.placement


def load_record(output_dir: Path, rank: int) -> RankRecord:
    """Read the record of one rank.

    Raises:
        ReportError: naming file, line and reason, if it is damaged or something else. A last line that was cut off
            (the job was killed while it wrote) is no damage.
    """
    path = record_path(output_dir, rank)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    whole, _, rest = text.rpartition("\n")
    lines = whole.split("\n")
    header = _parsed(Header, lines[0], f"{path}: line 1")
    stretches, deviations = [], []
    for number, line in enumerate(lines[1:], 2):
        if '"event"' in line:
            deviations.append(_parsed(Deviation, line, f"{path}: line {number}"))
        else:
            stretches.append(_parsed(Row, line, f"{path}: line {number}").stretch())
    if header.placement.rank != rank:
        raise ReportError(f"{path}: line 1: is of rank {header.placement.rank}")
    return RankRecord(header, tuple(stretches), tuple(deviations), _samples(output_dir, rank), cut=bool(rest))


def _samples(output_dir: Path, rank: int) -> tuple[Sample, ...]:
    path = samples_path(output_dir, rank)
    return load_samples(path) if path.is_file() else ()


def _parsed(model: type[ModelT], line: str, where: str) -> ModelT:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise ReportError(f"{where}: {validation_problem(error, model)}") from error


@dataclass(frozen=True)
class Series:
    """The job's iterations as rank 0 recorded them, with the energy of all ranks.

    Attributes:
        stretches: of rank 0.
        energy_j: shape (stretches,), mean energy of an iteration of all ranks; NaN where one rank has no figure.
    """

    stretches: Sequence[Stretch]
    energy_j: FloatArray

    def of(self, *states: str) -> list[tuple[Stretch, float]]:
        """The stretches of these states, with the energy of an iteration."""
        pairs = zip(self.stretches, self.energy_j.tolist(), strict=True)
        return [(stretch, energy_j) for stretch, energy_j in pairs if stretch.sort.state in states]


def series(records: Mapping[int, RankRecord], world_size: int) -> Series | None:
    """Join the records; None without that of the rank that leads.

    Ranks join their iterations to stretches each for itself, so that theirs need not be the same.
    """
    stretches = next((record.stretches for record in records.values() if record.placement.leads), ())
    if not stretches:
        return None
    # Pieces within which no rank's figure changes: there may be far more iterations than stretches.
    everywhere = [stretch for record in records.values() for stretch in record.stretches]
    edges = np.unique([edge for s in everywhere for edge in (s.first, s.first + s.count)])
    counts = np.diff(edges).astype(np.float64)

    def pieces(stretch: Stretch) -> slice:
        begin, end = np.searchsorted(edges, (stretch.first, stretch.first + stretch.count))
        return slice(int(begin), int(end))

    energy_j = np.full(len(counts), 0.0 if len(records) == world_size else math.nan)
    for record in records.values():
        of_rank = np.full(len(counts), math.nan)
        for stretch in record.stretches:
            of_rank[pieces(stretch)] = stretch.energy_j
        energy_j += of_rank
    return Series(stretches, np.array([_mean(energy_j[pieces(s)], counts[pieces(s)]) for s in stretches]))


def _mean(values: FloatArray, counts: FloatArray) -> float:
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=counts[known])) if known.any() else math.nan
