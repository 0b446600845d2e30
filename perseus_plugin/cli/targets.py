"""Which GPUs a command is about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.errors import ConfigError
from perseus_plugin.gpus.visible import ORDER_VARIABLE, VARIABLE, has_indices, matches, visible_positions

DEFAULT_ZEUSD_SOCKET = "/run/zeusd/zeusd.sock"
ALL, NONE, SOME = 0, 1, 3
"""Exit status of a command that did what it does for all GPUs, for none of them, or for some; 2 is wrong usage."""

GpuOption = Annotated[
    list[str] | None,
    typer.Option(
        help="UUID of a GPU, or its beginning; may be repeated. Default: all that CUDA_VISIBLE_DEVICES leaves."
    ),
]


@dataclass(frozen=True)
class Target:
    """One GPU that a command is about.

    Attributes:
        name: for people.
        spec: see `gpus.opening`; None for a GPU that cannot be told by its UUID.
        problem: why not.
    """

    name: str
    spec: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Listed:
    """One GPU of the machine as NVML lists it; `uuid` and `model` are empty where it does not tell, for `problem`."""

    index: int
    uuid: str = ""
    model: str = ""
    problem: str = ""


def exit_status(done: int, of: int) -> int:
    """See `ALL`; nothing to do counts as none."""
    return NONE if done == 0 else ALL if done == of else SOME


def gpu_targets(uuids: Sequence[str], emulated: Sequence[Path], zeusd_socket: str) -> list[Target]:
    """The GPUs named, by UUID or its beginning; all that CUDA would show if none is named.

    One that does not answer is among them, with the reason: it must not keep a command from the others.

    Raises:
        GpuError: NVML is not there.
        ConfigError: a file that is no emulated GPU.
    """
    for path in emulated:
        if not path.is_file():
            raise ConfigError(f"--emulated: got {str(path)!r}; allowed: the state file of an emulated GPU")
    if uuids:
        listed = list_gpus()
        targets = [_named(wanted, listed, zeusd_socket) for wanted in uuids]
    else:
        targets = [] if emulated else [_target(gpu, zeusd_socket) for gpu in _visible(list_gpus())]
    return [*targets, *(Target(str(path), f"emulated:{path.absolute()}") for path in emulated)]


def _target(gpu: Listed, zeusd_socket: str) -> Target:
    if not gpu.uuid:
        return Target(f"GPU {gpu.index}", problem=gpu.problem)
    return Target(gpu.uuid, f"auto:{zeusd_socket}:{gpu.uuid}")


def list_gpus() -> list[Listed]:
    """Every GPU of the machine, one by one.

    Raises:
        GpuError: NVML is not there, or cannot count them.
    """
    from perseus_plugin.gpus.nvml import load_nvml, text_of, translate

    nvml = load_nvml()
    try:
        found: list[Listed] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = text_of(nvml.nvmlDeviceGetUUID(handle))
                found.append(Listed(index, uuid, text_of(nvml.nvmlDeviceGetName(handle))))
            except nvml.NVMLError as error:
                found.append(Listed(index, problem=str(translate(error, f"GPU {index}"))))
        return found
    except nvml.NVMLError as error:
        raise translate(error, "NVML: cannot list the GPUs") from error
    finally:
        nvml.nvmlShutdown()


def _named(wanted: str, listed: Sequence[Listed], zeusd_socket: str) -> Target:
    found = matches(wanted, [gpu.uuid for gpu in listed])
    if len(found) == 1:
        return _target(listed[found[0]], zeusd_socket)
    known = ", ".join(gpu.uuid for gpu in (listed if not found else [listed[i] for i in found]) if gpu.uuid)
    meaning = f"the beginning of {len(found)} UUIDs" if found else "no GPU here"
    silent = [gpu.problem for gpu in listed if not gpu.uuid]
    told = f"; {len(silent)} more do not tell theirs ({silent[0]})" if silent and not found else ""
    return Target(wanted, problem=f"--gpu: got {wanted!r}, which is {meaning}; allowed: one of {known or 'none'}{told}")


def _visible(listed: Sequence[Listed]) -> list[Listed]:
    value = os.environ.get(VARIABLE)
    by_pci = os.environ.get(ORDER_VARIABLE) == "PCI_BUS_ID"
    if has_indices(value) and not by_pci and len({gpu.model for gpu in listed if gpu.model}) > 1:
        raise ConfigError(
            f"{VARIABLE}: got {value!r}; allowed with GPUs of different models: UUIDs, or indices with "
            f"{ORDER_VARIABLE}=PCI_BUS_ID (else CUDA counts the fastest first, which NVML does not know); or name "
            "them with --gpu"
        )
    return [listed[position] for position in visible_positions(value, [gpu.uuid for gpu in listed])]
