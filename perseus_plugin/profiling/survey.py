"""What the ranks' estimates add up to: the job's profile, blocking power and constant-time work. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from perseus_plugin.errors import ProfileError
from perseus_plugin.exchange.messages import RankEstimate, Recheck
from perseus_plugin.iteration.instructions import Constant, StreamOp
from perseus_plugin.profiling.guards import TooHigh, possible
from perseus_plugin.profiling.observations import StageEstimate
from perseus_plugin.profiling.pooling import blocking_power, pool, to_profile
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.profiling.same_work import Works, on_common_work

_FITS = 0.25  # a profile whose full-clock times are further off is of something else
_SIGMAS = 2.5  # standard errors of a mean that medians of so few steps stay within
_SAME = 0.01  # instruction times within this share of the profile's count as unchanged


@dataclass(frozen=True)
class Survey:
    """Everything measured that a plan needs.

    Attributes:
        profile: pooled over data-parallel replicas.
        blocking_power_w: power of a GPU that waits, the mean over clocks; counts where the profile has none by clock.
        unresolved: (stage, kind) whose energy is not known well enough to plan on.
        constant_time_s: constant-time work by (stage, name), as the stage saw it, waiting in collectives included.
        blocking_power_se_w: standard error of the blocking power (NaN: unknown).
        too_high: estimates above what the card can draw, which are not in the profile but for the highest clock.
    """

    profile: Profile
    blocking_power_w: float
    unresolved: frozenset[tuple[int, str]] = frozenset()
    constant_time_s: dict[tuple[int, str], float] = field(default_factory=dict)
    blocking_power_se_w: float = math.nan
    too_high: tuple[TooHigh, ...] = ()

    def constants_for(self, streams: Sequence[Sequence[StreamOp]]) -> dict[tuple[int, str], float]:
        """Durations of the constant-time work in these streams.

        In a collective every stage waits for the last one, which alone sees the work's own time: the shortest.
        """
        collective = {op.name for stream in streams for op in stream if isinstance(op, Constant) and op.collective}
        shortest: dict[str, float] = {}
        for (_, name), time_s in self.constant_time_s.items():
            shortest[name] = min(time_s, shortest.get(name, math.inf))
        return {
            (stage, name): shortest[name] if name in collective else time_s
            for (stage, name), time_s in self.constant_time_s.items()
        }


def stage_estimates(
    estimates: Sequence[RankEstimate],
    stages: int,
    max_relative_error: float = 0.05,
    works: Works | None = None,
) -> list[StageEstimate]:
    """The estimate of each stage: on the work that all stages of a replica did alike, pooled over the replicas.

    Raises:
        ProfileError: a stage from which no rank sent measurements, or a rank that sent nonsense.
    """
    grouped: dict[tuple[int, int], list[StageEstimate]] = {}
    for told in estimates:
        where = (told.placement.replica, told.placement.stage)
        try:
            estimate = StageEstimate.from_dict(told.estimate)
        except ProfileError as error:
            raise ProfileError(f"rank {told.placement.rank}: {error}") from error
        grouped.setdefault(where, []).append(replace(estimate, gpu=told.gpu))
    common = on_common_work(grouped, max_relative_error=max_relative_error, works=works)
    pooled: list[StageEstimate] = []
    for stage in range(stages):
        of_stage = [estimate for (_, its_stage), estimate in common.items() if its_stage == stage]
        if not of_stage:
            raise ProfileError(f"stage {stage}: no rank sent measurements")
        pooled.append(pool(of_stage, max_relative_error=max_relative_error))
    return pooled


def survey_of(
    estimates: Sequence[RankEstimate], pooled: Sequence[StageEstimate], power_limit_w: float | None = None
) -> Survey:
    """Join what all ranks measured.

    Args:
        estimates: of all ranks.
        pooled: the same by stage, see `stage_estimates`.
        power_limit_w: the most that a card draws, where that is less than the drivers tell.

    Raises:
        ProfileError: a stage has no usable measurement, or nothing shows what waiting costs.
    """
    constants: dict[tuple[int, str], float] = {}
    for stage in range(len(pooled)):
        of_stage = [e for e in estimates if e.placement.stage == stage]
        for name in {name for e in of_stage for name in e.constant_time_s}:
            times = [e.constant_time_s[name] for e in of_stage if name in e.constant_time_s]
            constants[stage, name] = statistics.median(times)
    profile, unresolved = to_profile(pooled)
    power_w, power_se_w = blocking_power(pooled)
    if not (math.isfinite(power_w) and power_w > 0):
        raise ProfileError("blocking power: no energy counter moved while a GPU waited")
    held = {(stage, clock) for stage, estimate in enumerate(pooled) for clock in estimate.held_mhz}
    profile, too_high = possible(profile, _limits_w(estimates, power_limit_w), held)
    unresolved |= {
        (one.stage, one.kind)
        for one in too_high
        if one.frequency_mhz == profile.table[one.stage, one.kind][0].frequency_mhz
    }
    return Survey(profile, power_w, unresolved, constants, power_se_w, too_high)


def _limits_w(estimates: Sequence[RankEstimate], given_w: float | None) -> dict[int, float]:
    """The most that a GPU of each stage can draw, as far as known."""
    limits: dict[int, float] = {}
    for told in estimates:
        stage, limit_w = told.placement.stage, told.power_limit_w
        if limit_w > 0:
            limits[stage] = max(limit_w, limits.get(stage, 0.0))
    if given_w is not None:
        stages = {told.placement.stage for told in estimates}
        limits = {stage: min(given_w, limits.get(stage, given_w)) for stage in stages}
    return limits


def certain(survey: Survey, max_time_error: float) -> Survey:
    """The survey without the clocks whose times are not known to within this share; the highest ones stay.

    A stage's clock goes as a whole, as plans need all of a stage's kinds at each clock. Of one execution nobody knows
    how usual it was. Times without an error (in a profile from elsewhere) are taken at their word.
    """
    table = survey.profile.table
    known = {}
    for stage in range(survey.profile.stages):
        of_stage = {key: rows for key, rows in table.items() if key[0] == stage}
        unsure = {
            row.frequency_mhz
            for rows in of_stage.values()
            for row in rows[1:]
            if row.time_se_s > max_time_error * row.time_s or row.samples == 1
        }
        for key, rows in of_stage.items():
            known[key] = tuple(row for row in rows if row.frequency_mhz not in unsure)
    return replace(survey, profile=Profile(known))


def misfit(survey: Survey, rechecks: Sequence[Recheck]) -> str:
    """Why a profile that was not measured in this run cannot be its profile; empty if it can."""
    if not any(recheck.time_s for recheck in rechecks):
        return "no undisturbed iteration at full clocks was seen"
    for recheck in rechecks:
        for kind, seen_s in recheck.time_s.items():
            rows = survey.profile.table.get((recheck.stage, kind))
            if rows is None:
                return f"stage {recheck.stage} runs {kind}, which the profile does not have"
            if abs(seen_s / rows[0].time_s - 1) > _FITS + _by_chance(survey, recheck.steps):
                return (
                    f"stage {recheck.stage} {kind} takes {seen_s:.4g} s at full clock, the profile says "
                    f"{rows[0].time_s:.4g} s"
                )
    return ""


def rescaled(survey: Survey, rechecks: Sequence[Recheck]) -> Survey:
    """The survey with instruction times and energies scaled to what was seen at full clocks since.

    All ranks look at the same iterations. Where steps vary in size these may just have been longer or shorter ones:
    what all instructions share is taken for a change of the job only where it is more than chance, and single ones
    are held against the others.
    """
    seen: dict[tuple[int, str], float] = {}
    for (stage, kind), rows in survey.profile.table.items():
        times = [r.time_s[kind] for r in rechecks if r.stage == stage and kind in r.time_s]
        if times:
            seen[stage, kind] = statistics.median(times) / rows[0].time_s
    chance = _by_chance(survey, min((r.steps for r in rechecks), default=0))
    size = statistics.median(seen.values()) if seen and chance > _SAME else 1.0
    grown = size if abs(size - 1) > chance else 1.0
    factors = dict.fromkeys(survey.profile.table, grown)
    for key, factor in seen.items():
        own = factor / size
        factors[key] = grown * (own if abs(own - 1) > _SAME else 1.0)
    return replace(survey, profile=survey.profile.scaled(factors))


def _by_chance(survey: Survey, steps: int) -> float:
    """By which share so many steps may be longer or shorter than usual, just as steps vary."""
    spreads = [rows[0].spread_between for rows in survey.profile.table.values() if rows[0].spread_between >= 0]
    return _SIGMAS * statistics.median(spreads) / math.sqrt(steps) if spreads and steps else 0.0
