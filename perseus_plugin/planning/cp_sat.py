"""OR-Tools' CP-SAT without pandas, which its module imports for variables in series: of these nothing here has any.

Pandas would be a third of what `perseus plan` takes for a small job, and 110 MB of every planner's memory.
"""

from __future__ import annotations

import builtins
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["cp_model", "without_pandas"]


class _OnlyNamed(ModuleType):
    """Has the classes that annotations name."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {})


def _import(name: str, *rest: Any) -> Any:
    return _OnlyNamed(name) if name == "pandas" else builtins.__import__(name, *rest)


def without_pandas(name: str) -> ModuleType:
    """A module of our own, for which importing pandas does nothing; the one that others import is left alone.

    Where it needs more of pandas than names it is that one.
    """
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    made = module_from_spec(spec)
    made.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
    try:
        spec.loader.exec_module(made)
    except Exception:  # whatever another version does with what is not pandas, while it is loaded
        return import_module(name)
    return made


if not TYPE_CHECKING:
    cp_model = without_pandas("ortools.sat.python.cp_model")
