"""What people write for the power budget of a group, on a command line."""

from __future__ import annotations

from perseus_plugin.errors import PlanError, shown
from perseus_plugin.iteration.words import parse_watts
from perseus_plugin.planning.power.budget import GroupBudget


def parse_group(told: str) -> GroupBudget:
    """A group's budget from `NAME=RANKS:WATTS` or `RANKS:WATTS`, such as `rack 1=0-31:20kW` or `node:6kW`.

    Raises:
        PlanError: it is neither.
    """
    group, colon, watts = told.rpartition(":")
    name, _, of = group.rpartition("=")
    if not colon or not of.strip():
        raise PlanError(
            f'group: got {shown(told)}; allowed: NAME=RANKS:WATTS, such as "rack 1=0-31:20kW" or "node:6kW"'
        )
    return GroupBudget(name.strip() or of.strip(), of.strip(), parse_watts(watts, f"group {name or of}"))
