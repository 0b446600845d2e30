"""Model descriptions: what they accept, the work they count, and the profile of an emulated GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from perseus_plugin.cli.simulation.description import (
    LOWEST_CLOCK_MHZ,
    PEAK_FLOPS,
    ModelDescription,
    catalogue,
    even_split,
    load_description,
    modelled_profile,
)
from perseus_plugin.errors import ConfigError
from perseus_plugin.gpus.emulated.physics import A100, BACKWARD_LIKE, FORWARD_LIKE, MODELS, WAITING

SMALL = {
    "layers": 6,
    "hidden": 64,
    "sequence_length": 32,
    "microbatch_size": 2,
    "vocabulary": 1000,
}

REST = "\n".join(f"{key}: {value}" for key, value in SMALL.items() if key != "layers")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    return path


def test_the_example_is_gpt3_and_its_operations_are_the_published_formula() -> None:
    model = load_description(Path(__file__).parents[3] / "examples/simulate/gpt3-175b.yaml")
    split = model.own_split
    assert split == (12,) * 8
    # Narayanan et al. (SC 2021): 96 B s l h^2 (1 + s/6h + V/16lh) for forward, backward and recomputed forward; the
    # output layer, which is not recomputed, has 6 of its 8 shares there.
    length, layers, hidden, vocabulary = 2048, 96, 12288, 50257
    published = 96 * length * layers * hidden**2 * (1 + length / (6 * hidden))
    output = 6 * length * hidden * vocabulary
    forward = sum(model.stage_flops(split))
    assert forward == pytest.approx(published / 4 + output / 3, rel=1e-12)


def test_the_catalogue_is_the_emulated_gpus() -> None:
    assert catalogue() == {name: MODELS[name] for name in PEAK_FLOPS}


def test_layers_are_spread_evenly() -> None:
    assert even_split(10, 4) == (3, 3, 2, 2)
    assert even_split(4, 4) == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="stages: got 5; allowed: from 1 to the number of layers, 4"):
        even_split(4, 5)


@pytest.mark.parametrize("name", ["h100", "b300"])
def test_a_profile_of_a_gpu_at_its_limit_has_no_clocks_that_it_does_not_reach(name: str) -> None:
    profile, gpu = modelled_profile(ModelDescription(**SMALL), (3, 3), name, {"forward", "backward"}), MODELS[name]
    for (_, kind), rows in profile.table.items():
        load = FORWARD_LIKE if kind == "forward" else BACKWARD_LIKE
        assert rows[0].frequency_mhz == gpu.max_clock_mhz
        assert max(row.energy_j / row.time_s for row in rows) <= gpu.limit_w
        assert rows[0].time_s > rows[-1].time_s / gpu.stretch(load, rows[-1].frequency_mhz), "held below that clock"
        for row in rows[1:]:
            clock = row.frequency_mhz
            assert clock in {gpu.held_mhz(FORWARD_LIKE, clock), gpu.held_mhz(BACKWARD_LIKE, clock)}


def test_a_profile_follows_the_gpu() -> None:
    model = ModelDescription(**SMALL, tensor_parallel=2, efficiency=0.25)
    profile = modelled_profile(model, (3, 3), "A100", {"forward", "backward"})
    flops = model.stage_flops((3, 3))
    top = {key: rows[0] for key, rows in profile.table.items()}
    assert top[0, "forward"].time_s == pytest.approx(flops[0] / (2 * 312e12 * 0.25))
    assert top[0, "backward"].time_s == pytest.approx(2 * top[0, "forward"].time_s)
    assert top[1, "forward"].time_s / top[0, "forward"].time_s == pytest.approx(flops[1] / flops[0])
    for kind, load in (("forward", FORWARD_LIKE), ("backward", BACKWARD_LIKE)):
        rows = profile.table[0, kind]
        assert rows[0].frequency_mhz == 1410
        assert rows[-1].frequency_mhz == LOWEST_CLOCK_MHZ
        for row in rows:
            assert row.time_s == pytest.approx(rows[0].time_s * A100.stretch(load, row.frequency_mhz))
            assert row.energy_j == pytest.approx(row.time_s * A100.power_w(load, row.frequency_mhz))
            assert row.blocking_power_w == pytest.approx(A100.power_w(WAITING, row.frequency_mhz))


def test_waiting_power_may_be_described(tmp_path: Path) -> None:
    text = f"layers: 6\n{REST}\nwaiting_power: {{1000: 60, 1400: 100}}\n"
    model = load_description(written(tmp_path, text))
    profile = modelled_profile(model, (3, 3), "a100", {"forward", "backward"})
    for stage in (0, 1):
        power = profile.waiting_power(stage, 0.0)
        assert [power.at_w(clock) for clock in (855, 1005, 1200, 1410)] == pytest.approx([60, 60.5, 80, 100])
    greedy = load_description(written(tmp_path, text.replace("100}", "900}")))
    with pytest.raises(ConfigError, match=r"waiting_power: got 900 W at 1410 MHz; allowed: at most what backward"):
        modelled_profile(greedy, (3, 3), "a100", {"forward", "backward"})
    with pytest.raises(ConfigError, match=r"waiting_power.*got 0; allowed: greater than 0"):
        load_description(written(tmp_path, text.replace("60", "0")))


def test_recomputation_is_part_of_the_backward_or_an_instruction_of_its_own() -> None:
    model = ModelDescription(**SMALL, recompute=True)
    inside = modelled_profile(model, (3, 3), "a100", {"forward", "backward"}).table
    apart = modelled_profile(model, (3, 3), "a100", {"forward", "recompute", "backward"}).table
    forward_s = inside[0, "forward"][0].time_s
    assert inside[0, "backward"][0].time_s == pytest.approx(3 * forward_s)
    assert apart[0, "backward"][0].time_s == pytest.approx(2 * forward_s)
    assert apart[0, "recompute"] == apart[0, "forward"]
    with pytest.raises(ConfigError, match="recompute: got false; allowed: true"):
        modelled_profile(ModelDescription(**SMALL), (3, 3), "a100", {"forward", "recompute", "backward"})
    with pytest.raises(ConfigError, match="a schedule that runs 'weight_backward'"):
        modelled_profile(model, (3, 3), "a100", {"forward", "weight_backward"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [", "not valid YAML"),
        ("- 1", "got list; allowed: an object with the keys layers, hidden"),
        ("layers: 6\nhidden: 64", "sequence_length: missing; it must be given"),
        (f"{REST}\nlayers: '6'", 'layers: got "6"; allowed: a valid integer'),
        (f"{REST}\nlayers: 6\nheads: 8", "heads: unknown key, given the value 8; known keys: efficiency, "),
        (f"{REST}\nlayers: 6\nefficiency: 1.5", "efficiency: got 1.5; allowed: less than or equal to 1"),
        (f"{REST}\nlayers: 0", "layers: got 0; allowed: greater than or equal to 1"),
    ],
)
def test_a_wrong_description_gives_one_error_with_file_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_description(path)
    assert str(caught.value).startswith(f"{path}: {message}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("stages: 2\nsplit: [3, 3]", "stages: got 2 beside split; allowed: one of the two"),
        ("split: [3, 4]", r"split: got \[3, 4\], together 7; allowed: layers of each stage, together 6"),
        ("split: [0, 6]", r"split: got \[0, 6\]; allowed: at least one layer in every stage but the last"),
        ("stages: 7", "stages: got 7; allowed: from 1 to the number of layers, 6"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path: Path, extra: str, message: str) -> None:
    text = "\n".join(f"{key}: {value}" for key, value in SMALL.items())
    with pytest.raises(ConfigError, match=message):
        load_description(written(tmp_path, f"{text}\n{extra}\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the model description"):
        load_description(tmp_path / "none.yaml")


def test_descriptions_take_no_infinities() -> None:
    with pytest.raises(ValidationError):
        ModelDescription(**SMALL, efficiency=float("nan"))
