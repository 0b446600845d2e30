"""How the plugin gets into a process whose training script knows nothing of it.

`install_import_hooks` is an entry point of the group `torch.backends`: `import torch` calls it in *every* program of an
environment where this package is installed. So it costs microseconds, imports nothing, and never raises: it only
puts a finder in front of `sys.meta_path` that, when DeepSpeed's engine modules are imported, runs our patch after them.
"""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

_ENGINE_MODULES = ("deepspeed.runtime.engine", "deepspeed.runtime.pipe.engine")


def install_import_hooks() -> None:
    """Patch DeepSpeed's engine classes as soon as they are imported. Never raises; safe to call again."""
    try:
        for name in _ENGINE_MODULES:
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                _patch(module)
        if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PatchingFinder())
    except Exception as error:
        _complain(error)


class _PatchingFinder(MetaPathFinder):
    """Finds the engine modules as the normal finders would, with a loader that patches after execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ENGINE_MODULES:
            return None
        try:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is None or spec.loader is None:
                return None
            spec.loader = _PatchingLoader(spec.loader)
        except Exception as error:
            _complain(error)
            return None
        return spec


class _PatchingLoader(Loader):
    """Delegates to the real loader; everything it does not define comes from there (`get_source` and the like)."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        try:
            _patch(module)
        except Exception as error:
            _complain(error)

    def __getattr__(self, name: str) -> Callable[..., object]:
        attribute: Callable[..., object] = getattr(self._real, name)
        return attribute


def _patch(module: ModuleType) -> None:
    from perseus_plugin.integrations.deepspeed import patch_engine_module

    patch_engine_module(module)


def _complain(error: Exception) -> None:
    message = f"perseus is off: could not hook into DeepSpeed: {error!r}; see docs/deepspeed.md for supported versions"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # warnings are errors here; ours must not break somebody's import
        print(message, file=sys.stderr)
