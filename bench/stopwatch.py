"""Seconds between two events on a GPU, with nothing of the host in them.

On an idle GPU the first event is over before the host has launched anything, and the launch is
timed too: about 10 us of a graph, which itself may take 60 (both expected; no GPU has run this
yet). So the GPU spins until all is queued behind it. bench/stopwatch.cuh is the same in C++.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LEAST, MOST = 200_000, 3_200_000  # cycles: 0.1 and 1.6 ms on an H200 at 1.98 GHz


class Stopwatch:
    """For work that takes the host about as long to launch each time."""

    def __init__(self) -> None:
        self._cycles = LEAST

    def seconds(self, launch: Callable[[], object]) -> float:
        """Of what `launch` queues on the current stream. Queueing that takes the host longer than
        MOST cycles shows in them after all."""
        while True:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self._cycles)  # private, but torch's own tests of streams live on it
            start.record()
            launch()
            stop.record()
            late = start.query()  # the spin was over while there was still something to queue
            stop.synchronize()
            if not late or self._cycles >= MOST:
                return start.elapsed_time(stop) * 1e-3
            self._cycles *= 2
