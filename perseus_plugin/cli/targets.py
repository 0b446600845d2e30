"""Which GPUs a command is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.gpus.base import ListedGpu
from perseus_plugin.gpus.registry import EMULATED, backend, names, spec_of
from perseus_plugin.gpus.visible import matches

DEFAULT_ZEUSD_SOCKET = "/run/zeusd/zeusd.sock"
ALL, NONE, SOME = 0, 1, 3
"""Exit status of a command that did what it does for all GPUs, for none of them, or for some; 2 is wrong usage."""


@dataclass(frozen=True)
class Target:
    """One GPU that a command is about.

    Attributes:
        name: for people.
        spec: see `gpus.registry`; None for a GPU that cannot be told by its UUID.
        problem: why not.
    """

    name: str
    spec: str | None = None
    problem: str = ""


def exit_status(done: int, of: int) -> int:
    """See `ALL`; nothing to do counts as none."""
    return NONE if done == 0 else ALL if done == of else SOME


def gpu_targets(uuids: Sequence[str], emulated: Sequence[Path], zeusd_socket: str) -> list[Target]:
    """The GPUs named, by UUID or its beginning; all that CUDA would show if none is named.

    One that does not answer is among them, with the reason: it must not keep a command from the others.

    Raises:
        GpuError: no backend lists any, as its driver is not there.
        ConfigError: a file that is no emulated GPU.
    """
    for path in emulated:
        if not path.is_file():
            raise ConfigError(f"--emulated: got {str(path)!r}; allowed: the state file of an emulated GPU")
    listed = _listed() if uuids or not emulated else {}
    if uuids:
        targets = [_named(wanted, listed, zeusd_socket) for wanted in uuids]
    else:
        seen = [(name, gpu) for name, gpus in listed.items() for gpu in backend(name).visible(gpus)]
        targets = [_target(name, gpu, zeusd_socket) for name, gpu in seen]
    return [*targets, *(Target(str(path), f"{EMULATED}:{path.absolute()}") for path in emulated)]


def _target(name: str, gpu: ListedGpu, zeusd_socket: str) -> Target:
    if not gpu.uuid:
        return Target(f"GPU {gpu.index}", problem=gpu.problem)
    return Target(gpu.uuid, spec_of(name, gpu.uuid, zeusd_socket, auto=True))


def _listed() -> dict[str, Sequence[ListedGpu]]:
    """Every GPU of the machine, by the backend that lists it.

    Raises:
        GpuError: none is listed; the first backend that cannot says why.
    """
    found: dict[str, Sequence[ListedGpu]] = {}
    problem: GpuError | None = None
    for name in names():
        try:
            found[name] = backend(name).listed()
        except GpuError as error:
            problem = problem or error
    if problem is not None and not any(found.values()):
        raise problem
    return found


def _named(wanted: str, listed: Mapping[str, Sequence[ListedGpu]], zeusd_socket: str) -> Target:
    gpus = [(name, gpu) for name, of_backend in listed.items() for gpu in of_backend]
    found = matches(wanted, [gpu.uuid for _, gpu in gpus])
    if len(found) == 1:
        return _target(*gpus[found[0]], zeusd_socket)
    known = ", ".join(gpu.uuid for _, gpu in (gpus if not found else [gpus[i] for i in found]) if gpu.uuid)
    meaning = f"the beginning of {len(found)} UUIDs" if found else "no GPU here"
    silent = [gpu.problem for _, gpu in gpus if not gpu.uuid]
    told = f"; {len(silent)} more do not tell theirs ({silent[0]})" if silent and not found else ""
    return Target(wanted, problem=f"--gpu: got {wanted!r}, which is {meaning}; allowed: one of {known or 'none'}{told}")
