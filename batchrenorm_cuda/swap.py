"""Changing the class of layers inside a model: which ones, how, and a report of it.

A layer changes its class and its buffers and stays the object it is, as torch's lazy layers do when
they learn their size. So whatever holds on to the layer or its parameters (a second place in the
model, hooks, an optimiser, a list) goes on working, and what nn.Module keeps in the object
(training mode, hooks, parametrizations) need not be copied.

Everything is checked and computed first; then all layers change, and that cannot fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Model = TypeVar("Model", bound=nn.Module)  # a layer by itself comes back as another class
Skip = str | type | nn.Module | Callable[[str, nn.Module], bool]

BUFFERS = {"running_mean", "running_var", "running_std", "num_batches_tracked", "schedule"}


@dataclass(frozen=True)
class Outcome:
    """What became of one layer."""

    names: tuple[str, ...]  # every path to it, "" for the root
    before: str  # its class
    after: str | None  # None: left alone
    reason: str = ""  # why it was left alone


@dataclass(frozen=True)
class Report:
    """What convert or fold did, one Outcome a layer, in the order of the model. Prints as a
    table."""

    outcomes: tuple[Outcome, ...]

    @property
    def changed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.after is not None)

    @property
    def left(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.after is None)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} of {len(self.outcomes)} layers changed"]
        names = [", ".join(name or "(root)" for name in o.names) for o in self.outcomes]
        width = max(map(len, names), default=0)
        for name, o in zip(names, self.outcomes, strict=True):
            what = f"-> {o.after}" if o.after else f"left alone: {o.reason}"
            lines.append(f"  {name:{width}}  {o.before} {what}")
        return "\n".join(lines)


@dataclass
class Change:
    """A layer and what it is to become."""

    layer: nn.Module
    cls: type[nn.Module]
    settings: dict[str, Any]  # attributes to set
    obsolete: set[str]  # attributes to delete
    buffers: dict[str, Tensor | None]
    renamed: Mapping[str, tuple[str, ...]]  # buffers persistent or not as the one before was
    wide: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # new values, of another dtype

    def make(self) -> None:
        layer, attributes = self.layer, vars(self.layer)
        extra = {k: t for k, t in layer._buffers.items() if k not in BUFFERS}
        layer._buffers.clear()
        layer._buffers.update(self.buffers | extra)
        for p, values in self.wide.items():  # as Module.to() does it: p stays the object it is
            p.data = values
            if p.grad is not None:
                p.grad = p.grad.to(values.dtype)
        hidden = layer._non_persistent_buffers_set
        for old, new in self.renamed.items():
            if old in hidden:
                hidden.remove(old)
                hidden.update(new)
        hidden -= BUFFERS - self.buffers.keys()
        for name in self.obsolete:
            attributes.pop(name, None)
        attributes.update(self.settings)
        layer.__class__ = self.cls


def swap_layers(
    model: Model,
    kind: str,
    wanted: Callable[[nn.Module], bool],
    after: type[nn.Module],
    plan: Callable[[Any, str], Change | str],  # of a layer that is wanted
    skip: Skip | Iterable[Skip],
    report: Callable[[Report], object] | None,
) -> Model:
    if not (report is None or callable(report)):
        raise TypeError(f"report must be callable, such as print, got {report!r}")
    outcomes: list[Outcome] = []
    changes: list[Change] = []
    found = _find(model, wanted, _skips(skip))
    plans: list[Change | str] = []
    around: dict[nn.Module, str] = {}  # what has been left alone, of all that is in it
    for layer, names, skipped in found:
        with torch.inference_mode(False):  # which would make tensors that training cannot use
            plans.append("skip" if skipped else plan(layer, names[0]))
        if isinstance(plans[-1], str) and not skipped:
            for inner in layer.modules():
                if inner is not layer:
                    around.setdefault(inner, names[0] or "the model")
    for (layer, names, _), planned in zip(found, plans, strict=True):
        own = type(layer).__name__
        if not isinstance(planned, str) and layer in around:
            planned = f"it is part of {around[layer]}"
        if isinstance(planned, str):
            outcomes.append(Outcome(names, own, None, planned))
        else:
            changes.append(planned)
            outcomes.append(Outcome(names, own, planned.cls.__name__))
    for change in changes:
        change.make()

    if not found and not any(isinstance(m, after) for m in model.modules()):
        warnings.warn(
            f"{type(model).__name__} has no {kind} to change{_peers(model)}", stacklevel=3
        )
    result = Report(tuple(outcomes))
    alike: dict[tuple[str, str], list[str]] = {}  # a warning for each kind: there may be dozens
    for outcome in result.left:
        if outcome.reason != "skip":
            alike.setdefault((outcome.before, outcome.reason), []).append(outcome.names[0])
    for (own, reason), paths in alike.items():
        first, more = paths[0] or "the model", len(paths) - 1
        what = f"and {more} more, each a {own}, were" if more else f"a {own}, was"
        warnings.warn(
            f"{first}, {what} left alone: {reason}. Name {'them' if more else 'it'} in skip if "
            "that is right",
            stacklevel=3,
        )
    if report is not None:
        report(result)
    return model


def _peers(model: nn.Module) -> str:
    """What to say of the Batch Renorms of other libraries in a model."""
    found = [type(m) for m in model.modules() if "batchrenorm" in type(m).__name__.lower()]
    if not found:
        return ""
    return (
        f", and {len(found)} {found[0].__name__} of {found[0].__module__}: put layers of this "
        "package in their places, and batchrenorm_cuda.adopt reads their state"
    )


def _find(
    model: nn.Module, wanted: Callable[[nn.Module], bool], skips: list[Skip]
) -> list[tuple[nn.Module, tuple[str, ...], bool]]:
    """Every module that is `wanted`, with its names and whether one of them is to be skipped."""
    found: dict[int, tuple[nn.Module, list[str], list[bool]]] = {}
    used: set[object] = set()
    for name, module, skipped in _walk(model, skips, used):
        if wanted(module):
            _, names, skippeds = found.setdefault(id(module), (module, [], []))
            names.append(name)
            skippeds.append(skipped)
    for pattern in skips:
        if isinstance(pattern, str) and pattern not in used:
            raise ValueError(
                f"skip must name modules of the model, got {pattern!r}, which none has"
            )
        if isinstance(pattern, nn.Module) and pattern not in used:
            raise ValueError(
                f"skip must have modules of the model, got a {type(pattern).__name__} that is not "
                "in it"
            )
    return [(module, tuple(names), any(skipped)) for module, names, skipped in found.values()]


def _walk(
    model: nn.Module, skips: list[Skip], used: set[object]
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every path to every module. Notes in `used` which names, patterns and modules fit one."""

    def matches(skip: Skip, name: str, module: nn.Module) -> bool:
        if isinstance(skip, str):
            fits = fnmatchcase(name, skip)
            if fits:
                used.add(skip)
            return fits
        if isinstance(skip, type):
            return isinstance(module, skip)
        if isinstance(skip, nn.Module):
            if module is skip:
                used.add(skip)
            return module is skip
        return bool(skip(name, module))

    def walk(
        name: str, module: nn.Module, skipped: bool, above: tuple[int, ...]
    ) -> Iterator[tuple[str, nn.Module, bool]]:
        # A list, so that every pattern is tried.
        skipped = any([matches(skip, name, module) for skip in skips]) or skipped
        yield name, module, skipped
        for child_name, child in module._modules.items():
            if child is not None and id(child) not in above:
                path = f"{name}.{child_name}" if name else child_name
                yield from walk(path, child, skipped, (*above, id(child)))

    return walk("", model, False, (id(model),))


def _skips(skip: Any) -> list[Skip]:
    one = isinstance(skip, str | type | nn.Module) or not isinstance(skip, Iterable)
    skips = [skip] if one else list(skip)
    for each in skips:
        if not (isinstance(each, str | type) or callable(each)):
            raise TypeError(
                "skip must be a name, a type, a module, a predicate or several of them, got "
                f"{type(each).__name__}"
            )
    return skips


def class_of(layer: nn.Module) -> type[nn.Module]:
    """Its class as written: a parametrized object has one more."""
    return type(layer).__bases__[0] if is_parametrized(layer) else type(layer)


def like(layer: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """cls, or what torch makes of it for a parametrized object."""
    if not is_parametrized(layer):
        return cls
    parametrized: Any = type(layer)
    own = dict(vars(parametrized))
    for name in ("__dict__", "__weakref__", "__doc__"):
        own.pop(name, None)
    # Without any a parametrized object cannot be copied; torch's gives way to that of the class.
    if hasattr(cls, "__deepcopy__"):
        own.pop("__deepcopy__", None)
    else:
        own.setdefault("__deepcopy__", parametrized.__deepcopy__)
    return type(f"Parametrized{cls.__name__}", (cls,), own)
