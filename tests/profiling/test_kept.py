"""A profile is kept with what it was measured on, and used again only for the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.kept import job_fingerprint, load_survey, read_survey, save_survey
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.survey import Survey

FACTS = {"gpu": "A100", "model": "abc"}


def survey() -> Survey:
    rows = [
        (stage, kind, Measurement(clock, 0.1 * 1410 / clock, 20.0 + clock / 100))
        for stage in range(2)
        for kind in ("forward", "backward")
        for clock in (1410, 1005)
    ]
    return Survey(Profile.from_rows(rows), 83.5, frozenset({(1, "backward")}), {(0, "optimizer_step"): 0.25})


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    fingerprint = job_fingerprint([(0, FACTS), (1, FACTS)])
    assert load_survey(fingerprint, tmp_path) is None
    save_survey(survey(), fingerprint, tmp_path)
    assert load_survey(fingerprint, tmp_path) == survey()


def test_errors_and_spread_come_back(tmp_path: Path) -> None:
    row = Measurement(1410, 0.1, 30.0, 40, 0.001, 0.3, 0.05, 0.01, 0.24, 0.03)
    kept = Survey(Profile({(0, "forward"): (row,)}), 83.5, blocking_power_se_w=0.7)
    save_survey(kept, {}, tmp_path)
    assert load_survey({}, tmp_path) == kept


def test_every_key_of_the_description_keeps_its_place(tmp_path: Path) -> None:
    save_survey(survey(), {"ranks": "2"}, tmp_path)
    assert (tmp_path / "profile.json").read_text() == json.dumps(
        {
            "schema_name": "perseus-profile",
            "version": 1,
            "fingerprint": {"ranks": "2"},
            "blocking_power_w": 83.5,
            "blocking_power_se_w": None,
            "unresolved": [[1, "backward"]],
            "constant_time_s": [[0, "optimizer_step", 0.25]],
        },
        indent=2,
    ) + "\n"


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    save_survey(survey(), {}, tmp_path)
    with pytest.raises(ProfileError, match=r"profile.json: blocking_power_w: got nan"):
        save_survey(replace(survey(), blocking_power_w=float("nan")), {}, tmp_path)
    assert load_survey({}, tmp_path) == survey()


def test_a_report_reads_it_whatever_it_was_measured_on(tmp_path: Path) -> None:
    fingerprint = job_fingerprint([(0, FACTS), (1, FACTS)])
    assert read_survey(tmp_path) is None
    save_survey(survey(), fingerprint, tmp_path)
    assert read_survey(tmp_path) == (survey(), fingerprint)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([(0, FACTS), (1, {**FACTS, "gpu": "H100"})], "stage 1: gpu was A100 and is H100"),
        ([(0, {**FACTS, "model": "xyz"}), (1, FACTS)], "stage 0: model was abc and is xyz"),
        ([(0, FACTS), (1, FACTS), (1, FACTS)], "ranks was 2 and is 3"),
        ([(0, FACTS), (1, FACTS), (1, {**FACTS, "gpu": "H100"})], "ranks was 2 and is 3"),
        ([(0, {**FACTS, "torch": "3"}), (1, FACTS)], r"stage 0: torch was \(nothing\) and is 3"),
    ],
)
def test_another_job_is_refused_with_the_difference(
    ranks: list[tuple[int, dict[str, str]]], named: str, tmp_path: Path
) -> None:
    save_survey(survey(), job_fingerprint([(0, FACTS), (1, FACTS)]), tmp_path)
    with pytest.raises(ProfileError, match=named):
        load_survey(job_fingerprint(ranks), tmp_path)


def test_the_order_of_ranks_does_not_matter() -> None:
    ranks = [(0, FACTS), (1, FACTS), (1, {**FACTS, "gpu": "H100"})]
    assert job_fingerprint(ranks) == job_fingerprint(ranks[::-1])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_name": "perseus-profile"}', "null"])
def test_a_damaged_description_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(ProfileError, match=r"profile\.json: (not valid|got .*; allowed: an object|version: missing)"):
        load_survey({}, tmp_path)


def test_a_description_of_another_version_is_refused(tmp_path: Path) -> None:
    fingerprint = job_fingerprint([(0, FACTS)])
    save_survey(survey(), fingerprint, tmp_path)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(ProfileError, match="version: got 2; allowed: 1"):
        load_survey(fingerprint, tmp_path)


def test_a_failed_write_leaves_no_description_beside_a_foreign_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = job_fingerprint([(0, FACTS)])
    save_survey(survey(), fingerprint, tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perseus_plugin.profiling.kept.save_profile", full)
    with pytest.raises(OSError, match="No space left"):
        save_survey(survey(), fingerprint, tmp_path)
    assert load_survey(fingerprint, tmp_path) is None
