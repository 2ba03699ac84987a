"""What autograd needs beyond the two kernels, in differentiable torch operations: gradients of
gradients, and forward mode.

With x_norm = (x - mean) / std the layer is y = weight * (x_norm * r + d) + bias, r and d constants.
Write P for the projection onto the null space of 1 and x_norm: the Jacobian of x_norm is P / std, a
symmetric matrix. Write B(g, v) for the derivative of P(g) / std in the direction v of x: symmetric
in g and v, as it comes from the Hessian of sum(g * x_norm). Then

    dx = weight * r / std * P(dy)      dweight = sum(dy * (r * x_norm + d))      dbias = sum(dy)

and everything below follows by the product rule. In inference mean and std are constants: P is the
identity and B is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column(t: Tensor, x: Tensor) -> Tensor:
    """[C] so that it broadcasts over x [N, C, ...]."""
    return t.view(-1, *[1] * (x.dim() - 2))


def _real(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _reciprocal(std: Tensor) -> Tensor:
    """As in csrc/core/math.h."""
    has_scale = ~(std < torch.finfo(std.dtype).tiny)
    return has_scale / torch.where(has_scale, std, 1)


class BatchStatistics:
    """x normalised by its own statistics."""

    def __init__(self, x: Tensor, eps: float) -> None:
        x = _real(x)
        self.dims = [0, *range(2, x.dim())]
        centred = x - self.mean(x)
        self.inv_std = _reciprocal((self.mean(centred.square()) + eps).sqrt())
        self.x_norm = centred * self.inv_std

    def mean(self, t: Tensor) -> Tensor:
        return t.mean(self.dims, keepdim=True)

    def project(self, g: Tensor) -> Tensor:
        """P(g) / std"""
        along = self.mean(g * self.x_norm)
        return (g - self.mean(g) - self.x_norm * along) * self.inv_std

    def bend(self, g: Tensor, v: Tensor) -> Tensor:
        """B(g, v)"""
        g_along, v_along = self.mean(g * self.x_norm), self.mean(v * self.x_norm)
        both = self.mean(g * v) - self.mean(g) * self.mean(v) - g_along * v_along
        bent = v_along * self.project(g) + g_along * self.project(v)
        return -self.inv_std * (bent + self.x_norm * both * self.inv_std)


class MovingStatistics:
    """x normalised by statistics that do not depend on it."""

    def __init__(self, x: Tensor, running_mean: Tensor, running_std: Tensor) -> None:
        x = _real(x)
        self.dims = [0, *range(2, x.dim())]
        self.inv_std = column(_reciprocal(running_std), x)
        self.x_norm = (x - column(running_mean, x)) * self.inv_std

    def project(self, g: Tensor) -> Tensor:
        return g * self.inv_std

    def bend(self, g: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(g)


class Derivatives:
    """The products that autograd asks for, at one point (x, weight) and, for those of the backward
    pass, one dy.

    weight, r, d are [C]. Gradients come back in the dtype of what they belong to.
    """

    def __init__(
        self, at: BatchStatistics | MovingStatistics, weight: Tensor | None, r: Tensor, d: Tensor
    ) -> None:
        self.at = at
        self.weight, self.r, self.d = weight, column(r, at.x_norm), column(d, at.x_norm)
        self.scale = self.r if weight is None else column(weight, at.x_norm) * self.r

    def per_channel(self, t: Tensor) -> Tensor:
        return t.sum(self.at.dims)

    def tangent_of_y(
        self, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None
    ) -> Tensor:
        x_norm = self.at.x_norm
        ty = torch.zeros_like(x_norm)
        if tx is not None:
            ty = ty + self.scale * self.at.project(_real(tx))
        if tweight is not None:
            ty = ty + column(tweight, x_norm) * (x_norm * self.r + self.d)
        if tbias is not None:
            ty = ty + column(tbias, x_norm)
        return ty

    def gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the backward operator gives: (dx, dweight, dbias)."""
        at, g = self.at, _real(dy)
        dx = self.scale * at.project(g)
        dweight = self.per_channel(g * (self.r * at.x_norm + self.d))
        return dx.to(dy.dtype), dweight, self.per_channel(g)

    def gradients_of_backward(
        self, dy: Tensor, ddx: Tensor, ddweight: Tensor, ddbias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cotangents of (dx, dweight, dbias) -> gradients for (dy, x, weight)."""
        at, g, v = self.at, _real(dy), _real(ddx)
        ddweight, ddbias = column(ddweight, g), column(ddbias, g)
        projected = at.project(g)
        for_dy = self.scale * at.project(v) + ddweight * (self.r * at.x_norm + self.d) + ddbias
        for_x = ddweight * self.r * projected + self.scale * at.bend(g, v)
        for_weight = None if self.weight is None else self.per_channel(v * self.r * projected)
        return for_dy.to(dy.dtype), for_x.to(ddx.dtype), for_weight

    def tangents_of_backward(
        self, dy: Tensor, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tangents of (dy, x, weight) -> tangents of (dx, dweight, dbias)."""
        at, g = self.at, _real(dy)
        tdx, for_weight, for_bias = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
        if tdy is not None:
            tg = _real(tdy)
            tdx = tdx + self.scale * at.project(tg)
            for_weight = for_weight + tg * (self.r * at.x_norm + self.d)
            for_bias = for_bias + tg
        if tx is not None:
            v = _real(tx)
            tdx = tdx + self.scale * at.bend(g, v)
            for_weight = for_weight + g * self.r * at.project(v)
        if tweight is not None:
            tdx = tdx + column(tweight, g) * self.r * at.project(g)
        return tdx.to(dy.dtype), self.per_channel(for_weight), self.per_channel(for_bias)
