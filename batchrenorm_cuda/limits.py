"""The limits of r and d in all layers of a model at once."""

from __future__ import annotations

import warnings

from torch import nn

from .arguments import check_flags
from .modules import _BatchRenorm, _require_schedule, accumulate, layers_of
from .schedule import RenormSchedule, batches_seen, later, require_steps_per_update


def set_schedule(model: nn.Module, schedule: RenormSchedule, *, from_now: bool = False) -> None:
    """Replaces the schedule of every Batch Renorm in a model.

    Each goes on at the step that its num_batches_tracked says. Buffers are overwritten in place:
    nothing is recompiled, captured CUDA graphs see the change, and the host does not wait for the
    device. Layers with track_running_stats=False have no limits and are passed over.

    Args:
        model: any module; its layers may be shared or nested.
        schedule: as in :func:`batchrenorm_cuda.convert`.
        from_now: count its steps from the present num_batches_tracked of each layer, as convert
            does. The host reads it, and so waits for the device.

    Raises:
        ValueError, TypeError: naming the argument or the layer and what it got, before anything has
            changed: for something that is not a RenormSchedule, or with from_now a
            num_batches_tracked that is not finite and >= 0.

    Warns if the model has no layer to set it in.
    """
    _require_schedule(schedule)
    check_flags(from_now=from_now)
    layers = _limited(model)
    planned = dict.fromkeys(layers, schedule)
    if from_now:
        for name, layer in layers.items():
            planned[name] = later(schedule, batches_seen(layer.num_batches_tracked, name))
    for name, layer in layers.items():
        layer.set_schedule(planned[name])


def set_limits(model: nn.Module, r_max: float, d_max: float) -> None:
    """These limits in every Batch Renorm of a model, from the next batch on and for good.

    As :func:`set_schedule`, with a schedule that does not move. r_max >= 1 and d_max >= 0 may be
    infinite.

    Raises:
        ValueError, TypeError: naming the argument and what it got, before anything has changed.
    """
    RenormSchedule.constant(r_max, d_max)
    for layer in _limited(model).values():
        layer.set_limits(r_max, d_max)


def set_steps_per_update(
    model: nn.Module, steps_per_update: int, before: int | None = None
) -> None:
    """Goes on with another number of microbatches for each step of the optimiser, in every Batch
    Renorm of a model: limits stay where they are and move on at the same pace, counted in steps of
    the optimiser. Waits for the device. See
    :meth:`batchrenorm_cuda.BatchRenorm1d.set_steps_per_update`.

    A job that resumes with another accumulation loads its checkpoint first::

        model = Model(schedule=RenormSchedule(500, 3.0, 4000, 5.0, 2500, steps_per_update=4))
        model.load_state_dict(checkpoint)       # of a job with the same schedule, whatever its own
        set_steps_per_update(model, 4)          # steps_per_update was

    Raises:
        ValueError, TypeError: naming the argument and what it got, before anything has changed.
    """
    require_steps_per_update(steps_per_update)
    if before is not None:
        require_steps_per_update(before, "before")
    accumulate(list(_limited(model).values()), steps_per_update, before)


def _limited(model: nn.Module) -> dict[str, _BatchRenorm]:
    """The layers that have limits, by name, or an error if those of one cannot be set."""
    layers = {name: m for name, m in layers_of(model).items() if m.schedule is not None}
    if not layers:
        warnings.warn(
            f"{type(model).__name__} has no Batch Renorm with moving statistics", stacklevel=3
        )
    for layer in layers.values():
        layer._require_settable("schedule")
    return layers
