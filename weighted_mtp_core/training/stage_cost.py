"""Measures what the steps of a stage cost: tokens and operations per second, and peak memory.

The cost differs between machines, so it is recorded as `timings`. Metrics are recorded separately, because
they do not depend on the speed of the machine. MLflow shows names that begin with `system/` in its tab for
system metrics, in which a megabyte is 10^6 bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from attrs import define, field

from weighted_mtp_core.runtime.cost import forget_peak, peak_memory
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.tracking.run_history import Point

_RATES = {
    "tokens_per_second": "{}_tokens_per_second",
    "flops_per_second": "system/{}_flops_per_second",
    "matrix_rate_share": "system/{}_matrix_rate_share",
}
_PEAKS = {
    "peak_host_memory": "system/{}_peak_host_memory_megabytes",
    "peak_device_memory": "system/{}_peak_device_memory_megabytes",
}


@define(kw_only=True, eq=False)
class StageCost:
    """Measures the steps of a stage between two calls of `read`.

    Attributes:
        stage: Name of the stage.
        device: The device that trains.
        matrix_rate: Operations per second of a large matrix product in each process, see `runtime/cost.py`;
            None if it was not measured.
        distributed: The processes that train together.
    """

    stage: str
    device: torch.device
    matrix_rate: float | None
    distributed: Distributed
    _clock: float = field(init=False, factory=time.perf_counter)
    _tokens: int = field(init=False, default=0)
    _flops: float = field(init=False, default=0.0)

    def begin(self) -> None:
        """Start the clock, and reset the peak memory of a CUDA device."""
        forget_peak(self.device)
        self._clock = time.perf_counter()

    def add(self, *, tokens: int, flops: float) -> None:
        """Add a step's tokens, with padding, and its floating-point operations, which are 0 if unknown."""
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time that the `with` block takes."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return rates since the last call and peaks of memory, by metric name; every process must call this.

        The rates cover all processes together, and a peak is the maximum over the processes. If no operations
        were counted, rates of operations are left out; if `matrix_rate` is None, the share of it is left out.
        The call does not reset the peaks.
        """
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        found = {"tokens_per_second": self._tokens / seconds}
        if self._flops:
            found["flops_per_second"] = self._flops / seconds
            if self.matrix_rate is not None:
                whole = self.matrix_rate * self.distributed.size
                found["matrix_rate_share"] = found["flops_per_second"] / whole
        peaks = peak_memory(self.device)
        for name, peak in zip(peaks, self.distributed.largest(*peaks.values()), strict=True):
            found[f"peak_{name}_memory"] = peak / 1e6
        self._clock, self._tokens, self._flops = time.perf_counter(), 0, 0.0
        return {(_RATES | _PEAKS)[name].format(self.stage): value for name, value in found.items()}


def cost_of(stage: str, series: Mapping[str, Sequence[Point]]) -> dict[str, float]:
    """Return the cost of a whole stage from its records: medians of rates, and the last peaks in megabytes.

    The possible keys are `tokens_per_second`, `flops_per_second`, `matrix_rate_share`, `peak_host_memory` and
    `peak_device_memory`; a key is missing if its value was not recorded.
    """
    points = {name: series.get(key.format(stage), ()) for name, key in (_RATES | _PEAKS).items()}
    return {
        name: statistics.median(each.value for each in found) if name in _RATES else found[-1].value
        for name, found in points.items()
        if found
    }
