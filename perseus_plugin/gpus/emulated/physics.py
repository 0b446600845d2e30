"""What the emulated GPUs are modelled on: instruction time and power as functions of the SM clock.

With `u` the clock as a fraction of the highest one, a GPU under a training load sustains

    sustained(u) = (u^-n + limit^-n)^(-1/n)

(its power limit keeps it from the highest clocks under load: `limit` is where, `n` how sharply). An
instruction takes

    time(u)  ~ compute_share / sustained(u) + (1 - compute_share)                  (1 at the highest clock)
    power(u) = static_w + dynamic_w * r(u)
    r(u)     ~ sustained(u) * voltage(sustained(u))^2                              (1 at the highest clock)
    voltage(u) = 1 + slope * softplus(sharpness * (u - knee)) / sharpness

that is: a share of its work scales with the clock and the rest with memory; switching power goes with clock
times voltage squared; the voltage is flat below a knee and rises above it. A GPU that waits for a peer switches too:
waiting is a load like the others, without a limit.

The constants are fitted by `benchmarks/emulation_fit.py` to the profiles published with the Perseus paper
(GPT-3 175B on A100 SXM and A40, SOSP'24), over all stages and clocks, and with them to what a waiting GPU draws: of
A100 PCIe the artifact's measured runs (how the energy of an iteration grows where only its waiting does: 68 W at
1,050 MHz, 69 at 1,075, 72 at 1,135, 87 where the clock is not locked), of A40 runs of the same kind (66 W at 1,150 MHz,
72 at 1,400, 77 at 1,600, 92 at the top). Errors of the fit, root mean square and largest:

    A100      forward   time 0.19 %, 0.51 %   power 1.29 %, 4.51 %   energy 1.30 %, 4.55 %
              backward  time 0.25 %, 0.79 %   power 1.16 %, 3.92 %   energy 1.21 %, 4.00 %
              waiting                         power 1.3 %, 1.9 %
    A40       forward   time 0.48 %, 1.33 %   power 1.41 %, 4.22 %   energy 1.53 %, 4.11 %
              backward  time 1.79 %, 5.08 %   power 1.60 %, 4.16 %   energy 1.93 %, 4.44 %
              waiting                         power 1.7 %, 2.7 %

(The largest power errors of work are those of the last stage, which does other work at lower power.)
Below 855 MHz, where nothing was published, it extrapolates. The `other` kind (optimizer, loading) is not
calibrated.

Of the models with a `limit_w` the limit stands apart from the curves, as on the card: a load runs at the highest
supported clock at which it draws no more. What is known of them and what is assumed is in `docs/emulation.md`; where a
load at the limit was measured, its power at the highest clock is what takes it to the limit at the clock read back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WAITING, FORWARD_LIKE, BACKWARD_LIKE, OTHER = range(4)
"""Load classes: waiting for a peer, and three kinds of work with their own time and power curves."""

LOAD_CLASSES = 4


def load_class(kind: str) -> int:
    """Which class of load an instruction kind belongs to; a forward and a backward in one are mostly the latter."""
    if "backward" in kind or "weight" in kind:
        return BACKWARD_LIKE
    if "forward" in kind:
        return FORWARD_LIKE
    return OTHER


@dataclass(frozen=True, slots=True)
class LoadModel:
    """How one class of work responds to the clock.

    Attributes:
        compute_share: share of the time that scales with the sustained clock, in [0, 1].
        limit: the clock it sustains under the power limit, as a fraction of the highest (inf: it is never limited).
        dynamic_w: power above static power at the highest clock.
    """

    compute_share: float
    limit: float
    dynamic_w: float


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU model. See the module's docstring for the formulas.

    Attributes:
        name: what is shown to people; says that it is emulated.
        max_clock_mhz, min_clock_mhz, clock_step_mhz: the SM clocks that can be locked.
        static_w: power of a GPU that switches nothing.
        limit_sharpness: `n` of the sustained clock.
        knee, slope, sharpness: of the voltage curve, over the clock as a fraction of the highest.
        waiting, forward, backward, other: the classes of load.
        limit_w: power limit it is delivered with (inf: what limits it is in the curves); one may be set below it.
        burst_j: energy beyond the limit that it draws, after it has been below, before its clock goes down.
        switch_s: how long a clock change takes that rises, and that drops, to a clock: (MHz, rise, drop) by rising
            clock, on the straight line between.
        tick_period_s, tick_lag_s: of the energy counter: how often it moves, and how long after that it shows.
        set_call_s, energy_call_s: how long the driver takes to set a clock, and to read the energy counter.
    """

    name: str
    max_clock_mhz: int
    min_clock_mhz: int
    clock_step_mhz: int
    static_w: float
    limit_sharpness: float
    knee: float
    slope: float
    sharpness: float
    waiting: LoadModel
    forward: LoadModel
    backward: LoadModel
    other: LoadModel
    limit_w: float = math.inf
    burst_j: float = 0.0
    switch_s: tuple[tuple[int, float, float], ...] = ((1, 0.005, 0.005),)
    tick_period_s: float = 0.020
    tick_lag_s: float = 0.0
    set_call_s: float = 0.0
    energy_call_s: float = 0.0

    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported SM clocks, falling."""
        return tuple(range(self.max_clock_mhz, self.min_clock_mhz - 1, -self.clock_step_mhz))

    def load(self, load: int) -> LoadModel:
        """The model of a load class."""
        return (self.waiting, self.forward, self.backward, self.other)[load]

    @property
    def blocking_w(self) -> float:
        """Power while waiting for a peer at the highest clock."""
        return self.power_w(WAITING, self.max_clock_mhz)

    def stretch(self, load: int, clock_mhz: float) -> float:
        """Time of an instruction of class `load` at `clock_mhz`, over its time at the highest clock."""
        model = self.load(load)

        def time(clock: float) -> float:
            return model.compute_share / self._sustained(model, clock) + 1.0 - model.compute_share

        return time(clock_mhz) / time(self.max_clock_mhz)

    def relative_power(self, load: int, clock_mhz: float) -> float:
        """Power above static power at `clock_mhz`, over the same at the highest clock."""
        model = self.load(load)

        def switching(clock: float) -> float:
            sustained = self._sustained(model, clock)
            return sustained * self._voltage(sustained) ** 2

        return switching(clock_mhz) / switching(self.max_clock_mhz)

    def power_w(self, load: int, clock_mhz: float) -> float:
        """Power at `clock_mhz` under a load of class `load`."""
        return self.static_w + self.load(load).dynamic_w * self.relative_power(load, clock_mhz)

    @property
    def most_w(self) -> float:
        """The most that it may be set to draw: its limit, or else what its heaviest load draws."""
        highest_w = max(self.power_w(load, clock) for load in range(LOAD_CLASSES) for clock in self.clocks_mhz())
        return min(self.limit_w, highest_w)

    def held_mhz(self, load: int, clock_mhz: int) -> int:
        """The clock at which a load of class `load` runs, under the limit, when `clock_mhz` is asked for."""
        allowed = [clock for clock in self.clocks_mhz() if clock <= clock_mhz]
        return next((clock for clock in allowed if self.power_w(load, clock) <= self.limit_w), self.min_clock_mhz)

    def switch_times_s(self, clock_mhz: int) -> tuple[float, float]:
        """How long a change to `clock_mhz` takes: one that rises, and one that drops."""
        rows = self.switch_s
        upper = next((i for i, (mhz, _, _) in enumerate(rows) if mhz >= clock_mhz), len(rows) - 1)
        (low_mhz, *low), (high_mhz, *high) = rows[max(upper - 1, 0)], rows[upper]
        share = min(1.0, (clock_mhz - low_mhz) / (high_mhz - low_mhz)) if high_mhz > low_mhz else 1.0
        rise_s, drop_s = (a + share * (b - a) for a, b in zip(low, high, strict=True))
        return rise_s, drop_s

    def _sustained(self, model: LoadModel, clock_mhz: float) -> float:
        n = self.limit_sharpness
        return float(((clock_mhz / self.max_clock_mhz) ** -n + model.limit**-n) ** (-1.0 / n))

    def _voltage(self, u: float) -> float:
        x = (u - self.knee) * self.sharpness
        softplus = x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
        return 1.0 + self.slope * softplus / self.sharpness


A100 = GpuModel(
    name="emulated A100-SXM4-80GB",
    max_clock_mhz=1410,
    min_clock_mhz=210,
    clock_step_mhz=15,
    static_w=51.45,
    limit_sharpness=47.15,
    knee=0.8057,
    slope=1.3209,
    sharpness=30.64,
    waiting=LoadModel(compute_share=0.0, limit=math.inf, dynamic_w=36.27),
    forward=LoadModel(compute_share=0.9366, limit=0.9689, dynamic_w=422.7),
    backward=LoadModel(compute_share=0.8751, limit=0.9644, dynamic_w=425.2),
    other=LoadModel(compute_share=0.0, limit=1.0, dynamic_w=152.0),
)

A40 = GpuModel(
    name="emulated A40-48GB",
    max_clock_mhz=1740,
    min_clock_mhz=210,
    clock_step_mhz=15,
    static_w=60.34,
    limit_sharpness=54.28,
    knee=0.9173,
    slope=7.5551,
    sharpness=14.64,
    waiting=LoadModel(compute_share=0.0, limit=math.inf, dynamic_w=31.48),
    forward=LoadModel(compute_share=0.5954, limit=0.8250, dynamic_w=237.5),
    backward=LoadModel(compute_share=0.2503, limit=0.8227, dynamic_w=229.0),
    other=LoadModel(compute_share=0.0, limit=1.0, dynamic_w=90.0),
)


def _held_by_its_limit(
    name: str,
    *,
    clocks_mhz: tuple[int, int],
    waiting_w: tuple[float, float],
    limit_w: float,
    sustained_mhz: tuple[float, float],
    burst_j: float,
) -> GpuModel:
    """A newer card, which its power limit holds; what its data sheet and measurements leave open is assumed.

    Voltage rises less than the A100's: so that work amid waits, which runs faster than alone until the limit takes
    hold, draws what it did on H100 and H200 (816 and 827 W of 700).

    Args:
        name: of the card.
        clocks_mhz: lowest and highest.
        waiting_w: static power, and power of a GPU that waits at the highest clock.
        limit_w: its power limit.
        sustained_mhz: the clocks at which a forward and a backward run under it.
        burst_j: see `GpuModel`.
    """
    low_mhz, high_mhz = clocks_mhz
    static_w, waits_w = waiting_w
    light = LoadModel(compute_share=0.0, limit=math.inf, dynamic_w=waits_w - static_w)
    model = replace(
        A100,
        slope=0.45,
        name=name,
        max_clock_mhz=high_mhz,
        min_clock_mhz=low_mhz,
        static_w=static_w,
        waiting=light,
        forward=replace(A100.forward, limit=math.inf),
        backward=replace(A100.backward, limit=math.inf),
        other=replace(A100.other, dynamic_w=0.3 * (limit_w - static_w)),
        limit_w=limit_w,
        burst_j=burst_j,
        switch_s=((low_mhz, 0.010, 0.030), (high_mhz, 0.020, 0.005)),
        tick_period_s=0.100,
        tick_lag_s=0.0116,
        set_call_s=0.002,
        energy_call_s=0.0037,
    )
    beside = [mhz + model.clock_step_mhz / 2 for mhz in sustained_mhz]  # no supported clock draws the limit exactly
    forward_w, backward_w = ((limit_w - static_w) / model.relative_power(FORWARD_LIKE, mhz) for mhz in beside)
    return replace(
        model,
        forward=replace(model.forward, dynamic_w=forward_w),
        backward=replace(model.backward, dynamic_w=backward_w),
    )


H100 = _held_by_its_limit(
    "emulated H100-SXM5-80GB",
    clocks_mhz=(345, 1980),
    waiting_w=(74.5, 125.0),
    limit_w=700.0,
    sustained_mhz=(1775.5, 1557.2),
    burst_j=5.0,
)
H200 = _held_by_its_limit(
    "emulated H200-SXM5-141GB",
    clocks_mhz=(345, 1980),
    waiting_w=(74.5, 125.0),
    limit_w=700.0,
    sustained_mhz=(1610.4, 1527.4),
    burst_j=5.0,
)
B200 = _held_by_its_limit(
    "emulated B200-SXM6-180GB",
    clocks_mhz=(120, 1965),
    waiting_w=(110.0, 180.0),
    limit_w=1000.0,
    sustained_mhz=(1667.0, 1667.0),
    burst_j=7.0,
)
B300 = _held_by_its_limit(
    "emulated B300-SXM6-288GB",
    clocks_mhz=(127, 2032),
    waiting_w=(115.0, 195.0),
    limit_w=1100.0,
    sustained_mhz=(1725.0, 1725.0),
    burst_j=8.0,
)

MODELS = {"a100": A100, "a40": A40, "h100": H100, "h200": H200, "b200": B200, "b300": B300}
"""GPU models by the name a configuration uses."""
