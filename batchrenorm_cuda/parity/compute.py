"""One case computed three ways: by the compiled operators, in float64 as the truth, and by plain
PyTorch as the peer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from batchrenorm_cuda import functional, modules, reference
from batchrenorm_cuda.schedule import RenormSchedule

from .cases import Case
from .tensors import Tensors, column, limits_at, momentum_at, statistic_dtype

# Results by name: y, dx, dweight, dbias, running_mean, running_std. One that the case does not have
# is missing.
Results = dict[str, Tensor]

_NO_EPS = 1e-30  # F.batch_norm refuses 0; this much added to a variance changes no bit of it


def _leaf(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()


def _backward(
    y: Tensor, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Results:
    inputs = {"dx": x, "dweight": weight, "dbias": bias}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    return {
        "y": y.detach(),
        **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True)),
    }


def _with_state(
    results: Results, running_mean: Tensor | None, running_std: Tensor | None
) -> Results:
    if running_mean is not None:
        results |= {
            "running_mean": running_mean.detach().clone(),
            "running_std": running_std.detach().clone(),
        }
    return results


def make_module(case: Case, t: Tensors) -> modules.BatchRenorm1d:
    """The layer in the state that the case starts from."""
    layer = {2: "BatchRenorm1d", 3: "BatchRenorm1d", 4: "BatchRenorm2d", 5: "BatchRenorm3d"}[
        t.x.dim()
    ]
    constant = RenormSchedule.constant(*case.limits)
    module = getattr(modules, layer)(
        t.x.size(1),
        eps=case.eps,
        momentum=case.momentum,
        affine=case.weight,
        bias=case.bias,
        track_running_stats=t.running_mean is not None,
        schedule=constant if case.schedule is None else RenormSchedule(*case.schedule),
        device=t.x.device,
        dtype=statistic_dtype(t.x.dtype),
    ).train(case.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_std"):
            if getattr(t, name) is not None:
                getattr(module, name).copy_(getattr(t, name))
        if t.running_mean is not None:
            module.num_batches_tracked.fill_(case.step)
    return module


def by_op(case: Case, t: Tensors) -> tuple[Results, int | None]:
    """What is under test, through the public interface. Second, the step counter afterwards, where
    there is one."""
    x = t.x.detach().requires_grad_()
    if case.through_module:
        module = make_module(case, t)
        results = _backward(module(x), t.dy, x, module.weight, module.bias)
        _with_state(results, module.running_mean, module.running_std)
        return results, None if t.running_mean is None else int(module.num_batches_tracked)
    weight, bias = _leaf(t.weight), _leaf(t.bias)
    mean, std = (None if s is None else s.clone() for s in (t.running_mean, t.running_std))
    r_max, d_max = case.limits
    y = functional.batch_renorm(
        x, mean, std, weight, bias, case.training, case.momentum, case.eps, r_max, d_max
    )
    return _with_state(_backward(y, t.dy, x, weight, bias), mean, std), None


def _by_reference(case: Case, t: Tensors, dtype: torch.dtype, shift: Tensor) -> Results:
    """The specification in `dtype`, on x - shift and running_mean - shift, where shift is [C]."""
    x = (t.x.detach().to(dtype) - column(shift, t.x)).requires_grad_()
    weight, bias = _leaf(t.weight, dtype), _leaf(t.bias, dtype)
    running_mean = None if t.running_mean is None else t.running_mean.to(dtype) - shift
    running_std = None if t.running_std is None else t.running_std.to(dtype, copy=True)
    before = None if running_mean is None else running_mean.clone()
    training = case.training or running_mean is None
    y = reference.batch_renorm(
        x,
        running_mean,
        running_std,
        weight,
        bias,
        training,
        momentum_at(case),
        case.eps,
        *limits_at(case),
    )
    results = _backward(y, t.dy.to(dtype), x, weight, bias)
    if (
        running_mean is not None
    ):  # moved back by its change alone: adding the shift again would round it away
        running_mean = t.running_mean.to(dtype) + (running_mean - before)
    return _with_state(results, running_mean, running_std)


def by_float64(case: Case, t: Tensors) -> Results:
    """The truth: the reference in float64.

    Batch Renormalization does not change when x and the moving mean are moved together, so each
    channel is moved to near zero first, which is exact: the truth is then far better than any
    float64 result that it has to judge.
    """
    first = (
        t.x.detach().double()[:1].flatten(2)[..., :1]
        if t.x.dim() > 2
        else t.x.detach().double()[:1]
    )
    pivot = torch.nan_to_num(first.reshape(-1), nan=0.0, posinf=0.0, neginf=0.0)
    return _by_reference(case, t, torch.float64, pivot)


def corrections(case: Case, t: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, std, r and d, [C] each, of the case in float64."""
    x = t.x.detach().double().transpose(0, 1).flatten(1)
    if not case.training and t.running_mean is not None:
        mean, std = t.running_mean.double(), t.running_std.double()
        return mean, std, torch.ones_like(std), torch.zeros_like(std)
    mean = x.mean(1)
    std = torch.sqrt((x - mean.unsqueeze(1)).square().mean(1) + case.eps)
    if t.running_mean is None:
        return mean, std, torch.ones_like(std), torch.zeros_like(std)
    r_max, d_max = limits_at(case)
    r = (std / t.running_std.double()).clamp(1.0 / r_max, r_max)
    d = ((mean - t.running_mean.double()) / t.running_std.double()).clamp(-d_max, d_max)
    return mean, std, r, d


def by_pytorch(case: Case, t: Tensors) -> Results:
    """The peer: what PyTorch makes of the case in the same dtype.

    r and d are constants, so Batch Renorm is F.batch_norm with weight * r for a weight and weight *
    d + bias for a bias, gradients included: the peer is the kernel that users have today. Moving
    averages come from the reference in the statistics' dtype, as F.batch_norm keeps others.
    """
    real = statistic_dtype(t.x.dtype)
    x, weight, bias = t.x.detach().requires_grad_(), _leaf(t.weight), _leaf(t.bias)
    r, d = (s.to(real) for s in corrections(case, t)[2:])
    gamma = r if weight is None else weight.to(real) * r
    beta = d if weight is None else weight.to(real) * d
    beta = beta if bias is None else beta + bias.to(real)
    if case.training or t.running_mean is None:
        y = F.batch_norm(x, None, None, gamma, beta, True, 0.0, max(case.eps, _NO_EPS))
    else:
        var = t.running_std.square()
        y = F.batch_norm(x, t.running_mean, var, gamma, beta, False, 0.0, _NO_EPS)
    results = _backward(y, t.dy, x, weight, bias)
    state = _by_reference(case, t, real, torch.zeros_like(r))
    return results | {
        name: state[name] for name in ("running_mean", "running_std") if name in state
    }


def _of_sum(terms: Tensor) -> Tensor:
    """Of terms with signs rounding adds up as their root sum of squares does; of others the sum
    itself is rounded (12 eps / 4: six times)."""
    return terms.square().sum(1).sqrt().maximum(terms.sum(1).abs() / 4)


def scales(case: Case, t: Tensors) -> Results:
    """For each result the size [C] of the terms that it is made of: what an error is measured by
    (see tolerance.py)."""
    mean, std, r, d = corrections(case, t)
    x = t.x.detach().double().transpose(0, 1).flatten(1) - mean.unsqueeze(1)
    x_norm, g = x / std.unsqueeze(1), t.dy.double().transpose(0, 1).flatten(1)
    one = torch.ones_like(std)
    weight = one if t.weight is None else t.weight.double()
    bias = 0.0 if t.bias is None else t.bias.double().abs()
    widest = x_norm.abs().amax(1)
    projected = g.mean(1).abs() + widest * (g * x_norm).mean(1).abs()
    # dweight has the error of the mean of x times the sum of dy: a fifth of a last place of std (12
    # eps / 64) is what the mean may be off.
    unbalanced = g.sum(1).abs() / 64
    found = {
        "y": weight.abs() * (widest * r + d.abs()) + bias,
        "dx": weight.abs() * r / std * (g.abs().amax(1) + projected),
        "dweight": _of_sum(g * (x_norm * r.unsqueeze(1) + d.unsqueeze(1))) + r * unbalanced,
        "dbias": _of_sum(g),
    }
    if t.running_mean is not None:
        moved = (
            momentum_at(case) * ((mean - t.running_mean).abs() + std * widest)
            if case.training
            else 0.0
        )
        found["running_mean"] = t.running_mean.double().abs() + moved
        moved = momentum_at(case) * (std - t.running_std).abs() if case.training else 0.0
        found["running_std"] = t.running_std.double().abs() + moved
    return found
