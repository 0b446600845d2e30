"""What is known of a job before it starts: a profile given in the configuration, or kept from an earlier run."""

from __future__ import annotations

import logging
import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perseus_plugin._version import __version__
from perseus_plugin.config import PerseusConfig, ProfilingConfig
from perseus_plugin.control.selection import Selection
from perseus_plugin.errors import ConfigError, PerseusError, ProfileError
from perseus_plugin.exchange.messages import REUSE, Placement, RankFacts, Reuse, facts_key, receive
from perseus_plugin.exchange.store import Exchange, wait_for
from perseus_plugin.profiling.failed import FILE, load_failure
from perseus_plugin.profiling.kept import Fingerprint, job_fingerprint, load_survey
from perseus_plugin.profiling.profile import load_profile
from perseus_plugin.profiling.survey import Survey, certain

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 30.0  # ranks start within this of each other, or the profile is measured anew


@dataclass(frozen=True)
class Known:
    """What every rank knows of a profile, and what rank 0 knows beyond that.

    Attributes:
        profile: whether there is a profile; the same on every rank.
        survey: the profile and what belongs to it, on rank 0.
        fingerprint: what a profile measured in this run is kept with, on rank 0.
        failed: why a sweep is not worth making, as an earlier one came to nothing or nothing can be planned; empty if
            it is. The same on every rank, but where a profile is given: there only rank 0's matters, which plans.
    """

    profile: bool = False
    survey: Survey | None = None
    fingerprint: Fingerprint = field(default_factory=dict)
    failed: str = ""


def given_profile(config: PerseusConfig, placement: Placement) -> Known | None:
    """The profile that the configuration names; None if it names none.

    Raises:
        ConfigError: it cannot be used for this job.
    """
    path = config.profiling.load
    if path is None:
        return None
    if not placement.leads:
        return Known(True)  # rank 0 reads it, and ends the job if it is of no use
    try:
        profile = load_profile(path, config.profiling.blocking_power_w, config.profiling.power_limit_w, regular=True)
    except PerseusError as error:
        raise ConfigError(f"perseus.profiling.load: {error}") from error
    if profile.stages != placement.stages:
        raise ConfigError(
            f"perseus.profiling.load: got {path!r} with {profile.stages} stages; allowed: a profile of this job's "
            f"{placement.stages} stages"
        )
    if config.profiling.blocking_power_w is None and not profile.says_waiting:
        raise ConfigError(
            f"perseus.profiling.blocking_power_w: missing; {path!r} does not say what a waiting GPU draws in every "
            "stage (column blocking_power); allowed: a number above 0 and at most 2000"
        )
    said_w = [m.blocking_power_w for _, _, m in profile.rows() if math.isfinite(m.blocking_power_w)]
    return Known(True, Survey(profile, config.profiling.blocking_power_w or statistics.mean(said_w)))


def kept_profile(
    config: PerseusConfig,
    placement: Placement,
    selection: Selection,
    facts: Mapping[str, str],
    exchange: Exchange,
    output_dir: Path,
    no_planner: str = "",
) -> Known:
    """The profile that an earlier run left in the output folder, if it is of the same job.

    Every rank says what its part of the job is; rank 0 compares and decides for all. Waits for that, before training
    starts; when a rank does not come in time the profile is measured anew.

    Args:
        facts: what the framework knows: model, microbatch size, versions.
        selection: this rank's GPU; without control of it there is nothing to profile.
        no_planner: why nothing can be planned, on rank 0; empty if it can.
    """
    mine = {
        **facts,
        "gpu": selection.name,
        "driver": selection.driver,
        "backend": selection.backend,
        "python": platform.python_version(),
        "perseus_plugin": __version__,
        "emulation": config.emulation.model_dump_json(exclude={"gpus"}) if selection.emulated else "none",
        "controlled": str(bool(selection.clocks_mhz)),
        "power_limit": f"{selection.enforced_limit_w:.0f} W" if selection.enforced_limit_w else "not told",
    }
    exchange.tell(facts_key(placement.rank), RankFacts(stage=placement.stage, facts=mine).model_dump())
    if not placement.leads:
        told = wait_for(exchange.heard, [REUSE], 2 * _START_TIMEOUT_S).get(REUSE)
        decision = Reuse() if told is None else receive(Reuse, told)
        return Known(decision.profile, failed=decision.failed)
    keys = [facts_key(rank) for rank in range(placement.world_size)]
    found = wait_for(exchange.told, keys, _START_TIMEOUT_S)
    ranks = [receive(RankFacts, value) for value in found.values()]
    fingerprint = job_fingerprint([(rank.stage, rank.facts) for rank in ranks])
    all_here = len(ranks) == placement.world_size
    survey = _kept(config, fingerprint, output_dir) if all_here else None
    failed = no_planner or (_failed(config, fingerprint, output_dir) if all_here and survey is None else "")
    exchange.tell_all(REUSE, Reuse(profile=survey is not None, failed=failed).model_dump())
    return Known(survey is not None, survey, fingerprint, failed)


def profiled_as(config: ProfilingConfig, fingerprint: Fingerprint) -> Fingerprint:
    """The fingerprint of a sweep that may come to nothing: of the job, and of how it is profiled."""
    return {**fingerprint, "profiling": config.model_dump_json(exclude={"reuse"})}


def _failed(config: PerseusConfig, fingerprint: Fingerprint, output_dir: Path) -> str:
    if not config.profiling.reuse:
        return ""
    try:
        reason = load_failure(profiled_as(config.profiling, fingerprint), output_dir)
    except ProfileError as error:
        logger.warning("profiling all the same: %s. Nothing needs to be done", error)
        return ""
    return reason and f"an earlier sweep of this job came to nothing: {reason}; remove {output_dir / FILE} to try again"


def _kept(config: PerseusConfig, fingerprint: Fingerprint, output_dir: Path) -> Survey | None:
    if not config.profiling.reuse:
        return None
    try:
        survey = load_survey(fingerprint, output_dir)
    except ProfileError as error:
        logger.warning("profiling anew, as the kept profile is not of this job: %s. Nothing needs to be done", error)
        return None
    if survey is not None and survey.unresolved:
        logger.info("profiling anew, as energies in the kept profile are not known well enough")
        return None
    if survey is not None and certain(survey, config.profiling.max_time_error).profile.table != survey.profile.table:
        logger.info("profiling anew, as times in the kept profile are not known well enough")
        return None
    if survey is not None:
        logger.info("using the profile kept in %s again (perseus.profiling.reuse)", output_dir)
    return survey
