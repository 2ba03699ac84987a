"""What a call costs the host, eager: tensors so small that the device has nothing to do."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import batchrenorm_cuda

from . import timing
from .shapes import Problem

SHAPES = ((4, 8), (256, 256), (4, 8, 4, 4))
# Calls of a sample. On CUDA BatchNorm launches about 7 kernels for one, and a host that has filled
# the queue, some 1024 launches deep, waits for the device (both expected, not measured).
CALLS = {"cpu": 200, "cuda": 100}


def _layers(shape: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
    two = len(shape) == 4
    ours = batchrenorm_cuda.BatchRenorm2d if two else batchrenorm_cuda.BatchRenorm1d
    theirs = nn.BatchNorm2d if two else nn.BatchNorm1d
    return {f"{kind.__name__}": kind(shape[1], device=device).train() for kind in (ours, theirs)}


def _steps(layer: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], float]:
    """Seconds a call of forward and backward, with a queue that does not fill up."""
    calls = CALLS[device.type]
    problem = Problem(shape, "float32", "nhwc" if len(shape) == 2 else "nchw")
    x, dy = problem.tensor(device).requires_grad_(), problem.tensor(device)
    inputs = [x, layer.weight, layer.bias]

    def sample() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            torch.autograd.grad(layer(x), inputs, dy)
        return (time.perf_counter() - begin) / calls

    return sample


def measure(device: torch.device, quick: bool = False) -> list[dict]:
    """Rows of microseconds a call for the layer and for BatchNorm."""
    rows = []
    samples_each = 9 if quick else 41
    for shape in SHAPES:
        layers = _layers(shape, device)
        samplers = {name: _steps(layer, shape, device) for name, layer in layers.items()}
        for sample in samplers.values():
            sample()
        gc.disable()
        try:
            samples = timing.take_turns(samplers, dict.fromkeys(samplers, samples_each))
        finally:
            gc.enable()
        us = {name: 1e6 * statistics.median(s) for name, s in samples.items()}
        rows.append({"shape": "x".join(map(str, shape)), "us": us})
    return rows


def text(rows: list[dict]) -> str:
    lines = ["host overhead, eager, forward + backward, us a call"]
    for row in rows:
        (ours, a), (theirs, b) = row["us"].items()
        lines.append(
            f"  {row['shape']:>10}  {ours} {a:6.1f}   nn.{theirs} {b:6.1f}   {a / b:.2f} of it"
        )
    return "\n".join(lines)
