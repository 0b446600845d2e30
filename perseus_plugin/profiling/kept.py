"""Keeping a job's profile with a fingerprint of what it was measured on, and using it again where that is the same.

`profile.csv` holds the measurements; `profile.json` beside it the fingerprint and what the CSV has no columns for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from perseus_plugin.errors import ProfileError, validation_problem
from perseus_plugin.files import read_model, remove, write_atomically
from perseus_plugin.profiling.profile import load_profile, save_profile
from perseus_plugin.profiling.survey import Survey

Fingerprint = dict[str, str]
"""Facts by name, e.g. `"stage 0: gpu"`; two profiles with the same facts are of the same job."""


class _ProfileFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    schema_name: Literal["perseus-profile"]
    version: Literal[1]
    fingerprint: Fingerprint
    blocking_power_w: float
    blocking_power_se_w: float | None = None
    unresolved: list[tuple[int, str]]
    constant_time_s: list[tuple[int, str, float]]


def job_fingerprint(ranks: Sequence[tuple[int, Mapping[str, str]]]) -> Fingerprint:
    """Join the facts of all ranks, given as (stage, facts); replicas of a stage that differ both count."""
    joined: dict[str, set[str]] = {}
    for stage, facts in ranks:
        for name, value in facts.items():
            joined.setdefault(f"stage {stage}: {name}", set()).add(value)
    fingerprint = {name: " / ".join(sorted(values)) for name, values in sorted(joined.items())}
    return {**fingerprint, "ranks": str(len(ranks))}


def save_survey(survey: Survey, fingerprint: Fingerprint, folder: Path) -> None:
    """Write profile.csv and profile.json.

    Raises:
        OSError: a file cannot be written; the old ones may then be there, never half of a new one.
        ProfileError: a figure that the file cannot hold; the old files are untouched.
    """
    try:
        content = _ProfileFile(
            schema_name="perseus-profile",
            version=1,
            fingerprint=fingerprint,
            blocking_power_w=survey.blocking_power_w,
            blocking_power_se_w=survey.blocking_power_se_w if math.isfinite(survey.blocking_power_se_w) else None,
            unresolved=sorted(survey.unresolved),
            constant_time_s=[(stage, name, time_s) for (stage, name), time_s in sorted(survey.constant_time_s.items())],
        )
    except ValidationError as error:
        raise ProfileError(f"profile.json: {validation_problem(error, _ProfileFile)}") from error
    # The old description goes first: it must never stand beside a CSV that it does not describe.
    remove(folder / "profile.json")
    save_profile(survey.profile, folder / "profile.csv")
    write_atomically(folder / "profile.json", json.dumps(content.model_dump(), indent=2) + "\n")


def read_survey(folder: Path) -> tuple[Survey, Fingerprint] | None:
    """The survey kept in `folder` and its fingerprint, whatever it was measured on; None if there is none.

    Raises:
        ProfileError: it is damaged or of another version.
    """
    path = folder / "profile.json"
    if not path.exists():
        return None
    file = read_model(path, _ProfileFile, ProfileError, 2**22)
    survey = Survey(
        load_profile(folder / "profile.csv"),
        file.blocking_power_w,
        frozenset(file.unresolved),
        {(stage, name): time_s for stage, name, time_s in file.constant_time_s},
        math.nan if file.blocking_power_se_w is None else file.blocking_power_se_w,
    )
    return survey, file.fingerprint


def load_survey(fingerprint: Fingerprint, folder: Path) -> Survey | None:
    """The survey kept in `folder` if it has this fingerprint; None if there is none.

    Raises:
        ProfileError: there is one, but of something else (the message names the first difference), or it is damaged.
    """
    kept = read_survey(folder)
    if kept is None:
        return None
    survey, facts = kept
    for name in sorted({*fingerprint, *facts}):
        before, now = facts.get(name, "(nothing)"), fingerprint.get(name, "(nothing)")
        if before != now:
            raise ProfileError(f"{folder / 'profile.json'}: {name} was {before} and is {now}")
    return survey
