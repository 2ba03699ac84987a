"""What a forward did, so that checkpoint.py can have it done again; and the two operators by which
compiled code takes part in that.

The operators forward and inference call `recall` before they compute and `record` after, where they
find that their thread is in a backward pass or under saved-tensor hooks (csrc/binding/regions.h).
In eager mode that has been seen to by then.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _ops, checkpoint
from .autograd import apply_inference, apply_repeated_training, wants_gradient


def copies(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies that selective checkpointing, which numbers the calls of each operator, does not see:
    a repetition may make others, or none."""
    eager = not torch.compiler.is_compiling() and checkpoint.may_repeat()
    with _disable_current_modes() if eager else nullcontext(), torch.no_grad():
        return tuple([t.clone() for t in tensors])


@dataclass(frozen=True)
class TrainingRepeat:
    """A training step with its statistics: they are not taken again, and nothing moves."""

    stats: Tensor
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if wants_gradient(x, weight, bias):
            return apply_repeated_training(x, weight, bias, self.stats, self.eps)
        return _ops.renormalize(x, weight, bias, self.stats)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


@dataclass(frozen=True)
class InferenceRepeat:
    """Inference by the moving statistics of that time."""

    running_mean: Tensor
    running_std: Tensor
    version: int | None = None  # of the layer's, which changes with them

    @classmethod
    def by(cls, running_mean: Tensor, running_std: Tensor) -> InferenceRepeat:
        mean, std = copies(running_mean, running_std)
        return cls(mean, std, _version(running_mean))

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        forward = apply_inference if wants_gradient(x, weight, bias) else _ops.inference
        return forward(x, weight, bias, self.running_mean, self.running_std)


_this_thread = threading.local()


@contextmanager
def seen_to() -> Iterator[None]:
    """Around operators whose caller has asked checkpoint.py himself."""
    before = getattr(_this_thread, "seen_to", False)
    _this_thread.seen_to = True
    try:
        yield
    finally:
        _this_thread.seen_to = before


_AROUND = (
    "Compile around the checkpoint: torch.compile(lambda x: checkpoint(model, x, "
    "use_reentrant=False, context_fn=batchrenorm_cuda.checkpoint_context_fn))"
)


def _refuse_cuda_graphs() -> None:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "") == "torch._inductor.cudagraph_trees":
            raise RuntimeError(
                "torch.compile captures a CUDA graph of a BatchRenorm layer inside activation "
                f"checkpointing that it does not see, and replays would repeat nothing. {_AROUND}, "
                "or without CUDA graphs"
            )
        frame = frame.f_back


def _recalled(running_mean: Tensor, training: bool) -> Tensor | None:
    first, again = checkpoint.regions()
    if first or again:
        _refuse_cuda_graphs()
    known = checkpoint.read(running_mean, again)
    if training and isinstance(known, TrainingRepeat):
        return known.stats.clone()
    if not training and isinstance(known, InferenceRepeat):
        if known.version != _version(running_mean):
            raise RuntimeError(
                "activation checkpointing repeats the inference of a compiled BatchRenorm layer, "
                "whose moving statistics have changed in between. Change them after the backward "
                "pass"
            )
        return None
    if known is not None:
        was, now = ("inference", "training") if training else ("training", "inference")
        raise RuntimeError(
            f"activation checkpointing repeats in {now} mode what a compiled BatchRenorm layer did "
            f"in {was} mode: model.train(), model.eval() or freeze_statistics came in between, and "
            "compiled code does what it was compiled for. Call it after the backward pass"
        )
    if training:
        if any(checkpoint.is_of_torch(region) for region, _ in again):
            raise RuntimeError(
                "activation checkpointing repeats the forward of a BatchRenorm layer that is "
                "compiled, or under forward-mode AD or torch.func, and there is no record of what "
                "it did the first time. Statistics have moved since, "
                f"or the mode has changed: gradients would be wrong. {_AROUND}"
            )
        checkpoint.warn_of_new_step()
    return None


_library = torch.library.Library("batchrenorm", "FRAGMENT")
_library.define("recall(Tensor running_mean, bool training) -> Tensor")
_library.define("record(Tensor running_mean, Tensor running_std, Tensor? stats, float eps) -> ()")


@torch.library.impl(_library, "recall", "CompositeExplicitAutograd")
def _(running_mean: Tensor, training: bool) -> Tensor:
    """The stats of the forward that this is a repetition of, or an empty tensor, or the text of an
    error."""
    with _disable_current_modes():
        try:
            seen = getattr(_this_thread, "seen_to", False)
            stats = None if seen else _recalled(running_mean, training)
        except Exception as error:
            return torch.frombuffer(bytearray(str(error).encode()), dtype=torch.uint8)
        return running_mean.new_empty(0) if stats is None else stats


@torch.library.impl(_library, "record", "CompositeExplicitAutograd")
def _(running_mean: Tensor, running_std: Tensor, stats: Tensor | None, eps: float) -> None:
    if getattr(_this_thread, "seen_to", False):
        return
    with _disable_current_modes():
        first, _ = checkpoint.regions()
        if not first:
            return
        if stats is None:
            repeat: checkpoint.Repeat = InferenceRepeat.by(running_mean, running_std)
        else:  # a copy: it is compiled code's own, which may use its memory for something else
            repeat = TrainingRepeat(stats.clone(), eps)
        checkpoint.write(running_mean, first, repeat)


torch.utils.checkpoint.SAC_IGNORED_OPS.update(
    (torch.ops.batchrenorm.recall.default, torch.ops.batchrenorm.record.default)
)
