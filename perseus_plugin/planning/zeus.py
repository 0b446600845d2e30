"""Plans in the format of Zeus's pipeline frequency optimizer: a Python literal, read but never evaluated.

The file holds a list with, for every stage, its instructions in execution order as `(kind, frequency_mhz)`.
"""

from __future__ import annotations

import ast
import pprint
from pathlib import Path

from perseus_plugin.errors import PlanError
from perseus_plugin.files import write_atomically
from perseus_plugin.planning.plan import Plan


def save_zeus_plan(plan: Plan, path: Path | str) -> None:
    """Write the plan's clocks in the Zeus format."""
    literal = [[(p.instruction.kind, p.frequency_mhz) for p in stage] for stage in plan.stages]
    write_atomically(Path(path), pprint.pformat(literal, width=110, compact=True) + "\n")


def load_zeus_plan(path: Path | str) -> list[list[tuple[str, int]]]:
    """Per stage its instructions in execution order as (kind, frequency_mhz).

    Raises:
        PlanError: naming the file, the place and the reason.
    """
    try:
        value = ast.literal_eval(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    if not isinstance(value, (list, tuple)) or not value:
        raise PlanError(f"{path}: got {type(value).__name__}; allowed: a list with one list for every stage")
    stages = []
    for s, stage in enumerate(value):
        if not isinstance(stage, (list, tuple)):
            raise PlanError(f"{path}: stage {s}: got {stage!r:.60}; allowed: a list of (kind, frequency)")
        stages.append([_entry(path, s, at, entry) for at, entry in enumerate(stage)])
    return stages


def _entry(path: Path | str, stage: int, at: int, entry: object) -> tuple[str, int]:
    match entry:
        case [str(kind), int(frequency)] if kind and frequency > 0 and not isinstance(frequency, bool):
            return kind, frequency
    raise PlanError(f"{path}: stage {stage}, entry {at}: got {entry!r:.60}; allowed: (kind, frequency in MHz)")
