"""Rank 0 while a job is measured.

Rounds of the sweep until energies are known, or the check of a profile from elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from perseus_plugin.config import ProfilingConfig
from perseus_plugin.errors import PerseusError
from perseus_plugin.files import try_to_write
from perseus_plugin.iteration.timetable import Timetable
from perseus_plugin.leader.rank_reports import RankReports
from perseus_plugin.profiling.kept import Fingerprint, save_survey
from perseus_plugin.profiling.observations import StageEstimate
from perseus_plugin.profiling.survey import Survey, certain, misfit, rescaled, stage_estimates, survey_of
from perseus_plugin.profiling.sweep import good_enough, sweep_order, times_known, worth_trying

logger = logging.getLogger(__name__)


class UnusableProfileError(PerseusError):
    """What was measured, or given, cannot be planned on; the message is the reason.

    Attributes:
        lasting: another sweep of this job, profiled the same way, would meet the same.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Measuring:
    """From what ranks report to a survey.

    Args:
        config: the `profiling` block.
        reports: of all ranks.
        order_sweep: tells all ranks to sweep over these clocks, in pairs or not, and returns the iteration at which
            that begins.
        stages: of the pipeline.
        timetable: with the first round of the sweep.
        output_dir: where the profile is kept.
        survey: what is known already (a loaded or kept profile), None to wait for the ranks' estimates.
        fingerprint: what a measured profile is kept with.
        full_sweep_mhz: the sweep to make if a kept profile turns out not to fit.

    Attributes:
        top_mhz: the highest clock.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        reports: RankReports,
        order_sweep: Callable[[tuple[int, ...], bool], int],
        *,
        stages: int,
        timetable: Timetable,
        output_dir: Path,
        survey: Survey | None,
        fingerprint: Fingerprint,
        full_sweep_mhz: tuple[int, ...],
    ) -> None:
        self._config, self._reports, self._order_sweep = config, reports, order_sweep
        self._stages, self._output_dir, self._fingerprint = stages, output_dir, fingerprint
        self._sweep_mhz = timetable.sweep.clocks_mhz
        self._full_sweep_mhz = full_sweep_mhz or timetable.sweep.clocks_mhz
        self._sweep_end, self._steps_per_block = timetable.sweep_end, timetable.steps_per_block
        self._known = survey
        self.top_mhz = max(timetable.sweep.clocks_mhz)

    def step(self, iteration: int) -> Survey | None:
        """The survey to plan on; None while it is still to come.

        Raises:
            UnusableProfileError: there will be none.
            ExchangeError: the store fails.
        """
        if iteration < self._sweep_end:
            return None
        survey = self._estimated() if self._known is None else self._checked(self._known)
        return None if survey is None else self._certain(survey)

    def _estimated(self) -> Survey | None:
        overdue, estimates = self._reports.overdue, self._reports.all_estimates()
        if estimates is None:
            if overdue:
                raise UnusableProfileError(self._reports.missing, lasting=False)
            return None
        try:
            stages = stage_estimates(estimates, self._stages, self._config.max_relative_error)
            survey = survey_of(estimates, stages)
        except PerseusError as error:
            raise UnusableProfileError(f"the profile cannot be used: {error} (try more steps_per_clock)") from None
        if self._sweep_again(stages):
            return None
        try_to_write("the profile", lambda: save_survey(survey, self._fingerprint, self._output_dir))
        self._say_unresolved(survey)
        return survey

    def _sweep_again(self, stages: Sequence[StageEstimate]) -> bool:
        """Order another round of the sweep if the estimates are not good enough yet."""
        again = self._reports.round + 1
        lower_mhz = sorted(set(self._sweep_mhz) - {self.top_mhz})
        if again >= self._config.rounds or not lower_mhz:
            return False
        in_pairs = self._stages > 1 and not times_known(stages, self._config.max_time_error / 2)
        if not in_pairs and good_enough(stages, self._config.max_relative_error):
            return False
        clocks = {self.top_mhz, *worth_trying(stages, lower_mhz)}
        if clocks == {self.top_mhz}:
            return False
        logger.info(
            "%s are not known well enough yet: profiling once more, at %d clocks",
            "times" if in_pairs else "energies",
            len(clocks),
        )
        seed = self._config.seed + again
        self._sweep_over(sweep_order(tuple(clocks), seed, 0 if in_pairs else 2), in_pairs)
        return True

    def _sweep_over(self, order: tuple[int, ...], paired: bool = False) -> None:
        self._reports.next_round()
        self._sweep_mhz = order
        blocks = 2 * (len(order) - 1) if paired else len(order)
        self._sweep_end = self._order_sweep(order, paired) + self._steps_per_block * blocks

    def _certain(self, survey: Survey) -> Survey:
        """What may be planned on."""
        most = self._config.max_time_error
        known = certain(survey, most)
        before, after = _below_top(survey), _below_top(known)
        if len(after) == len(before):
            return survey
        if after:
            logger.warning(
                "times of %d of %d clocks (of all stages) are not known to within %.1f %%: they are not used (more "
                "perseus.profiling.steps_per_clock or rounds would help)",
                len(before - after),
                len(before),
                100 * most,
            )
            return known
        rows = [row for rows in survey.profile.table.values() for row in rows[1:]]
        spread = max((row.spread_between for row in rows if row.spread_between >= 0), default=0.0)
        raise UnusableProfileError(
            f"no clock's time is known to within {100 * most:.1f} % (perseus.profiling.max_time_error), but to "
            f"{100 * _best_known(survey):.1f} % at best, as durations vary by "
            f"{100 * spread:.0f} % from step to step: more perseus.profiling.steps_per_clock or rounds would help",
            lasting=False,  # another time, a machine less busy may do
        )

    def _checked(self, survey: Survey) -> Survey | None:
        """A profile from elsewhere, if it is this job's by what all ranks measured at full clocks."""
        overdue = self._reports.overdue
        if not self._reports.all_rechecks(0) and not overdue:
            return None
        why_not = misfit(survey, list(self._reports.rechecks.values()))
        if why_not and self._config.load is not None:
            reason = f"the profile of perseus.profiling.load is not of this job: {why_not}"
            raise UnusableProfileError(reason, lasting=False)
        if why_not:
            logger.warning("profiling anew, as the kept profile does not fit: %s. Nothing needs to be done", why_not)
            self._known, self._reports.rechecks = None, {}
            self._sweep_over(self._full_sweep_mhz)
            return None
        return rescaled(survey, list(self._reports.rechecks.values()))

    def _say_unresolved(self, survey: Survey) -> None:
        for stage, kind in sorted(survey.unresolved):
            logger.warning(
                "stage %d: the energy of %s is not known to within %.0f %%; it stays at full clock "
                "(more perseus.profiling.steps_per_clock would help)",
                stage,
                kind,
                100 * self._config.max_relative_error,
            )


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
