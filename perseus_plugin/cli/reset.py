"""`perseus reset`: free clocks that a dead run left locked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.targets import DEFAULT_ZEUSD_SOCKET, gpu_specs
from perseus_plugin.control.ownership import describe, holder_of, lock_path
from perseus_plugin.control.takeover import take_over
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.opening import candidate_specs, open_gpu


def reset(
    gpu: Annotated[list[str] | None, typer.Option(help="UUID of a GPU; may be repeated. Default: all.")] = None,
    emulated: Annotated[list[Path] | None, typer.Option(help="State file of an emulated GPU; may be repeated.")] = None,
    zeusd_socket: Annotated[str, typer.Option(help="Unix socket of the zeusd daemon.")] = DEFAULT_ZEUSD_SOCKET,
    force: Annotated[bool, typer.Option(help="Also GPUs that a running job controls.")] = False,
) -> None:
    """Free the SM clocks of GPUs: of those named, or of all. Exit status 1 if one could not be freed."""
    try:
        specs = gpu_specs(gpu or [], emulated or [], zeusd_socket)
    except GpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    failed = [spec for spec in specs if not reset_one(spec, force=force)]
    raise typer.Exit(1 if failed else 0)


def reset_one(spec: str, *, force: bool) -> bool:
    """Free one GPU's clock and print how that went."""
    try:
        device, ownership, facts = take_over(spec, os.getpid(), wait_s=0.0)
    except GpuError as error:
        typer.echo(f"{spec}: not freed: {error}")
        return False
    who = f"{facts.name} {facts.uuid}"
    try:
        if ownership is not None:
            ownership.release()
            typer.echo(f"{who}: free" + (f" (it was {facts.leftover})" if facts.leftover else ""))
            return True
        holder = holder_of(lock_path(spec, facts.uuid))
        if holder is None or not force:
            hint = "" if holder is None else "; --force frees it all the same"
            typer.echo(f"{who}: not freed: {facts.why_not}{hint}")
            return False
        return _reset_by_force(spec, f"{who} (controlled by {describe(holder)})")
    finally:
        device.close()


def _reset_by_force(spec: str, who: str) -> bool:
    refusals = []
    for candidate in candidate_specs(spec):
        try:
            open_gpu(candidate).reset_clock()
        except GpuError as error:
            refusals.append(str(error))
        else:
            typer.echo(f"{who}: free")
            return True
    typer.echo(f"{who}: not freed: {'; and '.join(refusals)}")
    return False
