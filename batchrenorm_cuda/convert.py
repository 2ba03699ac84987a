"""A model with BatchNorm becomes one with Batch Renorm, and back.

Layers stay the objects they are; swap.py says how. This file says what of a BatchNorm becomes what.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .arguments import HALVES, check_flags, check_numbers
from .counterparts import Classes, check_counterparts, norm_for, renorm_for, standard, sync_for
from .lazy import _LazyBatchRenorm
from .modules import BatchRenorm1d, _BatchRenorm, _require_schedule, layers_of
from .schedule import RenormSchedule, batches_seen, later
from .swap import BUFFERS, Change, Model, Report, Skip, class_of, like, swap_layers
from .sync import LazySyncBatchRenorm, check_group

# What has been made of a buffer, so that layers that share one share what is made of it.
Ties = dict[tuple[Any, ...], Any]

STRANGER = "a subclass with methods of its own, and not in counterparts"

_RENORM_ATTRIBUTES = vars(BatchRenorm1d(1)).keys() - vars(nn.BatchNorm1d(1)).keys()
_NEW = {"running_std", "schedule", *_RENORM_ATTRIBUTES}


def convert(
    model: Model,
    *,
    schedule: RenormSchedule = RenormSchedule(),  # noqa: B008  immutable
    momentum: float | Literal["keep"] | None = 0.01,
    skip: Skip | Iterable[Skip] = (),
    from_now: bool = False,
    skip_nonfinite: bool = False,
    counterparts: Classes | None = None,
    report: Callable[[Report], object] | None = None,
) -> Model:
    """Turns every BatchNorm of a model into a Batch Renorm, in place, and returns the model.

    BatchNorm1d, 2d, 3d, SyncBatchNorm and the lazy ones become BatchRenorm1d, 2d, 3d,
    SyncBatchRenorm (with the same process_group) and LazyBatchRenorm1d, 2d, 3d, wherever they are,
    the root included. Layers stay the same objects and have the same Parameters, so an optimiser
    may have been made before; eps, statistics, counter, affine, track_running_stats, dtype, device,
    requires_grad, training mode, hooks and parametrizations stay as they are. What layers share
    they go on sharing: layers, Parameters, and statistics if eps is the same. Inference stays the
    same, as running_std = sqrt(running_var + eps). Statistics of half-precision layers become
    float32. State_dicts of the model from before still load.

    Convert before compiling, and before wrapping in DistributedDataParallel or FSDP, which make
    lists of the buffers.

    timm's BatchNormAct2d and SyncBatchNormAct are known. Any other subclass of a BatchNorm is left
    alone, with a warning and all inside it, unless all that it has of its own is a constructor, or
    `counterparts` has it. So is a layer with statistics that it does not update
    (track_running_stats set to False after construction), which is there to normalise by the batch
    alone, and one inside a fused module of torch.ao for training, which reads its running_var, and
    a FrozenBatchNorm2d as torchvision and detectron2 have it. A module of your own may read
    running_var, and has to be skipped if it writes it.

    Args:
        model: any module; its BatchNorms may be shared or nested. A BatchNorm by itself changes its
            class, which a type checker does not see.
        schedule: limits of r and d, for every layer, by the number of batches that the layer has
            seen.
        momentum: weight of a new batch in the moving averages, for every layer except those of
            momentum=None, which keep their cumulative average, and of 0, whose averages stay as
            they are. The default is the paper's, a tenth of BatchNorm's: r and d compare a batch
            with the averages, which at BatchNorm's 0.1 are made of little more than ten batches
            themselves. None: cumulative averages everywhere. "keep": each layer's own.
        skip: what to leave alone: a name or fnmatch pattern ("backbone", "*.downsample.1"), a type,
            a module, a predicate of name and module, or several of them. Each stands for the module
            and all inside it. A layer of several names is left alone if one of them is.
        from_now: count the steps of the schedule from the present num_batches_tracked of each
            layer. Otherwise they are counted from the start of the BatchNorm's training, and a
            model trained for longer than the schedule begins with the last limits. A schedule that
            is set afterwards knows nothing of it: give the schedule here, or from_now to
            set_schedule, too.
        skip_nonfinite: as in BatchRenorm2d.
        counterparts: what becomes of your own subclasses of BatchNorm: {OwnNorm: OwnRenorm}, the
            latter a subclass of the BatchRenorm1d, ... in the same place, with the methods that
            OwnNorm has. No constructor is called: attributes and submodules stay.
        report: called with a Report of what was changed and what was left alone, and why.
            report=print prints it.

    Raises:
        ValueError, TypeError: naming the argument or the layer and what it got, before anything has
            changed: for statistics that are not finite, a running_var or num_batches_tracked < 0, a
            name or module in `skip` that the model does not have, or a model that is wrapped in
            DistributedDataParallel already.
    """
    _require_model(model)
    _require_schedule(schedule)
    check_flags(from_now=from_now, skip_nonfinite=skip_nonfinite)
    classes = check_counterparts(counterparts, "BatchNorm", "BatchRenorm")
    if momentum != "keep":
        check_numbers(momentum=momentum, eps=0.0)

    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        wanted = schedule, skip_nonfinite, momentum
        others = 0
        for m in layers_of(model).values():
            keeps = momentum == "keep" or not m.momentum
            has = m._schedule, m.skip_nonfinite, momentum if keeps else m.momentum
            others += has != wanted
        if others and wanted != (RenormSchedule(), False, 0.01):
            warnings.warn(
                f"{type(model).__name__} has no BatchNorm to convert, and {others} Batch Renorms "
                "with other settings than these, which they keep: set_schedule(model, ...) changes "
                "a schedule",
                stacklevel=2,
            )

    ties: Ties = {}

    def plan(layer: nn.Module, name: str) -> Change | str:
        if not isinstance(layer, _BatchNorm):
            return "its statistics are fixed, and it goes on inferring by them"
        own = class_of(layer)
        after = renorm_for(own, classes)
        if after is None:
            return STRANGER
        if "forward" in vars(layer):
            return "its forward has been replaced"
        taken = _NEW & {*vars(layer), *layer._buffers, *layer._parameters, *layer._modules}
        if taken:
            return f"it has a {min(taken)} of its own"
        owner = type(model.get_submodule(name.rpartition(".")[0]))
        if owner.__module__.startswith("torch.ao.nn.intrinsic.qat."):
            return f"{owner.__name__} around it reads its running_var"
        tracks = layer._buffers.get("running_mean") is not None
        if tracks != layer.track_running_stats or tracks != (layer.running_var is not None):
            return "track_running_stats does not say whether it has statistics"
        if any(is_parametrized(layer, key) for key in ("running_mean", "running_var")):
            return "its statistics are parametrized"
        batches = batches_seen(layer._buffers.get("num_batches_tracked") if tracks else None, name)
        limits = later(schedule, batches) if from_now else schedule
        new = layer.momentum if momentum == "keep" or not layer.momentum else momentum
        return _to_renorm(layer, name, after, limits, new, skip_nonfinite, ties)

    return swap_layers(model, "BatchNorm", _is_norm, _BatchRenorm, plan, skip, report)


def fold(
    model: Model,
    *,
    skip: Skip | Iterable[Skip] = (),
    counterparts: Classes | None = None,
    report: Callable[[Report], object] | None = None,
) -> Model:
    """Turns every Batch Renorm of a model into the BatchNorm of the same inference, in place, and
    returns the model.

    For exporters, quantisation and fusions that know BatchNorm only; the inverse of
    :func:`convert`, which see for what is kept. SyncBatchRenorm becomes SyncBatchNorm, with its
    process_group.
    fold(copy.deepcopy(model)) leaves the model as it is.

    running_var is chosen such that 1 / sqrt(running_var + eps), rounded as torch rounds it, is
    1 / running_std to the last bit, but for one channel in 2,000 at most where it is one bit off.
    Beyond that the output differs by the order of torch's arithmetic alone. eps stays, unless a
    running_std is less than sqrt(eps): it is then lowered to the square of the least one, as no
    variance is negative. So give eps along when only the state_dict is passed on.

    A half-precision weight and bias become float32, in place, as by .float(): torch wants them of
    the dtype of the statistics, which do not fit in less. The output is half precision all the
    same.

    Args:
        model, skip, report: as in :func:`convert`.
        counterparts: {OwnRenorm: OwnNorm}; other subclasses with methods are left alone, with a
            warning.

    Raises:
        ValueError, TypeError: naming the argument or the layer and what it got, before anything has
            changed: for a running_std that is not positive or whose square is not a normal number
            (float32: outside 1.1e-19 ... 1.8e19).
    """
    _require_model(model)
    classes = check_counterparts(counterparts, "BatchRenorm", "BatchNorm")
    ties: Ties = {}

    def plan(layer: _BatchRenorm, name: str) -> Change | str:
        own = class_of(layer)
        if standard(own) is LazySyncBatchRenorm:
            return "torch has no lazy SyncBatchNorm, and it has not seen a batch yet"
        after = norm_for(own, classes)
        if after is None:
            return STRANGER
        if "forward" in vars(layer):
            return "its forward has been replaced"
        return _to_norm(layer, name, after, ties)

    return swap_layers(model, "Batch Renorm", _is_renorm, _BatchNorm, plan, skip, report)


def convert_sync(
    model: Model,
    process_group: dist.ProcessGroup | None = None,
    *,
    skip: Skip | Iterable[Skip] = (),
    counterparts: Classes | None = None,
    report: Callable[[Report], object] | None = None,
) -> Model:
    """Turns every Batch Renorm of a model into a SyncBatchRenorm, in place, and returns the model.

    What torch.nn.SyncBatchNorm.convert_sync_batchnorm is to a BatchNorm, which knows nothing of
    Batch Renorm: convert_sync(convert(model)). Layers stay the same objects and have the same
    Parameters and buffers; nothing but their class changes, and so do lazy ones, which become
    SyncBatchRenorm with their first input. A SyncBatchRenorm gets the new group.

    Convert before wrapping in DistributedDataParallel or FSDP, and in every process alike.

    Args:
        model: any module; its layers may be shared or nested.
        process_group: which processes normalise together; None: all, the default group of
            torch.distributed, which may be initialised later.
        skip, report: as in :func:`convert`.
        counterparts: {OwnRenorm: OwnSyncRenorm}, the latter a subclass of SyncBatchRenorm.

    Raises:
        ValueError, TypeError: as :func:`convert`, before anything has changed.
    """
    _require_model(model)
    check_group(process_group)
    classes = check_counterparts(counterparts, "BatchRenorm", "SyncBatchRenorm")

    def plan(layer: _BatchRenorm, name: str) -> Change | str:
        after = sync_for(class_of(layer), classes)
        if after is None:
            return STRANGER
        if "forward" in vars(layer):
            return "its forward has been replaced"
        cls = like(layer, after)
        buffers = {name: t for name, t in layer._buffers.items() if name in BUFFERS}
        return Change(layer, cls, {"process_group": process_group}, set(), buffers, {})

    return swap_layers(model, "Batch Renorm", _is_renorm, _BatchRenorm, plan, skip, report)


def _require_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "model must not be wrapped yet, got a DistributedDataParallel, which would not "
                "know the new buffers"
            )


def _is_norm(module: nn.Module) -> bool:
    """A BatchNorm, or the copy of one that torchvision, detectron2, transformers and many models
    freeze it into: a module of another class, all of whose state are buffers."""
    buffers = set(module._buffers.keys())  # a list of them, of a ScriptModule
    frozen = {"weight", "bias", "running_mean", "running_var"} <= buffers
    return isinstance(module, _BatchNorm) or (frozen and "FrozenBatchNorm" in type(module).__name__)


def _is_renorm(module: nn.Module) -> bool:
    return isinstance(module, _BatchRenorm)


def _dtype_and_device(layer: _BatchNorm) -> tuple[torch.dtype | None, torch.device | None]:
    for t in (*layer.parameters(recurse=True), layer.running_mean):
        if t is not None and t.is_floating_point():
            return t.dtype, t.device
    return None, None


def _to_renorm(
    layer: _BatchNorm,
    name: str,
    cls: type[nn.Module],
    schedule: RenormSchedule,
    momentum: float | None,
    skip_nonfinite: bool,
    ties: Ties,
) -> Change:
    dtype, device = _dtype_and_device(layer)
    size = () if issubclass(cls, _LazyBatchRenorm) else (layer.num_features,)
    try:
        fresh: Any = standard(cls)(
            *size,
            layer.eps,
            momentum,
            affine=False,
            track_running_stats=layer.track_running_stats,
            schedule=schedule,
            skip_nonfinite=skip_nonfinite,
            device=device,
            dtype=dtype,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name or 'model'}: {error}") from None
    buffers = dict(fresh._buffers)
    if layer.track_running_stats:
        prefix = f"{name}." if name else ""
        names = ("running_mean", "running_var", "num_batches_tracked")
        own = {n: layer._buffers.get(n) for n in names}  # old pickles have no counter
        own = {n: t for n, t in own.items() if t is not None and not is_lazy(t)}
        state = {f"{prefix}{n}": t for n, t in own.items()}
        fresh._adopt(state, prefix, assign=False)
        for before, source in own.items():
            n, eps = ("running_std", layer.eps) if before == "running_var" else (before, None)
            made_of = id(source), eps, buffers[n].dtype
            buffers[n] = ties.setdefault(made_of, state[f"{prefix}{n}"])
    settings = {k: vars(fresh)[k] for k in _RENORM_ATTRIBUTES} | {"momentum": momentum}
    if hasattr(fresh, "process_group"):  # a SyncBatchNorm's; of another layer: all processes
        settings["process_group"] = getattr(layer, "process_group", None)
    # Without statistics in it a state_dict has no schedule either.
    renamed = {"running_var": ("running_std", "schedule")}
    return Change(layer, like(layer, cls), settings, set(), buffers, renamed)


def _to_norm(layer: _BatchRenorm, name: str, cls: type[nn.Module], ties: Ties) -> Change:
    where = f"{name}." if name else ""
    buffers: dict[str, Tensor | None] = dict.fromkeys(
        ("running_mean", "running_var", "num_batches_tracked")
    )
    # torch 2.11 does not infer with an eps of 0. Added to a variance this one is nothing.
    eps = layer.eps or torch.finfo(torch.float32).tiny
    if layer.running_mean is not None:
        std = layer.running_std
        buffers["running_mean"] = layer.running_mean
        buffers["running_var"] = std
        buffers["num_batches_tracked"] = layer.num_batches_tracked
        if not is_lazy(std):
            made_of = id(std), eps
            if made_of not in ties:
                ties[made_of] = _variance(std, eps, f"{where}running_std")
            buffers["running_var"], eps = ties[made_of]

    wide: dict[nn.Parameter, Tensor] = {}
    if layer.running_mean is not None:
        for key in ("weight", "bias"):
            p = getattr(layer, key)
            if p is None or p.dtype not in HALVES:
                continue
            if key not in layer._parameters:
                raise ValueError(
                    f"{where}{key} must not be parametrized to become float32, got {p.dtype}"
                )
            with torch.no_grad():
                wide[p] = p.float()
    settings: dict[str, Any] = {"eps": eps}
    if issubclass(cls, nn.SyncBatchNorm):
        settings["process_group"] = getattr(layer, "process_group", None)
    renamed = {"running_std": ("running_var",)}
    obsolete = set(_RENORM_ATTRIBUTES)
    return Change(layer, like(layer, cls), settings, obsolete, buffers, renamed, wide)


def _variance(std: Tensor, eps: float, name: str) -> tuple[Tensor, float]:
    """(running_var, eps) such that 1 / sqrt(running_var + eps) is 1 / std, to the last bit."""
    if std.is_meta:
        return torch.empty_like(std), eps
    square = std * std
    tiny = torch.finfo(std.dtype).tiny
    right = (std > 0) & (square >= tiny) & square.isfinite()
    if not bool(right.all()):
        wrong = std[~right].tolist()
        raise ValueError(
            f"{name} must be > 0 and have a square that is a normal number of {std.dtype}, got "
            f"{wrong[0]} in {len(wrong)} of {std.numel()} channels"
        )
    eps = min(eps, square.min().item())
    rounded_eps = torch.tensor(eps, dtype=std.dtype, device=std.device)

    # Around the square there is nearly always one whose reciprocal root is that of std, whichever
    # of the two ways of computing it a kernel takes.
    up, down = torch.full_like(std, torch.inf), torch.zeros_like(std)
    totals = [square]
    for towards in (up, down):
        near = square
        for _ in range(2):
            near = torch.nextafter(near, towards)
            totals.append(near)
    variance, score = (square - rounded_eps).clamp_min(0), torch.full_like(std, -1)
    for total in totals:
        exact = (total - rounded_eps).clamp_min(0)
        for candidate in (exact, torch.nextafter(exact, up), torch.nextafter(exact, down)):
            rounded = candidate + rounded_eps
            fits = (1 / rounded.sqrt() == 1 / std).to(std.dtype) + (rounded.rsqrt() == 1 / std)
            variance = torch.where(fits > score, candidate, variance)
            score = torch.maximum(score, fits)
    return variance, eps
