"""BatchRenorm1d, 2d, 3d: torch.nn.BatchNorm1d, 2d, 3d with renormalization. They hold state,
nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import init

from ._ops import statistic_dtype
from .arguments import FLOATS, check_numbers
from .functional import batch_renorm
from .schedule import RenormSchedule


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
        if num_features < 1:
            raise ValueError(f"num_features must be >= 1, got {num_features}")
        check_numbers(momentum=momentum, eps=eps)
        _require_schedule(schedule)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.skip_nonfinite = skip_nonfinite
        self._schedule = schedule

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
        if self.track_running_stats:
            self.schedule.copy_(self._schedule.as_tensor())
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def set_schedule(self, schedule: RenormSchedule) -> None:
        """Replaces the schedule. It goes on at the step that num_batches_tracked says.

        The buffer is overwritten in place: compiled code is not recompiled, captured CUDA graphs
        see the change, and the host does not wait for the device.
        """
        _require_schedule(schedule)
        if self.schedule is None:
            raise ValueError("schedule cannot be set on a layer with track_running_stats=False")
        self._schedule = schedule
        self.schedule.copy_(schedule.as_tensor(), non_blocking=True)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):  # torch.fx takes modules of torch.nn alone for leaves
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        self._check_input_dim(input)
        # Straight from the dictionaries: Module.__getattr__ would take 0.4 us for each. A weight
        # that is not there is parametrized.
        buffers, parameters = self._buffers, self._parameters
        running_mean = buffers["running_mean"]
        return batch_renorm(
            input,
            running_mean,
            buffers["running_std"],
            parameters["weight"] if "weight" in parameters else self.weight,
            parameters["bias"] if "bias" in parameters else self.bias,
            self.training or running_mean is None,
            self.momentum,
            self.eps,
            num_batches_tracked=buffers["num_batches_tracked"],
            schedule=buffers["schedule"],
            skip_nonfinite=self.skip_nonfinite,
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
        return text

    def _apply(self, fn: Any, recurse: bool = True) -> _BatchRenorm:
        """Conversions to half precision leave statistics float32 and the schedule float64: sums and
        step counts of a training run do not fit in less."""

        def kept_precise(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is self.schedule:
                return t.to(moved.device) if moved.dtype != t.dtype else moved
            if t is self.running_mean or t is self.running_std:
                dtype = statistic_dtype(moved.dtype)
                return t.to(moved.device, dtype) if moved.dtype != dtype else moved
            return moved

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
        schedule = self._schedule
        if self.track_running_stats:
            try:
                schedule = self._adopt(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._schedule = schedule

    def _adopt(self, state_dict: dict[str, Any], prefix: str) -> RenormSchedule:
        """Brings this layer's entries of a state_dict into its own form, in place. Returns the
        schedule in force after."""

        def refuse(name: str, t: Tensor, wanted: str, right: Tensor) -> None:
            if not t.is_meta and not bool(right.all()):
                wrong = t.flatten()[~right.flatten()].tolist()
                raise ValueError(
                    f"{prefix}{name} must be {wanted}, got {wrong[0]} in {len(wrong)} of "
                    f"{t.numel()} channels"
                )

        mean = state_dict.get(f"{prefix}running_mean")
        std = state_dict.get(f"{prefix}running_std")
        var = state_dict.get(f"{prefix}running_var")
        if var is not None and std is None:
            refuse("running_var", var, "finite and >= 0", var.isfinite() & (var >= 0))
            del state_dict[f"{prefix}running_var"]
            std = (var.double() + self.eps).sqrt()
            state_dict.setdefault(f"{prefix}schedule", self.schedule)
            state_dict.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
        if mean is not None:
            refuse("running_mean", mean, "finite", mean.isfinite())
            state_dict[f"{prefix}running_mean"] = mean.to(self.running_mean.dtype)
        if std is not None:
            refuse("running_std", std, "finite and > 0", std.isfinite() & (std > 0))
            state_dict[f"{prefix}running_std"] = std.to(self.running_std.dtype)

        schedule = state_dict.get(f"{prefix}schedule")
        if schedule is None or schedule is self.schedule or schedule.is_meta:
            return self._schedule
        state_dict[f"{prefix}schedule"] = schedule.double()
        try:
            return RenormSchedule.from_tensor(schedule)
        except ValueError as error:
            raise ValueError(f"{prefix}schedule: {error}") from None


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
            inference too, and r = 1, d = 0: plain Batch Normalization.
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

    load_state_dict takes the state of a BatchNorm too: running_std = sqrt(running_var + eps), and
    the schedule stays as it is. Statistics that are not finite, or a running_std that is not
    positive, are an error.

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
