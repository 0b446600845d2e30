"""Functions of ours in the place of one object's methods, among those that other tools put there."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from perseus_plugin.integrations.base import Function

MadeFrom = Callable[[Callable[[], Function]], Function]
"""Makes one of our functions from what says, at any time, what is beneath it."""


class InstanceMethods:
    """Our functions in the place of an object's methods, on the instance; each calls what is beneath it.

    Beneath is what was on the instance when it was put there, else what the class has at the time of the call.

    Args:
        of_object: the object, which may be gone.
        made_from: by name, makes the function from one that says what is beneath.
    """

    def __init__(self, of_object: Callable[[], Any], made_from: Mapping[str, MadeFrom]) -> None:
        self._of_object, self._made_from = of_object, made_from
        # Those that still live, with what each is around: another tool may keep an old one and put it back at any time.
        self._put: weakref.WeakKeyDictionary[Function, list[Any]] = weakref.WeakKeyDictionary()
        self.put_all()

    def put_all(self) -> None:
        """Put ours on top, where none of ours is there."""
        for name in self._made_from:
            self.put(name)

    def put(self, name: str) -> None:
        """Put ours on top, unless one of ours is there."""
        attributes, of_object = vars(self._of_object()), self._of_object
        there = [attributes[name]] if name in attributes else []
        replaced: Any = there[0] if there else getattr(type(self._of_object()), name, None)
        if replaced is None or self._is_ours(replaced):
            return

        def beneath() -> Function:
            alive = of_object()
            function: Function = there[0] if there else getattr(type(alive), name).__get__(alive)
            return function

        function = functools.wraps(replaced)(self._made_from[name](beneath))
        vars(function).pop("__wrapped__", None)  # a bound method would keep the object
        self._put[function] = there
        attributes[name] = function

    def take_out(self) -> None:
        """Have the object's methods be as without us, where nobody has put something around ours since."""
        alive = self._of_object()
        for name in self._made_from if alive is not None else ():
            while self._is_ours(function := vars(alive).get(name)):
                there = self._put[function]
                del vars(alive)[name]
                vars(alive).update({name: there[0]} if there else {})

    def _is_ours(self, function: Any) -> bool:
        return any(function is ours for ours in list(self._put))
