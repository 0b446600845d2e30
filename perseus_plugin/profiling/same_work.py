"""The ranks' estimates on common work: durations of all stages and clocks fitted together, replica by replica."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from perseus_plugin.profiling.observations import BLOCKING, StageEstimate, StepMean
from perseus_plugin.profiling.pooling import pool, unresolved_kinds
from perseus_plugin.profiling.step_sizes import Durations, averaged, fit_durations

Estimates = Mapping[tuple[int, int], Sequence[StageEstimate]]
"""By (replica, stage) the estimates of its ranks, which work in lock-step."""


Works = Mapping[tuple[int, int], float]
"""By (replica, iteration) the mean of what was announced of its microbatches, by whatever measure."""
_ANNOUNCED = "announced"
_TELLS = 0.5  # share of the variance from step to step that announced work must explain


def on_common_work(
    estimates: Estimates, *, max_relative_error: float, works: Works | None = None
) -> dict[tuple[int, int], StageEstimate]:
    """One estimate per (replica, stage), with durations of what all stages did in the same steps.

    Each replica has steps of its own. As data differ, a replica may have had more work than another while it was
    measured; all are scaled to the mean of the replicas, so that this is not taken for a difference between clocks.
    Estimates without steps keep their durations. Work that was announced says how large steps are as well as a further
    stage would that always ran at one clock, where durations at one clock go with it.
    """
    result: dict[tuple[int, int], StageEstimate] = {}
    for replica in sorted({replica for replica, _ in estimates}):
        members = {stage: shards for (r, stage), shards in estimates.items() if r == replica}
        steps: dict[Hashable, Sequence[StepMean]] = {
            stage: averaged([e.steps for e in shards]) for stage, shards in members.items()
        }
        announced = _announced(steps, {i: work for (r, i), work in (works or {}).items() if r == replica})
        fitted = fit_durations({**steps, **announced})
        for stage, shards in members.items():
            joined = pool(shards, max_relative_error=max_relative_error)
            result[replica, stage] = _refitted(joined, stage, fitted, max_relative_error)
    return _scaled_alike(result) if all(e.steps for shards in estimates.values() for e in shards) else result


def _announced(
    members: Mapping[Hashable, Sequence[StepMean]], works: Mapping[int, float]
) -> dict[Hashable, Sequence[StepMean]]:
    """The announced work of a replica's steps as one more member; nothing where it says little of durations."""
    seen: dict[tuple[Hashable, str, int], list[tuple[float, float]]] = {}
    for member, means in members.items():
        for mean in means:
            if mean.step in works:
                pair = math.log(works[mean.step]), math.log(mean.mean_s)
                seen.setdefault((member, mean.kind, mean.frequency_mhz), []).append(pair)
    x, y = (
        np.concatenate([[0.0], *(np.array(pairs)[:, at] - np.mean(pairs, axis=0)[at] for pairs in seen.values())])
        for at in (0, 1)
    )
    square = float(x @ x) * float(y @ y)
    if not square > 0 or not (x @ y) > 0 or (x @ y) ** 2 / square < _TELLS:
        return {}
    known = {mean.step for means in members.values() for mean in means} & works.keys()
    return {_ANNOUNCED: [StepMean(step, 0, _ANNOUNCED, works[step], 1) for step in sorted(known)]}


def _refitted(estimate: StageEstimate, stage: int, fitted: Durations, max_relative_error: float) -> StageEstimate:
    if not any(stage == member for member, _, _ in fitted.at):
        return estimate
    rows = []
    for row in estimate.instructions:
        duration = fitted.at.get((stage, row.kind, row.frequency_mhz))
        if duration is not None:
            row = replace(row.lasting(duration.time_s, duration.se_s), spread=fitted.spread[stage, row.kind])
        rows.append(row)
    refitted = replace(estimate, instructions=tuple(rows), steps=())
    never = set(estimate.unresolved) - set(estimate.kinds) - {BLOCKING}
    unresolved = (unresolved_kinds(refitted, max_relative_error) | never) - {BLOCKING}
    return replace(refitted, unresolved=frozenset(unresolved | (estimate.unresolved & {BLOCKING})))


def _scaled_alike(estimates: Mapping[tuple[int, int], StageEstimate]) -> dict[tuple[int, int], StageEstimate]:
    logs: dict[tuple[int, str], dict[int, float]] = {}
    for (replica, stage), estimate in estimates.items():
        for row in estimate.instructions:
            if row.frequency_mhz == estimate.clocks_mhz[0]:
                logs.setdefault((stage, row.kind), {})[replica] = math.log(row.time_s)
    replicas = {replica for replica, _ in estimates}
    shared = [by_replica for by_replica in logs.values() if by_replica.keys() == replicas]
    if not shared or len(replicas) == 1:
        return dict(estimates)
    sums = {replica: sum(by_replica[replica] for by_replica in shared) for replica in replicas}
    mean = sum(sums.values()) / len(sums)
    factors = {replica: math.exp((mean - total) / len(shared)) for replica, total in sums.items()}
    return {
        (replica, stage): replace(
            estimate,
            instructions=tuple(
                row.lasting(row.time_s * factors[replica], row.time_se_s * factors[replica])
                for row in estimate.instructions
            ),
        )
        for (replica, stage), estimate in estimates.items()
    }
