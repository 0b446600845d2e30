"""Another split of a measured profile."""

from __future__ import annotations

import math

import pytest

from perseus_plugin.cli.simulation.description import ModelDescription, modelled_profile
from perseus_plugin.cli.simulation.resplit import resplit
from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.profile import Measurement, Profile

MODEL = ModelDescription(layers=12, hidden=64, sequence_length=32, microbatch_size=2, vocabulary=1000)
KINDS = {"forward", "backward"}


@pytest.mark.parametrize("after", [(3, 3, 3, 3), (4, 3, 3, 2), (6, 6), (2, 2, 2, 2, 2, 2)])
def test_a_model_split_anew_is_the_model_with_that_split(after: tuple[int, ...]) -> None:
    before = (3, 3, 3, 3)
    wanted = modelled_profile(MODEL, after, "a100", KINDS)
    made = resplit(modelled_profile(MODEL, before, "a100", KINDS), before, after)
    assert made.table.keys() == wanted.table.keys()
    for key, rows in wanted.table.items():
        for row, other in zip(rows, made.table[key], strict=True):
            assert other.frequency_mhz == row.frequency_mhz
            assert other.time_s == pytest.approx(row.time_s, rel=1e-9)
            assert other.energy_j == pytest.approx(row.energy_j, rel=1e-9)


def test_nothing_is_claimed_of_the_errors_of_what_was_not_measured() -> None:
    made = resplit(modelled_profile(MODEL, (3, 3, 3, 3), "a100", KINDS), (3, 3, 3, 3), (4, 3, 3, 2))
    assert all(m.samples == 0 and math.isnan(m.time_se_s) and math.isnan(m.energy_se_j) for _, _, m in made.rows())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ((3, 3), (6, 6), "layers: got"),
        ((3, 3, 3, 3), (3, 3, 3, 4), "together 13; allowed: layers of each stage, together 12"),
        ((6, 0, 3, 3), (3, 3, 3, 3), "with layers in all between"),
    ],
)
def test_splits_that_do_not_fit_are_refused(before: tuple[int, ...], after: tuple[int, ...], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        resplit(modelled_profile(MODEL, (3, 3, 3, 3), "a100", KINDS), before, after)


def test_a_pipeline_without_a_middle_is_refused() -> None:
    with pytest.raises(ProfileError, match="got a profile of 2 stages; allowed: from 3"):
        resplit(modelled_profile(MODEL, (6, 6), "a100", KINDS), (6, 6), (7, 5))


def test_stages_with_different_clocks_are_refused() -> None:
    profile = Profile.from_rows(
        (stage, kind, Measurement(clock, 1.0, 1.0))
        for stage in range(3)
        for kind in KINDS
        for clock in ((1400, 1200) if stage else (1410, 1200))
    )
    with pytest.raises(ProfileError, match="different clocks"):
        resplit(profile, (1, 1, 1), (1, 2, 0))
