"""The sessions that run in this process, without importing what a session needs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perseus_plugin.session.session import Session

_live: weakref.WeakSet[Session] = weakref.WeakSet()


def runs(session: Session) -> None:
    """A session has started; forgotten when nobody keeps it any more."""
    _live.add(session)


def kept_sessions() -> list[Session]:
    """All that anybody keeps, whether they have ended or not."""
    return list(_live)


def running_sessions() -> list[Session]:
    """Those that have not ended; empty where no session was ever started."""
    return [session for session in _live if not session.closed]
