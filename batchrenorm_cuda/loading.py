"""What a state_dict brings to a layer: checked, and in the form that the layer has it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._ops import statistic_dtype

if TYPE_CHECKING:
    from .modules import _BatchRenorm
    from .schedule import RenormSchedule


def adapt(
    layer: _BatchRenorm, state_dict: dict[str, Any], prefix: str, assign: bool
) -> RenormSchedule:
    """Brings this layer's entries of a state_dict into its own form, in place. Returns the schedule
    in force after.

    Raises:
        ValueError, TypeError: naming the entry and what it got.
    """
    names = ("running_mean", "running_std", "running_var", "num_batches_tracked", "schedule")
    keys = [prefix + name for name in names]
    mean_key, std_key, var_key, counter_key, schedule_key = keys
    mean, std, var, counter, schedule = (_entry(state_dict, key) for key in keys)
    if counter is not None:
        _require(counter_key, counter, "finite and >= 0", _is_not_negative, torch.int64)
        state_dict[counter_key] = counter.to(torch.int64)
    # torch.distributed.checkpoint fills in for what is not there with what the layer has.
    if var is not None and (std is None or std is layer.running_std):
        _require(var_key, var, "finite and >= 0", _is_not_negative)
        del state_dict[var_key]
        std = (var.double() + layer.eps).sqrt()
        # Not the buffer, which may be as to_empty() has left it.
        real = var if layer.schedule.is_meta else layer.schedule
        state_dict.setdefault(schedule_key, layer._schedule.as_tensor(real.device))
        count = layer.num_batches_tracked
        if layer.schedule.is_meta and not var.is_meta:  # with assign=True it becomes real now
            count = var.new_zeros((), dtype=torch.int64)
        state_dict.setdefault(counter_key, count)
    # With assign=True weight and bias take the dtype that they come in, and statistics go with it.
    weight = _entry(state_dict, f"{prefix}weight") if assign else None
    dtype = layer.running_mean.dtype if weight is None else statistic_dtype(weight.dtype)
    if mean is not None:
        _require(mean_key, mean, "finite", torch.isfinite, dtype)
        state_dict[mean_key] = mean.to(dtype).contiguous()
    if std is not None:
        _require(std_key, std, "finite and > 0", _is_positive, dtype)
        state_dict[std_key] = std.to(dtype).contiguous()
    if schedule is None or schedule is layer.schedule or schedule.is_meta:
        return layer._schedule
    try:
        found = layer._schedule.recognised_in(schedule)
    except ValueError as error:
        raise ValueError(f"{schedule_key}: {error}") from None
    state_dict[schedule_key] = found.as_tensor(schedule.device)
    return found


def _entry(state_dict: dict[str, Any], key: str) -> Tensor | None:
    t = state_dict.get(key)
    if key in state_dict and not isinstance(t, Tensor):
        raise TypeError(f"{key} must be a Tensor, got {type(t).__name__}")
    if t is not None and (t.is_complex() or t.layout != torch.strided):
        raise TypeError(
            f"{key} must be a dense tensor of real numbers, got {t.dtype} in {t.layout}"
        )
    return t


def _require(
    key: str,
    t: Tensor,
    wanted: str,
    test: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """That all of it passes the test, as it is and in the dtype that it is to be kept in."""
    if t.is_meta:
        return
    right = test(t)
    if dtype is not None and bool(right.all()):
        wanted, right = f"{wanted} in {dtype}", test(t.to(dtype))
    if not bool(right.all()):
        wrong = t.flatten()[~right.flatten()].tolist()
        where = f" in {len(wrong)} of {t.numel()} channels" if t.numel() > 1 else ""
        raise ValueError(f"{key} must be {wanted}, got {wrong[0]}{where}")


def _is_not_negative(t: Tensor) -> Tensor:
    return t.isfinite() & (t >= 0)


def _is_positive(t: Tensor) -> Tensor:
    return t.isfinite() & (t > 0)
