"""One rank's emulated GPU in a real training job: how long its instructions take, and making them take that long."""

from __future__ import annotations

import statistics
import time

from perseus_plugin.config import EmulationConfig
from perseus_plugin.exchange.messages import CALIBRATION, Placement
from perseus_plugin.exchange.store import Exchange, wait_for
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.execution import EmulatedExecution
from perseus_plugin.iteration.instructions import (
    BACKWARD,
    INPUT_BACKWARD,
    INPUT_SHARE,
    WEIGHT_BACKWARD,
    Compute,
    parts_of,
)

_CALIBRATION_TIMEOUT_S = 60.0
_PAIR = 0.9  # of its parts' times: what one of them waits for (communication within the layer) overlaps with the other


class EmulatedStage:
    """Stretches this rank's instructions (see `tap.Execution`).

    With times in the configuration these are the instructions' full-clock times from the first iteration on. Without,
    instructions run unstretched while their CPU time is measured, until `calibrate` is called.

    The gradients of input and weights take a backward's time together. The first stage's first chunk has no input whose
    gradient is computed: there the weights' takes all of it.

    Args:
        gpu: this rank's emulated GPU.
        config: the `emulation` block.
        placement: where this rank sits.
    """

    def __init__(self, gpu: EmulatedGpu, config: EmulationConfig, placement: Placement) -> None:
        self._execution = EmulatedExecution(gpu)
        self._config = config
        self._placement = placement
        self._given = config.forward_time_s is not None and config.backward_time_s is not None
        self._times_s: dict[str, float] = {}
        self._cpu_s: dict[str, list[float]] = {}
        self._calibrated = self._given
        self._running = ""
        self._began_cpu_s = 0.0

    @property
    def needs_calibration(self) -> bool:
        """Whether times are still to be taken from the CPU's."""
        return not self._calibrated

    def begin(self, operation: Compute) -> None:
        """The instruction begins."""
        self._running = operation.kind
        if self._calibrated:
            self._execution.begin(operation.kind, self._time_s(operation.kind))
        else:
            self._began_cpu_s = time.process_time()

    def finish(self) -> bool:
        """Wait until the emulated GPU is done; returns whether the CPU took longer than that."""
        if not self._calibrated:
            self._cpu_s.setdefault(self._running, []).append(time.process_time() - self._began_cpu_s)
            return False
        return self._execution.finish().overran

    def calibrate(self, exchange: Exchange) -> None:
        """Fix the times from the CPU times so far; all ranks of a stage take the same ones, as rank 0 tells them.

        Waits for all ranks, up to a minute: emulation only.
        """
        mine = {kind: statistics.median(times) for kind, times in self._cpu_s.items()}
        rank, stage = self._placement.rank, self._placement.stage
        exchange.tell(f"{CALIBRATION}/{rank}", [stage, mine])
        if self._placement.leads:
            keys = [f"{CALIBRATION}/{other}" for other in range(self._placement.world_size)]
            everyone = wait_for(exchange.told, keys, _CALIBRATION_TIMEOUT_S)
            exchange.tell_all(CALIBRATION, list(everyone.values()))
        everyone = wait_for(exchange.heard, [CALIBRATION], 2 * _CALIBRATION_TIMEOUT_S)
        of_stage = [times for other, times in everyone.get(CALIBRATION, []) if other == stage] or [mine]
        scale = self._config.time_scale
        self._times_s = {
            kind: scale * statistics.mean(times[kind] for times in of_stage if kind in times) for kind in mine
        }
        self._calibrated = True

    def _time_s(self, kind: str) -> float:
        if self._config.forward_time_s is not None and self._config.backward_time_s is not None:
            stage = self._placement.stage
            forward_s, backward_s = self._config.forward_time_s[stage], self._config.backward_time_s[stage]
            shares = {INPUT_BACKWARD: INPUT_SHARE, WEIGHT_BACKWARD: 1 - INPUT_SHARE}
            parts = parts_of(kind) or ((kind, 0),)
            times_s = [
                (backward_s if BACKWARD in name else forward_s)
                * (1.0 if (name, stage, chunk) == (WEIGHT_BACKWARD, 0, 0) else shares.get(name, 1.0))
                for name, chunk in parts
            ]
            return sum(times_s) * (_PAIR if len(parts) > 1 else 1.0)
        known = self._times_s.get(kind)
        # A kind that first shows up after calibration (another schedule) takes what the known ones take.
        return known if known is not None else max(self._times_s.values(), default=0.01)
