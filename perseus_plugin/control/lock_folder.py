"""Where the lock files of GPUs are: in a folder in which nobody but root and this user can put anything."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from perseus_plugin.errors import GpuError

LOCK_DIR_VARIABLE = "PERSEUS_LOCK_DIR"
ROOTS_LOCK_DIR = "/run/perseus"
LOCK_REMEDY = f"set {LOCK_DIR_VARIABLE} to a folder on a local disk that is yours and that nobody else can write to"

_RUNTIME_VARIABLE = "XDG_RUNTIME_DIR"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_said: set[str] = set()


def lock_folder() -> Path:
    """The folder of this user's lock files on this machine, made if it is missing.

    It is the same for all jobs, so not in the job's own TMPDIR. One that cannot be trusted or used is said, once, and
    the next one is taken: what PERSEUS_LOCK_DIR says, `/run/perseus` (root) or `$XDG_RUNTIME_DIR/perseus` (others),
    `/tmp/perseus-UID`, `~/.cache/perseus`.

    Raises:
        GpuError: there is none.
    """
    refused: list[str] = []
    for folder, must_be in _candidates():
        problem = _problem(folder)
        if not problem:
            if refused:
                _say(f"perseus: the GPU's lock file is in {folder}, as {'; '.join(refused)}; {LOCK_REMEDY}\n")
            return folder
        if must_be:
            refused.append(f"{folder} {problem}")
    raise GpuError(f"there is no folder for the GPU's lock file, as {'; '.join(refused)}; {LOCK_REMEDY}")


def _candidates() -> Iterator[tuple[Path, bool]]:
    """The folders in question, and whether it is worth a word that one is not used."""
    given = os.environ.get(LOCK_DIR_VARIABLE)
    if given:
        yield Path(given).absolute(), True
    user, runtime = os.geteuid(), os.environ.get(_RUNTIME_VARIABLE, "")
    if user == 0:
        yield Path(ROOTS_LOCK_DIR), True
    elif Path(runtime).is_absolute():
        yield Path(runtime) / "perseus", False  # batch jobs often have the variable, but not the folder
    yield Path(f"/tmp/perseus-{user}"), True
    home = Path("~").expanduser() if "HOME" in os.environ else Path()
    if home.is_absolute():
        yield home / ".cache" / "perseus", True


def _problem(folder: Path) -> str:
    """Why a folder is not to be used; empty if it is, and then it is there."""
    try:
        around = next(above for above in folder.parents if above.exists())
        foreign = _foreign(around.stat(), sticky_will_do=True)
        if foreign:  # they can put another one in this one's place
            return f"lies in {around}, which {foreign}"
        # Those above too are closed to others, whatever the umask: the next job refuses this one otherwise.
        for made in (*reversed([above for above in folder.parents if not above.exists()]), folder):
            made.mkdir(0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        return f"cannot be made or read: {error.strerror or error}"
    if not stat.S_ISDIR(status.st_mode):
        return "is a link" if stat.S_ISLNK(status.st_mode) else "is no folder"
    return _foreign(status) or ("" if os.access(folder, os.W_OK | os.X_OK) else "cannot be written")


def _foreign(status: os.stat_result, sticky_will_do: bool = False) -> str:
    """What lets others than root and this user put something into a folder, or put something else in its place."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _OTHERS_WRITE and not (sticky_will_do and status.st_mode & stat.S_ISVTX):
        return "can be written by others"
    return ""


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        sys.stderr.write(text)
