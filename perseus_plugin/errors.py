"""Errors that a user is meant to read: one sentence, naming the thing, the value and what is allowed."""

from __future__ import annotations


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


class ReportError(PerseusError):
    """An output folder that cannot be reported on: foreign or damaged."""
