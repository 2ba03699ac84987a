"""Batch Renormalization as a function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from . import _ops, checkpoint
from .arguments import HALVES, check_arguments, check_constants, check_flags
from .autograd import (
    Inference,
    RecordedTraining,
    Training,
    TransformableInference,
    TransformableTraining,
    apply_inference,
    apply_recorded_training,
    apply_training,
    wants_gradient,
)
from .clipping import counting
from .repeats import InferenceRepeat, TrainingRepeat, seen_to

_transforms_are_active = torch._C._are_functorch_transforms_active
_is_jit_tracing = torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
_increment_version = torch._C._increment_version
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # a torch.func transform that x has outlived


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
    clipping: Tensor | None = None,
) -> Tensor:
    """Batch Renormalization of each channel of x, over the batch and all spatial positions.

    In training, with the batch's mean and std = sqrt(biased variance + eps)::

        r = clip(std / running_std, 1 / r_max, r_max)                       constants under
        d = clip((mean - running_mean) / running_std, -d_max, d_max)        differentiation
        y = weight * ((x - mean) / std * r + d) + bias
        running_mean += momentum * (mean - running_mean)
        running_std += momentum * (std - running_std)

    and otherwise y = weight * (x - running_mean) / running_std + bias. Source: S. Ioffe, "Batch
    Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NIPS 2017,
    Algorithm 1.

    torch.jit.trace, torch.export and torch.onnx.export record inference as torch's own batch_norm,
    which is the same to rounding and needs no batchrenorm_cuda where it is loaded. A training step
    is recorded by torch.export alone, with its gradient, and needs it.

    Positional arguments are in the order of torch.nn.functional.batch_norm. Statistics have shape
    [C], are float32 (float64 for a float64 x) and on the device of x.

    Args:
        x: [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; float32, float16, bfloat16 or
            float64; any strides.
        running_mean, running_std: moving statistics, in units of x, updated in place in training.
            running_std averages the standard deviation with eps in it. They may not require a
            gradient. Both None: plain Batch Normalization by the batch (training only).
        weight, bias: [C], of the dtype of statistics or half precision. Either may be None.
        training: whether to normalise by the batch and learn from it.
        momentum: weight of this batch in the moving averages, in [0, 1]. None: the cumulative
            average, which is a weight of 1 / (num_batches_tracked + 1).
        eps: added to the variance, in units of x squared, >= 0.
        r_max, d_max: the limits, >= 1 and >= 0, infinity for none. A `schedule` replaces them.
        num_batches_tracked: int64, one element: the batches seen before. Incremented in training.
        schedule: float64 [5], made by RenormSchedule.as_tensor. The limits are then those of step
            num_batches_tracked, found on the device of x: nothing waits for the host.
        skip_nonfinite: leave moving statistics and counter as they are for a batch with a NaN or
            inf anywhere.
        clipping: float64 [9, C], made by clipping.new_counts: counts to which a training step adds
            how often and how far r and d were clipped. Needs num_batches_tracked. Inference adds
            nothing, and nor does a step under torch.func or in forward mode.

    Returns:
        y, of the shape and dtype of x, under autocast too. It is laid out in memory as x is, if x
        is contiguous or channels-last. An empty batch gives an empty y and changes nothing.

    Raises:
        ValueError, TypeError: naming the argument and what it got, before anything has changed. One
            value per channel is refused in training.
    """
    if type(x) is not Tensor and isinstance(x, Proxy):  # torch.fx records it as F.batch_norm
        given = (x, running_mean, running_std, weight, bias, training, momentum, eps, r_max, d_max)
        options = {
            "num_batches_tracked": num_batches_tracked,
            "schedule": schedule,
            "skip_nonfinite": skip_nonfinite,
            "clipping": clipping,
        }
        return x.tracer.create_proxy("call_function", batch_renorm, given, options)
    if training is not True and training is not False:
        check_flags(training=training)
    if running_mean is None and momentum is None:
        momentum = 0.0  # nothing is averaged, so nothing is to be counted
    step = (
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
    return normalise(x, weight, bias, training, step, clipping)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    step: tuple,
    clipping: Tensor | None,
    layer: Tensor | None = None,
) -> Tensor:
    """What :func:`batch_renorm` does, with what the forward operator takes after bias as a tuple.
    `layer`: the moving mean that repetitions by activation checkpointing are recognised by, if
    those in `step` are copies."""
    running_mean, running_std, *_ = step
    if _is_compiling():
        check_arguments(x, weight, bias, training, *step[:8])
        check_constants(running_mean=running_mean, running_std=running_std)
        return _traced(x, _wide(weight, x), _wide(bias, x), training, step, clipping)
    try:
        if running_mean is not None and (running_mean.requires_grad or running_std.requires_grad):
            check_constants(running_mean=running_mean, running_std=running_std)
        # Calls less for what is nearly always so.
        weight_ = weight if weight is None or weight.dtype is torch.float32 else _wide(weight, x)
        bias_ = bias if bias is None or bias.dtype is torch.float32 else _wide(bias, x)
        if _transforms_are_active() or forward_ad._current_level >= 0:
            return _transformed(x, weight_, bias_, training, step)
        x = _unwrap_if_dead(x)
        if not training:
            return _inferred(x, weight_, bias_, step)
        ordinary = clipping is None and running_mean is not None
        if ordinary and not (_is_jit_tracing() or checkpoint.may_repeat()):
            if wants_gradient(x, weight_, bias_):
                # As below, in two calls less: 1.5% of a training step of (4, 8).
                y = apply_training(x, weight_, bias_, step)
                _increment_version(step[:2])
                return y
        return _trained(x, weight_, bias_, step, clipping, layer)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        # Bad arguments are refused below, cheaply and before anything changes; this names the one.
        check_arguments(x, weight, bias, training, *step[:8])
        if training and running_mean is not None and isinstance(error, RuntimeError):
            _increment_version(step[:2])  # they may have moved: autograd refuses after that
        raise


def _wide(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A half-precision weight in the dtype that kernels read, differentiably."""
    if t is None or t.dtype not in HALVES:
        return t
    return t.to(_ops.statistic_dtype(x.dtype))


def _trained(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    step: tuple,
    clipping: Tensor | None = None,
    layer: Tensor | None = None,
) -> Tensor:
    if _is_jit_tracing():
        return _portable(x, weight, bias, True, step)
    if step[0] is not None and checkpoint.may_repeat():
        return _repeatable(x, weight, bias, True, step, clipping, layer)
    return _step(x, weight, bias, step, clipping, None)


def _step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    step: tuple,
    clipping: Tensor | None,
    keep: Callable[[Tensor], None] | None,
) -> Tensor:
    if clipping is not None:
        keep = counting(clipping, step, keep)
    if wants_gradient(x, weight, bias):
        if keep is None:
            y = apply_training(x, weight, bias, step)
        else:
            y = apply_recorded_training(x, weight, bias, step, keep)
    else:
        y, stats = _ops.forward(x, weight, bias, *step)
        if keep is not None:
            keep(stats)
    if step[0] is not None:
        # Autograd's own check that what inference has saved for its backward is still what it was.
        _increment_version(step[:2])
    return y


def _repeatable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    step: tuple,
    clipping: Tensor | None,
    layer: Tensor | None,
) -> Tensor:
    """Where this forward may run again, or is doing so: then it does what it did the first time,
    whatever the layer's mode is by now."""
    running_mean, running_std, _, _, _, eps, *_ = step
    known, keep = checkpoint.repetition(running_mean if layer is None else layer, training)
    with seen_to():
        if known is not None:
            if keep is not None:
                keep(known)
            return known(x, weight, bias)
        if not training:
            if keep is not None:
                keep(InferenceRepeat.by(running_mean, running_std))
            return InferenceRepeat(running_mean, running_std)(x, weight, bias)
        checkpoint.warn_of_new_step()
        if keep is None:
            return _step(x, weight, bias, step, clipping, None)
        return _step(
            x, weight, bias, step, clipping, lambda stats: keep(TrainingRepeat(stats, eps))
        )


def _inferred(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: tuple) -> Tensor:
    running_mean, running_std, _, _, momentum, eps, r_max, d_max, _ = step
    legal = eps >= 0 and r_max >= 1 and d_max >= 0 and (momentum is None or 0 <= momentum <= 1)
    if not legal:  # refused here too, so that it does not wait for the first training step
        check_arguments(x, weight, bias, False, *step[:8])
    if _is_jit_tracing():
        return _portable(x, weight, bias, False, step)
    if checkpoint.may_repeat():
        return _repeatable(x, weight, bias, False, step, None, None)
    if wants_gradient(x, weight, bias):
        return apply_inference(x, weight, bias, running_mean, running_std)
    return _ops.inference(x, weight, bias, running_mean, running_std)


def _transformed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, step: tuple
) -> Tensor:
    """Under torch.func, or with forward-mode tangents."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        # torch gives zeros for the second tangent of any autograd.Function.
        raise NotImplementedError(
            "batch_renorm does not have forward mode inside forward mode (jacfwd of jacfwd): take "
            "jacrev for one of the two"
        )
    if not training:
        return TransformableInference.apply(x, weight, bias, step[0], step[1])
    y = TransformableTraining.apply(x, weight, bias, *step)[0]
    if step[0] is not None:
        _increment_version(step[:2])
    return y


def _traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    step: tuple,
    clipping: Tensor | None,
) -> Tensor:
    """Under torch.compile and torch.export."""
    # Not is_exporting(): under Dynamo torch 2.11 takes that for true whatever it is.
    if torch.compiler._is_exporting_flag:
        if not training or step[0] is None:
            return _portable(x, weight, bias, training, step)
        return _recorded_step(x, weight, bias, step)
    if _transforms_are_active():
        # Dynamo does not trace an autograd.Function with a jvp or a vmap rule, and gives wrong
        # gradients for one without. It runs what raises here in eager mode, unless fullgraph=True.
        raise NotImplementedError(
            "batch_renorm under torch.func does not compile: compile inside the transform, as in "
            "torch.func.grad(torch.compile(f)), or not at all"
        )
    if not training:
        return Inference.apply(x, weight, bias, step[0], step[1])
    if clipping is not None:
        return RecordedTraining.apply(x, weight, bias, step, counting(clipping, step, None))
    if step[0] is not None and not torch.is_grad_enabled():
        # The first run of a reentrant checkpoint is without gradients, and to be written down.
        return _recorded_step(x, weight, bias, step)
    return Training.apply(x, weight, bias, step)


def _recorded_step(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: tuple) -> Tensor:
    """By an operator that changes nothing: the program writes its results back."""
    y, *moved = _training_step(x, weight, bias, *step)
    for t, after in zip(step[:3], moved, strict=True):
        if t is not None:
            t.copy_(after)
    return y


def _portable(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, step: tuple
) -> Tensor:
    """What leaves this process, in a trace or an exported program, is torch's own batch_norm: it
    needs no batchrenorm_cuda where it is loaded, and tools that export, fuse or quantise find the
    operator that they look for."""
    running_mean, running_std, _, _, _, eps, *_ = step
    no_eps = torch.finfo(torch.float32).tiny  # F.batch_norm wants a positive one
    if running_mean is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps or no_eps)
    if training:
        onnx = "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()
        recorder = "torch.onnx.export" if onnx else "torch.jit.trace"
        raise RuntimeError(_ops.NOT_IN_TRAINING.format(recorder))
    variance = running_std.square()  # with eps in it
    return F.batch_norm(x, running_mean, variance, weight, bias, False, 0.0, no_eps)


# What torch.export records of a training step: the forward operator with its gradient, so that an
# exported model can be trained. And what torch.compile runs without gradients. It returns the new
# running_mean, running_std and num_batches_tracked (empty for None) and changes nothing: torch
# wraps an operator that does, in a decomposed program, into one that it compiles without gradients.
# Not what everyone calls, as a kernel in Python costs 10 us.
_library = torch.library.Library("batchrenorm", "FRAGMENT")
_library.define(
    "training_step(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_std, Tensor? num_batches_tracked, Tensor? schedule, float? momentum, "
    "float eps, float r_max, float d_max, bool skip_nonfinite) -> (Tensor, Tensor, Tensor, Tensor)"
)
_training_step = torch.ops.batchrenorm.training_step.default
_Stepped = tuple[Tensor, Tensor, Tensor, Tensor]


def _on_copies(step: tuple, run: Callable[[tuple], Tensor]) -> _Stepped:
    mean, std, counter = (None if t is None else t.detach().clone() for t in step[:3])
    y = run((mean, std, counter, *step[3:]))
    return y, mean, std, y.new_empty(0, dtype=torch.int64) if counter is None else counter


def _trained_on_copies(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, step: tuple
) -> _Stepped:
    layer = step[0]
    return _on_copies(step, lambda step: _trained(x, weight, bias, step, layer=layer))


@torch.library.impl(_library, "training_step", "CompositeExplicitAutograd")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, *step: Any) -> _Stepped:
    if type(x) is Tensor:
        return _trained_on_copies(x, weight, bias, step)
    checkpoint.check_traced(_training_step, x, weight, bias, *step)
    return _on_copies(step, lambda step: _ops.forward(x, weight, bias, *step)[0])


@torch.library.impl(_library, "training_step", "Autograd")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, *step: Any) -> _Stepped:
    if type(x) is Tensor:
        return _trained_on_copies(x, weight, bias, step)
    if wants_gradient(x, weight, bias):  # traced, by AOTAutograd
        return _on_copies(step, lambda step: Training.apply(x, weight, bias, step))
    with torch._C._AutoDispatchBelowAutograd():
        return _training_step(x, weight, bias, *step)
