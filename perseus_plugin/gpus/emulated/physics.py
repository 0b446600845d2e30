"""What the emulated GPUs are modelled on: instruction time and power as functions of the SM clock.

With `u` the clock as a fraction of the highest one, a GPU under a training load sustains

    sustained(u) = (u^-n + limit^-n)^(-1/n)

(its power limit keeps it from the highest clocks under load: `limit` is where, `n` how sharply). An
instruction takes

    time(u)  ~ compute_share / sustained(u) + (1 - compute_share)                  (1 at the highest clock)
    power(u) = blocking_w + dynamic_w * r(u)
    r(u)     ~ sustained(u) * voltage(sustained(u))^2                              (1 at the highest clock)
    voltage(u) = 1 + slope * softplus(sharpness * (u - knee)) / sharpness

that is: a share of its work scales with the clock and the rest with memory; switching power goes with clock
times voltage squared; the voltage is flat below a knee and rises above it. While a GPU waits it draws
`blocking_w`, whatever its clock.

The constants are fitted by `benchmarks/emulation_fit.py` to the profiles published with the Perseus paper
(GPT-3 175B on A100 SXM and A40, SOSP'24), over all stages and clocks. Errors of the fit, root mean square
and largest:

    A100 SXM  forward   time 0.11 %, 0.38 %   power 1.31 %, 4.50 %   energy 1.30 %, 4.45 %
              backward  time 0.21 %, 0.66 %   power 1.12 %, 3.84 %   energy 1.11 %, 3.93 %
    A40       forward   time 0.49 %, 1.32 %   power 1.15 %, 3.62 %   energy 1.25 %, 3.91 %
              backward  time 1.79 %, 5.08 %   power 1.38 %, 3.08 %   energy 2.11 %, 4.60 %

(The largest power errors are those of the last stage, which does other work at lower power.)
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
        limit: the clock it sustains under the power limit, as a fraction of the highest.
        dynamic_w: power above blocking power at the highest clock.
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
        blocking_w: power while waiting for a peer.
        limit_sharpness: `n` of the sustained clock.
        knee, slope, sharpness: of the voltage curve, over the clock as a fraction of the highest.
        forward, backward, other: the classes of work.
    """

    name: str
    max_clock_mhz: int
    min_clock_mhz: int
    clock_step_mhz: int
    blocking_w: float
    limit_sharpness: float
    knee: float
    slope: float
    sharpness: float
    forward: LoadModel
    backward: LoadModel
    other: LoadModel

    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported SM clocks, falling."""
        return tuple(range(self.max_clock_mhz, self.min_clock_mhz - 1, -self.clock_step_mhz))

    def load(self, load: int) -> LoadModel:
        """The model of a load class."""
        if load == WAITING:
            return LoadModel(compute_share=0.0, limit=1.0, dynamic_w=0.0)
        return (self.forward, self.backward, self.other)[load - FORWARD_LIKE]

    def stretch(self, load: int, clock_mhz: float) -> float:
        """Time of an instruction of class `load` at `clock_mhz`, over its time at the highest clock."""
        model = self.load(load)

        def time(clock: float) -> float:
            return model.compute_share / self._sustained(model, clock) + 1.0 - model.compute_share

        return time(clock_mhz) / time(self.max_clock_mhz)

    def relative_power(self, load: int, clock_mhz: float) -> float:
        """Power above blocking power at `clock_mhz`, over the same at the highest clock."""
        model = self.load(load)

        def switching(clock: float) -> float:
            sustained = self._sustained(model, clock)
            return sustained * self._voltage(sustained) ** 2

        return switching(clock_mhz) / switching(self.max_clock_mhz)

    def power_w(self, load: int, clock_mhz: float) -> float:
        """Power at `clock_mhz` under a load of class `load`."""
        return self.blocking_w + self.load(load).dynamic_w * self.relative_power(load, clock_mhz)

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
    blocking_w=83.64,
    limit_sharpness=38.05,
    knee=0.8353,
    slope=2.2377,
    sharpness=18.29,
    forward=LoadModel(compute_share=0.9512, limit=0.9633, dynamic_w=393.8),
    backward=LoadModel(compute_share=0.8898, limit=0.9581, dynamic_w=395.3),
    other=LoadModel(compute_share=0.0, limit=1.0, dynamic_w=120.0),
)

A40 = GpuModel(
    name="emulated A40-48GB",
    max_clock_mhz=1740,
    min_clock_mhz=210,
    clock_step_mhz=15,
    blocking_w=70.38,
    limit_sharpness=44.14,
    knee=0.7105,
    slope=1.15,
    sharpness=34.18,
    forward=LoadModel(compute_share=0.5966, limit=0.8253, dynamic_w=227.3),
    backward=LoadModel(compute_share=0.2504, limit=0.8234, dynamic_w=219.2),
    other=LoadModel(compute_share=0.0, limit=1.0, dynamic_w=80.0),
)

MODELS = {"a100": A100, "a40": A40}
"""GPU models by the name a configuration uses."""
