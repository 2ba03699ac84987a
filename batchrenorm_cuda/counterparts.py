"""Which class of layer becomes which: BatchNorm, Batch Renorm, SyncBatchRenorm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .lazy import LazyBatchRenorm1d, LazyBatchRenorm2d, LazyBatchRenorm3d
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .norm_act import BatchRenormAct2d, SyncBatchRenormAct, norm_of, renorm_of
from .sync import LazySyncBatchRenorm, SyncBatchRenorm

Classes = Mapping[type[nn.Module], type[nn.Module]]

_RENORM: Classes = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: SyncBatchRenorm,
    nn.LazyBatchNorm1d: LazyBatchRenorm1d,
    nn.LazyBatchNorm2d: LazyBatchRenorm2d,
    nn.LazyBatchNorm3d: LazyBatchRenorm3d,
}
_NORM: Classes = {renorm: norm for norm, renorm in _RENORM.items()}
_SYNC: Classes = {
    BatchRenorm1d: SyncBatchRenorm,
    BatchRenorm2d: SyncBatchRenorm,
    BatchRenorm3d: SyncBatchRenorm,
    SyncBatchRenorm: SyncBatchRenorm,
    LazyBatchRenorm1d: LazySyncBatchRenorm,
    LazyBatchRenorm2d: LazySyncBatchRenorm,
    LazyBatchRenorm3d: LazySyncBatchRenorm,
    LazySyncBatchRenorm: LazySyncBatchRenorm,
    BatchRenormAct2d: SyncBatchRenormAct,
    SyncBatchRenormAct: SyncBatchRenormAct,
}
_STANDARD = (*_RENORM, *_NORM, LazySyncBatchRenorm)
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "BatchNorm": (_BatchNorm,),
    "BatchRenorm": (*_NORM, LazySyncBatchRenorm),
    "SyncBatchRenorm": (SyncBatchRenorm, LazySyncBatchRenorm),
}

# What a class may have that makes its objects do nothing else.
_INERT = {
    "__init__",
    "__module__",
    "__qualname__",
    "__doc__",
    "__annotations__",
    "__annotate_func__",
    "__annotations_cache__",
    "__parameters__",
    "__firstlineno__",
    "__static_attributes__",
}


def renorm_for(cls: type[nn.Module], own: Classes) -> type[nn.Module] | None:
    """The Batch Renorm that a class of BatchNorm becomes; None: it is a stranger."""
    return _counterpart(cls, own, _RENORM, renorm_of)


def norm_for(cls: type[nn.Module], own: Classes) -> type[nn.Module] | None:
    """The BatchNorm that a class of Batch Renorm becomes."""
    return _counterpart(cls, own, _NORM, norm_of)


def sync_for(cls: type[nn.Module], own: Classes) -> type[nn.Module] | None:
    """The SyncBatchRenorm that a class of Batch Renorm becomes."""
    return _counterpart(cls, own, _SYNC, lambda cls: None)


def standard(cls: type[nn.Module]) -> type[nn.Module]:
    """The layer of torch's or of this package that a class is made from."""
    return next(base for base in cls.__mro__ if base in _STANDARD)


def check_counterparts(own: Any, before: str, after: str) -> Classes:
    """A caller's own pairs, of subclasses of what is changed and of what it becomes: BatchNorm,
    BatchRenorm or SyncBatchRenorm."""
    if own is None:
        return {}
    if not isinstance(own, Mapping):
        raise TypeError(f"counterparts must be a dict of classes, got {type(own).__name__}")
    for pair in own.items():
        for cls, kind, place in zip(pair, (before, after), ("key", "value"), strict=True):
            if not (isinstance(cls, type) and issubclass(cls, _KINDS[kind])):
                raise TypeError(
                    f"counterparts must have a subclass of a {kind} for {place}, got {cls!r}"
                )
        lazy = [issubclass(cls, LazyModuleMixin) for cls in pair]
        if lazy[0] != lazy[1]:
            raise TypeError(f"counterparts must pair lazy classes with lazy ones, got {pair}")
    return own


def _counterpart(
    cls: type[nn.Module],
    own: Classes,
    known: Classes,
    elsewhere: Callable[[type], type[nn.Module] | None],
) -> type[nn.Module] | None:
    for base in cls.__mro__:
        found = own.get(base) or known.get(base) or elsewhere(base)
        if found is not None:
            others = {*cls.__mro__} - {*base.__mro__}
            return None if any(vars(c).keys() - _INERT for c in others) else found
    return None
