"""One logger tree, `perseus_plugin`: rank 0 speaks, the others only of their own trouble."""

from __future__ import annotations

import logging
import sys

from perseus_plugin.exchange.messages import Placement

ROOT = "perseus_plugin"


def set_up_logging(level: str, placement: Placement) -> None:
    """Set the tree's level, and give it a handler to standard error unless the program has set one up.

    Args:
        level: debug, info, warning or error; ranks that do not lead say nothing below a warning.
        placement: of this rank.
    """
    root = logging.getLogger(ROOT)
    wanted = getattr(logging, level.upper())
    root.setLevel(wanted if placement.leads else max(wanted, logging.WARNING))
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "perseus: " if placement.leads else f"perseus (rank {placement.rank}): "
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        root.addHandler(handler)
        root.propagate = False
