"""How the limits r_max and d_max move during training."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class RenormSchedule:
    """Limits of r and d as a function of the number of batches seen so far.

    Until `warmup_steps` the layer is plain Batch Normalization (r = 1, d = 0). From there r_max
    grows in a straight line from 1 to `r_max` at `r_max_step`, and d_max from 0 to `d_max` at
    `d_max_step`. The defaults are the paper's (Ioffe 2017, section 4.1).

    An end that equals `warmup_steps` makes a jump there. A limit may be infinite: no limit, from
    the first step after the warm-up on. With both, `RenormSchedule(5000, math.inf, 5000, math.inf,
    5000)` turns unlimited renormalization on at once.

    Args:
        warmup_steps: batches of plain Batch Normalization, >= 0.
        r_max: last limit of the scale correction, 1/r_max <= r <= r_max, >= 1. 1 turns the
            correction off.
        r_max_step: number of batches after which r_max is reached, >= warmup_steps.
        d_max: last limit of the shift correction, |d| <= d_max in units of the moving standard
            deviation, >= 0. 0 turns the correction off.
        d_max_step: number of batches after which d_max is reached, >= warmup_steps.

    Raises:
        ValueError: for a number outside its range, naming it.
        TypeError: for something that is not a number.
    """

    warmup_steps: float = 5000
    r_max: float = 3.0
    r_max_step: float = 40000
    d_max: float = 5.0
    d_max_step: float = 25000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not (0 <= self.warmup_steps < math.inf):
            raise ValueError(f"warmup_steps must be finite and >= 0, got {self.warmup_steps}")
        if not self.r_max >= 1:
            raise ValueError(f"r_max must be >= 1, got {self.r_max}")
        if not self.d_max >= 0:
            raise ValueError(f"d_max must be >= 0, got {self.d_max}")
        for name in ("r_max_step", "d_max_step"):
            step = getattr(self, name)
            if not (self.warmup_steps <= step < math.inf):
                raise ValueError(
                    f"{name} must be finite and >= warmup_steps ({self.warmup_steps}), got {step}"
                )

    @classmethod
    def constant(cls, r_max: float, d_max: float) -> RenormSchedule:
        """A schedule that does not move: these limits from the first batch on."""
        return cls(warmup_steps=0, r_max=r_max, r_max_step=0, d_max=d_max, d_max_step=0)

    def as_tensor(self, device: torch.device | str | None = None) -> Tensor:
        """The five numbers, float64 [5], in the order of the fields: the layer's `schedule`
        buffer."""
        return torch.tensor(astuple(self), dtype=torch.float64, device=device)

    @classmethod
    def from_tensor(cls, schedule: Tensor) -> RenormSchedule:
        """The inverse of `as_tensor`. Reads the tensor on the host, which waits for its device."""
        if schedule.shape != (5,):
            raise ValueError(f"schedule must have shape (5,), got {tuple(schedule.shape)}")
        values = dict(zip(cls.__dataclass_fields__, schedule.tolist(), strict=True))
        for name in ("warmup_steps", "r_max_step", "d_max_step"):
            if values[name].is_integer():
                values[name] = int(values[name])
        return cls(**values)

    def limits_at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) for the batch that comes after `step` others.

        The mirror, for people and for the reference, of what the kernels compute on the device
        (limits_at in csrc/core/math.h).
        """
        r_max = _ramp(step, self.warmup_steps, self.r_max_step, 1.0, self.r_max)
        d_max = _ramp(step, self.warmup_steps, self.d_max_step, 0.0, self.d_max)
        return r_max, d_max


def _ramp(step: float, start: float, end: float, first: float, last: float) -> float:
    if step >= end:
        return float(last)
    if step <= start:
        return first
    return first + (last - first) * ((step - start) / (end - start))
