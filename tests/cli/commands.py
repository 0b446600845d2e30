"""The `perseus` command as tests run it; the fixture is in `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Perseus = Callable[..., Done]
