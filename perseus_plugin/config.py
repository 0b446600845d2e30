"""The `perseus` block: strict, typed, documented; read from JSON, YAML or a dict.

Every setting carries what is allowed and what it means, so that error messages and the reference in the docs come
from one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from perseus_plugin.errors import ConfigError, PlanError, shown, validation_problem
from perseus_plugin.files import parse_json, parse_yaml, read_text
from perseus_plugin.gpus.base import DWELL_LATENCIES
from perseus_plugin.gpus.registry import AUTO, OFF, choices, is_backend
from perseus_plugin.iteration.bounds import GPUS_OF_A_GROUP, MOST_MHZ, MOST_SLOWDOWN, MOST_W
from perseus_plugin.iteration.references import LARGEST_SHARE
from perseus_plugin.iteration.words import parse_share, parse_watts

BLOCK = "perseus"

_MOST_BYTES = 2**20  # of a configuration

_Slowdown = Annotated[float, Field(ge=0, le=MOST_SLOWDOWN), BeforeValidator(lambda told: _in_words(parse_share, told))]
_Watts = Annotated[float, Field(gt=0), BeforeValidator(lambda told: _in_words(parse_watts, told))]

_TOLERANCE_PAIRED, _TOLERANCE_SWEEP = 0.01, 0.03


def _in_words(parse: Callable[[object], float], told: object) -> object:
    """What a person writes for a figure, as the command line takes it too; anything else stays, to be refused."""
    if not isinstance(told, str):
        return told
    try:
        return parse(told)
    except PlanError:
        return told


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _setting(default: Any, allowed: str, meaning: str, **constraints: Any) -> Any:
    return Field(default=default, description=meaning, json_schema_extra={"allowed": allowed}, **constraints)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ProfilingConfig(_Strict):
    """How time and energy of the instructions are measured."""

    warmup_steps: int = _setting(
        5,
        "a whole number from 0 to 1000000",
        "Iterations at the start that are run at full clocks and not measured.",
        ge=0,
        le=10**6,
    )
    clocks_mhz: Annotated[tuple[Annotated[int, Field(le=MOST_MHZ)], ...], BeforeValidator(_as_tuple)] | None = _setting(
        None,
        "a list of at least 2 different whole numbers from 1 to 10000, or null",
        "SM clocks to try, in MHz; each is moved to the nearest one the GPU supports. null: chosen by clock_count "
        "and lowest_clock.",
        min_length=2,
    )
    clock_count: int = _setting(8, "a whole number from 2 to 64", "How many clocks to try.", ge=2, le=64)
    lowest_clock: float = _setting(
        0.5,
        "a number above 0 and below 1",
        "Lowest clock to try, as a share of the GPU's highest.",
        gt=0,
        lt=1,
    )
    steps_per_clock: int = _setting(
        5, "a whole number from 2 to 10000", "Measured iterations per clock.", ge=2, le=10**4
    )
    settle_steps: int = _setting(
        1, "a whole number from 1 to 10000", "Iterations discarded after each change of clock.", ge=1, le=10**4
    )
    rounds: int = _setting(
        2,
        "a whole number from 1 to 10",
        "Most rounds of profiling; a further one, at the clocks still useful, is run only while "
        "max_relative_error or half of max_time_error is exceeded.",
        ge=1,
        le=10,
    )
    seed: int = _setting(
        0,
        "a whole number of at most 18 digits",
        "Seed of the random order in which clocks are tried.",
        gt=-(10**18),
        lt=10**18,
    )
    max_relative_error: float = _setting(
        0.05,
        "a number above 0 and at most 1",
        "An instruction whose energy is known less exactly than this stays at full clock.",
        gt=0,
        le=1,
    )
    max_time_error: float = _setting(
        0.02,
        "a number above 0 and at most 1",
        "A clock whose time, against the highest clock on the same work, is known less exactly than this (standard "
        "error, as a share) is not used.",
        gt=0,
        le=1,
    )
    reuse: bool = _setting(
        True,
        "true or false",
        "Use the profile in the output folder again when it was measured on the same model, stage split, microbatch "
        "size, GPUs, power limit and versions.",
    )
    load: str | None = _setting(
        None, "a path of a profile CSV, or null", "Use this profile instead of measuring one.", min_length=1
    )
    blocking_power_w: float | None = _setting(
        None,
        "a number above 0 and at most 2000, or null",
        "Power of a GPU that waits for a peer, in watts; needed with `load` if that profile has none "
        "(`blocking_power`), otherwise measured.",
        gt=0,
        le=MOST_W,
    )
    power_limit_w: float | None = _setting(
        None,
        "a number above 0 and at most 2000, or null",
        "The most that one GPU can draw, in watts: a loaded profile with more is refused, measured "
        "energies are kept below it (below 1.25 times that for work between waits at the limit). null: "
        "as the driver reports, 2000 with `load`.",
        gt=0,
        le=MOST_W,
    )


def _known_backend(name: str) -> str:
    if name not in (AUTO, OFF) and not is_backend(name):
        raise ValueError(choices())
    return name


class GpuConfig(_Strict):
    """Who sets the clocks."""

    backend: Annotated[str, AfterValidator(_known_backend)] = _setting(
        AUTO,
        choices(outside=False),
        "auto: NVML where allowed, else zeusd, else observe only; emulated where torch has no CUDA device. "
        "off: observe only, no clock is touched. Other packages may bring more.",
    )
    foreign_clock: Literal["ask_again", "give_way"] = _setting(
        "ask_again",
        '"ask_again" or "give_way"',
        "When somebody else changes the clock while the job runs: request ours again, or stop setting "
        "clocks from then on.",
    )
    verified: str | None = _setting(
        None,
        "a path, or null",
        "What `perseus verify --set-clocks` has written on this model of GPU; `cuda_graph` needs it where GPUs are not "
        "emulated.",
        min_length=1,
    )
    zeusd_socket: str = _setting("/run/zeusd/zeusd.sock", "a path", "Unix socket of the zeusd daemon.", min_length=1)


_Times = Annotated[tuple[Annotated[float, Field(gt=0, le=3600)], ...], BeforeValidator(_as_tuple)]


class EmulationConfig(_Strict):
    """The emulated GPU, for machines without one. Real work still runs; each instruction is stretched."""

    model: Literal["A100", "A40", "H100", "H200", "B200", "B300"] = _setting(
        "A100", '"A100", "A40", "H100", "H200", "B200" or "B300"', "Which GPU is emulated."
    )
    power_limit_w: float | None = _setting(
        None,
        "a number above 0 and at most 2000, or null",
        "Power limit of the emulated GPU in watts, at most the model's own: work that would draw more runs at a lower "
        "clock. null: the model's own.",
        gt=0,
        le=MOST_W,
    )
    forward_time_s: _Times | None = _setting(
        None,
        "a list with one number above 0 and at most 3600 per stage, or null",
        "Full-clock time of a forward of each stage, in seconds. null: the CPU time it takes, times time_scale.",
        min_length=1,
    )
    backward_time_s: _Times | None = _setting(
        None,
        "a list with one number above 0 and at most 3600 per stage, or null",
        "The same for a backward.",
        min_length=1,
    )
    time_scale: float = _setting(
        8.0,
        "a number from 1 to 1000",
        "Emulated full-clock time of an instruction as a multiple of the CPU time it takes here.",
        ge=1,
        le=1000,
    )
    switch_latency_s: float | None = _setting(
        None,
        "a number from 0 to 1, or null",
        "Time from a clock request until it takes effect, in seconds. null: the model's, 0.005 for an A100.",
        ge=0,
        le=1,
    )
    gpus: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] | None = _setting(
        None,
        "a list of paths, one per local rank, or null",
        "State files of emulated GPUs made elsewhere. With the backend nvml or auto their clocks are set through NVML: "
        "a simulated one in tests. null: made in the output folder.",
        min_length=1,
    )
    counter_period_s: float | None = _setting(
        None,
        "a number from 0.001 to 1, or null",
        "Period of the energy counter's ticks, in seconds. null: the model's, 0.02 for an A100.",
        ge=0.001,
        le=1,
    )


class LimitsConfig(_Strict):
    """Limits on clock changes."""

    max_changes_per_iteration: int | None = _setting(
        None,
        "a whole number from 0 to 1000000, or null",
        "Most clock changes from one instruction to another per stage and iteration, those for waits at lower clocks "
        "included; null: no limit. The return to full clocks for the end of the batch comes on top.",
        ge=0,
        le=10**6,
    )
    min_dwell_s: float | None = _setting(
        None,
        "a number from 0 to 60, or null",
        "Shortest time between two clock changes of one GPU, in seconds. null: twice the switch latency.",
        ge=0,
        le=60,
    )
    switch_latency_s: float | None = _setting(
        None,
        "a number from 0 to 1, or null",
        "How long a clock change takes to have effect, in seconds; rises are asked for that much early. "
        "null: measured.",
        ge=0,
        le=1,
    )
    free_after_s: float | None = _setting(
        None,
        "a number from 1 to 86400, or null",
        "How long a rank's training may request nothing (a collective that hangs, say) until its clock "
        "is freed; control resumes when the training goes on. null: five iterations, and at least 5 s. "
        "While the training process is stopped (a suspended job, a debugger) the clock is freed at "
        "once.",
        ge=1,
        le=86400,
    )

    @property
    def dwell_s(self) -> float | None:
        """The shortest time between two changes, None if it follows from a latency yet to be measured."""
        if self.min_dwell_s is not None:
            return self.min_dwell_s
        return None if self.switch_latency_s is None else DWELL_LATENCIES * self.switch_latency_s


class PlannerConfig(_Strict):
    """The process that plans, on rank 0's machine."""

    python: str | None = _setting(
        None,
        "a path, or null",
        "Python that runs it, of an environment with the extra `planner`, if the trainer's has none. "
        "null: the trainer's own.",
        min_length=1,
    )


class WatchConfig(_Strict):
    """When the plan is dropped because iterations run longer than they should."""

    tolerance: float | None = _setting(
        None,
        "a number above 0 and at most 10, or null",
        "Share by which iterations may run longer than planned before the plan is dropped. null: 0.01 against "
        "references, 0.03 against the sweep.",
        gt=0,
        le=10,
    )
    patience: int = _setting(
        10,
        "a whole number from 1 to 1000000",
        "Fewest iterations that a plan is judged by; against the sweep, the median over as many must "
        "exceed the tolerance.",
        ge=1,
        le=10**6,
    )
    reference_share: float = _setting(
        0.02,
        f"a number from 0 to {LARGEST_SHARE}",
        "Share of iterations under a plan that run at full clocks, to compare the plan with on the same "
        "work; more in the first 200. 0: none; the plan is compared with the sweep.",
        ge=0,
        le=LARGEST_SHARE,
    )
    max_replans: int = _setting(
        3,
        "a whole number from 0 to 1000000",
        "After so many dropped plans the job stays at full clocks.",
        ge=0,
        le=10**6,
    )

    @property
    def tolerance_against_sweep(self) -> float:
        """The same where there are no references to go by: at a straggler's pace, or under a power budget."""
        return _TOLERANCE_SWEEP if self.tolerance is None else self.tolerance

    @property
    def tolerance_or_default(self) -> float:
        """Share beyond which a plan is dropped."""
        if self.tolerance is not None:
            return self.tolerance
        return _TOLERANCE_PAIRED if self.reference_share > 0 else _TOLERANCE_SWEEP


class StragglersConfig(_Strict):
    """Slow ranks: reported or seen, and planned for."""

    enabled: bool = _setting(True, "true or false", "false: reports are refused and slow ranks are not looked for.")
    detect: bool = _setting(
        True, "true or false", "Look for slow ranks in the session's own instruction times; false: reports only."
    )
    threshold: float = _setting(
        0.03,
        "a number from 0.01 to 1",
        "Smallest slowdown, as a share, that is acted on; where times vary, only a larger one stands out of the noise.",
        ge=0.01,
        le=1,
    )
    window: int = _setting(
        8, "a whole number from 4 to 1000", "A rank is judged by its median over this many iterations.", ge=4, le=1000
    )
    min_duration: int = _setting(
        3,
        "a whole number from 1 to 1000",
        "A slowdown far beyond the noise is acted on after this many iterations.",
        ge=1,
        le=1000,
    )
    min_interval_s: float = _setting(
        10.0,
        "a number from 0 to 3600",
        "Shortest time from one answer to the next, in seconds, however often reports change.",
        ge=0,
        le=3600,
    )
    max_slowdown: float = _setting(
        100.0, "a number above 1 and at most 1000", "Reports of more than this are refused.", gt=1, le=1000
    )
    socket: bool = _setting(
        True,
        "true or false",
        "Take reports and targets from the command line on a unix socket in the output folder, for this user only.",
    )


class PrometheusConfig(_Strict):
    """Metrics for Prometheus, published by rank 0; off by default, needs the extra `prometheus`."""

    textfile: str | None = _setting(
        None,
        "a path that ends in .prom, or null",
        "File for node_exporter's textfile collector: needs no port. Removed when the job ends.",
        pattern=r"\.prom$",
    )
    port: int | None = _setting(
        None, "a whole number from 1 to 65535, or null", "TCP port to be scraped on, over HTTP.", ge=1, le=65535
    )
    address: str = _setting(
        "127.0.0.1",
        "an address of the machine",
        "Where the port is opened. There is no password: open it to other machines only in a network you trust.",
        min_length=1,
    )


class PerseusConfig(_Strict):
    """The whole `perseus` block."""

    enabled: bool = _setting(True, "true or false", "false: the plugin leaves no trace.")
    enforce: bool = _setting(
        True,
        "true or false",
        "false: a dry run. The job is profiled and planned for and says what the plan would do; outside the sweep no "
        "clock is set.",
    )
    slowdown: _Slowdown = _setting(
        0.0,
        'a number from 0 to 1, or a share such as "10%"',
        "Target: share by which an iteration may be longer than at full clocks.",
    )
    power_budget_w: _Watts | None = _setting(
        None,
        'a number above 0, watts such as "180kW", or null',
        "Average watts that the GPUs of the whole job may draw; iterations are as fast as that allows.",
    )
    price_per_kwh: float | None = _setting(
        None,
        "a number above 0, or null",
        "Price of a kWh. With this and price_per_gpu_hour the target is the iteration that costs least, instead of a "
        "slowdown.",
        gt=0,
    )
    price_per_gpu_hour: float | None = _setting(
        None, "a number from 0, or null", "Price of an hour of one GPU, in the same currency.", ge=0
    )
    power_budget_groups_w: dict[Annotated[str, Field(pattern=GPUS_OF_A_GROUP)], _Watts] = _setting(
        {},
        'an object of watts, by "gpu" (each), "node" (each), "node 3", or ranks such as "0-7,16"',
        "The same for some of its GPUs together, by ranks, node or GPU.",
    )
    node_overhead_w: float = _setting(
        0.0,
        "a number from 0",
        "Watts that a node draws besides its GPUs. With this or node_overhead_share, power budgets and "
        "peaks are of nodes, and each GPU counts with its share; those of each GPU stay of the GPU.",
        ge=0,
    )
    node_overhead_share: float = _setting(
        0.0, "a number from 0", "The same as a share of the power of its GPUs (fans, losses).", ge=0
    )
    peak_w: _Watts | None = _setting(
        None,
        'a number above 0, watts such as "180kW", or null',
        "Highest average power, in watts, that a plan of the whole job may reach over any peak_window_s seconds.",
    )
    peak_window_s: float = _setting(
        1.0, "a number above 0", "Length of the window that peak power is averaged over, in seconds.", gt=0
    )
    target_file: str | None = _setting(
        None,
        "a path, or null",
        "File that rank 0 watches: a JSON object with a target, as `perseus target` sets it.",
        min_length=1,
    )
    ramp_w_per_s: float | None = _setting(
        None,
        "a number above 0, or null",
        "When the target changes, take the power of the job's GPUs up or down in steps, on average no "
        "faster than this. null: in one step.",
        gt=0,
    )
    margin: float = _setting(
        0.01,
        "a number from 0 to 1",
        "Smallest share of its time by which a slowed instruction is planned to end before it is "
        "needed. More is used if measured iterations, replayed under the plan, would be too long.",
        ge=0,
        le=1,
    )
    quantile: float = _setting(
        0.9,
        "a number from 0.5 to below 1",
        "Share of iterations that a plan must not lengthen by more than 0.5 % of the time at full "
        "clocks, by a replay of measured iterations.",
        ge=0.5,
        lt=1,
    )
    catch_up: bool = _setting(
        True,
        "true or false",
        "Let a rank whose instruction begins later than the plan allows run faster until it is back on plan.",
    )
    lower_while_waiting: bool = _setting(
        True,
        "true or false",
        "Let a GPU wait at a lower clock if the wait is longer than two clock changes; never where the "
        "switch latency is unknown.",
    )
    cuda_graph: bool = _setting(
        False,
        "true or false",
        "The training step is replayed as one CUDA graph, in which no instruction is seen: clocks change by host time. "
        "Set by itself with Megatron's `full_iteration`.",
    )
    effort: Literal["quick", "normal", "thorough"] = _setting(
        "quick", '"quick", "normal" or "thorough"', "How long the planner searches for a better plan."
    )
    refine_s: float = _setting(
        60.0,
        "seconds from 0",
        "For how long a process of lowest priority searches for a better plan, at the next higher "
        "effort; it is adopted if it saves 0.1 % more over the last iterations. 0: never.",
        ge=0,
    )
    output_dir: str = _setting(
        "perseus_out",
        "a path",
        "Folder for summary.json, profile.csv, plan.json, frontier.json and records; made if missing. Relative paths, "
        "here and below, begin where the script is when the session starts.",
        min_length=1,
    )
    frontier: bool = _setting(
        True,
        "true or false",
        "Keep the time-energy frontier of the plan as frontier.json, computed by a process of lowest priority.",
    )
    record: bool = _setting(
        True,
        "true or false",
        "Every rank keeps its iterations, and a few of them whole, in the output folder for `perseus report` and "
        "`perseus trace`.",
    )
    profiling: ProfilingConfig = _setting(ProfilingConfig(), "an object", "How instructions are measured.")
    gpu: GpuConfig = _setting(GpuConfig(), "an object", "Who sets the clocks.")
    emulation: EmulationConfig = _setting(EmulationConfig(), "an object", "The emulated GPU.")
    limits: LimitsConfig = _setting(LimitsConfig(), "an object", "Limits on clock changes.")
    planner: PlannerConfig = _setting(PlannerConfig(), "an object", "The process that plans.")
    watch: WatchConfig = _setting(WatchConfig(), "an object", "When a plan is dropped.")
    stragglers: StragglersConfig = _setting(StragglersConfig(), "an object", "Slow ranks.")
    prometheus: PrometheusConfig = _setting(PrometheusConfig(), "an object", "Metrics for Prometheus.")
    signals: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple)] = _setting(
        (),
        'a list of objects with a `source` ("schedule", "price", "carbon" or that of another package) and its options',
        "Targets, prices and carbon intensities by time; of each matter, the first signal with a value counts.",
        max_length=16,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", '"debug", "info", "warning" or "error"', "How much the plugin logs."
    )


def parse_config(block: object, *, source: str = BLOCK) -> PerseusConfig:
    """Check a `perseus` block given as a mapping.

    Args:
        block: the value of the `perseus` key.
        source: how the block is called in error messages.

    Raises:
        ConfigError: naming the first wrong key, the value given, what is allowed and the nearest known key.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(f'{source}: got {shown(block)}; allowed: an object such as {{"enabled": true}}')
    try:
        config = PerseusConfig.model_validate(dict(block))
    except ValidationError as error:
        raise ConfigError(validation_problem(error, PerseusConfig, source)) from None
    _check_together(config, source)
    return config


def load_config(path: Path | str) -> PerseusConfig:
    """Read a block from a `.json`, `.yaml` or `.yml` file; an outer `perseus:` key is optional.

    Raises:
        ConfigError: the file cannot be read or parsed, or its content is wrong.
    """
    path = Path(path)
    if path.suffix not in {".json", ".yaml", ".yml"} and not path.is_char_device() and not path.is_fifo():
        raise ConfigError(f"{path}: ending {path.suffix!r}; allowed: .json, .yaml or .yml")
    try:
        text = read_text(path, _MOST_BYTES)
        content = parse_json(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    if path.suffix != ".json":
        try:
            content = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if isinstance(content, Mapping) and BLOCK in content:
        return parse_config(content[BLOCK], source=f"{path}: {BLOCK}")
    return parse_config({} if content is None else content, source=f"{path}: {BLOCK}")


def with_whole_paths(config: PerseusConfig) -> PerseusConfig:
    """The same with its paths from the root on: a script may change its folder while the job runs."""

    def whole(path: str) -> str:
        return str(Path(path).absolute())

    profiling, textfile, gpus = config.profiling, config.prometheus.textfile, config.emulation.gpus
    changes: dict[str, Any] = {
        "output_dir": whole(config.output_dir),
        "signals": tuple(
            {**one, "file": whole(one["file"])} if isinstance(one.get("file"), str) else one for one in config.signals
        ),
        "gpu": config.gpu.model_copy(
            update={
                "zeusd_socket": whole(config.gpu.zeusd_socket),
                "verified": None if config.gpu.verified is None else whole(config.gpu.verified),
            }
        ),
    }
    if profiling.load is not None:
        changes["profiling"] = profiling.model_copy(update={"load": whole(profiling.load)})
    if config.planner.python is not None:
        changes["planner"] = config.planner.model_copy(update={"python": whole(config.planner.python)})
    if config.target_file is not None:
        changes["target_file"] = whole(config.target_file)
    if textfile is not None:
        changes["prometheus"] = config.prometheus.model_copy(update={"textfile": whole(textfile)})
    if gpus is not None:
        changes["emulation"] = config.emulation.model_copy(update={"gpus": tuple(map(whole, gpus))})
    return config.model_copy(update=changes)


def _check_together(config: PerseusConfig, source: str) -> None:
    """What no single key can check."""
    clocks = config.profiling.clocks_mhz
    if clocks is not None and (len(set(clocks)) != len(clocks) or min(clocks) <= 0):
        raise ConfigError(
            f"{source}.profiling.clocks_mhz: got {list(clocks)}; allowed: a list of at least 2 different whole "
            "numbers from 1 to 10000, or null"
        )
    prices = {"price_per_kwh": config.price_per_kwh, "price_per_gpu_hour": config.price_per_gpu_hour}
    missing = [key for key, price in prices.items() if price is None]
    if len(missing) == 1:
        raise ConfigError(f"{source}.{missing[0]}: missing; give both price_per_kwh and price_per_gpu_hour or none")
    if not missing and config.slowdown:
        raise ConfigError(f"{source}.slowdown: got {config.slowdown:g}; allowed: 0 where prices say what costs least")
    times = config.emulation
    if (times.forward_time_s is None) != (times.backward_time_s is None):
        one = "forward_time_s" if times.forward_time_s is None else "backward_time_s"
        raise ConfigError(f"{source}.emulation.{one}: missing; give both forward_time_s and backward_time_s or none")
