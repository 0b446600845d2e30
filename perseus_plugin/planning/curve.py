"""`frontier.json`, as `planning/frontier.py` writes it, and reading back what is drawn of it; needs no solver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from perseus_plugin.errors import PlanError
from perseus_plugin.files import read_model
from perseus_plugin.iteration.bounds import Clock, PositiveEnergy, PositiveTime
from perseus_plugin.planning.targets import Prices

FRONTIER_FILE = "frontier.json"


@dataclass(frozen=True, slots=True)
class CurveSample:
    """One sample without its plan.

    Attributes:
        deadline_s: where it was taken.
        bound_j: what no plan for that takes less than, blocking included.
        iteration_time_s, energy_j: of the plan that was made for it.
    """

    deadline_s: float
    bound_j: float
    iteration_time_s: float
    energy_j: float


@dataclass(frozen=True, slots=True)
class FrontierCurve:
    """What is drawn of a frontier.

    Attributes:
        samples: by rising deadline.
        baseline_time_s, baseline_energy_j: every instruction at the profile's highest clock.
        slower: (iteration time, energy) of plans beyond the last sample, which draw less power for more energy.
    """

    samples: tuple[CurveSample, ...]
    baseline_time_s: float
    baseline_energy_j: float
    slower: tuple[tuple[float, float], ...] = ()

    def least_cost(self, prices: Prices, gpus: int) -> CurveSample:
        """The sample whose iteration costs least on so many GPUs, of which energies are."""
        return min(self.samples, key=lambda one: prices.cost(one.iteration_time_s, one.energy_j, gpus))


class PointInFile(BaseModel):
    """One sample; what is not drawn may be missing.

    Attributes:
        slope_w: None at the shortest iteration.
        clocks_mhz: of its plan, per stage in execution order.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    deadline_s: PositiveTime
    iteration_time_s: PositiveTime
    energy_j: PositiveEnergy
    energy_lower_bound_j: PositiveEnergy
    gap: float | None = None
    slope_w: float | None = None
    clocks_mhz: tuple[tuple[Clock, ...], ...] = ()


class BaselineInFile(BaseModel):
    """Every instruction at the profile's highest clock."""

    model_config = ConfigDict(allow_inf_nan=False)

    iteration_time_s: PositiveTime
    energy_j: PositiveEnergy


class SlowerInFile(BaselineInFile):
    """A plan beyond the last sample.

    Attributes:
        clocks_mhz: per stage in execution order.
    """

    clocks_mhz: tuple[tuple[Clock, ...], ...] = ()


class FrontierFile(BaseModel):
    """The content of `frontier.json`, in the order in which it is written."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_name: Literal["perseus-frontier"] = Field(alias="schema")
    version: Literal[1]
    tolerance: float | None = None
    baseline: BaselineInFile
    points: Annotated[tuple[PointInFile, ...], Field(min_length=1)]
    slower: tuple[SlowerInFile, ...] = ()


def load_curve(path: Path | str) -> FrontierCurve:
    """Read what is drawn from `frontier.json`.

    Raises:
        PlanError: it cannot be read, or is not such a file; the message says where.
    """
    content = read_model(path, FrontierFile, PlanError)
    samples = tuple(
        CurveSample(p.deadline_s, p.energy_lower_bound_j, p.iteration_time_s, p.energy_j) for p in content.points
    )
    slower = tuple((one.iteration_time_s, one.energy_j) for one in content.slower)
    return FrontierCurve(samples, content.baseline.iteration_time_s, content.baseline.energy_j, slower)
