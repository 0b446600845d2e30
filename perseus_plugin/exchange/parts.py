"""The parts of plans that a rank has at hand, and which of them an iteration follows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from perseus_plugin.exchange.messages import PlanPart, PlanParts
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Follow

Parts: TypeAlias = Mapping[tuple[int, str], PlanPart]
"""This stage's parts of the newest plans, by version of the set and schedule."""

_OLDER_SETS_KEPT = 3  # that the running iteration and switches yet to come may need


def part_for(parts: Parts, directive: Directive, record: IterationRecord) -> PlanPart | None:
    """The part that an iteration follows; None where there is none (yet), or it follows no plan."""
    return parts.get((directive.version, record.schedule)) if isinstance(directive, Follow) else None


def with_newest(parts: Parts, newest: PlanParts) -> Parts:
    """Those of a new set, beside those of the sets before it."""
    others = list(dict.fromkeys(version for version, _ in parts if version != newest.version))[-_OLDER_SETS_KEPT:]
    kept = {key: part for key, part in parts.items() if key[0] in others}
    return {**kept, **{(newest.version, part.schedule): part for part in newest.parts}}
