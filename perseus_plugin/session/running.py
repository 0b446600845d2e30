"""The sessions that run in this process, without importing what a session needs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perseus_plugin.session.session import Session


def running_sessions() -> list[Session]:
    """Those that have not ended; empty where no session was ever started."""
    module = sys.modules.get("perseus_plugin.session.session")
    return [] if module is None else [session for session in module.live_sessions if not session.closed]
