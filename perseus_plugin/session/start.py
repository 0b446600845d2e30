"""Starting a session: what is found out before it, and all its parts, built from the bottom up."""

from __future__ import annotations

import atexit
import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from perseus_plugin.config import PerseusConfig, with_whole_paths
from perseus_plugin.control.examination import why_not_planned
from perseus_plugin.control.lasting import LastingHelper
from perseus_plugin.control.selection import Selection, emulates, select_gpu, with_facts
from perseus_plugin.control.wire import DeviceFacts, Trouble
from perseus_plugin.errors import ConfigError, PlanError, ReportError, os_problem
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.store import Exchange, open_exchange
from perseus_plugin.files import opened_folder, own_folder
from perseus_plugin.iteration.timetable import Round, Timetable, nearest_clocks
from perseus_plugin.leader.job import Job
from perseus_plugin.leader.leader import Leader
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.planning.planner_process import why_no_planner
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.profiling.known import given_profile, kept_profile
from perseus_plugin.profiling.sweep import choose_clocks, sweep_order
from perseus_plugin.reporting.live.log import set_up_logging
from perseus_plugin.reporting.live.publishers import Publishers
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.reporting.record.lines import ONE_GRAPH
from perseus_plugin.reporting.verification import Verification, load_verification
from perseus_plugin.session.emulation import EmulatedStage
from perseus_plugin.session.ending import close_before_the_group
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import Link
from perseus_plugin.session.running import kept_sessions, runs
from perseus_plugin.session.session import Monitor, Session
from perseus_plugin.session.worker import SessionWorker

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 20.0


class StartHelper(Protocol):
    """Starts the process that sets a GPU's clock, see `LastingHelper.start`."""

    def __call__(self, spec: str, *, min_dwell_s: float | None = None, gives_way: bool = False) -> LastingHelper: ...


def start_session(
    config: PerseusConfig,
    placement: Placement,
    monitor: Monitor | None = None,
    facts: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    exchange: Exchange | None = None,
    start_helper: StartHelper = LastingHelper.start,
) -> Session:
    """Start a session on this rank.

    Args:
        config: the `perseus` block, enabled.
        placement: where this rank sits.
        monitor: writes (name, value) events; only where the framework has somewhere to write them.
        facts: what makes this rank's part of the job what it is (model, microbatch size, versions); a profile kept
            from an earlier run is used only if they are the same.
        about: further facts for the records alone, which may change without making a kept profile another job's.
        exchange: to the job's other ranks; None: through its default store.
        start_helper: starts the process that sets the GPU's clock.

    Raises:
        ConfigError: something in the block does not fit this job; raised on every rank, before training starts.
    """
    job, helper = prepare(config, placement, facts=facts, about=about, exchange=exchange, start_helper=start_helper)
    with ExitStack() as undone:
        undone.callback(job.exchange.close)
        if helper is not None:
            undone.callback(helper.close, timeout_s=1.0)
        session = _built(job, helper, monitor, undone)
        undone.pop_all()
    runs(session)
    atexit.register(session.close)
    close_before_the_group()
    if gc.isenabled():
        # Building the job and importing what a session needs have made so many objects that Python is about to look
        # through all there are, for tenths of a second: now, and not amid the first iterations that are measured.
        gc.collect()
    return session


def prepare(
    config: PerseusConfig,
    placement: Placement,
    *,
    facts: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    exchange: Exchange | None = None,
    start_helper: StartHelper = LastingHelper.start,
) -> tuple[Job, LastingHelper | None]:
    """Find out what a session is about, and take its GPU; see `start_session`.

    Returns:
        Who sets the clock, None where it will not be set.

    Raises:
        ConfigError: something in the block does not fit this job.
    """
    set_up_logging(config.log_level, placement)
    config = with_whole_paths(config)
    configured = _used(Path(config.output_dir))
    output_dir = _own_folder(configured, placement.rank)
    if placement.leads or emulates(config, placement):
        _make(output_dir)
    known = given_profile(config, placement)
    signals = SignalDesk(config.signals) if config.signals and placement.leads else None
    _check_emulation(config, placement)
    _check_budget(config, placement)
    if config.cuda_graph and config.limits.switch_latency_s == 0:
        raise ConfigError(
            "perseus.limits.switch_latency_s: got 0; allowed with perseus.cuda_graph: a number above 0, or null, as "
            "rises are asked for that much before their time"
        )
    if exchange is None:
        exchange = open_exchange(_next_name(), placement.leader)
    helper = None
    try:
        # Emulated GPUs lie in the configured folder: as real ones do, they outlive a session, and several may meet
        # there.
        selection = select_gpu(config, placement, configured)
        verified = _verified(config, selection)
        selection, helper = _take_gpu(config, selection, verified, start_helper)
        no_planner = why_no_planner(config.planner.python) if placement.leads and helper is not None else ""
        if known is None:
            known = kept_profile(config, placement, selection, facts or {}, exchange, output_dir, no_planner)
        elif no_planner:
            known = replace(known, failed=no_planner)
        if known.failed and helper is not None:
            helper.close(timeout_s=1.0)
            helper, selection = None, replace(selection, spec=None, clocks_mhz=(), why_not=known.failed)
        full_sweep_mhz = _sweep(config, selection)
        job = Job(
            config=config,
            placement=placement,
            exchange=exchange,
            output_dir=output_dir,
            selection=selection,
            known=known,
            # With a profile the top clock all the same, as the reference that the plan must keep to.
            timetable=_timetable(config, full_sweep_mhz[:1] if known.profile else full_sweep_mhz),
            full_sweep_mhz=full_sweep_mhz,
            facts={**(facts or {}), **(about or {}), **dict([ONE_GRAPH] if config.cuda_graph else [])},
            signals=signals,
        )
    except BaseException:
        if helper is not None:
            helper.close(timeout_s=1.0)
        exchange.close()
        raise
    return job, helper


def link_for(job: Job, helper: LastingHelper | None, *, writes_events: bool = False) -> Link:
    """What this rank's threads share; says why if no clock will be set."""
    link = Link(job.timetable, writes_events=writes_events)
    latency_s = job.config.limits.switch_latency_s
    if helper is None:
        _observe_only(job.selection, link, job.placement)
        return link
    helper.on_end(link.wake.set)
    if job.config.limits.free_after_s is not None:
        helper.free_after(job.config.limits.free_after_s)
    if latency_s is None:
        helper.measure_latency()
    else:
        link.rise_early(latency_s)
    return link


def _built(job: Job, helper: LastingHelper | None, monitor: Monitor | None, undone: ExitStack) -> Session:
    """All of a session, from the bottom up: nothing here makes, or knows, what uses it.

    What has to be ended goes into `undone`, in case that something after it cannot be made.
    """
    config, placement, selection = job.config, job.placement, job.selection
    lifetime = Lifetime(helper)
    undone.callback(lifetime.end)
    link = link_for(job, helper, writes_events=monitor is not None)
    lifetime.on_end(link.ended)
    job.exchange.on_news(link.wake.set)
    if not job.plans:
        job.exchange.look_rarely()
    leads = placement.leads
    publishers = Publishers(config, job.summary_facts) if leads else None
    if publishers is not None:
        undone.callback(publishers.close)
    takers: list[Monitor] = [link.add_events] if publishers is None else [link.add_events, publishers]
    relay = FigureRelay(job.exchange, takers, leads, writes=monitor is not None)
    leader = Leader(job, relay.tell, wake=link.wake.set, publishers=publishers) if leads else None
    if leader is not None:
        undone.callback(leader.close)
    worker = SessionWorker(job, link=link, lifetime=lifetime, helper=helper, relay=relay, leader=leader)
    emulated = None
    if selection.emulated_gpu is not None:
        emulated = EmulatedStage(selection.emulated_gpu, config.emulation, placement)
    session = Session(
        placement,
        lifetime=lifetime,
        link=link,
        exchange=job.exchange,
        helper=helper,
        emulated=emulated,
        monitor=monitor,
        stragglers=config.stragglers,
        folder=job.output_dir,
        worker=worker,
    )
    worker.start()
    return session


def _timetable(config: PerseusConfig, sweep_mhz: tuple[int, ...]) -> Timetable:
    profiling = config.profiling
    return Timetable(
        Round(profiling.warmup_steps, sweep_mhz),
        profiling.settle_steps,
        profiling.steps_per_clock,
        reference_share=config.watch.reference_share,
    )


def _take_gpu(
    config: PerseusConfig, selection: Selection, verified: Verification | None, start_helper: StartHelper
) -> tuple[Selection, LastingHelper | None]:
    """Start the helper of the selected GPU; without one if it cannot set clocks."""
    if selection.spec is None:
        return selection, None
    gives_way = config.gpu.foreign_clock == "give_way"
    helper = start_helper(selection.spec, min_dwell_s=config.limits.dwell_s, gives_way=gives_way)
    with ExitStack() as undone:
        undone.callback(helper.close, timeout_s=1.0)
        selection = _with_helper(config, selection, verified, helper)
        if selection.spec is not None:
            undone.pop_all()
    return selection, None if selection.spec is None else helper


def _with_helper(
    config: PerseusConfig, selection: Selection, verified: Verification | None, helper: LastingHelper
) -> Selection:
    """What the helper says of the GPU; without a spec if its clock cannot, or need not, be set."""
    device = helper.wait_ready(_READY_TIMEOUT_S)
    if device is not None and device.leftover:
        logger.warning("the SM clock was %s; it is free again, nothing needs to be done", device.leftover)
    if device is not None and device.foreign:
        logger.warning("the SM clock %s", device.foreign)
    problem = "" if device is not None else next((e.text for e in helper.drain() if isinstance(e, Trouble)), "")
    selection = with_facts(selection, device, problem)
    if device is not None and selection.spec is not None:
        why_not = _why_not_planned(config, selection, device, verified)
        if why_not:
            selection = replace(selection, spec=None, clocks_mhz=(), why_not=why_not)
    return selection


def _why_not_planned(
    config: PerseusConfig, selection: Selection, device: DeviceFacts, verified: Verification | None
) -> str:
    """Why a sweep could not lead to a plan on this GPU, known before it begins; empty if it could."""
    why_not = "" if verified is None else verified.why_not_by_time(device.name)
    if why_not:
        return f"the training step is one CUDA graph, and {config.gpu.verified} does not do for it: {why_not}"
    given = config.profiling.load is not None
    if not given and config.profiling.clocks_mhz is not None and len(set(selection.clocks_mhz)) > 1:
        tried = set(nearest_clocks(selection.clocks_mhz, config.profiling.clocks_mhz))
        if len(tried) < 2:
            return (
                f"perseus.profiling.clocks_mhz: {list(config.profiling.clocks_mhz)} are all {tried.pop()} MHz on this "
                f"GPU; allowed: clocks from {min(selection.clocks_mhz)} to {max(selection.clocks_mhz)} MHz that differ"
            )
    return why_not_planned(selection.clocks_mhz, device.counter, has_profile=given)


def _verified(config: PerseusConfig, selection: Selection) -> Verification | None:
    """In a graph nothing is seen: on a real GPU clocks are set by time only where that has been looked at before."""
    if not config.cuda_graph or selection.spec is None or selection.emulated_gpu is not None:
        return None
    if config.gpu.verified is None:
        raise ConfigError(
            "perseus.gpu.verified: missing; with perseus.cuda_graph clocks of a real GPU are set only where `perseus "
            "verify --set-clocks -o FILE.json` has shown how they change on such a GPU"
        )
    try:
        return load_verification(Path(config.gpu.verified))
    except ReportError as error:
        raise ConfigError(f"perseus.gpu.verified: {error}") from error


_sessions = 0


def _next_name() -> str:
    """Every rank makes its engines in the same order, so a count names the same session everywhere."""
    global _sessions
    _sessions += 1
    return str(_sessions)


def _own_folder(configured: Path, rank: int) -> Path:
    """The folder for a session's files: a further session of a rank, beside one that lives, has one of its own.

    Sessions that have failed keep theirs until they are closed, so all ranks choose alike.
    """
    taken = {session.folder for session in kept_sessions() if session.rank == rank}
    folder, number = configured, 1
    while folder in taken:
        number += 1
        folder = configured / f"session-{number}"
    if number > 1:
        logger.info("this is session %d of this process; its files are in %s", number, folder)
    return folder


def _used(configured: Path) -> Path:
    with _refused(configured):
        return own_folder(configured)


def _make(folder: Path) -> None:
    with _refused(folder), opened_folder(folder, make=True):
        pass


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"perseus.output_dir: got '{folder}'; allowed: a folder that can be written: {os_problem(error)}"
        ) from error


def _check_emulation(config: PerseusConfig, placement: Placement) -> None:
    for key in ("forward_time_s", "backward_time_s"):
        times = getattr(config.emulation, key)
        if times is not None and len(times) != placement.stages:
            raise ConfigError(
                f"perseus.emulation.{key}: got {len(times)} numbers; allowed: one per stage, {placement.stages} here"
            )
    measured = config.emulation.forward_time_s is None
    if emulates(config, placement) and measured and config.profiling.warmup_steps < 2:
        raise ConfigError(
            f"perseus.profiling.warmup_steps: got {config.profiling.warmup_steps}; allowed: a whole number from 2 "
            "when emulated times are taken from the CPU's (or give perseus.emulation.forward_time_s and "
            "backward_time_s)"
        )


def _check_budget(config: PerseusConfig, placement: Placement) -> None:
    """Groups must be of GPUs that there are; how many of them share a node is not known yet."""
    limit = PowerBudget.configured(config)
    for group in () if limit is None else limit.groups:
        if group.of[0].isdigit():
            try:
                group.ranks(placement.world_size, placement.world_size)
            except PlanError as error:
                raise ConfigError(str(error)) from None


def _observe_only(selection: Selection, link: Link, placement: Placement) -> None:
    """No clock will be set on this rank: say why; the other ranks must not plan on it."""
    if selection.backend == "off":
        if placement.leads:
            logger.info("observing only, as the gpu backend is off")
        return
    # What is missing mostly is missing on a whole machine: one line each. Any other rank's reason is told by rank 0.
    level = logging.WARNING if placement.local_rank == 0 else logging.DEBUG
    reason = selection.why_not
    logger.log(level, "observing only, no clock will be set: %s. `perseus doctor` tells more", reason)
    link.trouble(selection.why_not)


def _sweep(config: PerseusConfig, selection: Selection) -> tuple[int, ...]:
    """The clocks to profile in order; none without control. As many on every rank, whatever its GPU supports."""
    profiling, supported = config.profiling, selection.clocks_mhz
    if not supported:
        return ()
    if profiling.clocks_mhz is None:
        lowest_mhz = round(max(supported) * profiling.lowest_clock)
        return sweep_order(choose_clocks(supported, profiling.clock_count, lowest_mhz), profiling.seed)
    return nearest_clocks(supported, sweep_order(profiling.clocks_mhz, profiling.seed))
