"""Activation checkpointing: how a forward that runs again, to get its activations back, repeats the
first one exactly.

Run as a new step it would find moved statistics (other r and d, hence other gradients), move them
once more and count the batch twice. Run in the mode that the layer is in by then it might not even
be the same step: model.eval() or freeze_statistics may have come in between. So what a forward did
is written down where it may run again, and done again where it does, whatever mode, limits or
momentum the layer has by then. It is written on the object that torch keeps for that very purpose,
its region; nothing is compared, no kernel is added to a training step, and nothing lives longer
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

Code that torch.compile has made runs none of this. There the operators themselves ask, where they
find that their thread is in a backward pass or under saved-tensor hooks: repeats.py. What they
cannot repeat is an error. A CUDA graph calls no operator when it is replayed: one that was captured
before, outside of any region, is a new step each time, seen by nobody. Nor is compiled inference in
the first run of a reentrant region: its repetition takes the statistics of its own time.

Where torch.compile sees the checkpoint itself, compiled around it, torch decides what is
recomputed, and does not see that the statistics have moved in between. Checkpointing must then save
the forward operator, by a policy, checkpoint_context_fn; tracing raises an error where it does not.
Nor does torch see it where it chooses by itself what to recompute (activation_memory_budget,
aggressive_recomputation): what takes a step is marked to be saved.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import traceback
from torch.utils import checkpoint

from . import _C

_OWN_FUNCTIONS = f"{__package__}.autograd"
_OF_TORCH = "torch._functorch", "torch._dynamo", "torch._higher_order_ops"
_graph_task = torch._C._current_graph_task_id
# Off in the forward of every autograd.Function, which is faster to see than the Function.
_forward_mode = torch._C._is_fwd_grad_enabled
_inference_mode = torch.is_inference_mode_enabled
_autograd = torch._C._autograd
_top_hooks = _autograd._top_saved_tensors_default_hooks
_Frame = getattr(checkpoint, "_CheckpointFrame", ())


Repeat = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""What a forward did, to be done again: called with x, weight and bias, it gives y and changes
nothing."""


class _Tape:
    """What the forwards in one region did, by layer and in order."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, list[Repeat]]] = {}
        self._run: Any = None  # which repetition is on
        self._read: dict[int, int] = {}  # how far it has come, by layer

    def write(self, layer: Tensor, repeat: Repeat) -> None:
        # The layer's tensor is held so that its address stays its own.
        self._layers.setdefault(_address(layer), (layer, []))[1].append(repeat)

    def read(self, layer: Tensor, run: Any) -> Repeat | None:
        """What the layer did next; None for a layer that was not here the first time."""
        if run != self._run:
            self._run, self._read = run, {}
        at = _address(layer)
        if at not in self._layers:
            return None
        repeats = self._layers[at][1]
        position = self._read.get(at, 0)
        if position == len(repeats):
            raise RuntimeError(
                f"activation checkpointing calls a BatchRenorm layer of {layer.size(0)} "
                f"channels more often than the {len(repeats)} times of the forward that it repeats"
            )
        self._read[at] = position + 1
        return repeats[position]


def _address(layer: Tensor) -> int:
    """Not its id: each call may have another view of the same memory."""
    return (layer.data_ptr() if type(layer) is Tensor else 0) or -id(layer)


def _tape(region: Any) -> _Tape:
    return region.__dict__.setdefault("_batchrenorm_tape", _Tape())


def _hooks() -> list[tuple[Callable, Callable]]:
    """Saved-tensor hooks in force, outermost first. Only the top of their stack can be looked
    at."""
    found: list[tuple[Callable, Callable]] = []
    while (top := _top_hooks(True)) is not None:
        found.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in found:
        _autograd._push_saved_tensors_default_hooks(*pair)
    return found


def _held(function: Callable) -> Iterator[Any]:
    """What a function has from around it."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing yet
            continue


def _frame_regions() -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Frames of non-reentrant checkpointing: those that run for the first time, and (frame, run)
    of those that run again."""
    first, again = [], []
    for pack, _ in _hooks():
        for value in _held(inspect.unwrap(pack)):
            if isinstance(value, _Frame):
                first.append(value)
            elif isinstance(value, weakref.ref) and isinstance(value(), _Frame):
                again.append((value(), pack))
    return first, again


def _contexts(frame: Any) -> Iterator[FunctionCtx]:
    """The ctx of every autograd.Function whose forward a stack is in, but for ours and those that
    torch.compile makes."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx, module = frame.f_locals.get("ctx"), frame.f_globals.get("__name__", "")
            if isinstance(ctx, FunctionCtx) and not module.startswith((_OWN_FUNCTIONS, *_OF_TORCH)):
                yield ctx
        frame = frame.f_back


def _policy_saves(op: Any, args: tuple) -> bool:
    """Whether the selective checkpointing that an operator is traced under keeps its outputs."""
    frame = sys._getframe()
    while frame is not None:
        mode = frame.f_locals.get("self") if frame.f_code.co_name == "__torch_dispatch__" else None
        if isinstance(mode, checkpoint._CachingTorchDispatchMode):
            context = checkpoint.SelectiveCheckpointContext(is_recompute=False)
            policy = mode.policy_fn(context, op, *args)
            saves = checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.PREFER_SAVE
            return policy is True or policy in saves
        frame = frame.f_back
    return False


def _traced_region() -> bool:
    """Whether torch.compile is tracing a region, as opposed to tracing inside one that it does not
    see."""
    frame = sys._getframe()
    while frame is not None:
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if module == "torch._dynamo.convert_frame":
            return False
        if code.co_name == "checkpoint" and module == checkpoint.__name__:
            return True
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            if isinstance(frame.f_locals.get("ctx"), FunctionCtx) and module != _OWN_FUNCTIONS:
                return True
        frame = frame.f_back
    return False


def check_traced(op: Any, *args: Any) -> None:
    """Called while torch.compile traces an operator that takes a training step, with these
    arguments, on statistics."""
    if TracingContext.try_get() is None:
        return
    if _traced_region() and not _policy_saves(op, args):
        raise RuntimeError(
            "activation checkpointing and torch.compile together would repeat the forward of a "
            "BatchRenorm layer from moving statistics that it has moved already. Compile around "
            "the checkpoint, not inside it, and have it save what the layer computes: "
            "checkpoint(..., use_reentrant=False, "
            "context_fn=batchrenorm_cuda.checkpoint_context_fn)"
        )


def save_when_traced() -> None:
    """Called while torch.compile traces an operator that takes a training step on statistics,
    before the node of its graph is made. Without this a backward pass that saves memory by
    activation_memory_budget or aggressive_recomputation takes the step again, from statistics that
    have moved. With a budget, a graph of layers and elementwise operations alone fails in torch's
    partitioner, with an AssertionError: it would save the layers' outputs in one tuple."""
    if TracingContext.try_get() is None or not traceback.has_preserved_node_meta():
        return
    meta = traceback.current_meta
    budget = meta.get("memory_budget", functorch_config.activation_memory_budget)
    if budget == 0:
        raise RuntimeError(
            "activation_memory_budget=0 has torch.compile repeat the forward of a BatchRenorm "
            "layer from statistics that have moved. Take a budget above 0: layers are saved then"
        )
    meta["recompute"] = checkpoint.CheckpointPolicy.MUST_SAVE


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

    Where the checkpoint itself is not compiled, repetitions are recognised without it, of every
    kind of checkpointing and also of compiled code, and only [5, C] numbers are kept. Then it saves
    what the policy saves except for the layers, whose outputs compiled code may overwrite.

    Args:
        policy: list of operators to save, or function of context, operator and arguments, as
            torch.utils.checkpoint.create_selective_checkpoint_contexts takes them.
        allow_cache_entry_mutation: as there.

    Returns:
        Two contexts, for the first forward and for its repetition.
    """
    if policy is not None and not isinstance(policy, list) and not callable(policy):
        raise TypeError(
            f"policy must be a list of operators or a function, got {type(policy).__name__}"
        )
    traced = TracingContext.try_get() is not None
    if policy is None and not traced:
        return nullcontext(), nullcontext()
    operators = torch.ops.batchrenorm
    ours = operators.forward.default, operators.training_step.default
    kinds = checkpoint.CheckpointPolicy
    save, recompute = kinds.MUST_SAVE, kinds.PREFER_RECOMPUTE

    def rule(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        if op in ours:
            return save if traced else recompute
        if callable(policy):
            return policy(context, op, *args, **kwargs)
        return save if op in (policy or ()) else recompute

    return checkpoint.create_selective_checkpoint_contexts(rule, allow_cache_entry_mutation)


def _hooks_are_legible() -> bool:
    """Whether _C sees saved-tensor hooks come and go."""
    before = _top_hooks(True) is not None
    try:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            inside = _C.under_saved_tensor_hooks()
    except RuntimeError:  # hooks may be forbidden
        return False
    return inside and _C.under_saved_tensor_hooks() == before


def _may_repeat_seen_from_python() -> bool:
    return _graph_task() != -1 or _top_hooks(False) is not None


_legible = _hooks_are_legible()
_C.trust_saved_tensor_hooks(_legible)
_may_repeat = _C.may_repeat if _legible else _may_repeat_seen_from_python


def may_repeat() -> bool:
    """Whether a forward may run again in a backward pass, or is doing so now. Takes 0.1 us; false
    in ordinary training and inference."""
    return _may_repeat() or not (_forward_mode() or _inference_mode())


def warn_of_new_step() -> None:
    if _graph_task() != -1:
        warnings.warn(
            "a training forward inside a backward pass counts as a new batch. If it is there to "
            "repeat an earlier forward, gradients will be wrong: use torch.utils.checkpoint, whose "
            "repetitions are recognised",
            stacklevel=2,
        )


def is_of_torch(region: Any) -> bool:
    """Whether it is torch.utils.checkpoint's, which runs a forward again for nothing else."""
    reentrant = getattr(type(region), "_forward_cls", None) is checkpoint.CheckpointFunction
    return reentrant or isinstance(region, _Frame)


def regions() -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Regions that run for the first time, as far as hooks show them, and (region, run) of those
    that run again."""
    first, again = _frame_regions()
    if not again and _graph_task() != -1:
        # A node that only reads its inputs may set off the repetition of a frame: frames come
        # first.
        node = torch._C._current_autograd_node()
        if is_of_torch(node) or "_batchrenorm_tape" in getattr(node, "__dict__", ()):
            again = [(node, _graph_task())]
    return first, again


def read(layer: Tensor, again: list[tuple[Any, Any]]) -> Repeat | None:
    """What is to be done again, of the layer that owns the tensor `layer`; None: a new step."""
    known = None
    for region, run in again:  # those further out count the calls inside inner repetitions too
        known = _tape(region).read(layer, run)
    return known


def write(layer: Tensor, first: list[Any], repeat: Repeat) -> None:
    for region in first:
        _tape(region).write(layer, repeat)


def repetition(
    layer: Tensor, training: bool
) -> tuple[Repeat | None, Callable[[Repeat], None] | None]:
    """What a forward of the layer that owns the tensor `layer` repeats, and where it is written
    down.

    Returns what to do again, or None if this is a new step; and what to call, before a tensor is
    saved for backward, with what is or was done, or None.

    Raises:
        RuntimeError: for a training step that torch.utils.checkpoint repeats and has not seen the
            first time.
    """
    first, again = regions()
    if not torch.is_grad_enabled():
        first += _contexts(sys._getframe())
    known = read(layer, again)
    if training and known is None and any(is_of_torch(region) for region, _ in again):
        raise RuntimeError(
            "activation checkpointing repeats the forward of a BatchRenorm layer of "
            f"{layer.size(0)} channels, and there is no record of what it did the first time: it "
            "was not called then, or it has other buffers now, by load_state_dict(assign=True), "
            ".to() or .double(). Gradients would be wrong: do that after the backward pass"
        )
    return known, (lambda repeat: write(layer, first, repeat)) if first else None
