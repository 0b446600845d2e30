"""Where commands write to and read from: files, and `-` for standard output and input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from perseus_plugin.errors import ConfigError
from perseus_plugin.files import encoded, write_atomically

STANDARD = Path("-")
"""Standard output, or standard input."""
_STDIN = Path("/dev/stdin")
OF_JOBS = frozenset(
    {
        "events.jsonl",
        "frontier.json",
        "plan-inputs.json",
        "plan.json",
        "profile.csv",
        "profile.json",
        "schedule.json",
        "summary.json",
    }
)
"""Files of a job in its output folder, by which reports and `perseus share` know it."""


def job_folder(argument: Path | None, option: Path | None) -> Path:
    """The folder of a running job, which the argument names or `--job` does.

    Raises:
        ConfigError: none or two are named.
    """
    named = [one for one in (argument, option) if one is not None]
    if len(named) != 1:
        raise ConfigError(f"FOLDER: got {len(named)} of it and --job; allowed: one, the job's output folder")
    return named[0]


def source(path: Path) -> Path:
    """What is to be read where a user gives this path."""
    return _STDIN if path == STANDARD else path


def check_alone(given: str, *to_standard_output: bool) -> None:
    """Refuse to print two things where one is expected to be alone.

    Args:
        given: the options that could be meant, in words.
        to_standard_output: of each thing, whether it goes there.

    Raises:
        ConfigError: more than one does.
    """
    if sum(to_standard_output) > 1:
        raise ConfigError(f"got {given}; allowed: one of them, as there is one standard output")


def check_writable(path: Path | None, option: str = "--output", *, of: Path | None = None) -> None:
    """Refuse a path that nothing can be written to, before hours go into what it is for.

    Args:
        path: as the user gave it; None: nothing is to be written.
        option: that gave it.
        of: what is read, whose own files must not be replaced: a job's output folder, or a file.

    Raises:
        ConfigError: its folder is not there or may not be written in, or it is a folder, or what is read.
    """
    if path is None or path == STANDARD:
        return
    if path.is_dir():
        raise ConfigError(f"{option}: got {path}, which is a folder; allowed: a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: got {path}; allowed: a path in a folder that is there")
    if not os.access(path if _is_special(path) else path.parent, os.W_OK):
        raise ConfigError(f"{option}: got {path}; allowed: a path that you may write to")
    if of is not None and path.resolve() == of.resolve():
        raise ConfigError(f"{option}: got {path}, which is what is read; allowed: another file")
    if of is not None and path.name in OF_JOBS and of.is_dir() and path.parent.samefile(of):
        raise ConfigError(f"{option}: got {path}, which is the job's own; allowed: another file")


def write(path: Path, content: str | bytes, option: str = "--output") -> None:
    """Write a file whole or not at all; standard output, pipes and devices as they come.

    Raises:
        ConfigError: it cannot be written; names the path as the user gave it.
    """
    data = content if isinstance(content, bytes) else encoded(content)
    try:
        if path == STANDARD:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif _is_special(path):
            path.write_bytes(data)
        else:
            write_atomically(path, data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror or error}") from error


def written(*paths: Path | None) -> str:
    """What is said of files that were written; empty for none."""
    names = [str(path) for path in paths if path is not None and path != STANDARD]
    return f"wrote {' and '.join(names)}" if names else ""


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
