"""Pictures for papers and slides, of any kind that matplotlib writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from perseus_plugin.errors import ConfigError, lacking

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_drawable(path: Path | None, option: str) -> None:
    """Refuse a picture that cannot be drawn, before hours go into what it shows.

    Args:
        path: whose ending says of which kind it is; without one it is PNG. None: there is to be none.
        option: that gave it.

    Raises:
        ConfigError: matplotlib is not installed, or it does not write that kind.
    """
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError(f"{option}: {lacking(error)}") from error
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if _kind(path) not in kinds:
        raise ConfigError(f"{option}: got {path}; allowed: a path that ends in .{', .'.join(kinds)}")


def drawn(figure: Figure, path: Path) -> bytes:
    """What is to be written to the path, which was checked."""
    content = io.BytesIO()
    figure.savefig(content, format=_kind(path), dpi=120)
    return content.getvalue()


def _kind(path: Path) -> str:
    return path.suffix[1:].lower() or "png"
