"""What a report says, as data for programs. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from perseus_plugin.reporting.report.findings import Findings
from perseus_plugin.reporting.report.folder import state_of

REPORT_SCHEMA = "perseus-report"
REPORT_VERSION = 1


def report_to_json(found: Findings) -> str:
    """The figures of `perseus report`, by the names that they have in `Findings`; null is what is not known."""
    folder, plan = found.folder, found.folder.plan
    content = {
        "schema": REPORT_SCHEMA,
        "version": REPORT_VERSION,
        "folder": str(folder.path),
        "state": state_of(folder),
        "emulated": folder.emulated,
        "gpu": folder.gpu,
        "ranks": folder.world_size,
        "stages": folder.stages,
        "schedule": None if plan is None else plan.schedule,
        "microbatches": None if plan is None else plan.microbatches,
        "per_iteration": None if found.per is None else asdict(found.per),
        "so_far": None if found.so_far is None else asdict(found.so_far),
        "projections": [asdict(one) for one in found.projections],
        "rates": asdict(found.options.rates),
        "happenings": [asdict(one) for one in found.marks],
        "explained": list(found.explained),
        "origin": list(found.origin),
        "missing": list(folder.missing),
        "summary": None if folder.summary is None else folder.summary.model_dump(by_alias=True),
    }
    return json.dumps(_known(content), indent=2, allow_nan=False) + "\n"


def _known(value: Any) -> Any:
    """Plain data in which a number that is none is null."""
    if isinstance(value, dict):
        return {str(name): _known(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
