"""LazyBatchRenorm1d, 2d, 3d: layers that learn the number of channels from their first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ._ops import statistic_dtype
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from .schedule import RenormSchedule

_FIRST = {"weight": 1, "bias": 0, "running_mean": 0, "running_std": 1}


class _LazyBatchRenorm(LazyModuleMixin, _BatchRenorm):
    weight: UninitializedParameter  # type: ignore[assignment]
    bias: UninitializedParameter  # type: ignore[assignment]

    def __init__(
        self,
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
        # One channel and no tensors: what there will be is made below, without a size.
        super().__init__(
            1,
            eps,
            momentum,
            affine=False,
            track_running_stats=False,
            schedule=schedule,
            skip_nonfinite=skip_nonfinite,
            dtype=dtype,
        )
        self.num_features = 0
        self.affine = affine
        self.track_running_stats = track_running_stats
        dtype = torch.get_default_dtype() if dtype is None else dtype
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if affine:
            self.weight = UninitializedParameter(**factory)
            if bias:
                self.bias = UninitializedParameter(**factory)
        if track_running_stats:
            factory["dtype"] = statistic_dtype(dtype)
            for name in ("running_mean", "running_std"):
                self.register_buffer(name, UninitializedBuffer(**factory))
            counter = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer("num_batches_tracked", counter)
            self.register_buffer("schedule", schedule.as_tensor(device))

    @property
    def running_var(self) -> Tensor | None:
        """Without a size, too, as long as running_std is."""
        return self.running_std if is_lazy(self.running_std) else super().running_var

    def reset_running_stats(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor) -> None:
        """Makes the tensors that have no size yet, for the channels of the input; what was loaded
        stays."""
        self._check_input_dim(input)
        channels, tensors = input.size(1), {name: getattr(self, name) for name in _FIRST}
        if channels == 0:
            raise ValueError(f"x must have at least one channel, got shape {tuple(input.shape)}")
        for name, t in tensors.items():
            if t is not None and not is_lazy(t) and t.numel() != channels:
                raise ValueError(
                    f"x must have the {t.numel()} channels of the {name} that was loaded, got "
                    f"shape {tuple(input.shape)}"
                )
        self.num_features = channels
        for name, t in tensors.items():
            if is_lazy(t):
                first = _FIRST[name]
                t.materialize((self.num_features,))
                with torch.no_grad():
                    t.fill_(first)

    def _adopt(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> RenormSchedule:
        """Statistics of a layer that was saved before it had any are not looked at."""
        lazy: dict[str, Tensor] = {}
        for name in ("running_mean", "running_std", "running_var"):
            if is_lazy(state_dict.get(f"{prefix}{name}")):
                kept = "running_std" if name == "running_var" else name
                lazy[f"{prefix}{kept}"] = state_dict.pop(f"{prefix}{name}")
                if name == "running_var":  # the schedule then is missing, too
                    own = self._schedule.as_tensor(self.schedule.device)
                    state_dict.setdefault(f"{prefix}schedule", own)
        schedule = super()._adopt(state_dict, prefix, assign)
        state_dict.update(lazy)
        return schedule


class LazyBatchRenorm1d(_LazyBatchRenorm):
    """A BatchRenorm1d whose num_features is found in its first input, as torch.nn.LazyBatchNorm1d
    does it.

    Arguments are those of :class:`BatchRenorm1d` without num_features. weight, bias, running_mean
    and running_std have no size until the first forward, in training or not, or until a state_dict
    that has one is loaded, also that of a BatchNorm; num_batches_tracked and schedule are there
    from the start, so set_schedule works. After the first forward the object is a BatchRenorm1d,
    and as if constructed as one. Run it on a batch before an optimiser, DDP or deepcopy gets to see
    it. See torch.nn.modules.lazy.LazyModuleMixin.

    Raises:
        ValueError: from the first forward, for an x of the wrong number of dimensions or without
            channels; the layer is then still lazy. Otherwise as BatchRenorm1d.
    """

    _dims = BatchRenorm1d._dims
    cls_to_become: type[nn.Module] = BatchRenorm1d


class LazyBatchRenorm2d(_LazyBatchRenorm):
    """A BatchRenorm2d whose num_features is found in its first input. See
    :class:`LazyBatchRenorm1d`."""

    _dims = BatchRenorm2d._dims
    cls_to_become: type[nn.Module] = BatchRenorm2d


class LazyBatchRenorm3d(_LazyBatchRenorm):
    """A BatchRenorm3d whose num_features is found in its first input. See
    :class:`LazyBatchRenorm1d`."""

    _dims = BatchRenorm3d._dims
    cls_to_become: type[nn.Module] = BatchRenorm3d
