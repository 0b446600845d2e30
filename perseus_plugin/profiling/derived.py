"""Rows of instructions that nobody measured, from those of what they are part of. Pure, and an assumption.

A chunk of a stage takes what the stage's other chunks take. A backward takes what its halves take together. Of a
backward that was measured as a whole, the input's gradient takes a share of time and of energy, and the weights' the
rest; where a chunk computes no gradient of its input, as the model's first does, the weights' takes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from perseus_plugin.iteration.instructions import (
    BACKWARD,
    INPUT_BACKWARD,
    INPUT_SHARE,
    WEIGHT_BACKWARD,
    Compute,
    StageStream,
    of_chunk,
    parts_of,
)
from perseus_plugin.profiling.profile import Measurement, Profile

Rows = tuple[Measurement, ...]


def with_rows_for(profile: Profile, streams: Sequence[StageStream], input_share: float = INPUT_SHARE) -> Profile:
    """The profile, and what else of these streams' instructions can be derived; what cannot be is left out.

    Args:
        profile: as measured.
        streams: per stage its operations.
        input_share: of a whole backward, the input's gradient; above 0 and below 1.
    """
    table = dict(profile.table)
    for stage, stream in enumerate(streams):
        kinds = {op.kind for op in stream if isinstance(op, Compute)}
        measured = {kind: rows for (its_stage, kind), rows in profile.table.items() if its_stage == stage}
        for kind in kinds - measured.keys():
            rows = _derived(kind, kinds, measured, input_share)
            if rows:
                table[stage, kind] = rows
    return Profile(table)


def whole(kind: str) -> str:
    """The instruction of a stage without chunks and split backwards that this one is part of."""
    parts = parts_of(kind)
    if len(parts) != 1:
        return kind
    return BACKWARD if parts[0][0] in {INPUT_BACKWARD, WEIGHT_BACKWARD} else parts[0][0]


def _derived(kind: str, kinds: Collection[str], measured: Mapping[str, Rows], input_share: float) -> Rows:
    parts = parts_of(kind)
    if len(parts) != 1:
        return ()
    ((name, chunk),) = parts

    def rows(of: str) -> Rows:
        return measured.get(of_chunk(of, chunk)) or measured.get(of) or ()

    if name == BACKWARD and not rows(BACKWARD):
        # The model's first chunk has no gradient of its input: there the weights' is all there is.
        of_weights = rows(WEIGHT_BACKWARD)
        return _together(rows(INPUT_BACKWARD), of_weights) if rows(INPUT_BACKWARD) else of_weights
    if rows(name) or name not in {INPUT_BACKWARD, WEIGHT_BACKWARD}:
        return rows(name)
    share = input_share if name == INPUT_BACKWARD else 1 - input_share
    if name == WEIGHT_BACKWARD and of_chunk(INPUT_BACKWARD, chunk) not in kinds:
        share = 1.0
    return tuple(row.scaled(share) for row in rows(BACKWARD))


def _together(first: Rows, second: Rows) -> Rows:
    return tuple(
        Measurement(
            one.frequency_mhz,
            one.time_s + other.time_s,
            one.energy_j + other.energy_j,
            min(one.samples, other.samples),
            math.hypot(one.time_se_s, other.time_se_s),
            math.hypot(one.energy_se_j, other.energy_se_j),
            blocking_power_w=one.blocking_power_w,
            blocking_power_se_w=one.blocking_power_se_w,
        )
        for one, other in zip(first, second, strict=True)
    )
