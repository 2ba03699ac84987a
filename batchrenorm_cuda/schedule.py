"""How the limits r_max and d_max move during training."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .arguments import require_float

_STEPS = ("warmup_steps", "r_max_step", "d_max_step")

# What stands for an infinite limit in the buffer. No r or d in float32 is beyond it; but an average
# of infinities, as torch's AveragedModel makes of buffers, is inf - inf.
_NO_LIMIT = torch.finfo(torch.float32).max


@dataclass(frozen=True, repr=False)
class RenormSchedule:
    """Limits of r and d as a function of the number of batches seen so far.

    Until `warmup_steps` the layer is plain Batch Normalization (r = 1, d = 0). From there r_max
    grows in a straight line from 1 to `r_max` at `r_max_step`, and d_max from 0 to `d_max` at
    `d_max_step`. The defaults are the paper's (Ioffe 2017, section 4.1).

    An end that equals `warmup_steps` makes a jump there. A limit may be infinite: no limit, from
    the first step after the warm-up on. With both, `RenormSchedule(5000, math.inf, 5000, math.inf,
    5000)` turns unlimited renormalization on at once.

    With gradient accumulation a layer sees several batches, the microbatches, for each step of the
    optimiser. `steps_per_update` says how many, and all other numbers then count the steps of the
    optimiser. Limits go on moving in a straight line from one microbatch to the next. A layer's
    momentum is still the weight of a microbatch.

    Args:
        warmup_steps: batches of plain Batch Normalization, >= 0.
        r_max: last limit of the scale correction, 1/r_max <= r <= r_max, >= 1. 1 turns the
            correction off.
        r_max_step: number of batches after which r_max is reached, >= warmup_steps.
        d_max: last limit of the shift correction, |d| <= d_max in units of the moving standard
            deviation, >= 0. 0 turns the correction off.
        d_max_step: number of batches after which d_max is reached, >= warmup_steps.
        steps_per_update: batches that the layer sees for one of those counted above, a whole number
            >= 1. To change it in mid-training see :func:`batchrenorm_cuda.set_steps_per_update`.

    Raises:
        ValueError: for a number outside its range, naming it.
        TypeError: for something that is not a number.
    """

    warmup_steps: float = 5000
    r_max: float = 3.0
    r_max_step: float = 40000
    d_max: float = 5.0
    d_max_step: float = 25000
    steps_per_update: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            # numpy's numbers overflow, and do not read well.
            plain = int(value) if isinstance(value, Integral) else float(value)
            require_float(plain, name)
            object.__setattr__(self, name, plain)
        if not (0 <= self.warmup_steps < math.inf):
            raise ValueError(f"warmup_steps must be finite and >= 0, got {self.warmup_steps}")
        if not self.r_max >= 1:
            raise ValueError(f"r_max must be >= 1, got {self.r_max}")
        if not self.d_max >= 0:
            raise ValueError(f"d_max must be >= 0, got {self.d_max}")
        require_steps_per_update(self.steps_per_update)
        for name in ("r_max_step", "d_max_step"):
            step = getattr(self, name)
            if not (self.warmup_steps <= step < math.inf):
                raise ValueError(
                    f"{name} must be finite and >= warmup_steps ({self.warmup_steps}), got {step}"
                )
            require_float(int(step) * self.steps_per_update, f"{name} * steps_per_update")

    @classmethod
    def constant(cls, r_max: float, d_max: float) -> RenormSchedule:
        """A schedule that does not move: these limits from the first batch on."""
        return cls(warmup_steps=0, r_max=r_max, r_max_step=0, d_max=d_max, d_max_step=0)

    def __repr__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.steps_per_update == 1:
            del shown["steps_per_update"]
        return f"RenormSchedule({', '.join(f'{name}={v!r}' for name, v in shown.items())})"

    def as_tensor(self, device: torch.device | str | None = None) -> Tensor:
        """The layer's `schedule` buffer, float64 [5]: the first five fields, in their order.

        Steps are in batches, that is, multiplied by steps_per_update. An infinite limit is the
        largest float32, which kernels do not reach either. Without a device it is on torch's
        default one.
        """
        per = self.steps_per_update
        numbers = (
            self.warmup_steps * per,
            min(self.r_max, _NO_LIMIT),
            self.r_max_step * per,
            min(self.d_max, _NO_LIMIT),
            self.d_max_step * per,
        )
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    @classmethod
    def from_tensor(cls, schedule: Tensor, steps_per_update: int = 1) -> RenormSchedule:
        """The inverse of `as_tensor`. Reads the tensor on the host, which waits for its device.

        The tensor does not say what part steps_per_update had in its numbers. Without it, the
        schedule found is the same in batches.
        """
        if not isinstance(schedule, Tensor):
            raise TypeError(f"schedule must be a Tensor, got {type(schedule).__name__}")
        if schedule.shape != (5,):
            raise ValueError(f"schedule must have shape (5,), got {tuple(schedule.shape)}")
        require_steps_per_update(steps_per_update)
        names = [field.name for field in fields(cls)][:5]
        values = dict(zip(names, schedule.tolist(), strict=True))
        for name in _STEPS:
            values[name] /= steps_per_update
            if values[name].is_integer():
                values[name] = int(values[name])
        for name in ("r_max", "d_max"):
            if values[name] >= _NO_LIMIT:
                values[name] = math.inf
        # An average of ones, such as AveragedModel makes of buffers, may be a little less than one.
        if 1 - 1e-6 < values["r_max"] < 1:
            values["r_max"] = 1.0
        return cls(**values, steps_per_update=steps_per_update)

    def recognised_in(self, schedule: Tensor, otherwise: int = 1) -> RenormSchedule:
        """from_tensor, for a layer that has this schedule: if the tensor has the steps of this one
        with another steps_per_update, the schedule found says which; otherwise it is `otherwise`.
        """
        found = RenormSchedule.from_tensor(schedule)
        tried = {self.steps_per_update}
        tried |= {getattr(found, n) / getattr(self, n) for n in _STEPS if getattr(self, n) > 0}
        alike = replace(self, r_max=found.r_max, d_max=found.d_max)
        for per in tried:
            if per == int(per) >= 1:
                try:
                    same = replace(alike, steps_per_update=int(per))
                except ValueError:  # so many that no float holds the steps
                    continue
                if torch.equal(same.as_tensor("cpu"), found.as_tensor("cpu")):
                    return same
        return RenormSchedule.from_tensor(schedule, otherwise)

    def limits_at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) for the batch that comes after `step` others, microbatches included.

        The mirror, for people and for the reference, of what the kernels compute on the device
        (limits_at in csrc/core/math.h).
        """
        start, r_end, d_end = (getattr(self, name) * self.steps_per_update for name in _STEPS)
        r_max = _ramp(step, start, r_end, 1.0, self.r_max)
        d_max = _ramp(step, start, d_end, 0.0, self.d_max)
        return r_max, d_max


def require_steps_per_update(value: Any, name: str = "steps_per_update") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    require_float(value, name)


def batches_seen(counter: Tensor | None, layer: str = "") -> int:
    """A layer's num_batches_tracked as a number, which waits for its device; 0 if it has none or
    one without a value. Errors name the layer."""
    if counter is None or counter.is_meta:
        return 0
    where = f"{layer}." if layer else ""
    if counter.numel() != 1:
        raise ValueError(
            f"{where}num_batches_tracked must be one number, got shape {tuple(counter.shape)}"
        )
    if not (math.isfinite(counter) and counter >= 0):
        raise ValueError(
            f"{where}num_batches_tracked must be finite and >= 0, got {counter.item()}"
        )
    return int(counter)


def later(schedule: RenormSchedule, batches: int) -> RenormSchedule:
    """The schedule with its start moved to where a layer has seen so many batches."""
    per = schedule.steps_per_update
    steps = batches / per if batches % per else batches // per
    return replace(schedule, **{name: getattr(schedule, name) + steps for name in _STEPS})


def _ramp(step: float, start: float, end: float, first: float, last: float) -> float:
    if step >= end:
        return float(last)
    if step <= start:
        return first
    return first + (last - first) * ((step - start) / (end - start))
