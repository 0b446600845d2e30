"""A transformer described by its sizes, and the profile that an emulated GPU would have of it.

This is a model and no measurement. A stage's work is counted in floating-point operations (matrix products only, as in
Narayanan et al., SC 2021, appendix), divided by a share of the GPU's peak rate; how time and power follow the clock
comes from the emulated GPU (`gpus.emulated.physics`), which is fitted to published profiles of one model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perseus_plugin.cli.simulation.resplit import Split
from perseus_plugin.errors import ConfigError, validation_problem
from perseus_plugin.files import parse_yaml, read_text
from perseus_plugin.gpus.emulated.physics import FORWARD_LIKE, MODELS, WAITING, GpuModel, load_class
from perseus_plugin.iteration.bounds import MOST_COUNT, MOST_STAGES, MOST_W
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD
from perseus_plugin.iteration.schedules import RECOMPUTE
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.waiting import WaitingPower

_MOST_BYTES = 2**20  # of a description

PEAK_FLOPS = {"a100": 312e12, "a40": 149.7e12, "h100": 989.4e12, "h200": 989.4e12, "b200": 2250e12, "b300": 2250e12}
"""Dense bfloat16 tensor-core rate at the highest clock, from NVIDIA's data sheets, by the name in `MODELS`."""

LOWEST_CLOCK_MHZ = 855
"""Below this nothing was published, and the emulated GPUs extrapolate."""


class ModelDescription(BaseModel):
    """A transformer language model and how it is trained."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    layers: int = Field(ge=1, le=MOST_STAGES, description="transformer layers")
    hidden: int = Field(ge=1, le=MOST_COUNT, description="width of the model")
    sequence_length: int = Field(ge=1, le=MOST_COUNT, description="tokens of a sequence")
    microbatch_size: int = Field(ge=1, le=MOST_COUNT, description="sequences of a microbatch")
    vocabulary: int = Field(
        ge=1, le=MOST_COUNT, description="rows of the output matrix, which the last stage multiplies by"
    )
    stages: int | None = Field(
        default=None, ge=1, le=MOST_STAGES, description="pipeline stages of an even split; not with split"
    )
    split: list[Annotated[int, Field(ge=0, le=MOST_STAGES)]] | None = Field(
        default=None, min_length=1, description="layers of each stage; not with stages"
    )
    feed_forward: int | None = Field(
        default=None, ge=1, le=MOST_COUNT, description="width of the feed-forward part; 4 x hidden"
    )
    tensor_parallel: int = Field(default=1, ge=1, le=MOST_COUNT, description="GPUs that share a stage")
    recompute: bool = Field(default=False, description="whether the backward computes the whole forward again")
    efficiency: float = Field(
        default=0.5, gt=0, le=1, description="share of the GPU's peak rate that is reached; scales times, not savings"
    )
    waiting_power: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0, le=MOST_W)]] | None = Field(
        default=None, min_length=1, description="watts of a GPU that waits, by clock in MHz; as the emulated GPU"
    )

    @property
    def own_split(self) -> Split | None:
        """The split that the description names; None if it names none."""
        if self.split is not None:
            return tuple(self.split)
        return None if self.stages is None else even_split(self.layers, self.stages)

    def waiting_power_of(self, gpu: GpuModel) -> WaitingPower:
        """What a GPU that waits draws: as described, or else as the emulated one."""
        if self.waiting_power is not None:
            return WaitingPower(*zip(*sorted(self.waiting_power.items()), strict=True))
        return waiting_on(gpu)

    def stage_flops(self, split: Split) -> list[float]:
        """Floating-point operations of one microbatch's forward in each stage, all its GPUs together.

        Raises:
            ConfigError: the split does not add up to the layers.
        """
        if sum(split) != self.layers or min(split) < 0:
            raise ConfigError(
                f"split: got {list(split)}, together {sum(split)}; "
                f"allowed: layers of each stage, together {self.layers}"
            )
        tokens = self.microbatch_size * self.sequence_length
        width = self.feed_forward or 4 * self.hidden
        projections = 8 * tokens * self.hidden**2
        attention = 4 * tokens * self.sequence_length * self.hidden
        layer = projections + attention + 4 * tokens * self.hidden * width
        flops = [float(count * layer) for count in split]
        flops[-1] += 2 * tokens * self.hidden * self.vocabulary
        if min(flops) <= 0:
            raise ConfigError(f"split: got {list(split)}; allowed: at least one layer in every stage but the last")
        return flops


def even_split(layers: int, stages: int) -> Split:
    """Layers spread as evenly as they can be; the first stages get one more where that does not come out even.

    Raises:
        ConfigError: more stages than layers.
    """
    if not 1 <= stages <= layers:
        raise ConfigError(f"stages: got {stages}; allowed: from 1 to the number of layers, {layers}")
    each, left = divmod(layers, stages)
    return tuple(each + (stage < left) for stage in range(stages))


def catalogue() -> dict[str, GpuModel]:
    """The GPUs that a description can be simulated on, by name."""
    return {name: MODELS[name] for name in sorted(MODELS.keys() & PEAK_FLOPS.keys())}


def gpu_named(name: str) -> GpuModel:
    """A GPU of the catalogue.

    Raises:
        ConfigError: there is none of that name.
    """
    known = catalogue()
    if name.lower() not in known:
        raise ConfigError(f"--gpu: got {name!r}; allowed: {', '.join(known)}")
    return known[name.lower()]


def modelled_profile(description: ModelDescription, split: Split, gpu_name: str, kinds: Collection[str]) -> Profile:
    """The profile that this GPU would have of the model, per instruction of a whole stage.

    Args:
        description: the model.
        split: layers of each stage.
        gpu_name: of the catalogue.
        kinds: instruction kinds that the schedule runs; with "recompute" the backward does not compute the forward
            again, as the schedule does.

    Raises:
        ConfigError: the split does not fit, one of the kinds has no time, or waiting would draw more than work.
    """
    gpu = gpu_named(gpu_name)
    unknown = sorted(set(kinds) - {FORWARD, BACKWARD, RECOMPUTE})
    if unknown:
        raise ConfigError(f"model: got a schedule that runs {unknown[0]!r}; allowed: forward, backward and recompute")
    if RECOMPUTE in kinds and not description.recompute:
        raise ConfigError("model: recompute: got false; allowed: true for a schedule that recomputes early")
    full_s = [
        flops / (description.tensor_parallel * PEAK_FLOPS[gpu_name.lower()] * description.efficiency)
        for flops in description.stage_flops(split)
    ]
    forwards = {FORWARD: 1.0, RECOMPUTE: 1.0, BACKWARD: 2.0}
    if description.recompute and RECOMPUTE not in kinds:
        forwards[BACKWARD] += 1.0
    times_s = {
        (stage, kind): forwards[kind] * forward_s for stage, forward_s in enumerate(full_s) for kind in sorted(kinds)
    }
    return profile_on(gpu, times_s, description.waiting_power_of(gpu))


def waiting_on(gpu: GpuModel) -> WaitingPower:
    """What the emulated GPU draws while it waits."""
    clocks = gpu.clocks_mhz()[::-1]
    return WaitingPower(clocks, tuple(gpu.power_w(WAITING, clock) for clock in clocks))


def profile_on(gpu: GpuModel, times_s: Mapping[tuple[int, str], float], waiting: WaitingPower) -> Profile:
    """The profile that a GPU would have of instructions that take so long at its highest clock.

    Args:
        gpu: of the catalogue.
        times_s: by stage and kind.
        waiting: what it draws while it waits.

    Raises:
        ConfigError: waiting would draw more than work.
    """
    loads = {_load_of(kind) for _, kind in times_s}
    clocks = [
        mhz
        for mhz in gpu.clocks_mhz()
        # Clocks that the power limit keeps from all work are the highest one over again.
        if mhz >= LOWEST_CLOCK_MHZ
        and (mhz == gpu.max_clock_mhz or any(gpu.held_mhz(load, mhz) == mhz for load in loads))
    ]
    return Profile.from_rows(
        (stage, kind, _measurement(gpu, kind, clock, time_s, waiting.at_w(clock)))
        for (stage, kind), time_s in times_s.items()
        for clock in clocks
    )


def _measurement(gpu: GpuModel, kind: str, clock_mhz: int, full_clock_s: float, waiting_w: float) -> Measurement:
    load = _load_of(kind)
    held_mhz = gpu.held_mhz(load, clock_mhz)
    power_w = gpu.power_w(load, held_mhz)
    if power_w < waiting_w:
        raise ConfigError(
            f"model: waiting_power: got {waiting_w:g} W at {clock_mhz} MHz; allowed: at most what {kind} draws there, "
            f"{power_w:.4g} W on the {gpu.name}"
        )
    time_s = full_clock_s * gpu.stretch(load, held_mhz)
    return Measurement(
        clock_mhz,
        time_s,
        power_w * time_s,
        blocking_power_w=waiting_w,
    )


def _load_of(kind: str) -> int:
    return FORWARD_LIKE if kind == RECOMPUTE else load_class(kind)


def load_description(path: Path) -> ModelDescription:
    """Read a description from YAML (or JSON, which is YAML).

    Raises:
        ConfigError: naming the file, the key, the value and what is allowed.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the model description: {error}") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        known = ", ".join(ModelDescription.model_fields)
        raise ConfigError(f"{path}: got {type(content).__name__}; allowed: an object with the keys {known}")
    try:
        description = ModelDescription.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {validation_problem(error, ModelDescription)}") from None
    if description.stages is not None and description.split is not None:
        raise ConfigError(f"{path}: stages: got {description.stages} beside split; allowed: one of the two")
    if description.own_split is not None:
        try:
            description.stage_flops(description.own_split)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return description
