"""The `perseus` command as tests run it; the fixture is in `conftest.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Perseus = Callable[..., Done]

OF_AXES = ("#000000", "#ffffff", "#cccccc")
"""Of frames and text, which are not of the palette."""


def colours(svg: str) -> set[str]:
    """Colours that a picture has."""
    return set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
