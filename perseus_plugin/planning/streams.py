"""Instruction streams in files, and as JSON in requests to the planner's process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from perseus_plugin.errors import ScheduleError, validation_problem
from perseus_plugin.files import read_model, read_text, write_atomically
from perseus_plugin.iteration.actions import lists_from_csv, streams_of_actions
from perseus_plugin.iteration.bounds import MOST_STAGES, Count
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream, StreamOp

SCHEDULE_SCHEMA = "perseus-schedule"
SCHEDULE_VERSION = 1


class _Op(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ComputeOp(_Op):
    op: Literal["compute"]
    kind: str = Field(min_length=1)
    microbatch: Count
    chunk: Count = 0


class _ConstantOp(_Op):
    op: Literal["constant"]
    name: str = Field(min_length=1)
    collective: bool = False


class _SendOp(_Op):
    op: Literal["send"]
    peer: int = Field(ge=-MOST_STAGES, le=MOST_STAGES)
    blocking: bool = True
    channel: str = ""


class _ReceiveOp(_Op):
    op: Literal["receive"]
    peer: int = Field(ge=-MOST_STAGES, le=MOST_STAGES)
    channel: str = ""


_AnyOp = Annotated[_ComputeOp | _ConstantOp | _SendOp | _ReceiveOp, Field(discriminator="op")]


class _Streams(RootModel[list[list[_AnyOp]]]):
    pass


class ScheduleFile(_Op):
    """`schedule.json` and what is given to `--schedule`: the operations of every stage in program order."""

    schema_name: Literal["perseus-schedule"] = Field(default="perseus-schedule", alias="schema")
    version: Literal[1] = 1
    stages: list[list[_AnyOp]] = Field(min_length=1)


def streams_from_json(rows: Any) -> list[StageStream]:
    """Inverse of `stream_to_json`, for all stages.

    Raises:
        ScheduleError: naming the first operation that is none.
    """
    try:
        return _streams(_Streams.model_validate(rows).root)
    except ValidationError as error:
        raise ScheduleError(validation_problem(error, _Streams, "streams")) from error


def load_streams(path: Path | str) -> list[StageStream]:
    """Read streams from a file that ends in .csv, with every rank's actions as PyTorch's schedules write them, or JSON.

    `{"schema": "perseus-schedule", "version": 1, "stages": [[op, ...], ...]}` with operations
    `{"op": "compute", "kind": "forward", "microbatch": 0, "chunk": 0}`,
    `{"op": "constant", "name": "load", "collective": false}`,
    `{"op": "send", "peer": 1, "blocking": true, "channel": ""}` and `{"op": "receive", "peer": 0, "channel": ""}`.

    Raises:
        ScheduleError: naming the file, the place and the reason.
    """
    if Path(path).suffix.lower() != ".csv":
        return _streams(read_model(path, ScheduleFile, ScheduleError).stages)
    try:
        return list(streams_of_actions(lists_from_csv(read_text(Path(path)))))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def save_streams(streams: Sequence[StageStream], path: Path | str, make: bool = False) -> None:
    """Write what `load_streams` reads, through a temporary file and a rename; `make`: in a folder that may be missing.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "schema": SCHEDULE_SCHEMA,
        "version": SCHEDULE_VERSION,
        "stages": [stream_to_json(stream) for stream in streams],
    }
    write_atomically(Path(path), json.dumps(content) + "\n", make)


def stream_to_json(stream: StageStream) -> list[dict[str, str | int | bool]]:
    """The operations of one stage as plain JSON data."""
    return [_op_to_json(op) for op in stream]


def _op_to_json(op: StreamOp) -> dict[str, str | int | bool]:
    if isinstance(op, Compute):
        return {"op": "compute", "kind": op.kind, "microbatch": op.microbatch, "chunk": op.chunk}
    if isinstance(op, Constant):
        return {"op": "constant", "name": op.name, "collective": op.collective}
    if isinstance(op, Send):
        return {"op": "send", "peer": op.peer, "blocking": op.blocking, "channel": op.channel}
    return {"op": "receive", "peer": op.peer, "channel": op.channel}


def _streams(stages: Sequence[Sequence[_ComputeOp | _ConstantOp | _SendOp | _ReceiveOp]]) -> list[StageStream]:
    return [[_stream_op(op) for op in stage] for stage in stages]


def _stream_op(op: _ComputeOp | _ConstantOp | _SendOp | _ReceiveOp) -> StreamOp:
    if isinstance(op, _ComputeOp):
        return Compute(op.kind, op.microbatch, op.chunk)
    if isinstance(op, _ConstantOp):
        return Constant(op.name, op.collective)
    if isinstance(op, _SendOp):
        return Send(op.peer, op.blocking, op.channel)
    return Receive(op.peer, op.channel)
