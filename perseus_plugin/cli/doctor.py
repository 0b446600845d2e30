"""`perseus doctor`: would a job's GPUs be controlled here, and if not, what is missing."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.targets import DEFAULT_ZEUSD_SOCKET, Target, exit_status, gpu_targets
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.examination import counter_problem, why_not_obeyed, why_not_planned
from perseus_plugin.control.ownership import describe, helper_elsewhere, holder_of, lock_path, read_record
from perseus_plugin.control.wire import SwitchLatency, Trouble
from perseus_plugin.errors import GpuError, PerseusError
from perseus_plugin.gpus.base import Divisible, Gpu, enforced_limit_w
from perseus_plugin.gpus.registry import backend, names, open_gpu

PACKAGES = ("torch", "deepspeed", "megatron-core", "ortools", "nvidia-ml-py")
COUNTER_WATCH_S = 1.0
COUNTER_POLL_S = 0.001
LATENCY_ROUNDS = 4
CONTROL_WAIT_S = 20.0


@dataclass
class Findings:
    """What was found out about one GPU.

    Attributes:
        gpu: name and UUID.
        controlled: whether plans would be made for it, and a job's clocks set.
        facts: what is known, by what it is about.
        remedy: what to do if it is not controlled.
    """

    gpu: str
    controlled: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    remedy: str = ""


def doctor(
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU, or its beginning; may be repeated. Default: all visible.")
    ] = None,
    emulated: Annotated[list[Path] | None, typer.Option(help="State file of an emulated GPU; may be repeated.")] = None,
    zeusd_socket: Annotated[str, typer.Option(help="Unix socket of the zeusd daemon.")] = DEFAULT_ZEUSD_SOCKET,
    control: Annotated[
        bool, typer.Option(help="Try to set clocks (for about a second; resets any lock that is there).")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say for each GPU what works: of those named, or of all that CUDA_VISIBLE_DEVICES leaves.

    Exit status 0 if plans would be made for all of them and clocks set, 3 if for some, 1 if for none.
    """
    software, services = _drivers(zeusd_socket)
    software.update({package: version_of(package) for package in PACKAGES})
    findings: list[Findings] = []
    problem = ""
    try:
        targets = gpu_targets(gpu or [], emulated or [], zeusd_socket)
        findings = [examine(target, control=control) for target in targets]
        if not findings:
            problem = "no GPU here, or none that CUDA_VISIBLE_DEVICES leaves"
    except PerseusError as error:
        problem = str(error)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "schema": "perseus-doctor/1",
                    "software": software,
                    **services,
                    "problem": problem,
                    "gpus": [asdict(found) for found in findings],
                },
                indent=2,
            )
        )
    else:
        _print({**software, **services}, findings, problem)
    raise typer.Exit(exit_status(sum(found.controlled for found in findings), len(findings)))


def examine(target: Target, *, control: bool) -> Findings:
    """Find out about one GPU; with `control` by locking and resetting its clock."""
    spec = target.spec
    if spec is None:
        return Findings(target.name, remedy=target.problem)
    try:
        device = open_gpu(spec)
    except GpuError as error:
        return Findings(target.name, remedy=str(error))
    found = Findings(f"{device.name} {device.uuid}")
    try:
        clocks = device.supported_clocks_mhz()
        found.facts["SM clocks"] = f"{len(clocks)} from {clocks[-1]} to {clocks[0]} MHz"
        found.facts["SM clock now"] = f"{device.read_clock_mhz()} MHz"
        limits_w = enforced_limit_w(device), device.power_limit_w()
        said = [f"{w:.0f} W" if w > 0 else "not told" for w in limits_w]
        found.facts["power limit"] = f"in force: {said[0]}, highest that can be set: {said[1]}"
        counter = counter_problem(device)
        found.facts["energy counter"] = counter or counter_period(device)
        path = lock_path(spec, device.uuid)
        if isinstance(device, Divisible):
            found.facts["MIG"] = "enabled" if device.mig_enabled() else "not in the way"
        holder = holder_of(path) or helper_elsewhere(device.uuid, path)
        if holder is not None:
            found.facts["control"] = f"held by {describe(holder)}"
            found.remedy = "wait until that job has ended"
        elif control:
            _examine_control(spec, found)
        else:
            left = read_record(path).get("clock") == "locked"
            found.facts["leftover lock"] = "yes; `perseus reset` frees it" if left else "none"
            found.remedy = "not tried: run without --no-control"
        why_not = why_not_planned(clocks, counter)
        if why_not:
            found.controlled, found.remedy = False, why_not
    except GpuError as error:
        found.remedy = str(error)
    finally:
        device.close()
    return found


def _examine_control(spec: str, found: Findings) -> None:
    """Have a helper process, which frees the clock whatever ends this one, take the GPU over and time its changes."""
    helper = ClockHelper.start(spec)
    try:
        device = helper.wait_ready(CONTROL_WAIT_S)
        if device is None or not device.can_lock:
            found.facts["control"] = "refused"
            found.remedy = device.why_not if device is not None else _time_changes(helper, 0.0)[1]
            return
        found.facts["control"] = f"allowed, through {device.backend}"
        found.facts["leftover lock"] = f"{device.leftover}; it was freed" if device.leftover else "none of ours"
        if device.foreign:
            found.facts["foreign lock"] = device.foreign
        if len(device.clocks_mhz) < 2:
            return
        helper.measure_latency(LATENCY_ROUNDS)
        found.facts["switch latency"], found.remedy = _time_changes(helper, CONTROL_WAIT_S)
        found.controlled = not found.remedy
    finally:
        helper.close(CONTROL_WAIT_S)


def _time_changes(helper: ClockHelper, wait_s: float) -> tuple[str, str]:
    """How long clock changes take, and why the GPU is not one to plan for, empty if it is."""
    end_s = time.monotonic() + wait_s
    while True:
        for event in helper.drain():
            if isinstance(event, SwitchLatency):
                why_not = why_not_obeyed(event)
                if why_not:
                    return "the clock never reached its target", why_not
                text = f"{1e3 * event.p50_s:.1f} ms (95 %: {1e3 * event.p95_s:.1f} ms, {event.samples} changes"
                return text + (f", {event.timeouts} not seen)" if event.timeouts else ")"), ""
            if isinstance(event, Trouble):
                return "not known", event.text
        if time.monotonic() >= end_s:
            return "not known", "the clock helper did not answer in time"
        time.sleep(COUNTER_POLL_S)


def counter_period(
    device: Gpu, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> str:
    """How often an energy counter that moves does so, watched for a second."""
    last = device.read_energy()
    end_s = now() + COUNTER_WATCH_S
    ticks: list[float] = []
    while now() < end_s:
        sleep(COUNTER_POLL_S)
        reading = device.read_energy()
        if reading.energy_j != last.energy_j:
            ticks.append(reading.time_s)
        last = reading
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    return f"moves every {1e3 * statistics.median(gaps):.0f} ms" if gaps else "moves"


def _drivers(zeusd_socket: str) -> tuple[dict[str, str], dict[str, str]]:
    """What backends say of the software they need, and of the daemons."""
    software: dict[str, str] = {}
    services: dict[str, str] = {}
    for name in names():
        try:
            one = backend(name)
        except GpuError as error:
            software[f"backend {name}"] = str(error)
            continue
        software.update(one.software())
        if state := one.service(zeusd_socket):
            services[name] = state
    return software, services


def version_of(package: str) -> str:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print(software: dict[str, str], findings: list[Findings], problem: str) -> None:
    for name, state in software.items():
        typer.echo(f"{name:16} {state}")
    for found in findings:
        typer.echo(f"\n{found.gpu}: {'would be controlled' if found.controlled else 'would NOT be controlled'}")
        for about, text in found.facts.items():
            typer.echo(f"  {about:14} {text}")
        if found.remedy:
            typer.echo(f"  {'to do':14} {found.remedy}")
    if problem:
        typer.echo(f"\nno GPU would be controlled: {problem}")
