"""The process that owns a GPU's clock: `perseus_plugin.control.helper SPEC --parent PID`, run by `processes`.

It takes commands on standard input and answers on standard output (`wire.py`). Whatever ends it (end of the
pipe, a signal, an error, the death of the parent by any cause), it first resets the clock and makes sure
that it holds. It imports only what it needs, so that it starts fast.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from perseus_plugin.control.helper.heartbeat import Heartbeat
from perseus_plugin.control.helper.loop import HelperLoop
from perseus_plugin.control.helper.parent import Parent
from perseus_plugin.control.helper.rescue import rescue
from perseus_plugin.control.helper.resetting import free_clock, not_free
from perseus_plugin.control.helper.takeover import only_read, restore_foreign, take_over
from perseus_plugin.control.ownership import Ownership
from perseus_plugin.control.wire import BYE, EXIT_NO_GPU, EXIT_RESET_FAILED, READY, Trouble, pack_event, pack_reply
from perseus_plugin.errors import GpuError, os_problem
from perseus_plugin.gpus.base import Gpu

RESET_LIMIT_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Run the helper; returns its exit status (2: no GPU, 3: the clock may still be locked)."""
    wakeup = _catch_signals()
    options = _parse(arguments)
    inlet, outlet = sys.stdin.fileno(), sys.stdout.fileno()
    os.set_blocking(inlet, False)
    os.set_blocking(outlet, False)
    if options.reset_only:
        return _rescue(options, outlet)
    heartbeat = Heartbeat(outlet)
    heartbeat.beat()
    try:
        if options.read_only:
            gpu, ownership, facts = only_read(options.spec)
        else:
            gpu, ownership, facts = take_over(options.spec, options.parent, beat=heartbeat.beat)
    except (GpuError, OSError) as error:
        problem = os_problem(error) if isinstance(error, OSError) else str(error)
        _say(outlet, Trouble("helper_failed", problem, time.monotonic()))
        return EXIT_NO_GPU
    loop = HelperLoop(
        gpu,
        ownership,
        Parent(options.parent),
        inlet=inlet,
        outlet=outlet,
        wakeup=wakeup,
        heartbeat=heartbeat,
        spec=options.spec,
        min_dwell_s=options.min_dwell,
        settle_s=options.settle,
        gives_way=options.give_way,
        latency_s=options.switch_latency,
    )
    loop.emit(pack_reply(READY, facts.pack()))
    gc.freeze()
    _hurry()
    try:
        loop.run()
    finally:
        confirmed = ownership is None or _leave(gpu, ownership, loop.locked_mhz, options.spec, outlet)
    if confirmed:
        loop.emit(pack_reply(BYE))
    return 0 if confirmed else EXIT_RESET_FAILED


def _rescue(options: argparse.Namespace, outlet: int) -> int:
    status = 0
    if options.told:  # how long freeing the clock may take counts from here
        Heartbeat(outlet).beat()

    def tell(problem: str) -> None:
        nonlocal status
        status = EXIT_RESET_FAILED if problem else 0
        if problem:
            _say(outlet if options.told else -1, Trouble("reset_failed", problem, time.monotonic(), free=False))
        else:
            with suppress(OSError):
                os.write(outlet, pack_reply(BYE))

    rescue(
        options.spec,
        options.parent,
        instead_of=options.instead_of,
        grace_s=options.grace,
        locked_mhz=options.locked_mhz,
        tell=tell,
    )
    return status


def _leave(gpu: Gpu, ownership: Ownership, locked_mhz: int | None, spec: str, outlet: int) -> bool:
    """Free the clock if it may be locked. If that fails, tell the parent and whoever reads standard error."""
    if ownership.locked:
        outcome = free_clock(gpu, ownership, locked_mhz, limit_s=RESET_LIMIT_S)
        if not outcome.confirmed:
            text = f"{gpu.name} {gpu.uuid}: {not_free(spec, gpu.uuid, locked_mhz, outcome.problem)}"
            _say(outlet, Trouble("reset_failed", text, time.monotonic(), free=False))
            sys.stderr.write(f"perseus: {text}\n")
            return False
    if not restore_foreign(gpu, ownership):
        sys.stderr.write(
            f"perseus: {gpu.name} {gpu.uuid}: the SM clock could not be locked at {ownership.found_mhz} MHz again, as "
            "somebody else had it; it is free\n"
        )
    ownership.release()
    return True


def _hurry() -> None:
    """Run before all ordinary processes, where we may (root, CAP_SYS_NICE).

    On a node whose cores are all busy a request else waits for a time slice of several ms. The helper sleeps
    but for some 0.1 ms a request, and the kernel keeps 5 % of each core for others in any case.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _say(outlet: int, trouble: Trouble) -> None:
    try:
        os.write(outlet, pack_event(trouble))
    except OSError:
        sys.stderr.write(f"perseus: {trouble.text}\n")


def _catch_signals() -> int:
    """From now on the signals that ask a process to end, to stop or to go on are read from the returned file descriptor
    instead."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT):
        signal.signal(number, _ignore)
    return readable


def _ignore(number: int, frame: FrameType | None) -> None:
    """The loop learns of the signal through the wake-up file descriptor."""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="perseus_plugin.control.helper", description=__doc__)
    parser.add_argument("spec", help="which GPU, see perseus_plugin.gpus.registry")
    parser.add_argument("--parent", type=int, required=True, help="the process that this one serves")
    parser.add_argument("--min-dwell", type=float, help="shortest time between changes, s (default: by the latency)")
    parser.add_argument("--settle", type=float, default=0.03, help="time from a change to its read-back, s")
    parser.add_argument("--give-way", action="store_true", help="stop when the clock is changed from outside")
    parser.add_argument("--read-only", action="store_true", help="never set or free a clock")
    parser.add_argument("--switch-latency", type=float, default=0.0, help="of the GPU, where it is known, s")
    rescue_only = parser.add_argument_group("freeing the clock")
    rescue_only.add_argument("--reset-only", action="store_true", help="free the clock and end")
    rescue_only.add_argument("--instead-of", type=int, default=0, help="the helper process that does not do it")
    rescue_only.add_argument("--grace", type=float, default=0.0, help="how long that one still may, s")
    rescue_only.add_argument("--locked-mhz", type=int, help="the lock that was made last")
    rescue_only.add_argument("--told", action="store_true", help="the parent reads what is said on standard output")
    return parser.parse_args(arguments)
