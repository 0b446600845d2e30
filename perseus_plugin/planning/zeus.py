"""Plans in the format of Zeus's pipeline frequency optimizer: a Python literal.

The file holds a list with, for every stage, its instructions in execution order as `(kind, frequency_mhz)`.
"""

from __future__ import annotations

import pprint

from perseus_plugin.planning.plan import Plan


def zeus_plan(plan: Plan) -> str:
    """The plan's clocks in the Zeus format."""
    literal = [[(p.instruction.kind, p.frequency_mhz) for p in stage] for stage in plan.stages]
    return pprint.pformat(literal, width=110, compact=True) + "\n"
