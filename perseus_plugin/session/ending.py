"""A session ends before its job's process group does: its last figures go through the group's store.

Scripts end with `torch.distributed.destroy_process_group()`, or leave without it; then a session ends with the
interpreter.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from perseus_plugin.session.running import kept_sessions

logger = logging.getLogger(__name__)

_ours: set[Callable[..., Any]] = set()


def close_before_the_group() -> None:
    """From now on this process's sessions are closed when its default process group is destroyed. Idempotent."""
    distributed = sys.modules.get("torch.distributed")  # a job without it has no group
    module = sys.modules.get("torch.distributed.distributed_c10d")
    if distributed is None or module is None:
        return
    for owner in (distributed, module):
        _go_first(owner, "destroy_process_group", lambda group: group in (None, distributed.group.WORLD))
    # A script may have imported the function before us. This is what it calls before it lets go of the store.
    _go_first(module, "_update_default_pg", lambda group: group is None)


def _go_first(owner: Any, name: str, ends: Callable[[Any], bool]) -> None:
    """Close all sessions before a function runs, when it is called with a group that `ends` is true of."""
    stock = getattr(owner, name, None)
    if stock is None or stock in _ours:
        return

    @functools.wraps(stock)
    def close_first(*args: Any, **kwargs: Any) -> Any:
        if ends(next(iter((*args, *kwargs.values())), None)):
            _close_all()
        return stock(*args, **kwargs)

    _ours.add(close_first)
    setattr(owner, name, close_first)


def _close_all() -> None:
    for session in kept_sessions():
        try:
            session.close()
        except Exception as error:
            logger.warning("the summary may be incomplete: %r. Training is not affected", error)
