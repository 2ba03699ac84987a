"""Batch Renormalization in plain torch operations: the specification that the kernels are held to.

Follows Algorithm 1 of the paper (Ioffe 2017) line by line, on any device and in any floating dtype;
autograd makes the gradients, so they cannot share a mistake with the hand-written ones. For tests
and for reading. It is not a fallback: torch.compile gives it wrong gradients, because the moving
averages that r and d come from have moved by the time the backward pass recomputes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import RenormSchedule


def batch_renorm(
    x: Tensor,
    running_mean: Tensor | None,
    running_std: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
    *,
    num_batches_tracked: Tensor | None = None,
    schedule: Tensor | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Same arguments and meaning as :func:`batchrenorm_cuda.functional.batch_renorm`, without its
    checks.

    Arithmetic is in the dtype of x, and in float32 for half-precision x.
    """
    y_dtype = x.dtype
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    weight = x.new_ones(x.size(1)) if weight is None else weight
    bias = x.new_zeros(x.size(1)) if bias is None else bias
    if x.numel() == 0:
        return (x * _column(weight, x) + _column(bias, x)).to(y_dtype)
    if not training:
        x_norm = (x - _column(running_mean, x)) * _column(_reciprocal(running_std), x)
        return (x_norm * _column(weight, x) + _column(bias, x)).to(y_dtype)

    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims)
    variance = x.var(dims, correction=0) + eps
    varies = variance != 0  # false only for a constant channel with eps = 0: its x - mean is 0
    std = torch.where(varies, variance, 1).sqrt() * varies
    x_norm = (x - _column(mean, x)) * _column(_reciprocal(std), x)

    r, d = torch.ones_like(std), torch.zeros_like(mean)
    if running_mean is not None:
        # Constants of the step: the paper's stop_gradient. detach() stops forward mode as well.
        with torch.no_grad():
            if schedule is not None:
                limits = RenormSchedule.from_tensor(schedule)
                r_max, d_max = limits.limits_at(int(num_batches_tracked))
            has_scale = _has_scale(running_std)
            scale = torch.where(has_scale, running_std, 1)
            r = (std.detach() / scale).clamp(1 / r_max, r_max)
            d = ((mean.detach() - running_mean) / scale).clamp(-d_max, d_max)
            r = torch.where(has_scale, r, 1).to(std.dtype)
            d = torch.where(has_scale, d, 0).to(mean.dtype)

    with torch.no_grad():
        every = torch.ones((), dtype=torch.bool, device=x.device)
        counts = x.isfinite().all() if skip_nonfinite else every
        if running_mean is not None:
            if momentum is None:
                momentum = 1 / (num_batches_tracked.item() + 1)
            for running, batch in ((running_mean, mean), (running_std, std)):
                moved = running + momentum * (batch.detach() - running)
                running.copy_(torch.where(counts, moved, running))
        if num_batches_tracked is not None:
            num_batches_tracked += counts

    y = x_norm * _column(r, x) + _column(d, x)
    return (y * _column(weight, x) + _column(bias, x)).to(y_dtype)


def _column(t: Tensor, x: Tensor) -> Tensor:
    """[C] so that it broadcasts over x [N, C, ...]."""
    return t.view(-1, *[1] * (x.dim() - 2))


def _has_scale(std: Tensor) -> Tensor:
    """Whether 1 / std is finite. Only a channel that does not vary, with eps = 0, is without."""
    return ~(std < torch.finfo(std.dtype).tiny)


def _reciprocal(std: Tensor) -> Tensor:
    """1 / std, and 0 for a channel without a scale: its x - mean is 0 anyway."""
    has_scale = _has_scale(std)
    return has_scale / torch.where(has_scale, std, 1)
