"""What a training step keeps: bytes saved for backward, and the peak of what it allocates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import OURS, PEER, providers
from .shapes import Problem

PROBLEMS = (
    Problem((32, 64, 56, 56), "float32", "nchw"),
    Problem((32, 64, 56, 56), "float32", "nhwc"),
    Problem((32, 64, 56, 56), "bfloat16", "nchw"),
    Problem((32, 64, 56, 56), "bfloat16", "nhwc"),
)


def saved_bytes(step, x: Tensor) -> int:
    """Of the storages that a forward saves, without x, which the layer before keeps anyway."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(x)
    storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(step, device: torch.device) -> int:
    """The most that was allocated at one time during the step, above what was there before."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(device: torch.device) -> list[dict]:
    rows = []
    for problem in PROBLEMS:
        for name in (OURS, PEER):
            layer = providers.PROVIDERS[name].make(problem, device)
            x = problem.tensor(device).requires_grad_()
            step = providers.operation(layer, "train", x, problem.tensor(device))
            rows.append(
                {
                    "shape": problem.name,
                    "dtype": problem.dtype,
                    "layout": problem.layout,
                    "provider": name,
                    "tensor_bytes": problem.tensor_bytes,
                    "saved": saved_bytes(layer.train, x),
                    "peak": peak_bytes(step, device),
                }
            )
    return rows


def text(rows: list[dict]) -> str:
    lines = [
        "memory of a training step: KB saved for backward besides x; peak, in tensors of x's size"
    ]
    for row in rows:
        what = f"{row['shape']:>14} {row['dtype']:9} {row['layout']} {row['provider']:13}"
        peak = row["peak"] / row["tensor_bytes"]
        lines.append(f"  {what} saved {row['saved'] / 1e3:8.1f}   peak {peak:.3f}")
    return "\n".join(lines)
