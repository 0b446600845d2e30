"""What a replay said of the plans in force, and when they are held against newer iterations. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perseus_plugin.iteration.replayed import InForce, Overheads, Replayed
from perseus_plugin.leader.effects import Say
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.request import PlanAnswer

EVERY = 100
"""Iterations from one look at a plan to the next."""
SOON = 12
"""The same where a single iteration keeps a plan from saving more; twice as many from one such look to the next."""

_LARGE = 0.2  # of an iteration, beside the work that is known: well above what iterations measured on GPUs have shown


@dataclass(frozen=True)
class _Followed:
    in_force: InForce | None
    looked: int
    refine_at: int = 0  # iteration from which it may be refined: before, there is nothing to hold another one against
    refined: bool = False
    sooner: int | None = None  # iterations after which it is looked at again, where that is soon


class Reviews:
    """Which plan to look at next."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}

    def copy(self) -> Reviews:
        """One that changes by itself."""
        made = Reviews()
        made._followed = dict(self._followed)
        return made

    def follow(
        self, schedule: str, in_force: InForce | None, iteration: int, hinges: bool = False, refined: bool = False
    ) -> None:
        """A plan comes into force.

        Args:
            schedule: it is for.
            in_force: what to hold against newer iterations; None: whatever they say, another plan is looked for.
            iteration: the one that runs.
            hinges: see `Replayed`.
            refined: it need not be refined any more.
        """
        told = _told(self._followed.get(schedule), hinges)
        self._followed[schedule] = replace(
            told, in_force=in_force, looked=iteration, refined=refined, refine_at=iteration + SOON
        )

    def stay(self, schedule: str, hinges: bool) -> None:
        """A plan that was looked at stays in force; see `follow`."""
        self._followed[schedule] = _told(self._followed[schedule], hinges)

    def due(self, schedules: Sequence[str], iteration: int) -> str | None:
        """The schedule whose plan is to be looked at now, if there is one; it is not due again for a while."""
        known = [(one, self._followed[one]) for one in schedules if one in self._followed]
        due = [one for one, followed in known if iteration - followed.looked >= (followed.sooner or EVERY)]
        if not due:
            return None
        chosen = min(due, key=lambda one: self._followed[one].looked)
        self._followed[chosen] = replace(self._followed[chosen], looked=iteration)
        return chosen

    def to_refine(self, schedules: Sequence[str], iteration: int) -> str | None:
        """A schedule whose plan is to be refined; tried again after a while unless it is said to be `refined`."""
        for schedule in schedules:
            one = self._followed.get(schedule)
            if one is None or one.in_force is None or one.refined or iteration < one.refine_at:
                continue
            self._followed[schedule] = replace(one, refine_at=iteration + EVERY)
            return schedule
        return None

    def refined(self, schedule: str) -> None:
        """There is no more to be had from a plan."""
        self._followed[schedule] = replace(self._followed[schedule], refined=True)

    def in_force(self, schedule: str) -> InForce | None:
        """See `follow`."""
        return self._followed[schedule].in_force

    def clear(self) -> None:
        """No plan is in force any more."""
        self._followed.clear()


def _told(before: _Followed | None, hinges: bool) -> _Followed:
    followed = before or _Followed(None, 0)
    sooner = SOON if followed.sooner is None else min(2 * followed.sooner, EVERY)
    return replace(followed, sooner=sooner if hinges else None)


def clocks_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """A plan's clocks, per stage."""
    return tuple(tuple(plan.clocks_mhz(stage)) for stage in range(len(plan.stages)))


def catches_up_otherwise(before: InForce | None, answer: PlanAnswer) -> bool:
    """Whether late ranks do something else by an answer than under the plan it was asked about."""
    return before is not None and answer.catch_up != before.catch_up


def in_force(plan: Plan, answer: PlanAnswer, margin: float) -> InForce | None:
    """What newer iterations are held against; None where nothing is slowed, as a replay found nothing that holds.

    Args:
        plan: that comes into force.
        answer: that it came with.
        margin: that was asked for.
    """
    replayed = answer.replayed
    if replayed is not None and replayed.obstacle:
        return None
    margin = margin if replayed is None else replayed.margin
    transfer_s = answer.overheads.transfer_s
    return InForce(clocks_of(plan), answer.catch_up, margin, transfer_s, plan.wait_clocks_mhz)


def said_of_replay(number: int, schedule: str, replayed: Replayed, quantile: float) -> Say:
    """What a replay of measured iterations promises of plan `number`."""
    if replayed.obstacle:
        return Say(
            "warning",
            "nothing can be saved for %s while iterations keep to their time: %s. They run at full clocks; nothing "
            "needs to be done (perseus.slowdown allows some time)",
            (schedule, replayed.obstacle),
        )
    low, high = replayed.saving_interval
    return Say(
        "info",
        "plan %d replayed over %d measured iterations: %.1f %% less energy (%.1f to %.1f), %+.2f %% time "
        "(%+.2f %% at quantile %g); margin %.3g %%, %s",
        (
            number,
            replayed.iterations,
            100 * replayed.saving_mean,
            100 * low,
            100 * high,
            100 * (replayed.time_ratio_mean - 1),
            100 * (replayed.time_ratio_quantile - 1),
            quantile,
            100 * replayed.margin,
            f"{100 * replayed.raised:.1f} % of instructions catch up" if replayed.catch_up else "no catching up needed",
        ),
    )


def said_of_overheads(schedule: str, now: Overheads, before: Overheads | None) -> list[Say]:
    """What iterations take beside the work that is known, where that was measured; a warning once, where it is large.

    Args:
        schedule: of the iterations.
        now: as measured.
        before: what was said last; None: nothing yet.
    """
    if now.share is None:
        return []
    if now.share <= _LARGE:
        text = "%.1f %% of an iteration of %s are neither computing nor loading (%.3g ms per transfer, %.3g s once)"
        return [Say("info", text, (100 * now.share, schedule, 1e3 * now.transfer_s, now.end_s))]
    if before is not None and (before.share or 0.0) > _LARGE:
        return []
    return [
        Say(
            "warning",
            "%.3g s of %.3g s of an iteration of %s are neither computing nor loading: look at the network, and at "
            "what surrounds the schedule (%.3g ms per transfer between stages, %.3g s once). Plans account for it",
            (now.beside_s, now.iteration_s, schedule, 1e3 * now.transfer_s, now.end_s),
        )
    ]
