"""Instructions and the per-stage instruction stream, in the words of no particular framework.

An integration translates its framework's schedule into one *stream* per stage: the list of operations that
stage executes in program order. `graph.py` derives the dependency graph from the streams of all stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

FORWARD = "forward"
BACKWARD = "backward"
INPUT_BACKWARD = "input_backward"
"""The half of a backward that the stage before waits for: the gradient of the stage's input."""
WEIGHT_BACKWARD = "weight_backward"
"""The other half: the gradient of the stage's weights."""

INPUT_SHARE = 0.5
"""Assumed share of the input's gradient in a backward, where nothing was measured.

For a matrix of weights each half is one multiplication of the same size. Attention multiplies without weights, which
leaves a little more to the input's gradient (0.51 for GPT-3), as does computing activations again.
"""

_PART = re.compile(rf"({INPUT_BACKWARD}|{WEIGHT_BACKWARD}|{FORWARD}|{BACKWARD})(?:_(\d+))?")


def of_chunk(kind: str, chunk: int) -> str:
    """The kind of a model chunk's instructions: chunks differ in what they compute, so each has kinds of its own."""
    return kind if chunk == 0 else f"{kind}_{chunk}"


def of_pair(*kinds: str) -> str:
    """The kind of instructions that run as one."""
    return "_".join(kinds)


def parts_of(kind: str) -> tuple[tuple[str, int], ...]:
    """What a kind is made of, each with its chunk: the inverse of `of_chunk` and `of_pair`; empty for other names."""
    parts = tuple((name, int(chunk or 0)) for name, chunk in _PART.findall(kind))
    return parts if of_pair(*(of_chunk(*part) for part in parts)) == kind else ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One controllable piece of computation: a kind of work on one microbatch in one stage.

    Attributes:
        stage: pipeline stage, 0-based. With virtual stages this is the pipeline *rank* that executes it.
        kind: `"forward"`, `"backward"`, or another name for controllable work (`"input_backward"`,
            `"weight_backward"`, ...), with what `of_chunk` and `of_pair` make of them. Profile rows are keyed by
            `(stage, kind)`.
        microbatch: microbatch id, 0-based, within the iteration.
        chunk: model chunk (virtual stage) on that rank, 0 without virtual stages.
    """

    stage: int
    kind: str
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Compute:
    """Stream operation: controllable work; becomes an `Instruction`."""

    kind: str
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """Stream operation: work whose time does not depend on the SM clock (load a microbatch, optimizer step).

    Its duration is looked up by `(stage, name)`. In a collective one the stages wait for each other, so that its
    own time is what it takes the last one to arrive.
    """

    name: str
    collective: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Stream operation: send to stage `peer`; matched in order with that stage's receives from here.

    A blocking send ends only when the peer has begun to receive (rendezvous), which is an edge back from the
    receiver's program order. Matching is per `(from stage, to stage, channel)`.
    """

    peer: int
    blocking: bool = True
    channel: str = ""


@dataclass(frozen=True, slots=True)
class Receive:
    """Stream operation: wait for a tensor from stage `peer`. See `Send`."""

    peer: int
    channel: str = ""


StreamOp: TypeAlias = Compute | Constant | Send | Receive
StageStream: TypeAlias = Sequence[StreamOp]
StreamOf: TypeAlias = Callable[[int], Sequence[StreamOp]]
"""The stream of a stage, asked for by its number."""
"""The operations of one stage in program order."""
