"""Errors that a user is meant to read: one sentence, naming the thing, the value and what is allowed."""

from __future__ import annotations

import difflib
import errno
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_REMEDIES = {
    errno.EBADF: "something in this process has closed a file descriptor that is not its own",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many files open",
    errno.ENOSPC: "free space there, or give another folder",
    errno.EDQUOT: "free space in the quota, or give another folder",
    errno.EROFS: "it is read-only: give a folder that can be written",
    errno.EACCES: "see to its permissions, or give another folder",
    errno.EPERM: "see to its permissions, or give another folder",
    errno.ENOLCK: "its file system has no locks: give a folder on a local disk",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENOMEM: "the machine has no memory left",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "a part of the path is a file: give another folder",
    errno.ELOOP: "it is a link, and none is followed there: put a file or folder in its place",
    errno.ENXIO: "it is a pipe or a device: remove it",
    errno.ESTALE: "the network file system has lost it: mount it again",
    errno.EIO: "the disk or the network file system fails: see the kernel log",
}
_EXTRAS = {
    "matplotlib": "plot",
    "ortools": "planner",
    "pandas": "parquet",
    "plotly": "report",
    "prometheus_client": "prometheus",
    "pyarrow": "parquet",
    "rich": "cli",
    "typer": "cli",
}
"""What installs the packages that not everything needs (setup.cfg), by their modules."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # of models and of dataclasses


def os_problem(error: OSError) -> str:
    """A system error for people: the file, what is wrong, and what would help."""
    text = error.strerror or str(error) or type(error).__name__
    file = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{file}{text}" + (f" ({remedy})" if remedy else "")


def lacking(error: ImportError) -> str:
    """What a failed import asks for: the extra where its package is not installed, else as Python says it."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRAS or not isinstance(error, ModuleNotFoundError):
        return str(error)
    return f"needs {name}, which is not installed (pip install 'perseus-plugin[{_EXTRAS[name]}]')"


def plain(text: str) -> str:
    """What somebody else has written, in one line of its own, and with no code for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A refused value for people: as JSON where it has a form there, in one line of at most 80 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists without end
            text = f"a value of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def figure(value: float, form: str) -> str:
    """A figure for people; what rounds to nothing is not negative.

    Args:
        value: that may be negative.
        form: a format of fixed digits, such as ".2f" or "+.1%".
    """
    text = format(value, form)
    return text if any(digit in text for digit in "123456789an") else format(0.0, form)  # NaN is as it is


def validation_problem(error: ValidationError, model: type[BaseModel], source: str = "") -> str:
    """The first thing that is wrong with data, in one line: where it is, what was given, what is allowed.

    What is allowed is the `allowed` of the field's `json_schema_extra` where there is one, else as pydantic has it.

    Args:
        error: what `model` raised.
        model: what the data was checked by.
        source: how the whole of the data is called, put before the place; empty: not at all.
    """
    first = error.errors(include_url=False)[0]
    fields: Mapping[str, Any] = _fields(model)
    names = [source] if source else []
    allowed = ""
    for at, part in enumerate(first["loc"], 1):
        field = fields.get(str(part))
        if field is None and (fields or (first["type"] in _UNKNOWN and at == len(first["loc"]))):
            return _unknown_key(str(part), fields, ".".join(names), first["input"])
        names.append(str(part))
        fields = {} if field is None else _fields(field.annotation)
        if field is not None and isinstance(field.json_schema_extra, dict):
            allowed = str(field.json_schema_extra["allowed"])
            if not fields:
                break  # what follows are indices and names of a union's members
    where = ".".join(names) + ": " if names else ""
    if first["type"] == "missing":
        return f"{where}missing; it must be given"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return f"{where}not valid JSON: {reason.removeprefix('Invalid JSON: ')}"
    if first["type"] == "value_error" and allowed:  # a check of ours, which says itself what is allowed here
        allowed = reason
    elif reason.startswith("Input should be "):
        allowed = allowed or reason.removeprefix("Input should be ")
    return f"{where}got {shown(first['input'])}; " + (f"allowed: {allowed}" if allowed else _lowered(reason))


def _fields(model: Any) -> Mapping[str, Any]:
    """The fields of a pydantic model by the names they have in data; empty for anything else."""
    if getattr(model, "__pydantic_root_model__", False):
        return {}
    return {field.alias or name: field for name, field in getattr(model, "model_fields", {}).items()}


def _unknown_key(name: str, fields: Mapping[str, Any], section: str, value: object) -> str:
    known = sorted(fields)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    where = f"{section}." if section else ""
    said = name if name.isprintable() else json.dumps(name)
    text = f"{where}{said}: unknown key, given the value {shown(value)}"
    return f"{text}; {hint}known keys: {', '.join(known)}" if known else text


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


class PerseusError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PerseusError):
    """A wrong key or value in the `perseus` block or on a command line."""


class ProfileError(PerseusError):
    """A profile that cannot be planned on (missing rows, wrong values, wrong columns)."""


class ScheduleError(PerseusError):
    """Instruction streams that do not form a pipeline schedule (unmatched sends, cycles, deadlock)."""


class PlanError(PerseusError):
    """A plan that cannot be made (deadline too short) or a plan file that cannot be read."""


class GpuError(PerseusError):
    """A GPU that cannot be read or controlled: no permission, lost, not supported."""


class ClockNotFreeError(GpuError):
    """A GPU whose clock may still be locked although nobody wants that any more."""


class ReportError(PerseusError):
    """An output folder that cannot be reported on: foreign or damaged."""
