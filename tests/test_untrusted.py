"""Whatever others may have written, reading it gives the reader's own error in one line, and soon."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.cli.simulation.description import load_description
from perseus_plugin.cli.simulation.traces.kineto import load_traces
from perseus_plugin.cli.simulation.traces.table import load_table
from perseus_plugin.config import load_config, parse_config
from perseus_plugin.errors import ConfigError, PerseusError, PlanError, ProfileError
from perseus_plugin.exchange.client import ExchangeError, StoreClient
from perseus_plugin.exchange.messages import (
    IterationDurations,
    News,
    PaceOf,
    Placement,
    PlanPart,
    RankEstimate,
    receive,
)
from perseus_plugin.files import parse_json, parse_yaml, read_bytes
from perseus_plugin.planning.curve import load_curve
from perseus_plugin.planning.inputs import load_inputs
from perseus_plugin.planning.plan import load_plan, plan_from_json
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.profiling.failed import load_failure
from perseus_plugin.profiling.kept import read_survey
from perseus_plugin.profiling.profile import Measurement, Profile, load_profile
from perseus_plugin.reporting.live.events import read_events
from perseus_plugin.reporting.record.records import load_record
from perseus_plugin.reporting.record.samples import load_samples
from perseus_plugin.reporting.record.summary import load_summary

READERS: dict[str, Callable[[Path], object]] = {
    "schedule.json": load_streams,
    "schedule.csv": load_streams,
    "plan.json": load_plan,
    "plan-inputs.json": load_inputs,
    "frontier.json": load_curve,
    "profile.csv": load_profile,
    "profile.json": lambda path: read_survey(path.parent),
    "profile-failed.json": lambda path: load_failure({}, path.parent),
    "summary.json": load_summary,
    "samples.json": load_samples,
    "events.jsonl": read_events,
    "records/rank-0.jsonl": lambda path: load_record(path.parent.parent, 0),
    "operations.csv": load_table,
    "trace.json": lambda path: load_traces([path]),
    "model.yaml": load_description,
    "config.yaml": load_config,
    "config.json": load_config,
}
DIGITS = "9" * 10_000


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def schedule(microbatch: str) -> str:
    op = '{"op": "compute", "kind": "forward", "microbatch": ' + microbatch + "}"
    return '{"schema": "perseus-schedule", "version": 1, "stages": [[' + op + "]]}"


BODIES = {
    "nothing": "",
    "null": "null",
    "nul bytes": "\0\0",
    "no UTF-8": "\udcff",
    **{f"lists {depth} deep": nested(depth) for depth in (70, 300, 3_000, 100_000)},
    "objects deep": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "deep in a key": "layers: " + nested(3_000),
    "deep in a schedule": schedule(nested(150)),
    "digits": DIGITS,
    "digits in a schedule": schedule(DIGITS),
    "fewer digits in a schedule": schedule("9" * 4_000),
    "digits in YAML": f"layers: {DIGITS}\nslowdown: {DIGITS}",
    "digits in CSV": f"stage,instruction,frequency,time,energy\n0,forward,{DIGITS},1,1\n",
    "no date": "layers: 2024-13-45\nslowdown: 2024-13-45",
    "no time": "layers: 2024-01-05T25:61:61Z\nslowdown: 2024-01-05T25:61:61Z",
    "date": "layers: 2024-01-05\nslowdown: 2024-01-05",
    "tags": "layers: !!bool x\nslowdown: !!bool x",
    "timestamp": "layers: !!timestamp x\nslowdown: !!timestamp x",
    "bytes": "layers: !!binary x\nslowdown: !!binary x",
    "aliases": "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "a circle": "layers: &a [*a]\nslowdown: *a",
    "event": '{"time": 1, "event": "x", "more": ' + nested(3_000) + "}\n",
    "infinite": '{"time": 1e999, "event": "x"}\n',
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_a_file_that_is_not_what_it_should_be_is_refused_in_one_line(tmp_path: Path, name: str, body: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body.encode(errors="surrogateescape"))
    try:
        READERS[name](path)
    except PerseusError as error:
        told = str(error)
        assert "\n" not in told
        assert len(told) < 600 + len(str(path))
    else:  # a configuration may be empty, and events may be none
        assert name in ("config.json", "config.yaml", "events.jsonl")


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(PerseusError, match=r"more than .* bytes"):
        READERS[name](path)


def test_a_pipe_is_read_up_to_the_limit(tmp_path: Path) -> None:
    """As a shell gives it, `<(command)`."""
    inlet, outlet = os.pipe()
    os.write(outlet, b"some text")
    os.close(outlet)
    try:
        assert read_bytes(f"/proc/self/fd/{inlet}") == b"some text"
    finally:
        os.close(inlet)


@pytest.mark.parametrize("text", [nested(65), nested(500), nested(100_000), '{"a":' * 200 + "1" + "}" * 200, DIGITS])
def test_json_has_bounds(text: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=r"deep|digits"):
            parse_json(given)


def test_json_that_is_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        parse_json("[1, 2, 3, 4]", most=10)


@pytest.mark.parametrize(
    "value", [nested(30), ["[" * 500, "}" * 500, '\\"[['], [[[i]] for i in range(1000)], {"a": {"b": [{}]}}]
)
def test_json_within_them_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


def test_yaml_with_anchors_is_read() -> None:
    text = "a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\nc: [*a, *a]\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


class Store:
    """A store that holds something else than what ranks put there."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def clone(self) -> Store:
        raise NotImplementedError

    def check(self, keys: list[str]) -> bool:
        return True

    def get(self, key: str) -> bytes:
        return self._data


@pytest.mark.parametrize("text", [nested(100_000), nested(500), DIGITS, "\0", "{"])
def test_nonsense_in_the_store_is_an_exchange_error(text: str) -> None:
    exchange = StoreClient(Store(text.encode()), "prefix")
    with pytest.raises(ExchangeError, match="is not valid JSON"):
        exchange.fetch("key")


PLACE: dict[str, Any] = {"rank": 0, "world_size": 1, "stage": 0, "stages": 1, "replica": 0, "local_rank": 0}
PLACE["device"] = "cpu"
RAN: dict[str, Any] = {"number": 1, "schedule": "", "clocks_mhz": [0], "durations_s": [0.1], "starts_s": [0.0]}
RAN["time_s"] = 1.0


def test_figures_as_they_are_are_taken() -> None:
    assert receive(Placement, PLACE).leads
    assert receive(IterationDurations, RAN).durations_s == (0.1,)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        (Placement, {**PLACE, "stages": 2**63}),
        (Placement, {**PLACE, "rank": -1}),
        (Placement, {**PLACE, "shards": 0}),
        (News, {"sequence": 1, "switch": 2**63, "action": "full"}),
        (News, {"sequence": 1, "switch": 1, "action": "sweep", "clocks_mhz": [10**9]}),
        (RankEstimate, {"placement": PLACE, "gpu": "", "estimate": {}, "constant_time_s": {"step": 1e30}}),
        (RankEstimate, {"placement": PLACE, "gpu": "", "estimate": {}, "constant_time_s": {"step": float("nan")}}),
        (RankEstimate, {"placement": PLACE, "gpu": "", "estimate": {}, "constant_time_s": {}, "switch_latency_s": -1}),
        (PaceOf, {"pace": {1: 0.0}}),
        (PaceOf, {"pace": {1: float("inf")}}),
        (IterationDurations, {**RAN, "durations_s": [float("inf")]}),
        (IterationDurations, {**RAN, "starts_s": [1e30]}),
        (PlanPart, {"version": 1, "schedule": "", "clocks_mhz": [10**9], "times_s": [1.0]}),
        (PlanPart, {"version": 1, "schedule": "", "clocks_mhz": [0], "times_s": [1.0]}),
        (PlanPart, {"version": 1, "schedule": "", "clocks_mhz": [1000], "times_s": [1e30]}),
        (PlanPart, {"version": 1, "schedule": "", "clocks_mhz": [1000], "times_s": [-1.0]}),
    ],
)
def test_absurd_figures_in_messages_are_refused(message: Any, value: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError, match="from the job's store"):
        receive(message, value)


CSV = "stage,instruction,frequency,time,energy,samples,time_se\n"


@pytest.mark.parametrize(
    "row",
    [
        "0,forward,1000000000,1,100,,",
        "0,forward,1000,1e30,1e32,,",
        "0,forward,1000,1,100,,-0.1",
        "0,forward,1000,1,100,-1,",
    ],
)
def test_absurd_figures_in_a_profile_are_refused(tmp_path: Path, row: str) -> None:
    path = tmp_path / "profile.csv"
    path.write_text(f"{CSV}{row}\n")
    with pytest.raises(ProfileError, match=r"row 2: .*allowed"):
        load_profile(path)


def absurd(**changes: float) -> Profile:
    return Profile({(0, "forward"): (replace(Measurement(1000, 1.0, 100.0), **changes),)})


@pytest.mark.parametrize(
    "changes",
    [{"time_s": 1e30}, {"frequency_mhz": 10**9}, {"time_se_s": -1.0}, {"samples": -1}, {"blocking_power_w": -1.0}],
)
def test_they_are_refused_wherever_a_profile_comes_from(changes: dict[str, float]) -> None:
    with pytest.raises(ProfileError):
        absurd(**changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("predicted_s", [[[1.0, 0.5]]]),
        ("predicted_s", [[[0.0, 1e30]]]),
        ("predicted_s", [[[-1.0, 1.0]]]),
        ("stages", [[["forward", 0, 10**9]]]),
        ("stages", [[["forward", 2**63, 1000]]]),
        ("deadline_s", 1e30),
        ("waits", [[[0, 10**9, 1.0, 2.0]]]),
    ],
)
def test_absurd_figures_in_a_plan_are_refused(key: str, value: Any) -> None:
    content: dict[str, Any] = {
        "schema": "perseus-plan",
        "version": 1,
        "schedule": "one",
        "microbatches": 1,
        "deadline_s": 1.0,
        "iteration_time_s": 1.0,
        "energy_j": 1.0,
        "energy_lower_bound_j": 1.0,
        "gap": 0.0,
        "baseline": {"iteration_time_s": 1.0, "energy_j": 1.0},
        "stages": [[["forward", 0, 1000]]],
        "predicted_s": [[[0.0, 1.0]]],
    }
    plan_from_json(json.dumps(content))
    with pytest.raises(PlanError):
        plan_from_json(json.dumps({**content, key: value}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("profiling", "warmup_steps", 2**63),
        ("profiling", "steps_per_clock", 10**9),
        ("profiling", "settle_steps", 10**9),
        ("profiling", "seed", 10**400),
        ("profiling", "clocks_mhz", [1000, 10**9]),
        ("profiling", "blocking_power_w", 1e30),
        ("limits", "max_changes_per_iteration", 2**63),
        ("watch", "patience", 2**63),
        ("watch", "max_replans", 2**63),
        ("emulation", "forward_time_s", [1e30]),
    ],
)
def test_absurd_settings_are_refused(section: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"perseus\.{section}\.{key}: got .*; allowed: "):
        parse_config({section: {key: value}})
