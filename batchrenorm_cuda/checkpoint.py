"""Activation checkpointing: how a forward that runs again, to get its activations back, repeats the
first one exactly.

Run as a new step it would find moved statistics (other r and d, hence other gradients), move them
once more and count the batch twice. So the stats that the operator returns are written down where a
forward may run again, and read back where it does. They are written on the object that torch keeps
for that very purpose, its region; nothing is compared, no kernel is added, and nothing lives longer
than the graph:

* torch.utils.checkpoint with use_reentrant=False runs the forward under saved-tensor hooks that
  hold a _CheckpointFrame, and runs it again under hooks that hold the same frame;
* with use_reentrant=True, and in other checkpointing of that style, the forward runs inside the
  forward of an autograd.Function and again inside its backward, with the same ctx.

A layer may be called several times in a region: its calls are repeated in order. Regions may nest:
a forward is written on all those that it is a first run in, also while it is a repetition in one
further out.

A training forward inside a backward pass that repeats nothing known here is a step like any other,
as it has to be in a hook, but it warns, since it may be a repetition by checkpointing of another
make.

Inside torch.compile none of this runs: what is recomputed there is decided by torch, which does not
see that the statistics have moved in between. Checkpointing must then save the forward operator, by
a policy, checkpoint_context_fn; tracing raises an error where it does not. What was compiled before
and outside of any region cannot be seen to run inside one, and its repetition is a new step: only
checkpoint_context_fn helps.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

_OWN_FUNCTIONS = f"{__package__}.autograd"
_graph_task = torch._C._current_graph_task_id
_autograd = torch._C._autograd
_top_hooks = _autograd._top_saved_tensors_default_hooks
_Frame = getattr(checkpoint, "_CheckpointFrame", ())


class _Tape:
    """The stats of the training forwards in one region, by layer and in order."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._run: Any = None  # which repetition is on
        self._read: dict[int, int] = {}  # how far it has come, by layer

    def write(self, layer: Tensor, stats: Tensor) -> None:
        # The layer's tensor is held so that its id stays its own.
        self._layers.setdefault(id(layer), (layer, []))[1].append(stats)

    def read(self, layer: Tensor, run: Any) -> Tensor | None:
        """The next stats of the layer in this repetition; None for a layer that was not here the
        first time."""
        if run != self._run:
            self._run, self._read = run, {}
        if id(layer) not in self._layers:
            return None
        stats = self._layers[id(layer)][1]
        position = self._read.get(id(layer), 0)
        if position == len(stats):
            raise RuntimeError(
                f"activation checkpointing calls a BatchRenorm layer of {layer.size(0)} "
                f"channels more often than the {len(stats)} times of the forward that it repeats"
            )
        self._read[id(layer)] = position + 1
        return stats[position]


def _tape(region: Any) -> _Tape:
    return region.__dict__.setdefault("_batchrenorm_tape", _Tape())


def _hooks() -> list[tuple[Callable, Callable]]:
    """Saved-tensor hooks in force, outermost first. Only the top of their stack can be looked
    at."""
    found = []
    while (top := _top_hooks(True)) is not None:
        found.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in found:
        _autograd._push_saved_tensors_default_hooks(*pair)
    return found


def _frame_regions() -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Frames of non-reentrant checkpointing: those that run for the first time, and (frame, run)
    of those that run again."""
    first, again = [], []
    for pack, _ in _hooks():
        function = inspect.unwrap(pack)
        held = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        for value in held.values():
            if isinstance(value, _Frame):
                first.append(value)
            elif isinstance(value, weakref.ref) and isinstance(value(), _Frame):
                again.append((value(), pack))
    return first, again


def _function_regions() -> list[Any]:
    """The ctx of every autograd.Function whose forward we are in."""
    first = []
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals.get("ctx")
            if isinstance(ctx, FunctionCtx) and frame.f_globals["__name__"] != _OWN_FUNCTIONS:
                first.append(ctx)
        frame = frame.f_back
    return first


def _policy_saves(args: tuple) -> bool:
    """Whether the selective checkpointing that a forward is traced under keeps its outputs."""
    frame = sys._getframe()
    while frame is not None:
        mode = frame.f_locals.get("self") if frame.f_code.co_name == "__torch_dispatch__" else None
        if isinstance(mode, checkpoint._CachingTorchDispatchMode):
            context = checkpoint.SelectiveCheckpointContext(is_recompute=False)
            policy = mode.policy_fn(context, torch.ops.batchrenorm.forward.default, *args)
            saves = checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.PREFER_SAVE
            return policy is True or policy in saves
        frame = frame.f_back
    return False


def check_traced(*args: Any) -> None:
    """Called while torch.compile traces the forward operator with these arguments, on
    statistics."""
    if TracingContext.try_get() is None:
        return
    frames, _ = _frame_regions()
    if (frames or _function_regions()) and not _policy_saves(args):
        raise RuntimeError(
            "activation checkpointing and torch.compile together would repeat the forward of a "
            "BatchRenorm layer from moving statistics that it has moved already. Compile around "
            "the checkpoint, not inside it, and have it save what the layer computes: "
            "checkpoint(..., use_reentrant=False, "
            "context_fn=batchrenorm_cuda.checkpoint_context_fn)"
        )


def checkpoint_context_fn(
    policy: list | Callable[..., Any] | None = None, *, allow_cache_entry_mutation: bool = False
) -> tuple[Any, Any]:
    """Activation checkpointing under torch.compile that repeats what a model computes except for
    its BatchRenorm layers, whose statistics have moved since::

        def region(x):
            return checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_context_fn)

        torch.compile(region, fullgraph=True)

    A layer's output is then kept until the backward pass; its input is recomputed. Gradients are
    those without checkpointing, and statistics move once. With a policy of your own, what it saves
    is saved too: context_fn=functools.partial(checkpoint_context_fn, policy).

    Outside torch.compile repetitions are recognised without it, of every kind of checkpointing, and
    only [5, C] numbers are kept; it does no harm there. It is also right where a checkpoint that is
    not compiled calls what was compiled, by Inductor, before; without it that counts every batch
    twice, and gradients are wrong.

    Args:
        policy: list of operators to save, or function of context, operator and arguments, as
            torch.utils.checkpoint.create_selective_checkpoint_contexts takes them.
        allow_cache_entry_mutation: as there.

    Returns:
        Two contexts, for the first forward and for its repetition.
    """
    ours = torch.ops.batchrenorm.forward.default
    if policy is None:
        policy = []
    if isinstance(policy, list):
        rule: Any = [*policy, ours]
    elif callable(policy):

        def rule(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
            if op is ours:
                return checkpoint.CheckpointPolicy.MUST_SAVE
            return policy(context, op, *args, **kwargs)

    else:
        raise TypeError(
            f"policy must be a list of operators or a function, got {type(policy).__name__}"
        )
    return checkpoint.create_selective_checkpoint_contexts(rule, allow_cache_entry_mutation)


def may_repeat() -> bool:
    """Whether a training forward may run again in a backward pass, or is doing so now. Takes
    0.2 us; false in ordinary training."""
    return not torch.is_grad_enabled() or _graph_task() != -1 or _top_hooks(False) is not None


def warn_of_new_step() -> None:
    if _graph_task() != -1:
        warnings.warn(
            "a training forward inside a backward pass counts as a new batch. If it is there to "
            "repeat an earlier forward, gradients will be wrong: use torch.utils.checkpoint, whose "
            "repetitions are recognised",
            stacklevel=2,
        )


def repetition(layer: Tensor) -> tuple[Tensor | None, Callable[[Tensor], None] | None]:
    """What a training forward of the layer that owns the tensor `layer` repeats, and where it is
    written down.

    Returns the stats [5, C] to use, or None if this is a new step; and what to call with the stats
    that were used, or None.
    """
    first, again = _frame_regions()
    if not torch.is_grad_enabled():
        first += _function_regions()
    if not again and _graph_task() != -1:
        # A node that only reads its inputs may set off the repetition of a frame: frames come
        # first.
        node = torch._C._current_autograd_node()
        if "_batchrenorm_tape" in getattr(node, "__dict__", ()):
            again = [(node, _graph_task())]
    known = None
    for region, run in again:  # those further out count the calls inside inner repetitions too
        known = _tape(region).read(layer, run)
    if known is None:
        warn_of_new_step()
    tapes = [_tape(region) for region in first]
    return known, (lambda stats: [tape.write(layer, stats) for tape in tapes]) if tapes else None
