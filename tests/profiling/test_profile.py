from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import ProfileError
from perseus_plugin.iteration.bounds import MOST_S
from perseus_plugin.profiling.profile import Measurement, Profile, load_profile, save_profile
from tests.factories import profile

HEAD = "stage,instruction,frequency,time,energy"
GOOD = [
    "0,forward,1410,0.010,4.0",
    "0,forward,810,0.014,3.0",
    "0,backward,1410,0.020,8.0",
    "0,backward,810,0.028,6.0",
    "1,forward,1410,0.013,5.0",
    "1,backward,1410,0.026,10.0",
]


def written(folder: Path, rows: list[str], head: str = HEAD) -> Path:
    path = folder / "profile.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def refused(path: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_file_of_five_columns_loads(tmp_path: Path) -> None:
    """As Zeus writes it: pandas, rows in any order."""
    loaded = load_profile(written(tmp_path, GOOD[::-1]))
    assert loaded.stages == 2
    assert set(loaded.kinds) == {"forward", "backward"}
    top, low = loaded.table[0, "forward"]
    assert (top.frequency_mhz, top.time_s, top.energy_j) == (1410, 0.010, 4.0)
    assert (low.frequency_mhz, low.time_s, low.energy_j) == (810, 0.014, 3.0)
    assert all(m.samples == 0 and math.isnan(m.time_se_s) and math.isnan(m.energy_se_j) for _, _, m in loaded.rows())
    assert [m.frequency_mhz for m in loaded.table[1, "backward"]] == [1410]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n\n",
        lambda text: HEAD + text.removeprefix(HEAD).replace(",", ", "),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("1410", "1410.0"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["windows", "blank lines", "spaces", "byte order mark", "frequency as a float", "no last line break"],
)
def test_what_other_tools_make_of_it_loads(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = written(tmp_path, GOOD)
    plain = repr(load_profile(path))
    path.write_bytes(change(path.read_text()).encode())
    assert repr(load_profile(path)) == plain


def test_further_columns_may_follow(tmp_path: Path) -> None:
    rows = [f"{row},{i},0.001,,note" for i, row in enumerate(GOOD)]
    loaded = load_profile(written(tmp_path, rows, HEAD + ",samples,time_se,energy_se,remark"))
    top = loaded.table[1, "forward"][0]
    assert (top.samples, top.time_se_s) == (4, 0.001)
    assert math.isnan(top.energy_se_j)
    assert math.isnan(top.spread_within)
    assert math.isnan(top.spread_between_se)


def test_spread_is_read(tmp_path: Path) -> None:
    spread = "spread_within,spread_within_se,spread_between,spread_between_se"
    top = load_profile(written(tmp_path, [GOOD[0] + ",0.1,0.01,0.24,0.02"], f"{HEAD},{spread}")).table[0, "forward"][0]
    assert (top.spread_within, top.spread_within_se) == (0.1, 0.01)
    assert (top.spread_between, top.spread_between_se) == (0.24, 0.02)


@pytest.mark.parametrize(
    ("given_as", "read_as"),
    [
        ("Forward", "forward"),
        (" FORWARD ", "forward"),
        ("ForwardPass", "forward"),
        ("fwd", "forward"),
        ("BackwardPass", "backward"),
        ("BWD", "backward"),
        ("Weight", "weight"),
    ],
)
def test_kinds_are_matched_without_regard_to_case(tmp_path: Path, given_as: str, read_as: str) -> None:
    assert load_profile(written(tmp_path, [f"0,{given_as},1410,0.01,4.0"])).kinds == (read_as,)


def test_one_kind_under_two_names_is_a_row_given_twice(tmp_path: Path) -> None:
    message = refused(written(tmp_path, [*GOOD, "0,Fwd,1410,0.01,4.0"]))
    assert message == "row 8: stage 0 forward at 1410 MHz stands in row 2 already"


def test_spaces_around_column_names_do_not_matter(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path, GOOD, " stage , instruction,frequency ,time,energy")).stages == 2


def test_stages_that_begin_at_one_are_named_as_such(tmp_path: Path) -> None:
    rows = [f"{int(row[0]) + 1}{row[1:]}" for row in GOOD]
    assert refused(written(tmp_path, rows)) == "stages begin at 1; they count from 0: subtract 1 from every stage"


@pytest.mark.parametrize(
    ("row", "power_w", "reason"),
    [
        ("0,forward,1410,0.010,4000", None, "4000 J in 0.01 s is 4e+05 W; allowed: at most 2000 W"),
        ("0,forward,1410,0.000010,4", None, "4 J in 1e-05 s is 4e+05 W; allowed: at most 2000 W"),
        ("0,forward,1410,10.0,4.0", 70.0, "4 J in 10 s is 0.4 W; allowed: at least the blocking power, 70 W"),
        ("0,forward,1410,0.01,0.69", [70.0, 10.0], "0.69 J in 0.01 s is 69 W; allowed: at least the blocking power"),
    ],
    ids=["energies in mJ", "times in us", "times in ms", "below blocking"],
)
def test_rows_that_no_gpu_can_have_are_refused(
    tmp_path: Path, row: str, power_w: float | list[float] | None, reason: str
) -> None:
    path = written(tmp_path, [row, *GOOD[1:]])
    with pytest.raises(ProfileError) as caught:
        load_profile(path, power_w)
    assert str(caught.value).startswith(f"{path}: row 2: energy: {reason}")


def test_a_power_limit_and_the_rows_own_waiting_power_count_too(tmp_path: Path) -> None:
    columns = "stage,instruction,frequency,time,energy,blocking_power"
    path = written(tmp_path, ["0,forward,1410,0.01,4.5,90", "0,forward,900,0.02,1.4,60"], columns)
    assert load_profile(path, 80.0, 460.0).stages == 1  # 70 W at 900 MHz, where waiting draws 60
    with pytest.raises(ProfileError, match=r"row 2: energy: .* is 450 W; allowed: at most the power limit, 440 W"):
        load_profile(path, None, 440.0)
    path = written(tmp_path, ["0,forward,1410,0.01,4.5,90", "0,forward,900,0.02,1.4,75"], columns)
    with pytest.raises(ProfileError, match=r"row 3: energy: .* is 70 W; allowed: at least the blocking power, 75 W"):
        load_profile(path, 10.0)


def test_energies_are_held_against_the_blocking_power_of_their_stage(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path, GOOD), 200.0).stages == 2
    with pytest.raises(ProfileError, match=r"row 6: .* is 384\.6 W; allowed: at least the blocking power, 390 W"):
        load_profile(written(tmp_path, GOOD), [200.0, 390.0])


@pytest.mark.parametrize(
    "head",
    [
        "",
        "stage,instruction,frequency,time",
        "instruction,stage,frequency,time,energy",
        "Stage,instruction,frequency,time,energy",
        "stage;instruction;frequency;time;energy",
        '"stage,instruction',
    ],
)
def test_wrong_columns_name_the_row_and_the_right_ones(tmp_path: Path, head: str) -> None:
    message = refused(written(tmp_path, [] if head.startswith('"') else GOOD, head))
    assert message.startswith("row 1: ")
    if not head.startswith('"'):
        assert message.endswith(f"they must begin with {HEAD}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,forward,1410,0.013", "wrong number of columns"),
        ("1,forward,1410,0.013,5.0,7", "wrong number of columns"),
        ("1,,1410,0.013,5.0", "instruction is empty"),
        ("x,forward,1410,0.013,5.0", "stage: got 'x'; allowed: a number"),
        ("-1,forward,1410,0.013,5.0", "stage: got '-1'; allowed: a whole number from 0 to 10000"),
        ("0.5,forward,1410,0.013,5.0", "stage: got '0.5'; allowed: a whole number from 0 to 10000"),
        ("1,forward,0,0.013,5.0", "frequency: got '0'; allowed: a whole number from 1 to 10000"),
        ("1,forward,-1410,0.013,5.0", "frequency: got '-1410'; allowed: a whole number from 1 to 10000"),
        ("1,forward,inf,0.013,5.0", "frequency: got 'inf'; allowed: a whole number from 1 to 10000"),
        ("1,forward,nan,0.013,5.0", "frequency: got 'nan'; allowed: a whole number from 1 to 10000"),
        ("1,forward,1410,0,5.0", "time: got '0'; allowed: a finite number above 0, at most 1e+06"),
        ("1,forward,1410,-0.1,5.0", "time: got '-0.1'; allowed: a finite number above 0, at most 1e+06"),
        ("1,forward,1410,nan,5.0", "time: got 'nan'; allowed: a finite number above 0, at most 1e+06"),
        ("1,forward,1410,1e999,5.0", "time: got '1e999'; allowed: a finite number above 0, at most 1e+06"),
        ("1,forward,1410,,5.0", "time: got ''; allowed: a number"),
        ("1,forward,1410,fast,5.0", "time: got 'fast'; allowed: a number"),
        ("1,forward,1410,0.013,0", "energy: got '0'; allowed: a finite number above 0, at most 2e+09"),
        ("1,forward,1410,0.013,-5", "energy: got '-5'; allowed: a finite number above 0, at most 2e+09"),
        ("1,forward,1410,0.013,inf", "energy: got 'inf'; allowed: a finite number above 0, at most 2e+09"),
        ("0,forward,810,0.014,3.0", "stage 0 forward at 810 MHz stands in row 3 already"),
        ('1,"forward,1410,0.013,5.0', ""),
        ('1,"for"ward,1410,0.013,5.0', ""),
    ],
)
def test_a_wrong_row_is_named_with_the_reason(tmp_path: Path, row: str, reason: str) -> None:
    message = refused(written(tmp_path, [*GOOD[:4], row, *GOOD[5:]]))
    assert message == f"row 6: {reason}" if reason else message.startswith("row ")


def test_a_wrong_standard_error_or_count_is_named(tmp_path: Path) -> None:
    head = HEAD + ",samples,time_se,energy_se"
    assert refused(written(tmp_path, [GOOD[0] + ",2.5,,"], head)) == (
        "row 2: samples: got '2.5'; allowed: a whole number from 0 to 1000000000"
    )
    assert refused(written(tmp_path, [GOOD[0] + ",2,often,"], head)) == "row 2: time_se: got 'often'; allowed: a number"
    assert refused(written(tmp_path, [GOOD[0] + ",2,,-1"], head)) == (
        "row 2: energy_se: got '-1'; allowed: a number from 0, or nothing"
    )


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ((4, 5), None),
        ((0, 1, 2, 3), "stages begin at 1; they count from 0"),
        ((1,), "stage 0: frequency 810 MHz has no row for 'forward'"),
        ((2,), "stage 0: frequency 1410 MHz has no row for 'backward'"),
        (range(6), "the profile has no rows"),
    ],
)
def test_a_missing_stage_kind_or_clock_is_named(tmp_path: Path, missing: tuple[int, ...], reason: str | None) -> None:
    path = written(tmp_path, [row for i, row in enumerate(GOOD) if i not in missing])
    if reason is None:
        assert load_profile(path).stages == 1
    else:
        assert refused(path).startswith(reason)


def test_a_gap_between_stages_is_named(tmp_path: Path) -> None:
    rows = [row.replace("1,", "3,", 1) if row.startswith("1,") else row for row in GOOD]
    assert refused(written(tmp_path, rows)) == "stage 1 has no row, but stage 3 has"
    rows[-1] = "10000,backward,1410,0.026,10.0"
    assert refused(written(tmp_path, rows)) == "stage 1 has no row, but stage 10000 has"


def test_a_stage_has_rows_for_what_it_runs_and_no_others(tmp_path: Path) -> None:
    """As in a zero-bubble schedule, whose first stage computes no gradient of its input."""
    loaded = load_profile(written(tmp_path, [*GOOD[:5], "1,input_backward,1410,0.01,4.0"]))
    assert loaded.kinds == ("backward", "forward", "input_backward")
    assert {kind for stage, kind in loaded.table if stage == 1} == {"forward", "input_backward"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"stage,instruction\x00", b""])
def test_a_file_that_is_no_csv(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.csv"
    path.write_bytes(content)
    refused(path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    assert "cannot read the profile" in refused(tmp_path / "missing.csv")
    assert "cannot read the profile" in refused(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Measurement(810, 0.0, 1.0), "must be finite numbers above 0"),
        (Measurement(810, 1.0, math.nan), "must be finite numbers above 0"),
        (Measurement(1410, 1.0, 1.0), "two rows for one frequency"),
    ],
)
def test_a_table_is_checked_without_a_file_too(row: Measurement, reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        Profile({(0, "forward"): (Measurement(1410, 1.0, 1.0), row)})
    with pytest.raises(ProfileError, match="no rows"):
        Profile({})


def test_measurements_are_sorted_by_falling_clock_whatever_the_order() -> None:
    rows = list(profile().rows())
    assert Profile.from_rows(rows[::-1]) == profile()
    for measurements in profile().table.values():
        clocks = [m.frequency_mhz for m in measurements]
        assert clocks == sorted(clocks, reverse=True)


TIME = st.floats(min_value=1e-200, max_value=MOST_S)
POWER = st.floats(min_value=1e-3, max_value=1999)
ERROR = st.one_of(st.just(math.nan), st.floats(0, 1e300))
LETTERS = st.characters(codec="utf-8", exclude_categories=["C", "Z"])
KIND = st.text(LETTERS, min_size=1, max_size=8).map(str.lower).filter(lambda kind: kind not in {"fwd", "bwd"})


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    kinds = draw(st.lists(KIND, min_size=1, max_size=3, unique=True))
    rows = []
    for stage in range(draw(st.integers(1, 3))):
        for clock in draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4, unique=True)):
            for kind in kinds:
                time_s = draw(TIME)
                errors = [draw(ERROR) for _ in range(6)]
                row = Measurement(clock, time_s, time_s * draw(POWER), draw(st.integers(0, 10**6)), *errors)
                rows.append((stage, kind, row))
    return Profile.from_rows(rows)


@given(profiles())
def test_a_profile_survives_its_file(tmp_path_factory: pytest.TempPathFactory, saved: Profile) -> None:
    path = tmp_path_factory.mktemp("profile") / "profile.csv"
    save_profile(saved, path)
    assert repr(load_profile(path)) == repr(saved)  # NaN is not equal to itself
    assert path.read_text(encoding="utf-8").startswith(HEAD + ",")


@given(profiles())
def test_a_measurement_survives_the_way_to_another_process(saved: Profile) -> None:
    for _, _, row in saved.rows():
        assert repr(Measurement.from_row(json.loads(json.dumps(row.to_row())))) == repr(row)


@given(profiles(), st.floats(0.01, 100))
def test_a_scaled_profile_has_all_times_and_energies_scaled(plain: Profile, factor: float) -> None:
    try:
        scaled = plain.scaled(factor)
    except ProfileError:
        assert any(not 0 < m.time_s * factor <= MOST_S or not m.energy_j > 0 for _, _, m in plain.rows())
        return
    for (*key, new), (*old_key, old) in zip(scaled.rows(), plain.rows(), strict=True):
        assert key == old_key
        assert (new.frequency_mhz, new.samples) == (old.frequency_mhz, old.samples)
        assert (new.time_s, new.energy_j) == (old.time_s * factor, old.energy_j * factor)


def test_instructions_are_scaled_each_by_its_own_factor_and_those_of_one_stay_as_they_are() -> None:
    plain = profile()
    keys = list(plain.table)
    scaled = plain.scaled({key: 2.0 if key == keys[0] else 1.0 for key in keys})
    assert [m.time_s for m in scaled.table[keys[0]]] == [2 * m.time_s for m in plain.table[keys[0]]]
    assert all(scaled.table[key] == plain.table[key] for key in keys[1:])


def test_added_time_may_be_at_another_power_and_the_top_clock_left_alone() -> None:
    plain = profile()
    scaled = plain.scaled(1.5, below_top=True, added_w=[50.0])
    for (stage, kind), rows in plain.table.items():
        top, *others = scaled.table[stage, kind]
        assert top == rows[0]
        for new, old in zip(others, rows[1:], strict=True):
            assert new.time_s == 1.5 * old.time_s
            added_w = 0.0 if stage else 50.0  # the list has one stage only
            assert new.energy_j == pytest.approx(old.energy_j + added_w * 0.5 * old.time_s)
    told = Measurement(900, 1.0, 200.0, blocking_power_w=70.0)
    assert told.scaled(1.5, added_w=50.0).energy_j == pytest.approx(235.0), "as the clock waits"


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_a_number_above_zero(factor: float) -> None:
    with pytest.raises(ProfileError, match=r"scale: got .*; allowed: a finite number above 0"):
        profile().scaled(factor)
