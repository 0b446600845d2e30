from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from perseus_plugin.cli.job import parse_slowdown
from perseus_plugin.config import PerseusConfig, load_config, parse_config, with_whole_paths
from perseus_plugin.errors import ConfigError
from perseus_plugin.gpus.registry import choices

FULL: dict[str, Any] = {
    "enabled": True,
    "enforce": False,
    "slowdown": 0.0,  # no other one with prices
    "power_budget_w": 180e3,
    "price_per_kwh": 0.12,
    "price_per_gpu_hour": 2.0,
    "power_budget_groups_w": {"0-7,16": 5e3, "node": 6e3},
    "node_overhead_w": 900.0,
    "node_overhead_share": 0.05,
    "peak_w": 200e3,
    "peak_window_s": 0.5,
    "target_file": "target.json",
    "ramp_w_per_s": 500.0,
    "margin": 0.02,
    "quantile": 0.95,
    "catch_up": False,
    "lower_while_waiting": False,
    "cuda_graph": True,
    "effort": "normal",
    "refine_s": 30.0,
    "output_dir": "somewhere",
    "frontier": False,
    "record": False,
    "profiling": {
        "warmup_steps": 3,
        "clocks_mhz": [1410, 1005],
        "clock_count": 4,
        "lowest_clock": 0.6,
        "steps_per_clock": 7,
        "settle_steps": 2,
        "rounds": 3,
        "seed": -5,
        "max_relative_error": 0.1,
        "max_time_error": 0.02,
        "reuse": False,
        "load": "profile.csv",
        "blocking_power_w": 83.64,
        "power_limit_w": 300.0,
    },
    "gpu": {
        "backend": "zeusd",
        "foreign_clock": "give_way",
        "verified": "verify.json",
        "zeusd_socket": "/tmp/zeusd.sock",
    },
    "emulation": {
        "model": "A100",
        "forward_time_s": [0.01, 0.02],
        "backward_time_s": [0.02, 0.04],
        "power_limit_w": 300.0,
        "time_scale": 2,
        "switch_latency_s": 0.01,
        "gpus": ["gpu0", "gpu1"],
        "counter_period_s": 0.1,
    },
    "limits": {"max_changes_per_iteration": 4, "min_dwell_s": 0.5, "switch_latency_s": 0.02, "free_after_s": 30.0},
    "planner": {"python": "/opt/perseus/bin/python"},
    "watch": {"tolerance": 0.05, "patience": 3, "reference_share": 0.1, "max_replans": 0},
    "stragglers": {
        "enabled": False,
        "detect": False,
        "threshold": 0.05,
        "window": 10,
        "min_duration": 2,
        "min_interval_s": 5,
        "max_slowdown": 20,
        "socket": False,
    },
    "prometheus": {"textfile": "/var/lib/node_exporter/perseus.prom", "port": 9400, "address": "0.0.0.0"},
    "signals": [{"source": "carbon", "file": "grid.csv", "stretch": [[0, 80, 0.0]]}],
    "log_level": "debug",
}


SLOWDOWN = 'a number from 0 to 1, or a share such as "10%"'
WATTS = 'a number above 0, watts such as "180kW", or null'


def settings_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of the block, dotted."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += settings_of(field.annotation, f"{prefix}{name}.")
    return keys


def with_value(key: str, value: object) -> dict[str, Any]:
    """A block with one setting, given by its dotted key."""
    block: dict[str, Any] = {}
    here = block
    *sections, last = key.split(".")
    for section in sections:
        here = here.setdefault(section, {})
    here[last] = value
    return block


def test_an_empty_block_is_a_valid_one_and_enables() -> None:
    assert parse_config({}) == PerseusConfig()
    assert PerseusConfig().enabled
    assert PerseusConfig().slowdown == 0.0


def test_every_key_can_be_given() -> None:
    config = parse_config(FULL)
    assert config.model_dump(mode="json") == FULL
    assert set(settings_of(PerseusConfig)) == {
        *FULL,
        *(
            f"{name}.{key}"
            for name, section in FULL.items()
            if isinstance(section, dict) and name != "power_budget_groups_w"  # whose keys are the user's
            for key in section
        ),
    }, "a new setting belongs into FULL"


def test_json_yaml_and_dict_agree(tmp_path: Path) -> None:
    for name, text in (("block.json", json.dumps(FULL)), ("block.yaml", yaml.safe_dump(FULL))):
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name) == parse_config(FULL)
    (tmp_path / "outer.yml").write_text(yaml.safe_dump({"perseus": FULL}))
    (tmp_path / "outer.json").write_text(json.dumps({"perseus": FULL, "train_batch_size": 8}))
    assert load_config(tmp_path / "outer.yml") == load_config(str(tmp_path / "outer.json")) == parse_config(FULL)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == PerseusConfig()


def test_a_config_cannot_be_changed_afterwards() -> None:
    config = parse_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.slowdown = 0.5


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("enabled", 1, "true or false"),
        ("enabled", "yes", "true or false"),
        ("slowdown", -0.1, SLOWDOWN),
        ("power_budget_w", 0, WATTS),
        ("power_budget_w", "180kWh", WATTS),
        ("peak_w", "-3 W", WATTS),
        ("peak_window_s", 0, "a number above 0"),
        ("slowdown", "much", SLOWDOWN),
        ("slowdown", 10, SLOWDOWN),
        ("slowdown", None, SLOWDOWN),
        ("slowdown", True, SLOWDOWN),
        ("margin", 1.5, "a number from 0 to 1"),
        ("effort", "hard", '"quick", "normal" or "thorough"'),
        ("output_dir", "", "a path"),
        ("profiling", [], "an object"),
        ("profiling.warmup_steps", -1, "a whole number from 0 to 1000000"),
        ("profiling.warmup_steps", 2.5, "a whole number from 0 to 1000000"),
        ("profiling.warmup_steps", 2.0, "a whole number from 0 to 1000000"),
        ("profiling.clocks_mhz", [1410], "a list of at least 2 different whole numbers from 1 to 10000, or null"),
        ("profiling.clocks_mhz", [1410, 1410], "a list of at least 2 different whole numbers from 1 to 10000, or null"),
        ("profiling.clocks_mhz", [1410, 0], "a list of at least 2 different whole numbers from 1 to 10000, or null"),
        ("profiling.clocks_mhz", "1410", "a list of at least 2 different whole numbers from 1 to 10000, or null"),
        ("profiling.clock_count", 1, "a whole number from 2 to 64"),
        ("profiling.clock_count", 65, "a whole number from 2 to 64"),
        ("profiling.lowest_clock", 1, "a number above 0 and below 1"),
        ("profiling.lowest_clock", 0, "a number above 0 and below 1"),
        ("profiling.steps_per_clock", 1, "a whole number from 2 to 10000"),
        ("profiling.settle_steps", 0, "a whole number from 1 to 10000"),
        ("profiling.max_relative_error", 0, "a number above 0 and at most 1"),
        ("profiling.load", 3, "a path of a profile CSV, or null"),
        ("profiling.blocking_power_w", 0, "a number above 0 and at most 2000, or null"),
        ("profiling.power_limit_w", 0, "a number above 0 and at most 2000, or null"),
        ("gpu.backend", "cuda", choices()),
        ("gpu.zeusd_socket", None, "a path"),
        ("emulation.model", "V100", '"A100", "A40", "H100", "H200", "B200" or "B300"'),
        ("emulation.forward_time_s", [], "a list with one number above 0 and at most 3600 per stage, or null"),
        ("emulation.gpus", "gpu0", "a list of paths, one per local rank, or null"),
        ("emulation.gpus", [], "a list of paths, one per local rank, or null"),
        ("emulation.time_scale", 0.5, "a number from 1 to 1000"),
        ("emulation.switch_latency_s", 2, "a number from 0 to 1, or null"),
        ("emulation.counter_period_s", 0, "a number from 0.001 to 1, or null"),
        ("emulation.power_limit_w", 0, "a number above 0 and at most 2000, or null"),
        ("limits.max_changes_per_iteration", -1, "a whole number from 0 to 1000000, or null"),
        ("limits.min_dwell_s", 61, "a number from 0 to 60, or null"),
        ("limits.switch_latency_s", -1, "a number from 0 to 1, or null"),
        ("watch.tolerance", 0, "a number above 0 and at most 10, or null"),
        ("watch.reference_share", 0.5, "a number from 0 to 0.2"),
        ("watch.patience", 0, "a whole number from 1 to 1000000"),
        ("watch.max_replans", "3", "a whole number from 0 to 1000000"),
        ("log_level", "INFO", '"debug", "info", "warning" or "error"'),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value(key, value))
    assert str(caught.value) == f"perseus.{key}: got {json.dumps(value)}; allowed: {allowed}"


@pytest.mark.parametrize("written", ["10%", "10 %", "0.1", 0.1])
def test_a_slowdown_may_be_written_as_on_the_command_line(written: object) -> None:
    assert parse_config({"slowdown": written}).slowdown == 0.1
    assert parse_config({"slowdown": written}).slowdown == parse_slowdown(str(written))


@pytest.mark.parametrize("written", [10, 1.01, "1000%", "101 %"])
def test_what_is_no_slowdown_for_the_one_is_none_for_the_other(written: object) -> None:
    with pytest.raises(ConfigError, match=r"slowdown: got .*; allowed: .* 0 to 1,"):
        parse_config({"slowdown": written})
    with pytest.raises(ConfigError, match=r"slowdown: got .*; allowed: .* 0 to 1,"):
        parse_slowdown(str(written))


@pytest.mark.parametrize(("written", "watts"), [("180kW", 180e3), ("900 W", 900.0), ("1.2 MW", 1.2e6), (900, 900.0)])
def test_powers_may_be_written_as_on_the_command_line(written: object, watts: float) -> None:
    config = parse_config({"power_budget_w": written, "peak_w": written, "power_budget_groups_w": {"node": written}})
    assert (config.power_budget_w, config.peak_w, config.power_budget_groups_w) == (watts, watts, {"node": watts})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
@pytest.mark.parametrize("key", ["slowdown", "limits.min_dwell_s", "profiling.blocking_power_w"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"perseus\.{key}: got .*; allowed: a number"):
        parse_config(with_value(key, value))


@pytest.mark.parametrize(
    ("value", "item"), [([0.1, "x"], '"x"'), ([0.1, -1], "-1"), ([0.1, None], "null"), ([0.1, [0.2]], "[0.2]")]
)
def test_a_wrong_item_of_a_list_is_the_one_shown(value: list[object], item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value("emulation.forward_time_s", value))
    allowed = "a list with one number above 0 and at most 3600 per stage, or null"
    assert str(caught.value) == f"perseus.emulation.forward_time_s: got {item}; allowed: {allowed}"


@pytest.mark.parametrize("key", settings_of(PerseusConfig))
def test_every_setting_says_what_is_allowed_and_what_it_means(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value(key, {"no": ["setting"]} if "." in key or key not in FULL else {"no", "setting"}))
    message = str(caught.value)
    assert message.startswith(f"perseus.{key}: got ")
    assert "; allowed: " in message
    model: type[BaseModel] = PerseusConfig
    *sections, last = key.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        assert isinstance(annotation, type)
        model = annotation
    assert model.model_fields[last].description


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("slow_down", "slowdown"),
        ("Enabled", "enabled"),
        ("profiling.steps_per_clocks", "steps_per_clock"),
        ("gpu.backends", "backend"),
        ("limits.min-dwell-s", "min_dwell_s"),
        ("output-dir", "output_dir"),
        ("watch.patiences", "patience"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value(key, 7))
    assert f"perseus.{key}: unknown key, given the value 7; did you mean {near!r}? known keys: " in str(caught.value)


@pytest.mark.parametrize("key", ["zzzz", "none", "int", "tuple", "function-x", "a b", "", "profiling.str"])
def test_an_unknown_key_near_to_none_lists_the_known_ones(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value(key, None))
    assert str(caught.value).startswith(f"perseus.{key}: unknown key, given the value null; ")
    known = (
        "blocking_power_w, clock_count"
        if key.startswith("profiling.")
        else "effort, emulation, enabled, enforce, frontier, gpu"
    )
    assert known in str(caught.value)


@pytest.mark.parametrize("block", [{1: 2}, {None: True}, {"profiling": {2.5: 1}}, {("a", "b"): 1}])
def test_a_key_that_is_no_string_is_named(block: dict[object, object]) -> None:
    with pytest.raises(ConfigError, match=r"perseus.*: (unknown key|got)"):
        parse_config(block)


@pytest.mark.parametrize("block", [None, 3, "enabled", [], [("enabled", True)], True])
def test_a_block_that_is_no_object_is_refused(block: object) -> None:
    with pytest.raises(ConfigError, match=r'^perseus: got .*; allowed: an object such as \{"enabled": true\}$'):
        parse_config(block)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"effort": "x" * 1000})
    assert len(str(caught.value)) < 200


def test_a_value_that_cannot_be_printed_is_named_by_its_type() -> None:
    endless: list[Any] = []
    for _ in range(100_000):
        endless = [endless]
    for value in (10**5000, endless):
        with pytest.raises(ConfigError, match=r"^perseus\.effort: got a value of type (int|list); allowed: "):
            parse_config({"effort": value})


def test_a_key_with_a_line_break_stays_on_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"slow\ndown": 1})
    assert str(caught.value).startswith('perseus."slow\\ndown": unknown key')
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"price_per_kwh": 0.1}, "perseus.price_per_gpu_hour: missing; give both"),
        ({"price_per_gpu_hour": 0.0}, "perseus.price_per_kwh: missing; give both"),
        (
            {"slowdown": 0.1, "price_per_kwh": 0.1, "price_per_gpu_hour": 0.0},
            "perseus.slowdown: got 0.1; allowed: 0 where",
        ),
    ],
)
def test_prices_are_a_target_of_their_own(block: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    assert str(caught.value).startswith(said)


def test_only_the_first_of_several_errors_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"slowdown": -1, "margin": -1})
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("got") == 1


@pytest.mark.parametrize("given_times", ["forward_time_s", "backward_time_s"])
def test_emulated_times_come_in_pairs(given_times: str) -> None:
    missing = {"forward_time_s": "backward_time_s", "backward_time_s": "forward_time_s"}[given_times]
    with pytest.raises(ConfigError, match=rf"^perseus\.emulation\.{missing}: missing; "):
        parse_config({"emulation": {given_times: [0.1]}})


@pytest.mark.parametrize("name", ["block.json", "block.yaml"])
def test_a_file_with_a_wrong_value_names_itself(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"perseus": {"slowdown": -1}}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: perseus.slowdown: got -1; allowed: {SLOWDOWN}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.json", b'{"enabled": '),
        ("empty.json", b""),
        ("latin.json", b'{"output_dir": "\xff"}'),
        ("latin.yaml", b"output_dir: \xff"),
        ("broken.yaml", b"a: [1, 2"),
        ("tabs.yaml", b"a:\n\t- b"),
        ("two.yaml", b"--- {}\n--- {}"),
        ("object.yaml", b"!!python/object/apply:os.getcwd []"),
        ("deep.json", b"[" * 100_000),
        ("deep.yaml", b"[" * 600),
        ("bytes.yaml", b"a: \x00"),
        ("unhashable.yaml", b"? [a]\n: b"),
        ("list.yaml", b"[enabled]"),
        ("number.json", b"3"),
        ("null.json", b'{"perseus": null}'),
    ],
)
def test_a_file_that_cannot_be_parsed_is_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "YAML" not in message or path.suffix == ".yaml"


def test_a_file_that_is_not_there_or_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for path in (tmp_path / "missing.json", tmp_path / "folder.yaml", tmp_path / "missing" / "block.yml"):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            load_config(path)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config("nul\0byte.json")
    with pytest.raises(ConfigError, match=r"ending '\.toml'; allowed: \.json, \.yaml or \.yml"):
        load_config(tmp_path / "block.toml")


KEYS = st.sampled_from(sorted({part for key in settings_of(PerseusConfig) for part in key.split(".")}))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=3),
    st.sampled_from(["auto", "off", "quick", "A100", "info"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(KEYS, st.text(max_size=4), st.integers(), st.none()), inner, max_size=4),
    ),
    max_leaves=8,
)
BLOCKS = st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=4))


@given(BLOCKS)
def test_anything_gives_a_config_or_a_config_error(block: object) -> None:
    told = ""
    try:
        config = parse_config(block)
    except ConfigError as error:
        told = str(error)
    if told:
        assert told.startswith("perseus")
        assert len(told.splitlines()) == 1
    else:
        assert isinstance(block, dict)
        assert parse_config(config.model_dump()) == config


@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_what_a_file_says_is_what_a_dict_says(tmp_path_factory: pytest.TempPathFactory, block: dict[str, Any]) -> None:
    try:
        text = json.dumps(block)
    except TypeError:
        return  # bytes
    path = tmp_path_factory.mktemp("config") / "block.json"
    path.write_text(text)
    results = []
    for read in (lambda: load_config(path), lambda: parse_config(json.loads(text))):
        try:
            results.append(repr(read()))
        except ConfigError as error:
            results.append(str(error).removeprefix(f"{path}: "))
    assert results[0] == results[1]


def paths_of(config: BaseModel) -> dict[str, list[str]]:
    """The settings that are paths, by what they say is allowed."""
    found: dict[str, list[str]] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{below}": paths for below, paths in paths_of(value).items()}
        elif re.search(r"\bpaths?\b", str((field.json_schema_extra or {})["allowed"])):  # type: ignore[index]
            found[name] = [value] if isinstance(value, str) else list(value)
    return found


def test_every_path_becomes_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        **FULL,
        "gpu": {"zeusd_socket": "zeusd.sock", "verified": "v.json"},
        "prometheus": {"textfile": "metrics.prom"},
    }
    given["planner"] = {"python": "planner/bin/python"}
    config = parse_config(given)
    whole = with_whole_paths(config)
    before, after = paths_of(config), paths_of(whole)
    below = {
        "profiling.load",
        "gpu.zeusd_socket",
        "gpu.verified",
        "emulation.gpus",
        "planner.python",
        "prometheus.textfile",
    }
    assert set(before) == {"output_dir", "target_file", *below}
    assert after == {name: [f"{tmp_path}/{path}" for path in paths] for name, paths in before.items()}
    assert with_whole_paths(whole) == whole
