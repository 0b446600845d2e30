"""From what ranks report to a survey, or to another round of the sweep. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perseus_plugin.config import ProfilingConfig
from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.messages import RankEstimate
from perseus_plugin.leader.effects import Say
from perseus_plugin.profiling.observations import StageEstimate
from perseus_plugin.profiling.same_work import Works
from perseus_plugin.profiling.survey import Survey, certain, stage_estimates, survey_of
from perseus_plugin.profiling.sweep import good_enough, sweep_order, times_known, worth_trying


class UnusableProfileError(PerseusError):
    """What was measured, or given, cannot be planned on; the message is the reason.

    Attributes:
        lasting: another sweep of this job, profiled the same way, would meet the same.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class SweepInForce:
    """The round of the sweep that ranks make, or made last.

    Attributes:
        clocks_mhz: that are tried.
        end: first iteration after it.
        round: its number, from 0.
    """

    clocks_mhz: tuple[int, ...]
    end: int
    round: int = 0


@dataclass(frozen=True)
class AnotherRound:
    """A round of the sweep that is to be made.

    Attributes:
        clocks_mhz: in the order to try them.
        paired: by every other stage at a time, see `timetable.paired_clocks`.
        why: for people.
    """

    clocks_mhz: tuple[int, ...]
    paired: bool
    why: Say


def estimated(
    estimates: Sequence[RankEstimate], stages: int, config: ProfilingConfig, works: Works | None = None
) -> tuple[Survey, list[StageEstimate]]:
    """What the estimates of all ranks add up to, with what was announced of the steps' work.

    Raises:
        UnusableProfileError: nothing that can be planned on.
    """
    try:
        of_stages = stage_estimates(estimates, stages, config.max_relative_error, works)
        return survey_of(estimates, of_stages, config.power_limit_w), of_stages
    except PerseusError as error:
        raise UnusableProfileError(f"the profile cannot be used: {error} (try more steps_per_clock)") from None


def another_round(
    estimates: Sequence[StageEstimate], sweep: SweepInForce, top_mhz: int, config: ProfilingConfig
) -> AnotherRound | None:
    """The round that is needed as the stages' estimates are not good enough yet; None: they are, or enough is done."""
    again = sweep.round + 1
    as_highest = frozenset.intersection(*(estimate.as_highest_mhz for estimate in estimates)) if estimates else set()
    lower_mhz = sorted(set(sweep.clocks_mhz) - as_highest - {top_mhz})
    if again >= config.rounds or not lower_mhz:
        return None
    in_pairs = len(estimates) > 1 and not times_known(estimates, config.max_time_error / 2)
    if not in_pairs and good_enough(estimates, config.max_relative_error):
        return None
    clocks = {top_mhz, *worth_trying(estimates, lower_mhz)}
    if clocks == {top_mhz}:
        return None
    why = Say(
        "info",
        "%s are not known well enough yet: profiling once more, at %d clocks",
        ("times" if in_pairs else "energies", len(clocks)),
    )
    return AnotherRound(sweep_order(tuple(clocks), config.seed + again, 0 if in_pairs else 2), in_pairs, why)


def plannable(survey: Survey, config: ProfilingConfig) -> tuple[Survey, Say | None]:
    """What may be planned on, and what is to be said of what may not.

    Raises:
        UnusableProfileError: nothing.
    """
    most = config.max_time_error
    known = certain(survey, most)
    before, after = _below_top(survey), _below_top(known)
    if len(after) == len(before):
        return survey, None
    if after:
        return known, Say(
            "warning",
            "times of %d of %d clocks (of all stages) are not known to within %.1f %%: they are not used (more "
            "perseus.profiling.steps_per_clock or rounds would help)",
            (len(before - after), len(before), 100 * most),
        )
    rows = [row for rows in survey.profile.table.values() for row in rows[1:]]
    spread = max((row.spread_between for row in rows if row.spread_between >= 0), default=0.0)
    raise UnusableProfileError(
        f"no clock's time is known to within {100 * most:.1f} % (perseus.profiling.max_time_error), but to "
        f"{100 * _best_known(survey):.1f} % at best, as durations vary by "
        f"{100 * spread:.0f} % from step to step: more perseus.profiling.steps_per_clock or rounds would help",
        lasting=False,  # another time, a machine less busy may do
    )


def said_of_measured(survey: Survey, config: ProfilingConfig) -> list[Say]:
    """What is not used, or stays at full clocks, as its energy is not known."""
    said = []
    if survey.too_high:
        first = survey.too_high[0]
        said.append(
            Say(
                "warning",
                "%d energies are estimated above what the GPU can draw (first: stage %d %s at %d MHz: %.0f of %.0f W): "
                "their clocks, but for the highest, are not used (more perseus.profiling.steps_per_clock would help)",
                (len(survey.too_high), first.stage, first.kind, first.frequency_mhz, first.power_w, first.limit_w),
            )
        )
    return said + [
        Say(
            "warning",
            "stage %d: the energy of %s is not known to within %.0f %%; it stays at full clock "
            "(more perseus.profiling.steps_per_clock would help)",
            (stage, kind, 100 * config.max_relative_error),
        )
        for stage, kind in sorted(survey.unresolved)
    ]


def _below_top(survey: Survey) -> set[tuple[int, int]]:
    """Stages and their clocks below the highest."""
    return {(stage, row.frequency_mhz) for (stage, _), rows in survey.profile.table.items() for row in rows[1:]}


def _best_known(survey: Survey) -> float:
    """The least error of a clock's time; that of a clock is the largest of all of a stage's kinds, as a share."""
    errors: dict[tuple[int, int], float] = {}
    for (stage, _), rows in survey.profile.table.items():
        for row in rows[1:]:
            where, error = (stage, row.frequency_mhz), row.time_se_s / row.time_s
            if error >= 0:  # where it is known
                errors[where] = max(error, errors.get(where, 0.0))
    return min(errors.values())
