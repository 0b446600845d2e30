"""The GPU backends there are, and GPUs named across a process boundary: a spec string, and the `Gpu` it opens.

    emulated:PATH               an emulated GPU's state file
    nvml:UUID                   a GPU through NVML
    zeusd:SOCKET:INDEX:UUID     clocks through the zeusd daemon, readings through NVML; INDEX is the daemon's number of
                                the GPU and may be empty (found by its PCI address)
    auto:SOCKET:UUID            NVML where that is allowed, else zeusd where it answers on SOCKET
    NAME:REST                   a GPU of a backend that another package brings (`docs/extending.md`)

Backends are imported only when one is asked: the helper process starts with as little as it needs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu, GpuBackend

AUTO, OFF = "auto", "off"
"""Values of `perseus.gpu.backend` that are no backends: whichever serves, and none."""
EMULATED = "emulated"

# A new backend is one line here.
_BACKENDS = {
    "nvml": "perseus_plugin.gpus.nvml:NvmlBackend",
    "zeusd": "perseus_plugin.gpus.zeusd:ZeusdBackend",
    EMULATED: "perseus_plugin.gpus.emulated.device:EmulatedBackend",
}
ENTRY_POINTS = "perseus_plugin.gpus"
"""Group of entry points by which other packages bring backends of theirs; names that are taken are not looked at."""
_ONE_GPU = ("nvml", "zeusd")
"""Ways to one and the same GPU: with `auto` the helper tries them in this order."""


def choices(outside: bool = True) -> str:
    """What `perseus.gpu.backend` may be, for people; with the backends of other packages that are here."""
    return one_of([AUTO, *(names() if outside else _BACKENDS), OFF])


def one_of(allowed: Sequence[str]) -> str:
    """`"a", "b" or "c"`."""
    quoted = [f'"{name}"' for name in allowed]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]])


def names() -> tuple[str, ...]:
    """Names of all backends, those of other packages last."""
    return (*_BACKENDS, *_outside())


def is_backend(name: str) -> bool:
    """Whether there is a backend of this name."""
    return name in _BACKENDS or name in _outside()


def backend(name: str) -> GpuBackend:
    """The backend of this name.

    Raises:
        GpuError: there is none, or it cannot be loaded.
    """
    if not is_backend(name):
        raise GpuError(f"GPU backend {name!r}: allowed: {', '.join(names())}")
    return _load(name, _BACKENDS.get(name) or _outside()[name])


def backends() -> Iterator[tuple[str, GpuBackend]]:
    """All backends with their names, each loaded when it is its turn.

    Raises:
        GpuError: one of another package cannot be loaded.
    """
    for name in names():
        yield name, backend(name)


def open_gpu(spec: str) -> Gpu:
    """Open the GPU that `spec` names; for `auto` with what can at least be read: NVML.

    Raises:
        GpuError: a spec of no known form, or a GPU that cannot be opened.
    """
    name, _, rest = candidate_specs(spec)[0].partition(":")
    try:
        if not rest or not is_backend(name):
            raise ValueError(spec)
        return backend(name).open(rest)
    except ValueError as error:
        forms = {known: found.form for known, found in backends()}
        shown = [f"{known}:{form}" for known, form in {**forms, AUTO: "SOCKET:UUID"}.items()]
        raise GpuError(f"GPU {spec!r}: allowed: {', '.join(shown)}") from error


def candidate_specs(spec: str) -> tuple[str, ...]:
    """The specs to try in this order for control of the GPU that `spec` names."""
    name, _, rest = spec.partition(":")
    socket, colon, uuid = rest.rpartition(":")
    if name != AUTO or not colon:
        return (spec,)
    return tuple(spec_of(way, uuid, socket) for way in _ONE_GPU)


def spec_of(name: str, uuid: str, socket: str, *, auto: bool = False) -> str:
    """The spec of a GPU.

    Args:
        name: of the backend, or `auto`.
        uuid: of the GPU.
        socket: `perseus.gpu.zeusd_socket`.
        auto: whether another way to the same GPU will do, too.
    """
    if name == AUTO or (auto and name in _ONE_GPU):
        return f"{AUTO}:{socket}:{uuid}"
    return f"{name}:{backend(name).rest_of(uuid, socket)}"


def lock_file(spec: str) -> Path | None:
    """Where the backend of a spec has the GPU's lock file; None: where all others are."""
    name, _, rest = candidate_specs(spec)[0].partition(":")
    return backend(name).lock_file(rest)


def _outside() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS) if point.name not in _BACKENDS}


@functools.cache
def _load(name: str, path: str) -> GpuBackend:
    module, _, attribute = path.partition(":")
    try:
        made: GpuBackend = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise GpuError(f"GPU backend {name!r}: {path} cannot be loaded: {error!r}") from error
    return made
