"""How PyTorch's schedules come to be hooked: by an environment variable, or by a call. Imports next to nothing.

`torch.distributed.pipelining` is imported by programs that do not use the plugin, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.base import is_first_of_machine, say_could_not_start, wrap_once

VARIABLE = "PERSEUS_CONFIG"
"""Names a YAML or JSON file with the `perseus` block."""

_BASE = "_PipelineSchedule"
_given: list[str] = []


def patch_schedules_module(module: ModuleType) -> None:
    """Have every schedule that is built be hooked where the job asks for it. Idempotent.

    The settings are read when a schedule is built: one that is wrong costs seconds, and no training.
    """

    def around(stock: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            path = _given[-1] if _given else os.environ.get(VARIABLE)
            if path:
                _hook(self, path)

        return init

    wrap_once(getattr(module, _BASE, None), "__init__", around)


def is_schedule(candidate: Any) -> bool:
    """Whether it is a schedule of `torch.distributed.pipelining`, of any version."""
    return any(one.__name__ == _BASE for one in type(candidate).__mro__)


def turn_on(path: str) -> None:
    """Hook every schedule that is built from now on, with the settings in a file; instead of the variable."""
    _given.append(path)


def _hook(schedule: Any, path: str) -> None:
    try:
        from perseus_plugin.integrations.torch_pipelining.adapter import enable

        enable(schedule, path)
    except ConfigError:
        # Not on rank 0 alone: the file may be missing, or wrong, on another machine.
        if not is_first_of_machine():
            raise SystemExit(1) from None  # the same traceback from every rank would bury it
        raise
    except Exception:
        say_could_not_start()  # a fault of ours, or an incomplete installation
