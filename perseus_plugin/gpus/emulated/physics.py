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
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WAITING, FORWARD_LIKE, BACKWARD_LIKE, OTHER = range(4)
"""Load classes: waiting for a peer, and three kinds of work with their own time and power curves."""

LOAD_CLASSES = 4


def load_class(kind: str) -> int:
    """Which class of load an instruction kind belongs to."""
    if "forward" in kind:
        return FORWARD_LIKE
    if "backward" in kind or "weight" in kind:
        return BACKWARD_LIKE
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

MODELS = {"a100": A100, "a40": A40}
"""GPU models by the name a configuration uses."""
