"""Seconds of an operation: on inputs that rotate past the last-level cache, providers taking turns.

On CUDA a graph of one call for each set of inputs is replayed between two events, on a GPU that is
busy until it is queued (stopwatch.py), so that neither the host nor the launch queue is in the
figure. What cannot be captured is launched call by call there, longer than the GPU is kept busy
for: the host is in its figure, and it says so ("events"). On the CPU calls run in a loop long
enough for the clock.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import providers, roofline
from .shapes import Problem
from .stopwatch import Stopwatch

MOST_SETS = {"cuda": 256, "cpu": 128}
HOT_CALLS = 16  # of one graph, on the same inputs


@dataclass(frozen=True)
class Budget:
    """How long to measure one provider on one operation."""

    seconds: float
    least: int  # samples
    most: int

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Budget:
        if device.type == "cuda":
            return cls(0.01, 5, 15) if quick else cls(0.02, 7, 31)
        return cls(0.05, 3, 9) if quick else cls(0.15, 7, 51)


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    spread: float  # of the middle 80% of samples, relative to the median
    samples: int
    method: str  # "graph", "events" or "clock"
    because: str = ""  # of events: why there is no graph


def sets_needed(problem: Problem, device: torch.device, hot: bool) -> int:
    """Sets of inputs to rotate through: enough that none is still in the cache when its turn comes
    again."""
    if hot:
        return 1
    enough = math.ceil(2 * roofline.cache_bytes(device) / max(problem.tensor_bytes, 1)) + 1
    return min(max(enough, 2), MOST_SETS[device.type])


@functools.lru_cache(maxsize=1)  # operations on one problem follow one another
def inputs_of(problem: Problem, device: torch.device, sets: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x and dy."""
    return [(problem.tensor(device), problem.tensor(device)) for _ in range(sets)]


class CudaSampler:
    """One sample is one replay, in seconds a call."""

    def __init__(self, layer: providers.Layer, op: str, inputs: list, hot: bool) -> None:
        self._stream, self._stopwatch = torch.cuda.Stream(), Stopwatch()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Forward and capture share a stream, or autograd would wait for one stream on another in
        # the middle of a capture.
        with torch.cuda.stream(self._stream), layer.scope():
            operations = [providers.operation(layer, op, x, dy) for x, dy in inputs]
            operations = operations * HOT_CALLS if hot else operations
            for _ in range(2):
                operations[0]()
            self._stream.synchronize()
            self.calls, self.method, graph = len(operations), "graph", torch.cuda.CUDAGraph()
            self.because = ""
            self._operations, self._scope, self._launch = operations, layer.scope, graph.replay
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    # Outputs that stay alive lie apart: writes rotate past the cache as reads do.
                    self._made = [] if hot else [operation() for operation in operations]
                    if hot:
                        self._one_after_another()
            except RuntimeError as error:
                self._launch, self.method = self._one_after_another, "events"
                self.because = in_a_line(error)
            self._launch()  # the first replay also brings the graph to the GPU
        torch.cuda.synchronize()

    def _one_after_another(self) -> None:
        for operation in self._operations:
            operation()

    def sample(self) -> float:
        with torch.cuda.stream(self._stream), self._scope():
            return self._stopwatch.seconds(self._launch) / self.calls


class Rotation:
    """Which of the sets of inputs is next: the one that was used longest ago, by any provider. With
    a rotation each, they would use the same one in turn, and find it where the other has left
    it."""

    def __init__(self, sets: int) -> None:
        self._sets, self._next = sets, 0

    def take(self, calls: int) -> range:
        """The next ones, as indices modulo the number of sets."""
        begin = self._next
        self._next = (begin + calls) % self._sets
        return range(begin, begin + calls)


class CpuSampler:
    """One sample is a loop of at least two milliseconds, in seconds a call."""

    LEAST_SECONDS = 2e-3

    def __init__(self, layer: providers.Layer, op: str, inputs: list, rotation: Rotation) -> None:
        self._operations = [providers.operation(layer, op, x, dy) for x, dy in inputs]
        self._rotation, self.calls, self.method, self.because = rotation, 1, "clock", ""
        self.sample()
        while (seconds := self.sample()) * self.calls < self.LEAST_SECONDS:
            self.calls = max(self.calls + 1, math.ceil(1.5 * self.LEAST_SECONDS / seconds))

    def sample(self) -> float:
        operations, taken = self._operations, self._rotation.take(self.calls)
        begin = time.perf_counter()
        for i in taken:
            operations[i % len(operations)]()
        return (time.perf_counter() - begin) / self.calls


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _timing(samples: list[float], method: str, because: str = "") -> Timing:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    median = statistics.median(samples)
    spread = (tenths[-1] - tenths[0]) / median
    return Timing(median, spread, len(samples), method, because)


def take_turns(
    samplers: dict[str, Callable[[], float]], budgets: dict[str, int]
) -> dict[str, list[float]]:
    """Samples of each, `budgets` many. A round goes through all of them, the next one backwards, so
    that a machine that slows down slows everyone down alike."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for _ in range(max(budgets.values(), default=0)):
        for name in order:
            if len(samples[name]) < budgets[name]:
                samples[name].append(samplers[name]())
        order.reverse()
    return samples


def time_operation(
    problem: Problem,
    op: str,
    names: list[str],
    device: torch.device,
    *,
    hot: bool = False,
    budget: Budget,
) -> dict[str, Timing | Exception]:
    """A timing for each provider, or the exception that it raised."""
    inputs = inputs_of(problem, device, sets_needed(problem, device, hot))
    rotation = Rotation(len(inputs))
    samplers, found = {}, {}
    for name in names:
        try:
            layer = providers.PROVIDERS[name].make(problem, device)
            if device.type == "cuda":
                samplers[name] = CudaSampler(layer, op, inputs, hot)
            else:
                samplers[name] = CpuSampler(layer, op, inputs, rotation)
        except Exception as error:  # a provider that fails must not take the others with it
            found[name] = error
    counts = {}
    for name, sampler in samplers.items():
        seconds = sampler.sample() * sampler.calls
        counts[name] = min(max(math.ceil(budget.seconds / seconds), budget.least), budget.most)
    collecting = gc.isenabled()
    gc.disable()
    try:
        samples = take_turns({name: s.sample for name, s in samplers.items()}, counts)
    finally:
        if collecting:
            gc.enable()
    found |= {n: _timing(samples[n], s.method, s.because) for n, s in samplers.items()}
    return {name: found[name] for name in names}
