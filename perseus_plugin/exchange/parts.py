"""The parts of plans that a rank has at hand, and which of them an iteration follows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from perseus_plugin.exchange.messages import BatchPart, PlanPart, PlanParts
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Follow

Parts: TypeAlias = Mapping[tuple[int, str], PlanPart]
"""This stage's parts of the newest plans, by version of the set (for single batches: `_of_batch`) and schedule."""

_OLDER_SETS_KEPT = 3  # that the running iteration and switches yet to come may need
_BATCHES_KEPT = 32  # that are still to run, or have and may still be asked for


def part_for(parts: Parts, directive: Directive, record: IterationRecord) -> PlanPart | None:
    """The part that an iteration follows; None where there is none (yet), or it follows no plan."""
    if not isinstance(directive, Follow):
        return None
    return batch_part(parts, record) if directive.batch else parts.get((directive.version, record.schedule))


def batch_part(parts: Parts, record: IterationRecord) -> BatchPart | None:
    """The part that was made for an iteration's own batch, whether it is followed or not."""
    part = parts.get((_of_batch(record.number), record.schedule))
    return part if isinstance(part, BatchPart) else None


def with_own_plan(directive: Directive, parts: Parts, record: IterationRecord) -> Directive:
    """The directive of an iteration that begins, with the plan for its own batch where one was made beside that set."""
    if not isinstance(directive, Follow) or directive.straggler or directive.limited:
        return directive
    part = batch_part(parts, record)
    return replace(directive, batch=True) if part is not None and part.base == directive.version else directive


def with_newest(parts: Parts, newest: PlanParts) -> Parts:
    """Those of a new set, beside those of the sets before it."""
    others = list(dict.fromkeys(version for version, _ in parts if version >= 0 and version != newest.version))
    kept = {key: part for key, part in parts.items() if key[0] < 0 or key[0] in others[-_OLDER_SETS_KEPT:]}
    return {**kept, **{(newest.version, part.schedule): part for part in newest.parts}}


def with_batch(parts: Parts, part: BatchPart) -> Parts:
    """With the part of one more batch; those that came long before it are over, however far apart batches are."""
    others = [key for key in parts if key[0] < 0][-_BATCHES_KEPT + 1 :]
    kept = {key: of for key, of in parts.items() if key[0] >= 0 or key in others}
    return {**kept, (_of_batch(part.iteration), part.schedule): part}


def _of_batch(iteration: int) -> int:
    """What stands for the version of the set: below 0, as sets are numbered from 0."""
    return -1 - iteration
