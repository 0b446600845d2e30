from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.profile import Profile, load_profile, save_profile
from perseus_plugin.profiling.waiting import WaitingPower
from tests.factories import profile

CURVE = WaitingPower((1100, 1400, 1600), (66.0, 72.0, 77.0))


@pytest.mark.parametrize(("mhz", "watts"), [(900, 66.0), (1100, 66.0), (1250, 69.0), (1600, 77.0), (1980, 77.0)])
def test_between_clocks_it_lies_on_the_line_and_outside_it_stays(mhz: int, watts: float) -> None:
    assert CURVE.at_w(mhz) == pytest.approx(watts)


def test_of_the_cheapest_clocks_the_highest_is_waited_at() -> None:
    assert CURVE.cheapest_mhz([600, 900, 1100, 1400]) == 1100
    assert WaitingPower.constant(75.0).cheapest_mhz([600, 900]) == 900
    assert CURVE.lowest_w == 66.0
    assert not CURVE.is_constant
    assert WaitingPower.constant(75.0).is_constant


def test_the_profile_carries_it_by_stage_through_its_file(tmp_path: Path) -> None:
    plain = profile(2)
    rows = [
        (stage, kind, replace(row, blocking_power_w=50 + row.frequency_mhz / 100) if stage == 1 else row)
        for stage, kind, row in plain.rows()
    ]
    path = tmp_path / "profile.csv"
    save_profile(Profile.from_rows(rows), path)
    loaded = load_profile(path)
    assert loaded.waiting_power(0, 70.0) == WaitingPower.constant(70.0)
    of_last = loaded.waiting_power(1, 70.0)
    top_mhz = loaded.table[1, "forward"][0].frequency_mhz
    assert of_last.at_w(top_mhz) == pytest.approx(50 + top_mhz / 100)
    assert list(of_last.clocks_mhz) == sorted(row.frequency_mhz for row in loaded.table[1, "forward"])
    assert math.isnan(loaded.table[0, "forward"][0].blocking_power_w)


def test_a_negative_waiting_power_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    path.write_text("stage,instruction,frequency,time,energy,blocking_power\n0,forward,1410,0.01,4.0,-70\n")
    with pytest.raises(ProfileError, match="blocking_power: got '-70'; allowed: a number from 0"):
        load_profile(path)
