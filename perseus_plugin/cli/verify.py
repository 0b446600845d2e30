"""`perseus verify`: is what measuring and control rest on true of this machine's GPU?"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

from perseus_plugin._version import __version__
from perseus_plugin.cli.destinations import check_writable, write, written
from perseus_plugin.cli.targets import DEFAULT_ZEUSD_SOCKET, Target, gpu_targets
from perseus_plugin.cli.terminal import console
from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A100
from perseus_plugin.gpus.registry import EMULATED, open_gpu
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD

if TYPE_CHECKING:
    from perseus_plugin.cli.verification.measuring import Subject
    from perseus_plugin.reporting.verification import Verification, Waiting

TIMES_S = {FORWARD: 0.02, BACKWARD: 0.04}
"""About how long instructions take: the short end of what jobs have, where measuring is hardest."""
_MOST_MINUTES = 60.0
_ROUNDS = 10
_T = TypeVar("_T")


def verify(
    minutes: Annotated[float, typer.Option(help="About how long to measure.")] = 5.0,
    set_clocks: Annotated[
        bool, typer.Option("--set-clocks", help="Also set clocks (they are reset at the end). Without: read-only.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="UUID of the GPU, or its beginning (default: the first visible one).", show_default=False),
    ] = None,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="On an emulated GPU; so it is where there is no GPU, too.")
    ] = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="JSON to write; the page goes beside it, ending in .html.")
    ] = Path("verify.json"),
    zeusd_socket: Annotated[str, typer.Option(help="Unix socket of the zeusd daemon.")] = DEFAULT_ZEUSD_SOCKET,
) -> None:
    """Measure, on a GPU that nothing else uses, what plans rest on: times, energies, waiting, clock changes."""
    # Load the estimator and the page, which other subcommands do without.
    from perseus_plugin.cli.verification.page import EMULATED as ONLY_EMULATED
    from perseus_plugin.cli.verification.page import machine_line, page, parts

    if not 0 < minutes <= _MOST_MINUTES:
        raise ConfigError(f"--minutes: got {minutes:g}; allowed: above 0, at most {_MOST_MINUTES:g}")
    if output.suffix != ".json":
        raise ConfigError(f"--output: got {output}; allowed: a path that ends in .json")
    check_writable(output)
    if emulated and gpu is not None:
        raise ConfigError("got --gpu and --emulated; allowed: one of them")
    to = console()

    def say(text: str) -> None:
        to.print(text, soft_wrap=True)

    target = None if emulated else _real(gpu, zeusd_socket, say)
    with _subject(target, set_clocks) as subject:
        found = measure(subject, 60 * minutes, set_clocks, say)
    beside = output.with_suffix(".html")
    write(output, found.to_json())
    write(beside, page(found))
    say(f"\n{machine_line(found)}")
    if found.machine.emulated:
        say(ONLY_EMULATED)
    for part in parts(found):
        shown = Table(title=part.title, title_justify="left")
        for index, name in enumerate(part.rows[0]):
            shown.add_column(name, justify="right" if index else "left")
        for row in part.rows[1:]:
            shown.add_row(*row)
        to.print(shown)
    for name, why in found.missing.items():
        say(f"not measured: {name}: {why}")
    say(written(output, beside))


def measure(subject: Subject, seconds: float, set_clocks: bool, say: Callable[[str], None]) -> Verification:
    """Everything, in about this time; what cannot be measured is said in the result."""
    from perseus_plugin.cli.verification import clocks, graphs, measuring
    from perseus_plugin.reporting.verification import GRAPHS, Machine, Verification

    began_s, missing = time.monotonic(), dict[str, str]()

    def part(name: str, share: float, run: Callable[[Subject, float], _T]) -> _T | None:
        say(f"{name}: about {max(share * seconds, 1):.0f} s")
        try:
            return run(subject, share * seconds)
        except Exception as error:  # on a GPU that nobody has seen yet: one figure must not cost the others
            missing[name] = (str(error) or repr(error)).splitlines()[0]
            return None

    gpu, supported = subject.gpu, subject.gpu.supported_clocks_mhz()
    measuring.warm_up(subject, 0.05 * seconds)
    calls = part("reading the GPU", 0.03, measuring.measure_calls)
    boundaries = part("times of instructions", 0.07, measuring.measure_boundaries)
    hooks = part("cost of the hooks", 0.07, measuring.measure_hooks)
    replays = part(GRAPHS, 0.06, graphs.measure_graphs)
    energies = part("energy of instructions", 0.36, measuring.measure_energies)
    at_the_limit = part("energy of instructions at the power limit", 0.15, measuring.measure_at_the_limit)
    waiting = part("waiting", 0.05, measuring.measure_waiting) or []
    waiting += _peers(subject, 0.05 * seconds, missing, say)
    switches, waiting_at = [], []
    if not set_clocks:
        missing["clock changes, waiting by clock"] = "clocks are only set with --set-clocks"
    elif not subject.watch.facts.can_lock:
        missing["clock changes, waiting by clock"] = subject.watch.facts.why_not
    else:
        switches = part("clock changes", 0.1, lambda one, s: clocks.measure_switches(one, _ROUNDS, s)) or []
        waiting_at = part("waiting by clock", 0.01, clocks.measure_waiting_at) or []
    return Verification(
        perseus_plugin=__version__,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=time.monotonic() - began_s,
        set_clocks=set_clocks,
        machine=Machine(
            gpu=gpu.name,
            emulated=gpu.emulated,
            backend=subject.bench.about,
            driver=gpu.driver,
            software={"python": platform.python_version(), **subject.bench.software, "linux": platform.release()},
            cpus=len(os.sched_getaffinity(0)),
            clocks_mhz=(supported[-1], supported[0]),
            clock_count=len(supported),
            power_limit_w=gpu.power_limit_w(),
        ),
        calls_us=calls or {},
        boundaries=boundaries,
        hooks=hooks,
        graphs=replays,
        counter=None if energies is None else energies.counter,
        estimator=None if energies is None else energies.estimator,
        at_the_limit=None if at_the_limit is None else at_the_limit.estimator,
        waiting=tuple(waiting),
        switches=tuple(switches),
        waiting_at=tuple(waiting_at),
        missing=missing,
    )


def _peers(subject: Subject, seconds: float, missing: dict[str, str], say: Callable[[str], None]) -> list[Waiting]:
    """Waiting in `torch.distributed`, on a real GPU: an emulated one waits in one way only."""
    from perseus_plugin.cli.verification.measuring import waiting
    from perseus_plugin.cli.verification.peers import ONE_GPU, peer_device, wait_for_a_peer

    if subject.gpu.emulated:
        missing["waiting in torch.distributed"] = "an emulated GPU waits in one way only"
        return []
    found, seconds = [], subject.watch.long_enough_s(seconds)
    for backend in ("gloo", "nccl"):
        name = f"receive of {backend}, peer late"
        peer = peer_device(subject.bench.device)
        say(f"{name}: about {seconds + 20:.0f} s")
        try:
            begin_s, end_s = wait_for_a_peer(backend, (subject.bench.device, peer), seconds)
        except GpuError as error:
            alone = backend == "nccl" and peer == subject.bench.device
            missing[name] = str(error) + (f"; {ONE_GPU}" if alone else "")
            continue
        found.append(waiting(subject.watch, name, begin_s, end_s))
    return found


def _real(uuid: str | None, zeusd_socket: str, say: Callable[[str], None]) -> Target | None:
    """The GPU to look at; None where there is none."""
    try:
        targets = gpu_targets([uuid] if uuid else [], [], zeusd_socket)
    except GpuError as error:
        if uuid:
            raise
        say(f"no GPU here ({error}): an emulated one is used, and its figures are a model's")
        return None
    if not targets:
        say("no GPU here, or none that CUDA_VISIBLE_DEVICES leaves: an emulated one is used, its figures are a model's")
        return None
    target = targets[0]
    if target.spec is None:
        raise GpuError(target.problem)
    return target


@contextmanager
def _subject(target: Target | None, set_clocks: bool) -> Iterator[Subject]:
    """Open the GPU, or make an emulated one, and have its counter watched."""
    from perseus_plugin.cli.verification.bench import CudaBench, EmulatedBench, cuda_device
    from perseus_plugin.cli.verification.measuring import Subject
    from perseus_plugin.cli.verification.running import Watch
    from perseus_plugin.control.selection import POLLS_PER_TICK, Selection

    with tempfile.TemporaryDirectory() as folder:
        if target is None or target.spec is None:
            gpu = EmulatedGpu.create(Path(folder) / "gpu")
            spec, poll_s = f"{EMULATED}:{Path(folder) / 'gpu'}", A100.tick_period_s / POLLS_PER_TICK
            subject = Subject(gpu, EmulatedBench(gpu, TIMES_S), Watch(spec, poll_s, control=set_clocks), TIMES_S)
        else:
            bench = CudaBench(cuda_device(target.name), TIMES_S)
            watch = Watch(target.spec, Selection.poll_interval_s, control=set_clocks)
            subject = Subject(open_gpu(target.spec), bench, watch, TIMES_S)
        try:
            yield subject
        finally:
            subject.watch.helper.close()
            subject.bench.close()
            subject.gpu.close()
