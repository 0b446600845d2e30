"""One logger tree, `perseus_plugin`: rank 0 speaks, the others only of their own trouble."""

from __future__ import annotations

import logging
import sys

ROOT = "perseus_plugin"


def set_up_logging(level: str, rank: int) -> None:
    """Set the tree's level, and give it a handler to standard error unless the program has set one up.

    Args:
        level: debug, info, warning or error; ranks other than 0 say nothing below a warning.
        rank: of this process.
    """
    root = logging.getLogger(ROOT)
    wanted = getattr(logging, level.upper())
    root.setLevel(wanted if rank == 0 else max(wanted, logging.WARNING))
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "perseus: " if rank == 0 else f"perseus (rank {rank}): "
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        root.addHandler(handler)
        root.propagate = False
