"""What a sweep came to nothing for, kept so that a restarted job does not repeat it: `profile-failed.json`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from perseus_plugin.errors import ProfileError
from perseus_plugin.files import write_atomically
from perseus_plugin.profiling.kept import Fingerprint

FILE = "profile-failed.json"
SCHEMA = "perseus-failed-profile"
VERSION = 1


class _FailedFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_name: str
    version: int
    fingerprint: Fingerprint
    reason: str
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
    content = {
        "schema_name": SCHEMA,
        "version": VERSION,
        "fingerprint": fingerprint,
        "reason": reason,
        "date": datetime.date.today().isoformat(),
    }
    write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")


def load_failure(fingerprint: Fingerprint, folder: Path) -> str:
    """Why an earlier sweep of the same job, profiled the same way, came to nothing; empty if there was none.

    Raises:
        ProfileError: the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.exists():
        return ""
    try:
        file = _FailedFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ProfileError(f"{path}: cannot be read: {reason}") from error
    if (file.schema_name, file.version) != (SCHEMA, VERSION):
        raise ProfileError(f"{path}: is {file.schema_name} {file.version}; allowed: {SCHEMA} {VERSION}")
    return f"{file.reason} (found on {file.date})" if file.fingerprint == fingerprint else ""
