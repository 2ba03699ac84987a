"""What torch.fx records of a layer: a leaf, as it takes modules of torch.nn for leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from .modules import _BatchRenorm


def traced(layer: _BatchRenorm, input: Proxy) -> Any:
    """The node for a layer's `_leaf`, its forward as this package has it.

    What is around that, hooks and the forward of a subclass or of the object, has been traced: it
    would come twice if the leaf were the module.
    """
    tracer: Any = input.tracer
    if tracer.root is layer:
        raise TraceError(
            f"a {type(layer).__name__} cannot be traced by itself, since it is a leaf: "
            "trace torch.nn.Sequential(layer)"
        )
    path = tracer.path_of_module(layer)
    alone = getattr(layer.forward, "__func__", None) is type(layer)._leaf
    if alone and not (layer._forward_hooks or layer._forward_pre_hooks):
        return tracer.create_proxy("call_module", path, (input,), {})
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", leaf_of, (module, input), {})


def leaf_of(layer: _BatchRenorm | _BatchNorm, input: Tensor) -> Tensor:
    """What a layer computes without what is around it. `fold` may have made a BatchNorm of it."""
    if not isinstance(layer, _BatchNorm):
        return layer._leaf(input)
    torchs: Any = next(c for c in type(layer).__mro__ if c.__module__ == _BatchNorm.__module__)
    return torchs.forward(layer, input)
