"""timm's BatchNormAct2d and SyncBatchNormAct, which drop and activate what they have normalised, as
Batch Renorms. timm is not imported before one becomes a BatchNorm again."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor, nn

from .modules import BatchRenorm2d
from .sync import SyncBatchRenorm

_HOME = "timm.layers.norm_act"  # since timm 0.9


class BatchRenormAct2d(BatchRenorm2d):
    """A BatchRenorm2d, followed by `drop` and `act`, modules: what
    :func:`batchrenorm_cuda.convert` makes of timm's BatchNormAct2d, whose they are."""

    def forward(self, input: Tensor) -> Tensor:
        return _finish(self, super().forward(input))


class SyncBatchRenormAct(SyncBatchRenorm):
    """A SyncBatchRenorm, followed by `drop` and `act`: that of timm's SyncBatchNormAct, and what
    :func:`batchrenorm_cuda.convert_sync` makes of a BatchRenormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return _finish(self, super().forward(input))


def _finish(layer: nn.Module, x: Tensor) -> Tensor:
    for name in ("drop", "act"):  # timm's SyncBatchNormAct may be without
        module = layer._modules.get(name)
        if module is not None:
            x = module(x)
    return x


_RENORMS: dict[str, type[nn.Module]] = {
    "BatchNormAct2d": BatchRenormAct2d,
    "SyncBatchNormAct": SyncBatchRenormAct,
}


def renorm_of(cls: type) -> type[nn.Module] | None:
    """What becomes of a class of timm's."""
    return _RENORMS.get(cls.__name__) if cls.__module__ == _HOME else None


def norm_of(cls: type) -> type[nn.Module] | None:
    """The class of timm's that a Batch Renorm of this file was, if timm is there."""
    names = {renorm: name for name, renorm in _RENORMS.items()}
    if cls not in names:
        return None
    try:
        return getattr(import_module(_HOME), names[cls])
    except ImportError:
        return None
