"""What a job's plan was made from, in its output folder, so that it can be made again, and others like it.

The instruction streams are files of their own there; all else is in `plan-inputs.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perseus_plugin.errors import PerseusError, PlanError, validation_problem
from perseus_plugin.files import read_model, write_atomically
from perseus_plugin.iteration.bounds import Count, Power, Stage, Time
from perseus_plugin.iteration.instructions import StageStream
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import Effort, Target
from perseus_plugin.profiling.profile import profile_from_csv, profile_to_csv

INPUTS_FILE = "plan-inputs.json"


class _InputsFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    schema_name: Literal["perseus-plan-inputs"] = Field(alias="schema")
    version: Literal[1]
    schedule: str
    profile: str
    constant_time_s: list[tuple[Stage, str, Time]]
    blocking_power_w: Annotated[list[Power], Field(min_length=1)]
    blocking_power_se_w: Power | None
    target: dict[str, Any]
    margin: Annotated[float, Field(ge=0, le=1)]
    effort: Effort
    search: bool
    full_clocks: bool
    drawn: Annotated[float, Field(gt=0, le=1)]
    max_changes: Count | None
    min_dwell_s: Time
    full_clock_only: list[tuple[Stage, str]]
    latency_s: Time | None
    lower_while_waiting: bool
    transfer_s: Time
    end_s: Time


def save_inputs(request: PlanRequest, path: Path) -> None:
    """Write what a plan was made from, through a temporary file and a rename.

    Args:
        request: see `PlanRequest.as_made`.
        path: of the file.

    Raises:
        OSError: it cannot be written.
        PlanError: a figure that it cannot hold.
    """
    beside = request.overheads or Overheads()
    try:
        content = _InputsFile(
            schema="perseus-plan-inputs",
            version=1,
            schedule=request.schedule,
            profile=profile_to_csv(request.profile),
            constant_time_s=[(stage, name, time_s) for (stage, name), time_s in request.constant_time_s.items()],
            blocking_power_w=list(request.blocking_power_w),
            blocking_power_se_w=request.blocking_power_se_w,
            target=request.target.to_dict(),
            margin=request.margin,
            effort=request.effort,  # type: ignore[arg-type]
            search=request.search,
            full_clocks=request.full_clocks,
            drawn=request.drawn,
            max_changes=request.max_changes,
            min_dwell_s=request.min_dwell_s,
            full_clock_only=sorted(request.full_clock_only),
            latency_s=request.latency_s,
            lower_while_waiting=request.lower_while_waiting,
            transfer_s=beside.transfer_s,
            end_s=beside.end_s,
        )
    except ValidationError as error:
        raise PlanError(f"{path.name}: {validation_problem(error, _InputsFile)}") from error
    write_atomically(path, content.model_dump_json(by_alias=True, indent=2) + "\n")


def load_inputs(path: Path, streams: Sequence[StageStream] = ()) -> PlanRequest:
    """Read what a plan was made from.

    Args:
        path: of the file.
        streams: of its schedule.

    Raises:
        PlanError: naming the file, the place and the reason.
    """
    file = read_model(path, _InputsFile, PlanError)
    try:
        return PlanRequest(
            schedule=file.schedule,
            streams=streams,
            constant_time_s={(stage, name): time_s for stage, name, time_s in file.constant_time_s},
            profile=profile_from_csv(file.profile, "profile"),
            blocking_power_w=file.blocking_power_w,
            blocking_power_se_w=file.blocking_power_se_w,
            target=Target.from_dict(file.target),
            margin=file.margin,
            effort=file.effort,
            search=file.search,
            full_clocks=file.full_clocks,
            drawn=file.drawn,
            max_changes=file.max_changes,
            min_dwell_s=file.min_dwell_s,
            full_clock_only=frozenset(file.full_clock_only),
            latency_s=file.latency_s,
            lower_while_waiting=file.lower_while_waiting,
            overheads=Overheads(file.transfer_s, file.end_s),
        )
    except PerseusError as error:
        raise PlanError(f"{path}: {error}") from error
