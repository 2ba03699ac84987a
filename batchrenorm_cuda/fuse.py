"""A Batch Renorm in inference, computed by the convolution or linear layer in front of it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from .modules import _BatchRenorm
from .swap import class_of

Conv = TypeVar("Conv", bound=_ConvNd)
Linear = TypeVar("Linear", bound=nn.Linear)


def fuse_conv_batch_renorm_eval(conv: Conv, norm: _BatchRenorm) -> Conv:
    """A convolution that computes norm(conv(x)), both in eval mode. torch's fuse_conv_bn_eval for
    this layer.

    With scale = weight / running_std of the norm, the new weight is that of conv times scale, by
    output channel, and the new bias is (bias - running_mean) * scale + the norm's bias. Both are
    computed in float64 and rounded once.

    Args:
        conv: Conv1d, 2d, 3d or ConvTranspose1d, 2d, 3d in eval mode, with or without bias, any
            groups. Not changed. A subclass has to use weight and bias as these do, which is not
            looked at: one that standardises its weight comes out wrong.
        norm: in eval mode, with statistics. Not changed.

    Returns:
        A copy of conv with a new weight and a bias, in the dtype and on the device of conv's
        weight.

    Raises:
        ValueError, TypeError: naming the argument and what it got.
    """
    if not isinstance(conv, _ConvNd):
        raise TypeError(f"conv must be a convolution of torch.nn, got {type(conv).__name__}")
    scale, shift = _affine(norm, conv, "conv", conv.out_channels)
    weight = conv.weight.detach().double()
    if conv.transposed:  # [C_in, C_out / groups, ...], C_in in groups too
        grouped = weight.unflatten(0, (conv.groups, -1))
        by_channel = scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * by_channel).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return _with(conv, weight, shift)


def fuse_linear_batch_renorm_eval(linear: Linear, norm: _BatchRenorm) -> Linear:
    """A linear layer that computes norm(linear(x)) for x of shape [N, C_in], both in eval mode.

    As :func:`fuse_conv_batch_renorm_eval`, with an nn.Linear in the place of the convolution.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    scale, shift = _affine(norm, linear, "linear", linear.out_features)
    return _with(linear, linear.weight.detach().double() * scale.view(-1, 1), shift)


def _affine(
    norm: Any, layer: _ConvNd | nn.Linear, name: str, channels: int
) -> tuple[Tensor, Tensor]:
    """(scale, new bias), float64 [C], of the layer that does the norm's work."""
    if not isinstance(norm, _BatchRenorm):
        raise TypeError(f"norm must be a BatchRenorm, got {type(norm).__name__}")
    for argument, module in ((name, layer), ("norm", norm)):
        if module.training:
            raise ValueError(f"{argument} must be in eval mode, got one in training")
    if norm.running_mean is None:
        raise ValueError("norm must have moving statistics, got one with track_running_stats=False")
    if norm.num_features != channels:
        raise ValueError(
            f"norm must have the {channels} channels of {name}'s output, got {norm.num_features}"
        )
    for key in ("weight", "bias"):
        own = key in layer._parameters or is_parametrized(layer, key)
        if not own and getattr(layer, key) is not None:
            raise ValueError(f"{name} must have a {key} of its own, got one that a hook computes")

    mean, std = norm.running_mean.double(), norm.running_std.double()
    scale = torch.where(std != 0, 1 / std, 0)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
    shift = (bias - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _with(layer: Any, weight: Tensor, bias: Tensor) -> Any:
    """A copy of a layer with other tensors."""
    old = layer.weight
    fused = copy.deepcopy(layer)
    if is_parametrized(fused):
        # Not remove_parametrizations: that edits the class, which the copy shares with its model.
        del fused._modules["parametrizations"]
        fused.__class__ = class_of(layer)
    for name, value in (("weight", weight), ("bias", bias)):
        like = old if name == "weight" or layer.bias is None else layer.bias
        fused.register_parameter(name, nn.Parameter(value.to(old.dtype), like.requires_grad))
    return fused
