"""How the plugin gets into a process whose training script knows nothing of it.

`install_import_hooks` is an entry point of the group `torch.backends`: `import torch` calls it in *every* program of an
environment where this package is installed. So it costs microseconds, imports nothing, and never raises: it only
puts a finder in front of `sys.meta_path` that, when one of a few modules is imported, runs our patch after it. Where it
is not found, `import torch` fails, and what is installed may name an older place than the code has: so it stays here.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

# A framework is one entry: what it is called in messages, its modules, and our function that patches each of them.
_FRAMEWORKS = (
    (
        "DeepSpeed",
        ("deepspeed.runtime.engine", "deepspeed.runtime.pipe.engine"),
        "perseus_plugin.integrations.deepspeed.adapter:patch_engine_module",
    ),
    (
        "Megatron",
        ("megatron.training.arguments",),
        "perseus_plugin.integrations.megatron.arguments:patch_arguments_module",
    ),
    (
        "torch.distributed.pipelining",
        ("torch.distributed.pipelining.schedules",),
        "perseus_plugin.integrations.torch_pipelining.turning_on:patch_schedules_module",
    ),
    (
        "nvidia-resiliency-ext",
        ("nvidia_resiliency_ext.straggler.straggler", "nvidia_resiliency_ext.attribution.straggler.straggler"),
        "perseus_plugin.integrations.resiliency:patch_straggler_module",
    ),
)
_PATCHES = {module: (name, patch) for name, modules, patch in _FRAMEWORKS for module in modules}


def install_import_hooks() -> None:
    """Patch the frameworks' modules as soon as they are imported. Never raises; safe to call again."""
    name = ""
    try:
        for name in _PATCHES:
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                _patch(module, name)
        if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PatchingFinder())
    except Exception as error:
        _complain(error, name)


class _PatchingFinder(MetaPathFinder):
    """Finds the modules to be patched as the other finders would, with a loader that patches after execution."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _PATCHES or fullname in self._finding:
            return None
        self._finding.add(fullname)  # another tool's finder may ask all finders in its turn, and us again
        try:
            spec = self._found_by_others(fullname, path, target)
            if spec is None or spec.loader is None:
                return None
            spec.loader = _PatchingLoader(spec.loader, fullname)
        except Exception as error:
            _complain(error, fullname)
            return None
        finally:
            self._finding.discard(fullname)
        return spec

    def _found_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        """What would be found without us: other tools have finders of their own, which patch what they find."""
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is not self and find_spec is not None:
                spec: importlib.machinery.ModuleSpec | None = find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _PatchingLoader(Loader):
    """Delegates to the real loader; everything it does not define comes from there (`get_source` and the like)."""

    def __init__(self, real: Loader, name: str) -> None:
        self._real, self._name = real, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        try:
            _patch(module, self._name)
        except Exception as error:
            _complain(error, self._name)

    def __getattr__(self, name: str) -> Callable[..., object]:
        attribute: Callable[..., object] = getattr(self._real, name)
        return attribute


def _patch(module: ModuleType, name: str) -> None:
    where, _, function = _PATCHES[name][1].partition(":")
    getattr(importlib.import_module(where), function)(module)


def _complain(error: Exception, name: str) -> None:
    framework = _PATCHES[name][0] if name in _PATCHES else "any framework"
    message = f"perseus is off: could not hook into {framework}: {error!r}; the docs list supported versions"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # warnings are errors here; ours must not break somebody's import
        print(message, file=sys.stderr)
