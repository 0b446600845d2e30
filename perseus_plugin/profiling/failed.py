"""What a sweep came to nothing for, kept so that a restarted job does not repeat it: `profile-failed.json`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from perseus_plugin.errors import ProfileError
from perseus_plugin.exchange.messages import Text
from perseus_plugin.files import read_model, write_atomically
from perseus_plugin.profiling.kept import Fingerprint

FILE = "profile-failed.json"


class _FailedFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_name: Literal["perseus-failed-profile"]
    version: Literal[1]
    fingerprint: Fingerprint
    reason: Text
    date: str


def save_failure(reason: str, fingerprint: Fingerprint, folder: Path) -> None:
    """Keep why a sweep came to nothing.

    Args:
        reason: for people; one that a further sweep of the same job would meet again.
        fingerprint: of the job, and of how it was profiled.
        folder: the output folder.

    Raises:
        OSError: the file cannot be written.
    """
    content = _FailedFile(
        schema_name="perseus-failed-profile",
        version=1,
        fingerprint=fingerprint,
        reason=reason,
        date=datetime.date.today().isoformat(),
    )
    write_atomically(folder / FILE, json.dumps(content.model_dump(), indent=2) + "\n")


def load_failure(fingerprint: Fingerprint, folder: Path) -> str:
    """Why an earlier sweep of the same job, profiled the same way, came to nothing; empty if there was none.

    Raises:
        ProfileError: the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.exists():
        return ""
    file = read_model(path, _FailedFile, ProfileError, 2**22)
    return f"{file.reason} (found on {file.date})" if file.fingerprint == fingerprint else ""
