"""What batch_renorm refuses, and how it says so.

The operators check as much, in C++, before they change anything, but can only raise RuntimeError.
So this slower check runs after they have refused, to name the culprit, and ahead of them where they
do not run: under torch.compile.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._ops import statistic_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALVES = frozenset((torch.float16, torch.bfloat16))  # looked into at every call


def _require_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def require_float(value: Any, name: str) -> None:
    if isinstance(value, int) and abs(value) >= 2**1024:
        raise ValueError(f"{name} must fit in a float, got an int of {value.bit_length()} bits")


def _require_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    require_float(value, name)


def _require_dense(t: Any, name: str) -> None:
    _require_tensor(t, name)
    if t.layout != torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _require(t: Any, x: Tensor, name: str, length: int, dtypes: tuple) -> None:
    """A vector of this length on the device of x."""
    _require_dense(t, name)
    if t.dim() != 1 or t.size(0) != length:
        raise ValueError(
            f"{name} must have shape ({length},) for x of shape {tuple(x.shape)}, "
            f"got {tuple(t.shape)}"
        )
    _require_beside(t, x, name, dtypes)


def _require_beside(t: Tensor, x: Tensor, name: str, dtypes: tuple) -> None:
    if t.dtype not in dtypes:
        raise TypeError(f"{name} must be {dtypes[0]} for x of {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def check_constants(**statistics: Tensor | None) -> None:
    """Moving statistics get no gradient, so none may be asked for."""
    for name, t in statistics.items():
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, since there is none of it: pass "
                f"{name}.detach(), got requires_grad=True"
            )


def check_numbers(
    momentum: float | None, eps: float, r_max: float = 1.0, d_max: float = 0.0
) -> None:
    """Raises for a number outside its range; NaN is outside all of them."""
    if momentum is not None:
        _require_number(momentum, "momentum")
        if not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum must be in [0, 1], or None for the cumulative average, got {momentum}"
            )
    for name, value, least in (("eps", eps, 0), ("r_max", r_max, 1), ("d_max", d_max, 0)):
        _require_number(value, name)
        if not value >= least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    running_mean: Tensor | None,
    running_std: Tensor | None,
    num_batches_tracked: Tensor | None,
    schedule: Tensor | None,
    momentum: float | None,
    eps: float,
    r_max: float,
    d_max: float,
    *,
    synchronised: bool = False,
) -> None:
    """Raises the ValueError or TypeError that these arguments of batch_renorm deserve, if any.
    `synchronised`: other processes have more of the batch."""
    _require_dense(x, "x")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, ...], got {tuple(x.shape)}")
    channels = x.size(1)
    if channels == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")

    if (running_mean is None) != (running_std is None):
        missing = "running_mean" if running_mean is None else "running_std"
        raise ValueError(
            f"running_mean and running_std must be given together, got None for {missing} only"
        )
    if running_mean is None and not training:
        raise ValueError("running_mean and running_std must be given with training=False, got None")
    real = statistic_dtype(x.dtype)
    for name, t in (("running_mean", running_mean), ("running_std", running_std)):
        if t is not None:
            _require(t, x, name, channels, (real,))
            if training and not t.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous, as it is updated in place, got stride {t.stride()}"
                )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _require(t, x, name, channels, (real, torch.float16, torch.bfloat16))

    if num_batches_tracked is not None:
        _require_tensor(num_batches_tracked, "num_batches_tracked")
        if num_batches_tracked.numel() != 1:
            raise ValueError(
                "num_batches_tracked must be one number, "
                f"got shape {tuple(num_batches_tracked.shape)}"
            )
        _require_beside(num_batches_tracked, x, "num_batches_tracked", (torch.int64,))
    if schedule is not None:
        _require(schedule, x, "schedule", 5, (torch.float64,))
        if num_batches_tracked is None:
            raise ValueError("num_batches_tracked must be given with a schedule, got None")

    if momentum is None and training and num_batches_tracked is None:
        raise ValueError("num_batches_tracked must be given with momentum=None, got None")
    check_numbers(momentum, eps, r_max, d_max)

    if training and x.numel() == channels and not synchronised:
        raise ValueError(
            f"x must have more than one value per channel in training, got shape {tuple(x.shape)}"
        )
