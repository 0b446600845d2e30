"""Plans in the format of Zeus's pipeline frequency optimizer: a Python literal.

The file holds a list with, for every stage, its instructions in execution order as `(kind, frequency_mhz)`.
"""

from __future__ import annotations

import pprint
from pathlib import Path

from perseus_plugin.files import write_atomically
from perseus_plugin.planning.plan import Plan


def save_zeus_plan(plan: Plan, path: Path | str) -> None:
    """Write the plan's clocks in the Zeus format."""
    literal = [[(p.instruction.kind, p.frequency_mhz) for p in stage] for stage in plan.stages]
    write_atomically(Path(path), pprint.pformat(literal, width=110, compact=True) + "\n")
