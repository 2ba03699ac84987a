"""The operators as torch.autograd.Functions.

Functions, because torch.library.register_autograd refuses operators that mutate. Two of a kind:
`Training` and `Inference` in the plain style, which costs half as much per call in eager mode, and
which torch.compile can trace; `TransformableTraining` and `TransformableInference` for torch.func
and forward mode, which need setup_context, a vmap rule and a jvp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _ops
from .derivatives import BatchStatistics, Derivatives, MovingStatistics

Gradients = tuple[Tensor | None, ...]

_is_grad_enabled = torch.is_grad_enabled
_transforms_are_active = torch._C._are_functorch_transforms_active
_backward = _ops.backward
_ALL_THREE = (True, True, True, False)


def wants_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if not _is_grad_enabled():
        return False
    if not (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return False
    # Which autograd would find when statistics have moved.
    if x.is_inference() or (weight is not None and weight.is_inference()):
        name = "x" if x.is_inference() else "weight"
        raise ValueError(
            f"{name} must be kept for the backward pass, and an inference tensor cannot be: "
            f"call {name}.clone() outside of torch.inference_mode()"
        )
    return True


def _needed(ctx: Any, gradients: Gradients) -> Gradients:
    """Gradients of the first inputs, None for those that nobody asked for and for the inputs after
    them."""
    need = ctx.needs_input_grad
    found = [g if n else None for g, n in zip(gradients, need, strict=False)]
    return (*found, *[None] * (len(need) - len(found)))


def _is_differentiated() -> bool:
    """Whether a backward pass is: by create_graph=True, or in forward mode."""
    return _is_grad_enabled() or forward_ad._current_level >= 0 or _transforms_are_active()


def _drops_graphs(dy: Tensor) -> bool:
    """Whether dy is a batch of the vmap under is_grads_batched=True and torch.autograd.functional's
    vectorize=True. It runs the forward of a Function alone, and what that gives has no graph."""
    return (
        _is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.is_legacy_batchedtensor(dy)
    )


def _training_gradients(ctx: Any, dy: Tensor) -> Gradients:
    """Of x, weight and bias, and None for what comes after them."""
    x, weight, stats = ctx.saved_tensors
    # _is_differentiated() and _needed() in line, for the case that nearly all are: code and objects
    # come out of the L3 when a layer's data have been through the L2. A backward pass of (4, 8)
    # takes 140 us then, 145 by calling them, nn.BatchNorm1d 138 (Emerald Rapids).
    if _is_grad_enabled() or forward_ad._current_level >= 0 or _transforms_are_active():
        if _drops_graphs(dy):
            at = Derivatives(BatchStatistics(x, ctx.eps), weight, stats[3], stats[4])
            gradients = at.gradients(dy)
        else:
            gradients = TrainingBackward.apply(dy, x, weight, stats, ctx.eps)
    else:
        gradients = _backward(dy, x, weight, stats)
    need = ctx.needs_input_grad
    if need == _ALL_THREE:
        return *gradients, None
    dx, dweight, dbias = gradients
    return dx if need[0] else None, dweight if need[1] else None, dbias if need[2] else None, None


def _entered_at_backward(function: type[Function]) -> type[Function]:
    """Has its node call backward. Else it calls a wrapper in Python, which finds out anew each time
    whether backward or vjp is there to be called: 4 us of the 33 of a backward pass of
    (4, 8), nn.BatchNorm1d 26 (AMD EPYC, Zen 3)."""
    node = getattr(function, "_backward_cls", None)  # torch's own name for it, and not documented
    if node is not None:
        node.apply = function.backward
    return function


@_entered_at_backward
class Training(Function):
    """A training step.

    `step` is what the forward operator takes after weight and bias, as a tuple: autograd then looks
    at four arguments instead of twelve.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        step: tuple[Any, ...],
    ) -> Tensor:
        y, stats = _ops.forward(x, weight, bias, *step)
        ctx.save_for_backward(x, weight, stats)
        ctx.eps = step[5]
        return y

    backward = staticmethod(_training_gradients)


@_entered_at_backward
class RecordedTraining(Function):
    """A training step whose stats `keep` is called with, before anything is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        step: tuple[Any, ...],
        keep: Callable[[Tensor], None],
    ) -> Tensor:
        y, stats = _ops.forward(x, weight, bias, *step)
        keep(stats)
        ctx.save_for_backward(x, weight, stats)
        ctx.eps = step[5]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return *_training_gradients(ctx, dy), None


@_entered_at_backward
class RepeatedTraining(Function):
    """A training step with the stats of an earlier one: statistics are not taken again, and nothing
    moves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, stats)
        ctx.eps = eps
        return _ops.renormalize(x, weight, bias, stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return *_training_gradients(ctx, dy), None


@_entered_at_backward
class Inference(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_std: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, running_mean, running_std)
        return _ops.inference(x, weight, bias, running_mean, running_std)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        if _is_differentiated():
            if _drops_graphs(dy):
                dx, dweight, dbias = _inference_derivatives(*ctx.saved_tensors).gradients(dy)
            else:
                dx, dweight, dbias = InferenceBackward.apply(dy, *ctx.saved_tensors)
        else:
            dx, dweight, dbias = _ops.inference_backward(dy, *ctx.saved_tensors)
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


# Function.apply without its wrapper in Python, which costs 4 us to look for torch.func transforms:
# for callers that have made sure that there are none.
apply_training = super(Function, Training).apply
apply_recorded_training = super(Function, RecordedTraining).apply
apply_repeated_training = super(Function, RepeatedTraining).apply
apply_inference = super(Function, Inference).apply


def _one_by_one(function: type[Function], info: Any, in_dims: tuple, args: tuple) -> tuple:
    """A vmap rule: every member of the ensemble by itself. Its results are bitwise those of the
    member alone, and what is updated in place is updated through a view of the stack."""
    members = [
        function.apply(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    if isinstance(members[0], Tensor):
        return torch.stack(members), 0
    return tuple(torch.stack(t) for t in zip(*members, strict=True)), (0,) * len(members[0])


_UPDATED = {3: "running_mean", 4: "running_std", 5: "num_batches_tracked"}


class TransformableTraining(Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_std: Tensor | None,
        num_batches_tracked: Tensor | None,
        schedule: Tensor | None,
        momentum: float | None,
        eps: float,
        r_max: float,
        d_max: float,
        skip_nonfinite: bool,
    ) -> tuple[Tensor, Tensor]:
        return _ops.forward(
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, *_ = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, weight, stats)
        ctx.save_for_forward(x, weight, stats)
        ctx.eps = inputs[8]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstats: Tensor) -> Gradients:
        gradients = TrainingBackward.apply(dy, *ctx.saved_tensors, ctx.eps)
        return _needed(ctx, gradients)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, tweight: Tensor, tbias: Tensor, *_: Any) -> tuple[Tensor, None]:
        x, weight, stats = ctx.saved_tensors
        at = Derivatives(BatchStatistics(x, ctx.eps), weight, stats[3], stats[4])
        return at.tangent_of_y(tx, tweight, tbias).to(x.dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        for index, name in _UPDATED.items():
            if args[index] is not None and in_dims[index] is None:
                raise ValueError(
                    f"{name} must be vmapped like the inputs, got one for all {info.batch_size} of "
                    "them: it is updated in place. Stack one for each, as "
                    "torch.func.stack_module_state does, or normalise with training=False"
                )
        return _one_by_one(TransformableTraining, info, in_dims, args)


class TransformableInference(Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_std: Tensor,
    ) -> Tensor:
        return _ops.inference(x, weight, bias, running_mean, running_std)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, running_mean, running_std = inputs
        ctx.save_for_backward(x, weight, running_mean, running_std)
        ctx.save_for_forward(x, weight, running_mean, running_std)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return _needed(ctx, InferenceBackward.apply(dy, *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, tweight: Tensor, tbias: Tensor, *_: Any) -> Tensor:
        x, weight, running_mean, running_std = ctx.saved_tensors
        at = _inference_derivatives(x, weight, running_mean, running_std)
        return at.tangent_of_y(tx, tweight, tbias).to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _one_by_one(TransformableInference, info, in_dims, args)


class TrainingBackward(Function):
    """The backward operator, itself differentiable."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.backward(dy, x, weight, stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.eps = inputs[4]

    @staticmethod
    def _at(ctx: Any) -> tuple[Tensor, Derivatives]:
        dy, x, weight, stats = ctx.saved_tensors
        return dy, Derivatives(BatchStatistics(x, ctx.eps), weight, stats[3], stats[4])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        dy, at = TrainingBackward._at(ctx)
        return _needed(ctx, at.gradients_of_backward(dy, *cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        dy, at = TrainingBackward._at(ctx)
        return at.tangents_of_backward(dy, *tangents[:3])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _one_by_one(TrainingBackward, info, in_dims, args)


class InferenceBackward(Function):
    """The backward operator of inference, itself differentiable."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor, running_std: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.inference_backward(dy, x, weight, running_mean, running_std)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        dy, *rest = ctx.saved_tensors
        return _needed(ctx, _inference_derivatives(*rest).gradients_of_backward(dy, *cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        dy, *rest = ctx.saved_tensors
        return _inference_derivatives(*rest).tangents_of_backward(dy, *tangents[:3])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _one_by_one(InferenceBackward, info, in_dims, args)


def _inference_derivatives(
    x: Tensor, weight: Tensor | None, running_mean: Tensor, running_std: Tensor
) -> Derivatives:
    at = MovingStatistics(x, running_mean, running_std)
    return Derivatives(at, weight, torch.ones_like(running_std), torch.zeros_like(running_std))
