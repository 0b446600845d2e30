"""`perseus reset`: free clocks that a dead run left locked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.targets import DEFAULT_ZEUSD_SOCKET, NONE, Target, exit_status, gpu_targets
from perseus_plugin.control.helper.takeover import take_over
from perseus_plugin.control.ownership import describe, helper_elsewhere, holder_of, lock_path
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.registry import candidate_specs, open_gpu


def reset(
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU, or its beginning; may be repeated. Default: all visible.")
    ] = None,
    emulated: Annotated[list[Path] | None, typer.Option(help="State file of an emulated GPU; may be repeated.")] = None,
    zeusd_socket: Annotated[str, typer.Option(help="Unix socket of the zeusd daemon.")] = DEFAULT_ZEUSD_SOCKET,
    force: Annotated[bool, typer.Option(help="Also GPUs that a running job controls.")] = False,
) -> None:
    """Free the SM clocks of GPUs: of those named, or of all that CUDA_VISIBLE_DEVICES leaves.

    Exit status 0 if all are free, 3 if some are, 1 if none is.
    """
    try:
        targets = gpu_targets(gpu or [], emulated or [], zeusd_socket)
    except GpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(NONE) from error
    if not targets:
        typer.echo("error: no GPU here, or none that CUDA_VISIBLE_DEVICES leaves", err=True)
    freed = [reset_one(target, force=force) for target in targets]
    raise typer.Exit(exit_status(sum(freed), len(freed)))


def reset_one(target: Target, *, force: bool) -> bool:
    """Free one GPU's clock and print how that went."""
    spec = target.spec
    if spec is None:
        typer.echo(f"{target.name}: not freed: {target.problem}")
        return False
    try:
        device, ownership, facts = take_over(spec, os.getpid(), wait_s=0.0, examine=False)
    except GpuError as error:
        typer.echo(f"{target.name}: not freed: {error}")
        return False
    who = f"{facts.name} {facts.uuid}"
    try:
        if ownership is not None:
            ownership.found(0)  # whoever resets wants no lock at all, nor one made again later
            ownership.release()
            typer.echo(f"{who}: free" + (f" (it was {facts.leftover})" if facts.leftover else ""))
            return True
        try:
            lock = lock_path(spec, facts.uuid)
            holder = holder_of(lock) or helper_elsewhere(facts.uuid, lock)
            by = "" if holder is None else f" (controlled by {describe(holder)})"
        except GpuError:  # its reason is that of `why_not`
            by = " (whoever controls it)"
        if not by or not force:
            hint = "; --force frees it all the same" if by else ""
            typer.echo(f"{who}: not freed: {facts.why_not}{hint}")
            return False
        return _reset_by_force(spec, who + by)
    finally:
        device.close()


def _reset_by_force(spec: str, who: str) -> bool:
    refusals = []
    for candidate in candidate_specs(spec):
        try:
            device = open_gpu(candidate)
            try:
                device.reset_clock()
            finally:
                device.close()
        except GpuError as error:
            refusals.append(str(error))
        else:
            typer.echo(f"{who}: free")
            return True
    typer.echo(f"{who}: not freed: {'; and '.join(refusals)}")
    return False
