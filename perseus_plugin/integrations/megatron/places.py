"""Functions of Megatron's modules: what they are called with, and wrappers that stand in their place now and then."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from perseus_plugin.integrations.base import Function

_WRAPPERS_KEPT = 3


class Argument:
    """One argument of a function, by name, however it is passed.

    Args:
        function: whose signature counts.
        name: of the argument.
        usual: its position in Megatron's own function, for one that only passes on `*args`, as other tools' wrappers
            do. None: it is passed by name.
    """

    def __init__(self, function: Function, name: str, usual: int | None = None) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # compiled functions need not tell theirs: then the place is Megatron's own
            parameters = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        passes_on = not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._name = name
        self._position = positional.index(name) if name in positional else usual if passes_on else None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call, None where it was not passed."""
        if self._name in kwargs:
            return kwargs[self._name]
        return args[self._position] if self._position is not None and self._position < len(args) else None


class Place:
    """One name in a module, and the wrapper that stands there now and then.

    Args:
        module, name: the place, of a module or a class.
        wrap: makes the wrapper of a function.
    """

    def __init__(self, module: ModuleType | type, name: str, wrap: Callable[[Function], Function]) -> None:
        self._module, self._name, self._wrap = module, name, wrap
        self._made: list[tuple[Function, Function]] = []
        # All that still live: another tool may keep an old one and put it back at any time.
        self._beneath: weakref.WeakKeyDictionary[Function, Function] = weakref.WeakKeyDictionary()

    def put(self) -> None:
        """Put a wrapper around what stands there, unless it is one of ours; nothing where nothing stands."""
        there = getattr(self._module, self._name, None)
        if there is None or self._is_ours(there):
            return
        # What was wrapped before is known again: it is the same in every iteration, and its signature was looked at.
        wrapper = next((wrapper for beneath, wrapper in self._made if beneath is there), None)
        if wrapper is None:
            wrapper = functools.wraps(there)(self._wrap(there))
            self._made = [*self._made[-_WRAPPERS_KEPT:], (there, wrapper)]
            self._beneath[wrapper] = there
        setattr(self._module, self._name, wrapper)

    @property
    def displaced(self) -> bool:
        """Whether somebody has put something else in the place of our wrapper."""
        there = getattr(self._module, self._name, None)
        return bool(self._made) and not self._is_ours(there)

    def take_out(self) -> None:
        """Put back what our wrapper has replaced, if the wrapper still stands there."""
        there = getattr(self._module, self._name, None)
        if there is not None and self._is_ours(there):
            setattr(self._module, self._name, self._beneath[there])

    def _is_ours(self, function: Any) -> bool:
        return any(function is wrapper for wrapper in list(self._beneath))
