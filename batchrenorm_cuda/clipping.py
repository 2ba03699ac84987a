"""How often and how far r and d leave their limits: one layer's counts, kept on its device.

The counts are a float64 tensor [9, C], a row for each of ROWS, to which every training step adds.
Two operators do it: one takes down the moving statistics that a step finds, one compares them after
it with what the step has computed. Operators, because selective activation checkpointing numbers
the calls of each of torch's, and a repetition makes none for the counts; and because torch.compile
may not recompute them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor

SUMS = ("steps", "r_clipped", "d_clipped", "log_r", "d", "log_r_excess", "d_excess")
LARGEST = ("log_r_largest", "d_largest")
ROWS = len(SUMS) + len(LARGEST)

# What rounding may put between r as computed and as recomputed here, in units of what is rounded.
_ROUNDING = 1e-6

_library = torch.library.Library("batchrenorm", "FRAGMENT")
_library.define(
    "before_step(Tensor running_mean, Tensor running_std, Tensor num_batches_tracked) -> Tensor"
)
_library.define(
    "count_clipping(Tensor(a!) counts, Tensor stats, Tensor before, Tensor num_batches_tracked) "
    "-> ()"
)


@torch.library.impl(_library, "before_step", "CompositeExplicitAutograd")
def _before_step(running_mean: Tensor, running_std: Tensor, num_batches_tracked: Tensor) -> Tensor:
    """float64 [2 C + 1]."""
    parts = running_mean, running_std, num_batches_tracked.reshape(1)
    return torch.cat([t.detach().double() for t in parts])


@torch.library.impl(_library, "count_clipping", "CompositeExplicitAutograd")
def _count_clipping(
    counts: Tensor, stats: Tensor, before: Tensor, num_batches_tracked: Tensor
) -> None:
    channels = stats.size(1)
    mean, std, steps = before.split([channels, channels, 1])
    centre, residue, inv_std, r, d = stats.detach().double()
    shift = centre - mean
    log_r = (inv_std * std).log().abs()
    wanted_d = ((shift + residue) / std).abs()
    log_r_excess = log_r - r.log().abs()
    d_excess = wanted_d - d.abs()
    r_clipped = log_r_excess > _ROUNDING
    d_clipped = d_excess > _ROUNDING * (1 + shift.abs() / std)
    rows = torch.stack(
        [
            torch.ones_like(r),
            r_clipped.double(),
            d_clipped.double(),
            log_r,
            wanted_d,
            torch.where(r_clipped, log_r_excess, 0),
            torch.where(d_clipped, d_excess, 0),
            log_r,
            wanted_d,
        ]
    )
    # A step that was not counted, skipped or empty, is not counted here. Neither is a channel that
    # says nothing: with a NaN, or constant without eps.
    counted = (num_batches_tracked > steps) & log_r.isfinite()
    rows = torch.where(counted, rows, 0)
    sums, largest = counts.split([len(SUMS), len(LARGEST)])
    sums.add_(rows[: len(SUMS)])
    largest.copy_(torch.maximum(largest, rows[len(SUMS) :]))


@torch.library.register_fake("batchrenorm::before_step", lib=_library)
def _(running_mean, running_std, num_batches_tracked):
    return running_mean.new_empty((2 * running_mean.size(0) + 1,), dtype=torch.float64)


@torch.library.register_fake("batchrenorm::count_clipping", lib=_library)
def _(counts, stats, before, num_batches_tracked):
    return None


before_step = torch.ops.batchrenorm.before_step.default
count_clipping = torch.ops.batchrenorm.count_clipping.default
torch.utils.checkpoint.SAC_IGNORED_OPS.update((before_step, count_clipping))


def new_counts(channels: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # which would make a tensor that training cannot add to
        return torch.zeros(ROWS, channels, dtype=torch.float64, device=device)


def counting(
    counts: Tensor, step: tuple, keep: Callable[[Tensor], None] | None
) -> Callable[[Tensor], None]:
    """Called before a step: what is to be called with its stats. `keep` is called, too."""
    running_mean, running_std, num_batches_tracked, *_ = step
    if running_mean is None or num_batches_tracked is None:
        missing = "running_mean" if running_mean is None else "num_batches_tracked"
        raise ValueError(f"{missing} must be given with clipping, got None")
    if not isinstance(counts, Tensor):
        raise TypeError(f"clipping must be a Tensor, got {type(counts).__name__}")
    if counts.shape != (ROWS, running_mean.numel()) or counts.dtype != torch.float64:
        raise ValueError(
            f"clipping must be float64 of shape ({ROWS}, {running_mean.numel()}), got "
            f"{counts.dtype} of {tuple(counts.shape)}"
        )
    if counts.layout != torch.strided or counts.requires_grad:
        got = "one that requires a gradient" if counts.requires_grad else counts.layout
        raise ValueError(f"clipping must be a dense tensor without a gradient, got {got}")
    if not torch.compiler.is_compiling():
        if counts.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError("clipping must not be an inference tensor, which cannot be added to")
        if any(s == 0 and counts.size(i) > 1 for i, s in enumerate(counts.stride())):
            raise ValueError(
                f"clipping must have a place for each count, got strides {counts.stride()}"
            )
    if counts.device != running_mean.device:
        raise ValueError(
            f"clipping must be on the device of running_mean, {running_mean.device}, got "
            f"{counts.device}"
        )
    before = before_step(running_mean, running_std, num_batches_tracked)

    def count(stats: Tensor) -> None:
        count_clipping(counts, stats, before, num_batches_tracked)
        if keep is not None:
            keep(stats)

    return count


@dataclass(frozen=True)
class Clipping:
    """What was clipped in one layer, over all channels and counted training steps.

    r and d are meant as they were before clipping: r = std / running_std and d = (mean -
    running_mean) / running_std. r corrects both ways, so its size is |log r|, to be compared with
    log(r_max). All are NaN without a step.
    """

    steps: int
    """Training batches counted. Those that skip_nonfinite skips, empty ones and repetitions by
    activation checkpointing are not."""
    r_clipped: float
    """Fraction of (channel, step) pairs in which r was outside 1 / r_max ... r_max."""
    d_clipped: float
    """Fraction of (channel, step) pairs in which d was outside -d_max ... d_max."""
    log_r: float
    """Mean of |log r|."""
    d: float
    """Mean of |d|, in units of the moving standard deviation."""
    log_r_excess: float
    """Mean of what |log r| was more than log(r_max), 0 where it was not."""
    d_excess: float
    """Mean of what |d| was more than d_max, 0 where it was not."""
    log_r_largest: float
    d_largest: float

    @classmethod
    def of(cls, counts: Tensor) -> Clipping:
        """Reads the counts of a layer, which waits for its device."""
        sums, largest = counts.split([len(SUMS), len(LARGEST)])
        totals = torch.cat([sums[:1].amax(1), sums.sum(1), largest.amax(1)]).tolist()
        steps, pairs, values = totals[0], totals[1], totals[2:]
        means = [value / pairs if pairs else math.nan for value in values[: len(SUMS) - 1]]
        extremes = [value if pairs else math.nan for value in values[len(SUMS) - 1 :]]
        return cls(int(steps), *means, *extremes)
