"""BatchRenorm1d, 2d, 3d: torch.nn.BatchNorm1d, 2d, 3d with renormalization. They hold state,
nothing else."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import init
from torch.nn.parameter import is_lazy

from ._ops import statistic_dtype
from .arguments import FLOATS, check_flags, check_numbers
from .clipping import Clipping, new_counts
from .functional import normalise
from .fx import traced
from .loading import adapt
from .repeats import copies
from .schedule import RenormSchedule, batches_seen, later, require_steps_per_update


def _require_schedule(schedule: Any) -> None:
    if not isinstance(schedule, RenormSchedule):
        raise TypeError(f"schedule must be a RenormSchedule, got {type(schedule).__name__}")


class _BatchRenorm(nn.Module):
    """What the three have in common.

    Not a subclass of torch's _BatchNorm: SyncBatchNorm.convert_sync_batchnorm would silently
    replace it by a layer that does not renormalize.
    """

    _version = 1
    __constants__ = [
        "track_running_stats",
        "momentum",
        "eps",
        "num_features",
        "affine",
        "skip_nonfinite",
    ]
    _dims: tuple[int, ...]  # of the inputs
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    skip_nonfinite: bool
    statistics_frozen: bool
    _schedule: RenormSchedule
    weight: nn.Parameter  # or None, as in torch's, which says no more
    bias: nn.Parameter
    running_mean: Tensor | None
    running_std: Tensor | None
    num_batches_tracked: Tensor | None
    schedule: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        schedule: RenormSchedule = RenormSchedule(),  # noqa: B008  immutable
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, Integral):
            raise TypeError(f"num_features must be a whole number, got {num_features!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be >= 1, got {num_features}")
        check_numbers(momentum=momentum, eps=eps)
        check_flags(skip_nonfinite=skip_nonfinite)
        _require_schedule(schedule)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.skip_nonfinite = skip_nonfinite
        self.statistics_frozen = False
        self._schedule = schedule
        # Not a buffer: it comes and goes, and DDP, FSDP and moving averages keep lists of buffers.
        self._clipping: Tensor | None = None

        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        has = {"weight": affine, "bias": affine and bias}
        for name, present in has.items():
            empty = nn.Parameter(torch.empty(num_features, **factory)) if present else None
            self.register_parameter(name, empty)
        buffers: dict[str, Tensor | None] = dict.fromkeys(
            ("running_mean", "running_std", "num_batches_tracked", "schedule")
        )
        if track_running_stats:
            factory["dtype"] = statistic_dtype(dtype)
            buffers = {
                "running_mean": torch.zeros(num_features, **factory),
                "running_std": torch.ones(num_features, **factory),
                "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device),
                "schedule": schedule.as_tensor(device),
            }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.reset_parameters()

    @property
    def running_var(self) -> Tensor | None:
        """running_std squared, less eps: for code that reads a BatchNorm's to fold or export it,
        and divides by sqrt(running_var + eps). A new tensor each time, of the dtype of running_std;
        writing to it changes nothing in the layer. Negative where running_std < sqrt(eps)."""
        std = self.running_std
        return None if std is None else std.square() - self.eps

    def reset_running_stats(self) -> None:
        """Back to mean 0, standard deviation 1, and no batch seen."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_std.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Everything as constructed, after to_empty() too, but with the schedule that was set or
        loaded last."""
        self.reset_running_stats()
        self.reset_clipping()
        if self.track_running_stats:
            self.schedule.copy_(self._schedule.as_tensor("cpu"))
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def set_schedule(self, schedule: RenormSchedule, *, from_now: bool = False) -> None:
        """Replaces the schedule. It goes on at the step that num_batches_tracked says; from_now:
        its steps are counted from that one, and so it starts.

        The buffer is overwritten in place: compiled code is not recompiled, captured CUDA graphs
        see the change, and the host does not wait for the device, unless from_now has it read
        num_batches_tracked. While a graph is captured it is a RuntimeError.
        """
        _require_schedule(schedule)
        check_flags(from_now=from_now)
        self._require_settable("schedule")
        if from_now:
            schedule = later(schedule, batches_seen(self.num_batches_tracked))
        self._schedule = schedule
        self.schedule.copy_(schedule.as_tensor("cpu"), non_blocking=True)

    def set_limits(self, r_max: float, d_max: float) -> None:
        """These limits from the next batch on, for good: a schedule that does not move. For a
        trainer that decides on the limits itself, step by step.

        As :meth:`set_schedule`: in place, with no wait and no recompilation.
        """
        limits = RenormSchedule.constant(r_max, d_max)
        self.set_schedule(replace(limits, steps_per_update=self._schedule.steps_per_update))

    def read_limits(self) -> tuple[float, float]:
        """(r_max, d_max) for the next batch: (1, 0), which is BatchNorm, without moving statistics.
        Waits for the device."""
        if self.schedule is None:
            return 1.0, 0.0
        real = not self.schedule.is_meta
        schedule = RenormSchedule.from_tensor(self.schedule) if real else self._schedule
        return schedule.limits_at(batches_seen(self.num_batches_tracked))

    def set_steps_per_update(self, steps_per_update: int, before: int | None = None) -> None:
        """Goes on with another number of microbatches for each step of the optimiser: the limits
        stay where they are and move on at the same pace, counted in steps of the optimiser.

        num_batches_tracked, which counts microbatches, is multiplied by steps_per_update / before,
        and so are the steps of the schedule, both in place. The schedule is read from its buffer,
        which waits for the device: DDP, FSDP or a loader may have written another into it. Call it
        between two steps of the optimiser: a fraction of one is rounded down.

        With momentum=None the average goes on, too: as if it had been over microbatches of the new
        size from the start.

        Args:
            steps_per_update: microbatches for each step from now on, >= 1.
            before: and until now. The default is what the schedule of the layer says. A state_dict
                has it in batches only. So after load_state_dict the number is that of the
                checkpoint if the layer was made with the schedule that it was saved with, whatever
                the schedule's steps_per_update. A checkpoint whose steps are all the layer's times
                a whole number is taken for such a one; from any other it is 1, and with a schedule
                that has no steps the layer's own. What was written into the buffer without
                load_state_dict is taken the same way, but any other to count as the layer does.
                Where that is wrong `before` has to say it.
        """
        accumulate([self], steps_per_update, before)

    def _accumulating(
        self, steps_per_update: int, before: int | None
    ) -> tuple[int, RenormSchedule]:
        """What accumulate() works with: microbatches a step until now, and the schedule from now
        on."""
        require_steps_per_update(steps_per_update)
        if before is not None:
            require_steps_per_update(before, "before")
        self._require_settable("steps_per_update")
        schedule = self._schedule
        if not self.schedule.is_meta:
            with suppress(ValueError):  # which to_empty() may have left there
                schedule = schedule.recognised_in(self.schedule, schedule.steps_per_update)
        if before is None:
            before = schedule.steps_per_update
        elif before != schedule.steps_per_update:
            schedule = RenormSchedule.from_tensor(schedule.as_tensor("cpu"), before)
        return before, replace(schedule, steps_per_update=steps_per_update)

    @property
    def monitors_clipping(self) -> bool:
        return self._clipping is not None

    def monitor_clipping(self, on: bool = True) -> None:
        """Counts from now on how often and how far r and d are clipped, or no longer does.

        :func:`batchrenorm_cuda.monitor_clipping` does it for a model and says more. Counts start at
        zero, and are dropped at the end; True goes on with those there are.
        """
        if not on:
            self._clipping = None
        elif self._clipping is None:
            self._require_statistics("clipping cannot be monitored")
            if is_lazy(self.running_mean):
                raise ValueError("clipping cannot be monitored before the layer has seen a batch")
            self._clipping = new_counts(self.running_mean.numel(), self.running_mean.device)

    def read_clipping(self) -> Clipping:
        """What was clipped since the start or the last reset. Waits for the device."""
        if self._clipping is None:
            raise ValueError("clipping must be monitored to be read: call monitor_clipping() first")
        return Clipping.of(self._clipping)

    def reset_clipping(self) -> None:
        """Starts counting over, in place; nothing to do when clipping is not monitored."""
        if self._clipping is not None:
            self._clipping.zero_()

    def _require_settable(self, what: str) -> None:
        self._require_statistics(f"{what} cannot be set")
        for name in ("schedule", "num_batches_tracked"):
            buffer = getattr(self, name)
            fixed = isinstance(buffer, Tensor) and buffer.is_inference()
            if fixed and not torch.is_inference_mode_enabled():
                raise ValueError(f"{name} must not be an inference tensor, which cannot change")
        if self.schedule.is_cuda and torch.cuda.is_current_stream_capturing():
            # The copy is from memory of this call, which a replay would read again.
            raise RuntimeError(
                f"{what} cannot be set while a CUDA graph is captured: set it between replays, "
                "which see the change"
            )

    def _require_statistics(self, refusal: str) -> None:
        if self.schedule is None:
            raise ValueError(f"{refusal} on a layer with track_running_stats=False")

    def forward(self, input: Tensor) -> Tensor:
        # All that is seldom so behind one look at the type: isinstance(input, Proxy) of a tensor
        # looks up its __class__ too, and _check_input_dim takes 0.4 us.
        if type(input) is not Tensor or input.dim() not in self._dims:
            if isinstance(input, Proxy):
                return traced(self, input)
            self._check_input_dim(input)
        # Straight from the dictionaries: Module.__getattr__ would take 0.4 us for each. What is not
        # there is parametrized, or was made an attribute of another kind.
        buffers, parameters = self._buffers, self._parameters
        try:
            layer = mean = buffers["running_mean"]
            std, counter = buffers["running_std"], buffers["num_batches_tracked"]
            schedule = buffers["schedule"]
        except KeyError:
            layer = mean = self.running_mean
            std, counter, schedule = self.running_std, self.num_batches_tracked, self.schedule
        training = self.training
        if training and not self.track_running_stats and mean is not None:
            mean, std, counter = copies(mean, std, counter)
        return normalise(
            input,
            parameters["weight"] if "weight" in parameters else self.weight,
            parameters["bias"] if "bias" in parameters else self.bias,
            (training and not self.statistics_frozen) or mean is None,
            (
                mean,
                std,
                counter,
                schedule,
                0.0 if mean is None else self.momentum,
                self.eps,
                3.0,
                5.0,
                self.skip_nonfinite,
            ),
            self._clipping,
            layer,
        )

    _leaf: Callable[..., Tensor] = forward

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks a module for first; else it fails somewhere inside of torch.
        (Not a BatchNorm instead: put into training, the script would not renormalize.)"""
        raise RuntimeError(
            f"a {type(self).__name__} cannot be compiled by torch.jit.script: make a BatchNorm of "
            "the same inference of it first, batchrenorm_cuda.fold(model.eval())"
        )

    def _check_input_dim(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if x.dim() not in self._dims:
            wanted = " or ".join(f"{d}D" for d in self._dims)
            raise ValueError(f"x must be {wanted}, got {x.dim()}D input of shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )
        if self.affine and self.bias is None:
            text += ", bias=False"
        if self.skip_nonfinite:
            text += ", skip_nonfinite=True"
        if self.track_running_stats:
            text += f", schedule={self._schedule}"
        if self.statistics_frozen:
            text += ", statistics_frozen=True"
        return text

    def _apply(self, fn: Any, recurse: bool = True) -> _BatchRenorm:
        """Conversions to half precision leave statistics float32 and the schedule float64: sums and
        step counts of a training run do not fit in less."""

        def kept_precise(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is self.schedule or t is self.num_batches_tracked:
                return t.to(moved.device) if moved.dtype != t.dtype else moved
            if t is self.running_mean or t is self.running_std:
                dtype = statistic_dtype(moved.dtype)
                return t.to(moved.device, dtype) if moved.dtype != dtype else moved
            return moved

        if self._clipping is not None:
            moved = fn(self._clipping)
            exact = moved.dtype == self._clipping.dtype
            self._clipping = moved if exact else self._clipping.to(moved.device)
        return super()._apply(kept_precise, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also takes the state of a BatchNorm. Refuses statistics and schedules that could not be
        used, and then loads nothing into this layer."""
        arguments = (
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        schedule, hooks = self._schedule, self._load_state_dict_pre_hooks
        # Hooks of the user may still change what there is. Torch's own for a lazy layer takes sizes
        # from what is to be loaded.
        lazy = getattr(getattr(self, "_load_hook", None), "id", None)
        for key, hook in list(hooks.items()):
            if key != lazy:
                hook(*arguments)
        if self.running_mean is not None:
            try:
                schedule = self._adopt(
                    state_dict, prefix, local_metadata.get("assign_to_params_buffers", False)
                )
            except (ValueError, TypeError) as error:
                error_msgs.append(str(error))
                return
            has_mean, has_std = (f"{prefix}running_{s}" in state_dict for s in ("mean", "std"))
            if has_mean and not has_std:  # an error later, if the load is strict
                warnings.warn(
                    f"{prefix}running_mean is loaded without a running_std or running_var, so that "
                    "mean and standard deviation do not belong together. If the state was picked "
                    "by the names that this model has, load it whole: running_var is taken, too",
                    stacklevel=2,
                )
        self._load_state_dict_pre_hooks = OrderedDict(
            (key, hook) for key, hook in hooks.items() if key == lazy
        )
        try:
            super()._load_from_state_dict(*arguments)
        finally:
            self._load_state_dict_pre_hooks = hooks
        self._schedule = schedule
        mean = self.running_mean
        if self._clipping is not None and mean is not None and self._clipping.device != mean.device:
            # assign=True has put the layer on another device.
            if self._clipping.is_meta:
                self._clipping = new_counts(mean.numel(), mean.device)
            else:
                self._clipping = self._clipping.to(mean.device)

    def _adopt(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> RenormSchedule:
        return adapt(self, state_dict, prefix, assign)


def layers_of(model: nn.Module) -> dict[str, _BatchRenorm]:
    """The Batch Renorms of a model, each once, by its first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchRenorm)}


def accumulate(layers: list[_BatchRenorm], steps_per_update: int, before: int | None) -> None:
    """set_steps_per_update of all of these layers, or an error and of none."""
    planned = [layer._accumulating(steps_per_update, before) for layer in layers]
    scaled: set[int] = set()  # counters: layers may share one
    for layer, (until_now, schedule) in zip(layers, planned, strict=True):
        counter = layer.num_batches_tracked
        if counter is not None and id(counter) not in scaled:
            scaled.add(id(counter))
            counter.mul_(steps_per_update).div_(until_now, rounding_mode="floor")
        layer.set_schedule(schedule)


class BatchRenorm1d(_BatchRenorm):
    """Batch Renormalization of [N, C] or [N, C, L], in the place of torch.nn.BatchNorm1d.

    In training it normalises by the batch, as BatchNorm does, and then corrects the result towards
    what the moving statistics would have given: y = weight * (x_norm * r + d) + bias. Training and
    inference then see the same function, also where a batch has few examples, or dependent ones. In
    inference it is the affine map that BatchNorm is.

    Source: S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", NIPS 2017; :func:`batchrenorm_cuda.functional.batch_renorm` has the
    formulae.

    Arguments and attributes are those of torch.nn.BatchNorm1d, and more.

    Args:
        num_features: channels C of the input.
        eps: added to the variance, in units of x squared.
        momentum: weight of a new batch in the moving averages, in [0, 1]; the default is the
            paper's, a tenth of BatchNorm's. None: the cumulative average.
        affine: whether there are a weight (starts at 1) and a bias (at 0) to learn.
        track_running_stats: False: no moving statistics. The batch is normalised by its own, in
            inference too, and r = 1, d = 0: plain Batch Normalization. The attribute, set to False
            later, has training leave statistics and counter as they are, as BatchNorm's does; r and
            d are still taken from them.
        device, dtype: of weight and bias. Statistics are float64 beside float64, else float32, and
            stay so under .half() and .to(dtype).
        bias: False: a weight only.
        schedule: limits of r and d by number of batches seen.
        skip_nonfinite: let a batch with a NaN or inf anywhere move neither statistics nor counter.

    State:
        weight, bias: parameters [C].
        running_mean, running_std: buffers [C], in units of x. running_std averages standard
            deviations, with eps in them.
        num_batches_tracked: buffer, int64: training batches seen.
        schedule: buffer, float64 [5]: see :meth:`set_schedule` and RenormSchedule.
        running_var: property, running_std squared less eps, for what reads a BatchNorm's.
        statistics_frozen: attribute, not saved: see :func:`batchrenorm_cuda.freeze_statistics`.

    load_state_dict takes the state of a BatchNorm too: running_std = sqrt(running_var + eps), and
    the schedule stays as it is. Statistics that are not finite, a running_std that is not positive
    and a num_batches_tracked < 0 are an error, and the layer stays as it is.

    Shape:
        output as input, in shape, dtype and memory format.

    Raises:
        ValueError, TypeError: naming the argument and what it got; from the constructor and from
            forward, which leaves the state as it was. Training needs more than one value per
            channel, or none.
    """

    _dims = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch Renormalization of [N, C, H, W], in the place of torch.nn.BatchNorm2d.

    Contiguous and channels_last inputs give outputs of the same format. Everything else is as in
    :class:`BatchRenorm1d`.
    """

    _dims = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch Renormalization of [N, C, D, H, W], in the place of torch.nn.BatchNorm3d.

    Contiguous and channels_last_3d inputs give outputs of the same format. Everything else is as in
    :class:`BatchRenorm1d`.
    """

    _dims = (5,)
