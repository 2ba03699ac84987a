"""Moving statistics in hand: taken anew from a data set, or kept as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .modules import _BatchRenorm, layers_of
from .schedule import RenormSchedule


def update_stats(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | int | None = None,
    *,
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Takes the moving statistics of every Batch Renorm in a model anew, from one pass over data.

    For weights that were averaged, pruned or loaded without statistics. It is
    torch.optim.swa_utils.update_bn for these layers, which update_bn passes over (and moves, as it
    puts the model into training).

    running_mean and running_std become the averages of the batches' means and standard deviations,
    each batch of the same weight. Meanwhile the layers normalise by the batch alone (r = 1, d = 0),
    as there is nothing to correct towards. Everything else is in eval mode: dropout is off, and
    ordinary BatchNorms are not touched. To take their statistics anew too, do so first, with
    :func:`freeze_statistics`, update_bn and :func:`unfreeze_statistics`.

    num_batches_tracked, the schedule, momentum, training modes and what monitors have counted are
    afterwards what they were, so training goes on where it was. So are the statistics of layers
    that are frozen or that no batch has come to.

    After torch.optim.swa_utils.AveragedModel(model), which copies the buffers of the model that
    trains, call it with the averaged model. use_buffers=True averages the statistics instead; but
    as torch rounds the average of a counter down, copy num_batches_tracked from the trained model
    before training the averaged one any further.

    Args:
        model: any module, wrapped or compiled or not.
        loader: batches. Each is given to the model, or, if it is a tuple or list, its first element
            is.
        device: where that is moved to before, if given.
        forward: how to run the model on a batch, if not so: called with each batch as it is, in the
            place of the model.

    Raises:
        ValueError: for a lazy layer that has not seen a batch yet.
        TypeError: naming the argument and what it got.

    After an exception, also one of the loader or the model, the model is as it was. Without batches
    or without layers to fill it warns.
    """
    if forward is not None and device is not None:
        raise ValueError(f"device must be None with forward, which moves batches, got {device}")
    named = {
        name: layer
        for name, layer in layers_of(model).items()
        if layer.running_mean is not None
        and layer.track_running_stats
        and not layer.statistics_frozen
    }
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be callable, got {type(forward).__name__}")
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader must be iterable, got {type(loader).__name__}")
    for name, layer in named.items():
        if is_lazy(layer.running_mean):
            raise ValueError(
                f"{name or 'model'} must have seen a batch, got a {type(layer).__name__} without a "
                "number of channels"
            )
    if not named:
        warnings.warn(f"{type(model).__name__} has no moving statistics to update", stacklevel=2)
        return

    batches = 0
    with _restored(model, list(named.values())), torch.no_grad():
        for batch in loader:
            if forward is not None:
                forward(batch)
            else:
                model(_first(batch, device))
            batches += 1
    if batches == 0:
        warnings.warn("loader has no batches: all statistics are as they were", stacklevel=2)


def _first(batch: Any, device: torch.device | str | int | None) -> Any:
    x = batch
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError("loader must give batches with a first element, got an empty one")
        x = batch[0]
    if device is None:
        return x
    if not hasattr(x, "to"):
        raise TypeError(
            f"loader must give what can be moved to a device, got {type(x).__name__}: say in "
            "forward how to run the model on it"
        )
    return x.to(device)


@contextmanager
def _restored(model: nn.Module, layers: list[_BatchRenorm]) -> Iterator[None]:
    """For the time of the context the layers, and only they, train, averaging from zero. Of what
    has changed only the statistics stay, and those only without an exception."""
    statistics: list[tuple[_BatchRenorm, Tensor, Tensor]] = []
    settings: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for layer in layers:
            for t in (layer.running_mean, layer.running_std):
                statistics.append((layer, t, t.clone()))
            for t in (layer.num_batches_tracked, layer.schedule):
                settings.append((t, t.clone()))
    modes = [(module, module.training) for module in model.modules()]
    kept = [(layer, layer.momentum, layer._clipping) for layer in layers]
    plain = RenormSchedule.constant(1.0, 0.0).as_tensor("cpu")
    whole = False
    try:
        for module, _ in modes:
            module.training = False  # not eval(), which models override
        for layer in layers:
            layer.training = True
            layer.momentum = None
            layer._clipping = None
            layer.schedule.copy_(plain)
            layer.reset_running_stats()
        yield
        whole = True
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum, clipping in kept:
            layer.momentum, layer._clipping = momentum, clipping
        with torch.no_grad():
            for layer, t, before in statistics:
                if not whole or int(layer.num_batches_tracked) == 0:
                    t.copy_(before)
            for t, before in settings:
                t.copy_(before)


def freeze_statistics(model: nn.Module) -> None:
    """Every Batch Renorm in a model, or the layer given, from now on normalises by its moving
    statistics in training too, and leaves them and num_batches_tracked as they are.

    It then is the affine map that it is in inference, as a frozen BatchNorm, with r = 1 and d = 0,
    whatever the limits. Weight and bias still learn; requires_grad_(False) stops them. For fine
    tuning with batches that are too small or too unlike the data to learn statistics from, as in
    detection.

    Unlike eval() it survives model.train(). It is no part of the state_dict, as training modes and
    requires_grad are not: a job that resumes calls it again. Copies and pickles keep it;
    :func:`batchrenorm_cuda.fold` makes BatchNorms that do not know of it. A layer's own is its
    attribute `statistics_frozen`.
    """
    _set_frozen(model, True)


def unfreeze_statistics(model: nn.Module) -> None:
    """The inverse of :func:`freeze_statistics`: statistics, counter and schedule go on from where
    they were."""
    _set_frozen(model, False)


def _set_frozen(model: nn.Module, frozen: bool) -> None:
    layers = [layer for layer in layers_of(model).values() if layer.running_mean is not None]
    for layer in layers:
        layer.statistics_frozen = frozen
    if not layers:
        warnings.warn(
            f"{type(model).__name__} has no Batch Renorm with moving statistics", stacklevel=3
        )
