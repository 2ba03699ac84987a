"""The registered operators, torch.ops.batchrenorm.*, and what they return when nothing is computed.

csrc/binding/schema.cpp declares them. A fake kernel says the shapes, dtypes and strides of the
outputs, for torch.compile, torch.export and meta tensors; it must agree with csrc/binding, and
torch.library.opcheck holds the two together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import Tensor

try:
    from . import _C  # noqa: F401  registers the operators
except ImportError as error:
    _package = Path(__file__).parent
    if (_package.parent / "setup.py").is_file() and not any(_package.glob("_C.*.so")):
        raise ImportError(
            f"batchrenorm_cuda is imported from its source tree, {_package.parent}, where it has "
            "not been built. Build it there, pip install --no-build-isolation -e ., or, if it is "
            "installed, run from another directory"
        ) from error
    raise ImportError(
        f"the compiled part of batchrenorm_cuda does not load ({error}). Build it in the source "
        "tree, where the torch that it is to run with is installed: "
        "pip install --no-build-isolation ."
    ) from error

from . import checkpoint

forward = torch.ops.batchrenorm.forward.default
backward = torch.ops.batchrenorm.backward.default
renormalize = torch.ops.batchrenorm.renormalize.default
inference = torch.ops.batchrenorm.inference.default
inference_backward = torch.ops.batchrenorm.inference_backward.default
moments = torch.ops.batchrenorm.moments.default
merge = torch.ops.batchrenorm.merge.default
backward_sums = torch.ops.batchrenorm.backward_sums.default
backward_project = torch.ops.batchrenorm.backward_project.default

# What a repetition calls in place of forward. Selective checkpointing has not seen it the first
# time and would refuse it.
torch.utils.checkpoint.SAC_IGNORED_OPS.add(renormalize)

NOT_IN_TRAINING = (
    "a training step of a BatchRenorm layer cannot be recorded by {}: call model.eval() first"
)
STAT_ROWS = 5  # centre, mean - centre, 1 / std, r, d


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics, weight and bias beside an x of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor, order: Iterable[int]) -> bool:
    """Whether x lies in memory without gaps, dimensions from slowest to fastest as in `order`."""
    expected = 1
    for dim in reversed(list(order)):
        if x.size(dim) != 1:
            if x.stride(dim) != expected:
                return False
            expected = expected * x.size(dim)
    return True


def empty_as_formatted(x: Tensor) -> Tensor:
    """An uninitialised tensor in the format that kernels read x in: its own if it is dense as
    [N][C][S] or as [N*S][C], else the one of the two that is nearer. Dimensions of size 1 have no
    say."""
    channels_last = [0, *range(2, x.dim()), 1]
    if x.numel() == 0 or _is_dense(x, range(x.dim())) or _is_dense(x, channels_last):
        return torch.empty_like(x)
    if x.dim() == 2 or x.stride(1) != 1:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    return x.new_empty([x.size(dim) for dim in channels_last]).permute(inverse)


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """One meta tensor among real ones is enough to land here."""
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"tensors must be on the device of x, {x.device}, got {t.device}")


@torch.library.register_fake("batchrenorm::forward")
def _(
    x,
    weight,
    bias,
    running_mean,
    running_std,
    num_batches_tracked,
    schedule,
    momentum,
    eps,
    r_max,
    d_max,
    skip_nonfinite,
):
    _check_devices(x, weight, bias, running_mean, running_std, num_batches_tracked, schedule)
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise RuntimeError(NOT_IN_TRAINING.format("torch.onnx.export"))
    if running_mean is not None:
        checkpoint.save_when_traced()
        checkpoint.check_traced(
            forward,
            x,
            weight,
            bias,
            running_mean,
            running_std,
            num_batches_tracked,
            schedule,
            momentum,
            eps,
            r_max,
            d_max,
            skip_nonfinite,
        )
    stats = x.new_empty((STAT_ROWS, x.size(1)), dtype=statistic_dtype(x.dtype))
    return empty_as_formatted(x), stats


@torch.library.register_fake("batchrenorm::backward")
def _(dy, x, weight, stats):
    _check_devices(x, dy, weight, stats)
    dweight = x.new_empty((x.size(1),), dtype=statistic_dtype(x.dtype))
    return empty_as_formatted(x), dweight, torch.empty_like(dweight)


@torch.library.register_fake("batchrenorm::renormalize")
def _(x, weight, bias, stats):
    _check_devices(x, weight, bias, stats)
    return empty_as_formatted(x)


@torch.library.register_fake("batchrenorm::inference")
def _(x, weight, bias, running_mean, running_std):
    _check_devices(x, weight, bias, running_mean, running_std)
    return empty_as_formatted(x)


@torch.library.register_fake("batchrenorm::inference_backward")
def _(dy, x, weight, running_mean, running_std):
    _check_devices(x, dy, weight, running_mean, running_std)
    dweight = x.new_empty((x.size(1),), dtype=statistic_dtype(x.dtype))
    return empty_as_formatted(x), dweight, torch.empty_like(dweight)


@torch.library.register_fake("batchrenorm::moments")
def _(x, backward):
    return x.new_empty((2 * x.size(1) + 2,), dtype=torch.float64)


@torch.library.register_fake("batchrenorm::merge")
def _(gathered, dtype, running_mean, running_std, num_batches_tracked, schedule, *numbers):
    _check_devices(gathered, running_mean, running_std, num_batches_tracked, schedule)
    channels = gathered.size(1) // 2 - 1
    stats = gathered.new_empty((STAT_ROWS, channels), dtype=statistic_dtype(dtype))
    return stats, gathered.new_empty((2,))


@torch.library.register_fake("batchrenorm::backward_sums")
def _(dy, x, stats):
    _check_devices(x, dy, stats)
    dweight = x.new_empty((x.size(1),), dtype=statistic_dtype(x.dtype))
    sums = x.new_empty((2, x.size(1)), dtype=torch.float64)
    return sums, dweight, torch.empty_like(dweight)


@torch.library.register_fake("batchrenorm::backward_project")
def _(dy, x, weight, stats, sums, total):
    _check_devices(x, dy, weight, stats, sums, total)
    return empty_as_formatted(x)
