"""SyncBatchRenorm: one batch, normalised together by all processes of a group.

Going forward, every process takes the moments of its own examples, in one read of them; all
exchange them in one all_gather, float64 [2 * C + 2] each; and every process merges them in the
order of the ranks and does with the result what the ordinary layer does with a batch. So
statistics, limits and counter have the same bits everywhere. Going back, sum(dy) and
sum(dy * (x - mean)) are added up in one all_reduce, float64 [2, C].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.graph import increment_version
from torch.fx import Proxy

from . import _ops, checkpoint
from .arguments import check_arguments, check_constants
from .autograd import Gradients, wants_gradient
from .clipping import counting
from .functional import _transforms_are_active, _wide
from .lazy import _LazyBatchRenorm
from .modules import _BatchRenorm
from .repeats import copies
from .schedule import RenormSchedule


def check_group(group: Any) -> None:
    """Raises for what is no process group, nor what torch gives to a process outside of one."""
    known = (dist.ProcessGroup,) if dist.is_available() else ()
    outside = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
    if not (group is None or outside or isinstance(group, known)):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {group!r}")


class SyncBackward(Function):
    """dx (None unless asked for), dweight and dbias. It cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        total: Tensor,
        group: Any,
        need_x: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        sums, dweight, dbias = _ops.backward_sums(dy, x, stats)
        # Whoever needs it here: others may need it for their dx.
        dist.all_reduce(sums, group=group)
        dx = _ops.backward_project(dy, x, weight, stats, sums, total) if need_x else None
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise NotImplementedError(
            "SyncBatchRenorm has no second derivatives where several processes normalise together: "
            "take BatchRenorm1d, 2d or 3d"
        )


class SyncTraining(Function):
    """y of a training step whose statistics have been merged.

    `total` is what merge returns beside the stats. `anchor` is there to be differentiated through:
    a process that wants no gradient of its own then still takes part in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        stats: Tensor,
        total: Tensor,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, stats, total)
        ctx.group = group
        return _ops.renormalize(x, weight, bias, stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, stats, total = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = SyncBackward.apply(dy, x, weight, stats, total, ctx.group, need_x)
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *[None] * 4,
        )


def _merged(x: Tensor, step: tuple, group: Any, world: int, wants: bool) -> tuple[Tensor, Tensor]:
    """The stats of what all processes have, and its Total. Moves moving statistics and counter."""
    message = _ops.moments(x, wants)
    gathered = message.new_empty(world * message.numel())
    # The second is the name before torch 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, message, group=group)
    return _ops.merge(gathered.view(world, -1), x.dtype, *step)


@dataclass(frozen=True)
class SyncRepeat:
    """y of a training step whose statistics have been merged, the first time and again."""

    stats: Tensor
    total: Tensor
    group: Any

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        anchor = None
        wants = wants_gradient(x, weight, bias)
        # Reads the total on the host, but only where nothing here needs a gradient.
        if torch.is_grad_enabled() and not wants and self.total[1].item() > 0:
            anchor = x.new_empty(0, requires_grad=True)
        if not wants and anchor is None:
            return _ops.renormalize(x, weight, bias, self.stats)
        return SyncTraining.apply(x, weight, bias, anchor, self.stats, self.total, self.group)


@torch._disable_dynamo
def _trained(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    step: tuple,
    clipping: Tensor | None,
    group: Any,
    world: int,
    layer: Tensor | None,
) -> Tensor:
    if _transforms_are_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "SyncBatchRenorm has neither torch.func transforms nor forward mode where several "
            "processes normalise together: take BatchRenorm1d, 2d or 3d"
        )
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "a training step of a SyncBatchRenorm cannot be recorded by torch.export or "
            "torch.jit.trace: call model.eval() first"
        )
    # Before anything is exchanged: an error in one process keeps the others waiting.
    check_arguments(x, weight, bias, True, *step[:8], synchronised=True)
    check_constants(running_mean=step[0], running_std=step[1])
    weight, bias = _wide(weight, x), _wide(bias, x)
    running_mean, running_std, *_ = step
    keep = None
    if running_mean is not None and checkpoint.may_repeat():
        known, keep = checkpoint.repetition(layer, training=True)
        if known is not None:
            if keep is not None:
                keep(known)
            return known(x, weight, bias)
        checkpoint.warn_of_new_step()
    count = None if clipping is None else counting(clipping, step, None)
    wants = wants_gradient(x, weight, bias)
    with torch.no_grad():
        merged = _merged(x, step, group, world, wants)
    if count is not None:
        count(merged[0])
    repeat = SyncRepeat(*merged, group)
    if keep is not None:
        keep(repeat)
    if running_mean is not None:
        increment_version((running_mean, running_std))
    return repeat(x, weight, bias)


class SyncBatchRenorm(_BatchRenorm):
    """Batch Renormalization over the batches of all processes of a group, in the place of
    torch.nn.SyncBatchNorm.

    A training step takes its mean and standard deviation over the examples of all processes, which
    may have different numbers of them, or none; r, d, the moving statistics and the counter follow
    from those, with the same bits in every process that has started from the same state. y and dx
    are those of one process with the whole batch, up to rounding. The gradients of weight and bias
    are of this process's share of the loss, as SyncBatchNorm's are: DistributedDataParallel and
    FSDP average them.

    Each training forward of each layer is one all_gather, and each backward one all_reduce, of
    torch.distributed, on whatever device the group's backend works. So all processes must call
    their layers in the same order and equally often, and all run the backward pass, or none.
    Without an initialised torch.distributed, in a group of one process, and in inference, the layer
    is a BatchRenorm1d, 2d or 3d, and nothing is exchanged.

    Activation checkpointing, reentrant or not, exchanges nothing in its repetition. Under
    torch.compile there is a graph break around the layer. There are no second derivatives, no
    forward mode and no torch.func transforms across processes: an error says so.

    Source: S. Ioffe, "Batch Renormalization", NIPS 2017; moments are merged as in T. F. Chan, G. H.
    Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in :class:`BatchRenorm1d`.
        process_group: from torch.distributed; None: the default group, of all processes.
        device, dtype, bias, schedule, skip_nonfinite: as in :class:`BatchRenorm1d`. With
            skip_nonfinite, a NaN or inf in one process keeps the state of all of them.

    Shape:
        input [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; output as input, in shape, dtype
        and memory format. Processes may differ in everything but C and dtype. One value per channel
        is allowed here, as others may have more.

    State and state_dict are those of :class:`BatchRenorm1d`. A copy has the same group. A layer
    with a group cannot be pickled, as a SyncBatchNorm cannot: save its state_dict, or set its
    process_group to None before.

    Raises:
        ValueError, TypeError: as :class:`BatchRenorm1d`, before anything is exchanged; for a group
            that this process is not in.
        RuntimeError: from torch.distributed, where another process has ended or does not answer in
            the time that the group was made with.
    """

    _dims = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        schedule: RenormSchedule = RenormSchedule(),  # noqa: B008  immutable
        skip_nonfinite: bool = False,
    ) -> None:
        check_group(process_group)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            schedule=schedule,
            skip_nonfinite=skip_nonfinite,
            device=device,
            dtype=dtype,
        )
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchRenorm:
        """With the same group, which nothing can copy."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def _world(self) -> int:
        together = dist.is_available() and dist.is_initialized()
        if not (self.training and together) or self.statistics_frozen:
            return 1
        world = dist.get_world_size(self.process_group)
        if world < 1:
            raise ValueError(
                f"process_group must have this process, rank {dist.get_rank()}, in it, got "
                f"{self.process_group}"
            )
        return world

    def forward(self, input: Tensor) -> Tensor:
        world = self._world()
        if world == 1 or isinstance(input, Proxy):
            return super().forward(input)
        self._check_input_dim(input)
        statistics: tuple[Tensor, ...]
        statistics = self.running_mean, self.running_std, self.num_batches_tracked
        tracks = self.running_mean is not None
        if tracks and not self.track_running_stats:
            statistics = copies(*statistics)
        step = (
            *statistics,
            self.schedule,
            self.momentum if tracks else 0.0,
            self.eps,
            1.0,  # limits without a schedule, and so without moving statistics
            0.0,
            self.skip_nonfinite,
        )
        return _trained(
            input,
            self.weight,
            self.bias,
            step,
            self._clipping,
            self.process_group,
            world,
            self.running_mean,
        )

    _leaf = forward


class LazySyncBatchRenorm(_LazyBatchRenorm):
    """A SyncBatchRenorm whose num_features is found in its first input: what convert_sync makes of
    a LazyBatchRenorm. Arguments are those of :class:`LazyBatchRenorm1d`; process_group is an
    attribute."""

    _dims = SyncBatchRenorm._dims
    cls_to_become: type[nn.Module] = SyncBatchRenorm
    process_group: dist.ProcessGroup | None = None
