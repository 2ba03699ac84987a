"""How often and how far r and d were clipped, in all layers of a model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy

from .clipping import Clipping
from .modules import _BatchRenorm, layers_of

# The open monitors that a layer is monitored for. Not an attribute of the layer, as a copy of it is
# not theirs to end; and not the monitors themselves, which hold the layer.
_open: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def monitor_clipping(model: nn.Module) -> ClippingMonitor:
    """Has every Batch Renorm of a model count how often and how far r and d are clipped, from now
    until the monitor is closed::

        with monitor_clipping(model) as monitor:
            for step, batch in enumerate(loader):
                ...
                if step % 1000 == 999:
                    for name, clipping in monitor.read().items():
                        print(name, f"{clipping.r_clipped:.1%} {clipping.d_clipped:.1%}")
                    monitor.reset()

    Counts are kept on the device of each layer, by some small kernels a step, without waiting for
    it; only reading waits. When nothing monitors there is no cost. In the warm-up (r_max = 1, d_max
    = 0) everything is clipped. It goes on in compiled code, which is compiled once more for it, and
    in CUDA graphs captured meanwhile. Inference is not counted, nor are calls under torch.func
    transforms or with forward-mode tangents, nor what torch.export has recorded. Counts follow the
    layer to another device and into copies, and are in no state_dict. A layer has one set of them,
    which all monitors that are open at a time read and reset; the last to be closed ends it.

    Args:
        model: any module. Layers with track_running_stats=False clip nothing and are left out.

    Raises:
        TypeError: for something that is not a module.
        ValueError: for a lazy layer that has not seen a batch yet, or a model without layers to
            monitor.
    """
    return ClippingMonitor(model)


class ClippingMonitor:
    """See :func:`monitor_clipping`."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {n: m for n, m in layers_of(model).items() if m.running_mean is not None}
        if not self._layers:
            raise ValueError(
                "model must have a Batch Renorm with moving statistics, got a "
                f"{type(model).__name__} with none"
            )
        for name, layer in self._layers.items():
            if is_lazy(layer.running_mean):
                raise ValueError(
                    f"{name or 'model'} must have seen a batch, got a {type(layer).__name__} "
                    "without a number of channels"
                )
        self._token = object()
        for layer in self._layers.values():
            if layer in _open or not layer.monitors_clipping:  # and not by the layer's own method
                layer.monitor_clipping(True)
                _open.setdefault(layer, set()).add(self._token)

    def read(self) -> dict[str, Clipping]:
        """What was clipped since the start or the last reset, by the name of the layer. Waits for
        the device."""
        for name, layer in self._layers.items():
            if not isinstance(layer, _BatchRenorm):
                raise ValueError(
                    f"{name or 'model'} must be a Batch Renorm to be read, got a "
                    f"{type(layer).__name__}, folded since: read before fold"
                )
        return {name: layer.read_clipping() for name, layer in self._layers.items()}

    def reset(self) -> None:
        """Starts over. In place: captured CUDA graphs go on counting."""
        for layer in self._layers.values():
            if isinstance(layer, _BatchRenorm):
                layer.reset_clipping()

    def close(self) -> None:
        """Ends the counting in all layers that were not monitored before, and that no other monitor
        needs, whatever the order in which they were opened."""
        for layer in self._layers.values():
            tokens = _open.get(layer, set())
            if self._token not in tokens:
                continue
            tokens.remove(self._token)
            if not tokens:
                del _open[layer]
                if isinstance(layer, _BatchRenorm):  # and not folded meanwhile
                    layer.monitor_clipping(False)

    def __enter__(self) -> ClippingMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
