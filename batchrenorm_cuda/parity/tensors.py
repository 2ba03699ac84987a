"""The tensors of a case: values from a seed, in the memory layout that the case asks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrenorm_cuda.schedule import RenormSchedule

from .cases import Case

# Each takes values [N, C, ...] and returns a tensor of the same values (but for "expanded") in
# another layout.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda v: v.contiguous(memory_format=torch.channels_last_3d),
    "channels_last_1d": lambda v: v.transpose(1, -1).contiguous().transpose(1, -1),
    "sliced rows": lambda v: _padded(v, -1)[..., 1:-2],
    "sliced channels": lambda v: _padded(v, 1)[:, 1:-2],
    "sliced channels_last": lambda v: FORMS["channels_last"](_padded(v, 1))[:, 1:-2],
    "strided": lambda v: v.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda v: _shifted(v.contiguous()),
    "misaligned channels_last": lambda v: _shifted(FORMS["channels_last"](v)),
    "expanded": lambda v: v[:1].clone().expand_as(v),
    "permuted": lambda v: (
        v.permute(*range(v.dim() - 1, -1, -1)).contiguous().permute(*range(v.dim() - 1, -1, -1))
    ),
}
POKES = ("", "constant", "nan", "inf", "zero weight")
RUNNING = ("near", "far", "fresh", "absent")


@dataclass
class Tensors:
    x: Tensor  # [N, C, ...]
    dy: Tensor  # as x, in its own layout
    weight: Tensor | None  # [C]
    bias: Tensor | None
    running_mean: Tensor | None  # [C]; both moving statistics or neither
    running_std: Tensor | None


def _padded(v: Tensor, dim: int) -> Tensor:
    before, after = v.narrow(dim, 0, 1), v.narrow(dim, -2 if v.size(dim) > 1 else 0, 1)
    return torch.cat([before, v, after, after], dim)


def _shifted(v: Tensor) -> Tensor:
    """The same strides, one element further on in a storage of its own."""
    storage = torch.empty(v.numel() + 1, dtype=v.dtype, device=v.device)
    return storage.as_strided(v.shape, v.stride(), 1).copy_(v)


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of moving statistics, weight and bias of an x of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column(t: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to broadcast against x."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _running(case: Case, mean: Tensor, std: Tensor, normal) -> tuple[Tensor | None, Tensor | None]:
    channels = mean.numel()
    if case.running == "absent":
        return None, None
    if case.running == "fresh":
        return torch.zeros_like(mean), torch.ones_like(std)
    if case.running == "near":  # as after some hundred steps: nothing is clipped
        return mean + 0.3 * std * normal(channels), std * torch.exp(
            0.2 * normal(channels).clamp(-2, 2)
        )
    # "far": r beyond both of its limits in every second channel, d in every second pair
    sign = torch.where(torch.arange(channels, device=mean.device) % 2 == 0, 1.0, -1.0).to(mean)
    pair = torch.where(torch.arange(channels, device=mean.device) % 4 < 2, 1.0, -1.0).to(mean)
    running_std = std * torch.exp(2.5 * sign)
    return mean + 9.0 * running_std * pair, running_std


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The tensors of `case`, the same values on every run and, rounded, in every dtype."""
    shape = case.shape_on(device)
    channels = shape[1]
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device=device, dtype=torch.float64)

    mean = case.mean + case.std * normal(channels)
    std = case.std * torch.exp(0.3 * normal(channels))
    x = torch.randn(shape, generator=generator).to(device, torch.float64)
    x.mul_(column(std, x)).add_(column(mean, x))
    if case.poke == "constant":
        x[:, 0] = mean[0]
    elif case.poke in ("nan", "inf"):
        x[-1, 0].view(-1)[-1] = float(case.poke)
    x = FORMS[case.form](x.to(dtype))
    dy = torch.randn(shape, generator=generator) + case.dy_mean
    dy = FORMS[case.dy_form](dy.to(device, dtype))

    weight, bias = 1.0 + 0.5 * normal(channels), normal(channels)
    if case.poke == "zero weight":
        weight[0] = 0.0
    real = statistic_dtype(dtype)
    parameter = dtype if case.half_weight else real
    running_mean, running_std = _running(case, mean, torch.sqrt(std * std + case.eps), normal)
    return Tensors(
        x,
        dy,
        weight.to(parameter) if case.weight else None,
        bias.to(parameter) if case.bias else None,
        None if running_mean is None else running_mean.to(real),
        None if running_std is None else running_std.to(real),
    )


def expected_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of y: those of x where x is dense with the channels of an element apart or
    together, else contiguous, with the channels together where they are in x."""
    if x.numel() == 0 or x.dim() == 2:
        return _strides(x.shape, range(x.dim()))
    first = list(range(x.dim()))
    last = [0, *first[2:], 1]
    for order in (first, last):
        if _same(x, _strides(x.shape, order)):
            return _strides(x.shape, order)
    return _strides(x.shape, last if x.stride(1) == 1 else first)


def has_strides(y: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether y is laid out so; the stride of a size-1 dimension means nothing."""
    return _same(y, strides)


def _strides(shape: torch.Size, order) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(list(order)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _same(x: Tensor, strides: tuple[int, ...]) -> bool:
    return all(
        size == 1 or have == want
        for size, have, want in zip(x.shape, x.stride(), strides, strict=True)
    )


def limits_at(case: Case) -> tuple[float, float]:
    """r_max and d_max of the case's step."""
    return (
        case.limits
        if case.schedule is None
        else RenormSchedule(*case.schedule).limits_at(case.step)
    )


def momentum_at(case: Case) -> float:
    """The weight of this batch in the moving averages."""
    return 1.0 / (case.step + 1) if case.momentum is None else case.momentum
