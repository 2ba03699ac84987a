"""The contract in numpy, written from its text and sharing no code with csrc/core/math.h.

x is [N, C, S], its values as the kernel's own dtype holds them; everything else is [C]. Computed in
extended precision, so that it can judge float64 kernels too.
"""

from __future__ import annotations

import numpy as np


def _column(values: np.ndarray | float) -> np.ndarray:
    return np.asarray(values, np.longdouble).reshape(-1, 1)


def limits_at(schedule: np.ndarray, step: int) -> tuple[float, float]:
    """r_max and d_max of the batch after `step` others; schedule: warmup_steps, r_max, r_max_step,
    d_max, d_max_step."""
    warmup, r_max, r_max_step, d_max, d_max_step = map(float, schedule)

    def between(end: float, low: float, high: float) -> float:
        if step >= end:
            return high
        if step <= warmup:
            return low
        return low + (high - low) * (step - warmup) / (end - warmup)

    return between(r_max_step, 1.0, r_max), between(d_max_step, 0.0, d_max)


def forward(
    x: np.ndarray,
    weight=None,
    bias=None,
    running_mean=None,
    running_std=None,
    *,
    num_batches_tracked: int | None = None,
    schedule=None,
    limits=(1.0, 0.0),
    momentum: float = 0.01,
    eps: float = 1e-5,
    skip_nonfinite: bool = False,
) -> dict[str, np.ndarray]:
    """Algorithm 1. A negative momentum is the cumulative average."""
    x = x.astype(np.longdouble)
    count = num_batches_tracked or 0
    if schedule is not None:
        limits = limits_at(schedule, count)
    if momentum < 0:
        momentum = 1.0 / (count + 1)
    r_max, d_max = limits
    with np.errstate(all="ignore"):
        mean = x.mean((0, 2))
        std = np.sqrt(x.var((0, 2)) + eps)
        r, d = np.ones_like(mean), np.zeros_like(mean)
        if running_mean is not None:
            running_mean = running_mean.astype(np.longdouble)
            running_std = running_std.astype(np.longdouble)
            r = np.clip(std / running_std, 1 / r_max, r_max)
            d = np.clip((mean - running_mean) / running_std, -d_max, d_max)
        inv_std = np.where(std == 0, 0.0, 1 / std)
        x_norm = (x - _column(mean)) * _column(inv_std)
        y = x_norm * _column(r) + _column(d)
        if weight is not None:
            y = y * _column(weight)
        if bias is not None:
            y = y + _column(bias)
        out = {
            "y": y,
            "mean": mean,
            "std": std,
            "inv_std": inv_std,
            "r": r,
            "d": d,
        }
        keep = skip_nonfinite and not np.isfinite(x).all()
        if running_mean is not None:
            out["running_mean"] = (
                running_mean if keep else running_mean + momentum * (mean - running_mean)
            )
            out["running_std"] = (
                running_std if keep else running_std + momentum * (std - running_std)
            )
    if num_batches_tracked is not None:
        out["num_batches_tracked"] = np.array([count if keep else count + 1])
    return out


def backward(
    dy: np.ndarray, x: np.ndarray, weight=None, *, mean, inv_std, r, d, training: bool = True
) -> dict[str, np.ndarray]:
    """Gradients given the statistics of the forward, or the moving ones in inference (r = 1, d =
    0)."""
    dy, x = dy.astype(np.longdouble), x.astype(np.longdouble)
    m = dy.shape[0] * dy.shape[2]
    x_norm = (x - _column(mean)) * _column(inv_std)
    sum_g, sum_gx = dy.sum((0, 2)), (dy * x_norm).sum((0, 2))
    scale = np.asarray(r) * np.asarray(inv_std)
    if weight is not None:
        scale = scale * weight
    g = dy
    if training:
        g = dy - _column(sum_g) / m - x_norm * _column(sum_gx) / m
    return {"dx": g * _column(scale), "dweight": r * sum_gx + d * sum_g, "dbias": sum_g}


def inference(x: np.ndarray, weight=None, bias=None, *, running_mean, running_std) -> np.ndarray:
    y = (x.astype(np.longdouble) - _column(running_mean)) / _column(running_std)
    if weight is not None:
        y = y * _column(weight)
    return y if bias is None else y + _column(bias)
