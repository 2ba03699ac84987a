"""Checkpoints of other Batch Renorms, by plain state_dicts and arrays; none of those libraries is
needed.

    model.load_state_dict(adopt.from_sb3(torch.load("critic.pt", weights_only=True)))

A model with BatchRenorm1d, 2d, 3d in the places of the peer's layers then infers what the peer's
did. The functions for torch libraries take the state_dict of a layer or of a whole model, of which
the other entries stay as they are; those for Keras and flax take one layer's arrays. All return a
state_dict of new tensors, in float32 or float64, and leave their arguments as they are.

Inference needs no eps, as running_std has it inside. Training on does: :data:`DEFAULTS` has the
constructor arguments that go with each peer's own defaults, as in BatchRenorm1d(256,
**adopt.DEFAULTS["sb3"]). No peer steps quite as this layer does (some average variances, some
unbiased ones, some keep two sets of statistics), so curves agree closely, not bitwise.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .schedule import RenormSchedule

# Keras and flax write 0.99 for a momentum of 0.01: the weight of the past. ludvb adds its 1e-3 to
# the standard deviation, not to the variance: the same for a constant channel, which is where it
# matters. KataGo's are those of its published networks.
DEFAULTS: dict[str, dict[str, float]] = {
    "ludvb": {"eps": 1e-6, "momentum": 0.01},
    "sb3": {"eps": 1e-3, "momentum": 0.01},
    "torchrl": {"eps": 1e-5, "momentum": 0.01},
    "avalanche": {"eps": 1e-5, "momentum": 0.01},
    "katago": {"eps": 1e-4, "momentum": 0.001},
    "keras": {"eps": 1e-3, "momentum": 0.01},
    "flax": {"eps": 1e-3, "momentum": 0.01},
}

# The paper's last limits, for trained layers that keep no count of batches.
_TRAINED = RenormSchedule.constant(3.0, 5.0)


def from_ludvb(
    state: Mapping[str, Any],
    *,
    affine: bool = True,
    schedule: RenormSchedule = RenormSchedule(),  # noqa: B008  immutable
) -> dict[str, Tensor]:
    """A state_dict of models with the BatchRenorm1d, 2d, 3d of github.com/ludvb/batchrenorm.

    Its running_std averages std + eps, and its inference divides by it, as this layer's does. Its
    schedule is the paper's, and so the default here.

    Args:
        state: names to tensors: weight, bias, running_mean, running_std, num_batches_tracked [C].
        affine: False for layers made with affine=False, whose weight and bias are not used; they
            are left out.
        schedule: what the layers go on with, at step num_batches_tracked.

    Raises:
        ValueError, TypeError: naming the argument or the entry and what it got, also if `state` has
            no such layer.
    """

    def layer(entries: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return _state(
            name,
            **_given(entries, affine),
            running_mean=entries["running_mean"],
            running_std=entries["running_std"],
            steps=entries["num_batches_tracked"],
            schedule=schedule,
        )

    return _layers(state, ("running_mean", "running_std", "num_batches_tracked"), layer)


def from_sb3(
    state: Mapping[str, Any],
    *,
    eps: float = 1e-3,
    affine: bool = True,
    schedule: RenormSchedule = RenormSchedule(100_001, 3.0, 100_001, 5.0, 100_001),  # noqa: B008
) -> dict[str, Tensor]:
    """A state_dict of models with the BatchRenorm1d of sb3-contrib (CrossQ).

    It averages the unbiased variance: running_std = sqrt(ra_var + eps). Its own schedule is the
    default here: BatchNorm up to step 100,000, and then 3 and 5 at once.

    Args:
        state: names to tensors: scale, bias, ra_mean, ra_var [C], steps.
        eps: that of its layers, in units of x squared.
        affine: False for layers made with affine=False, whose scale and bias are not used; they are
            left out.
        schedule: what the layers go on with, at step `steps`.

    Raises:
        ValueError, TypeError: naming the argument or the entry and what it got, also if `state` has
            no such layer.
    """
    _require_eps("eps", eps)

    def layer(entries: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return _state(
            name,
            weight=entries.get("scale") if affine else None,
            bias=entries.get("bias") if affine else None,
            running_mean=entries["ra_mean"],
            running_std=_root(entries["ra_var"], eps, f"{name}ra_var"),
            steps=entries["steps"],
            schedule=schedule,
        )

    return _layers(state, ("ra_mean", "ra_var", "steps"), layer)


def from_torchrl(
    state: Mapping[str, Any],
    *,
    eps: float = 1e-5,
    layers: str = "*",
    schedule: RenormSchedule = RenormSchedule(10_000, 3.0, 10_000, 5.0, 10_000),  # noqa: B008
) -> dict[str, Tensor]:
    """A state_dict of models with the BatchRenorm1d of torchrl (or of corenet: the same names).

    It averages an unbiased variance: running_std = sqrt(running_var + eps). The default schedule is
    what torchrl documents, BatchNorm for warmup_steps=10,000 and then 3 and 5; its code lets the
    limits grow on after that.

    Args:
        state: names to tensors: weight, bias, running_mean, running_var, num_batches_tracked [C]. A
            BatchNorm has the same.
        eps: that of its layers, in units of x squared.
        layers: name or fnmatch pattern of the layers to adopt, for a model that has BatchNorms as
            well.
        schedule: what the layers go on with, at step num_batches_tracked.

    Raises:
        ValueError, TypeError: naming the argument or the entry and what it got, also if `state` has
            no such layer.
    """
    _require_eps("eps", eps)

    def layer(entries: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return _state(
            name,
            **_given(entries),
            running_mean=entries["running_mean"],
            running_std=_root(entries["running_var"], eps, f"{name}running_var"),
            steps=entries["num_batches_tracked"],
            schedule=schedule,
        )

    return _layers(state, ("running_mean", "running_var", "num_batches_tracked"), layer, layers)


def from_avalanche(
    state: Mapping[str, Any], *, schedule: RenormSchedule | None = None
) -> dict[str, Tensor]:
    """A state_dict of models with the BatchRenorm2D of Avalanche.

    **Its statistics are not in its state_dict.** With gamma and beta alone, mean and standard
    deviation are 0 and 1, a warning says so, and inference is meaningless until the model has seen
    training batches. To have the same inference, add the attributes `running_avg_mean` and
    `running_avg_std` of its modules to `state`, beside gamma::

        for name, module in peer.named_modules():
            if isinstance(module, BatchRenorm2D):
                state[f"{name}.running_avg_mean"] = module.running_avg_mean
                state[f"{name}.running_avg_std"] = module.running_avg_std

    running_avg_std averages standard deviations with eps inside, as this layer does.

    Args:
        state: names to tensors: gamma, beta, and the two above [1, C, 1, 1].
        schedule: what the layers go on with, at step 0. Default: the limits 3 and 5 that Avalanche
            grows to, at once, for layers with statistics, and RenormSchedule() for those without.
            (Avalanche adds 1e-4 a sample.)

    Raises:
        ValueError, TypeError: naming the argument or the entry and what it got, also if `state` has
            no such layer.
    """
    without: list[str] = []

    def layer(entries: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        mean, std = entries.get("running_avg_mean"), entries.get("running_avg_std")
        known = mean is not None and std is not None
        if not known:
            without.append(name.removesuffix("."))
            mean, std = torch.zeros_like(entries["beta"]), torch.ones_like(entries["beta"])
        return _state(
            name,
            weight=entries["gamma"],
            bias=entries["beta"],
            running_mean=mean,
            running_std=std,
            steps=None,
            schedule=schedule or (_TRAINED if known else RenormSchedule()),
        )

    result = _layers(state, ("gamma", "beta"), layer)
    if without:
        warnings.warn(
            f"{len(without)} layers ({without[0] or 'the layer'}, ...) come without statistics, "
            "which Avalanche does not save: they must see training batches before they infer",
            stacklevel=2,
        )
    return result


def from_katago(
    state: Mapping[str, Any],
    *,
    scale: float | Callable[[str], float | None] | None = None,
    gamma_center_1: bool = False,
    schedule: RenormSchedule = _TRAINED,
) -> dict[str, Tensor]:
    """A state_dict of models with the NormMask of KataGo, of norm_kind bnorm, brenorm or
    fixbrenorm.

    Of its two sets of statistics this takes the one for inference, running_mean and running_std
    (with eps inside); r and d in training are then of this one, too. Layers without gamma get a
    weight of ones. The trainer sets KataGo's limits and keeps no count of batches, so
    num_batches_tracked is 0 and the default schedule has the limits 3 and 5 from the start.

    NormMask multiplies its output by the mask: do that after the layer. In training KataGo takes
    statistics of the masked-in points only; this layer, of all.

    Args:
        state: names to tensors: running_mean, running_std [C], beta and perhaps gamma [1, C, 1, 1];
            others are dropped.
        scale: the factor that set_scale gave the layers, which no state_dict has: a number for all
            of them, or a function of the layer's name. None: no factor. It goes into the weight.
        gamma_center_1: True for networks with gamma_weight_decay_center_1, which store gamma - 1.
        schedule: what the layers go on with, at step 0.

    Raises:
        ValueError, TypeError: naming the argument or the entry and what it got, also if `state` has
            no such layer.
    """

    def layer(entries: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        gamma = entries.get("gamma")
        weight = torch.ones_like(entries["beta"]) if gamma is None else gamma + gamma_center_1
        factor = scale(name.removesuffix(".")) if callable(scale) else scale
        if factor is not None and not (isinstance(factor, Real) and math.isfinite(factor)):
            where = f" for {name.removesuffix('.')}" if callable(scale) else ""
            raise TypeError(f"scale must be a finite number, got {factor!r}{where}")
        return _state(
            name,
            weight=weight if factor is None else weight * factor,
            bias=entries["beta"],
            running_mean=entries["running_mean"],
            running_std=entries["running_std"],
            steps=None,
            schedule=schedule,
        )

    return _layers(state, ("beta", "running_mean", "running_std"), layer)


def from_keras(
    arrays: Mapping[str, Any],
    *,
    epsilon: float = 1e-3,
    renorm_clipping: Mapping[str, float] | None = None,
    schedule: RenormSchedule | None = None,
) -> dict[str, Tensor]:
    """The state_dict of one layer, from a BatchNormalization of Keras 3 or tf_keras, with
    renorm=True or without::

        layer.load_state_dict(adopt.from_keras({w.name: w.numpy() for w in peer.weights}))

    Keras infers by sqrt(moving_variance + epsilon), and so running_std is that; moving_stddev and
    the second set of statistics (renorm_mean, renorm_stddev), which r and d in its training come
    from, are not used. The channel axis is not stored: bring inputs to [N, C, ...]. There is a
    weight and a bias for scale=True and center=True; a bias alone gets a weight of ones.

    Args:
        arrays: names ("gamma", or "block/norm/gamma:0") to arrays or variables: moving_mean,
            moving_variance [C], and perhaps gamma, beta.
        epsilon: the peer's, in units of x squared.
        renorm_clipping: the peer's, {"rmax": ..., "dmax": ...}; what is missing has no limit. rmin
            must be 1 / rmax if it is there, and is so here if it is not. Keras has no schedule: the
            limits hold from the start.
        schedule: what the layer goes on with, at step 0, in place of renorm_clipping.

    Raises:
        ValueError, TypeError: naming the argument or the array and what it got.
    """
    _require_eps("epsilon", epsilon)
    entries: dict[str, Tensor] = {}
    for key, value in _mapping(arrays, "arrays").items():
        name = key.split("/")[-1].split(":")[0]
        if name in entries:
            raise ValueError(f"arrays must be those of one layer, got {name} twice")
        entries[name] = _tensor(value, key)
    for name in ("moving_mean", "moving_variance"):
        if name not in entries:
            raise ValueError(f"arrays must have {name}, got {_listed(entries)}")
    if schedule is None:
        schedule = _keras_limits({} if renorm_clipping is None else renorm_clipping)
    return _state(
        "",
        **_weight_beside(entries.get("gamma"), entries.get("beta")),
        running_mean=entries["moving_mean"],
        running_std=_root(entries["moving_variance"], epsilon, "moving_variance"),
        steps=None,
        schedule=schedule,
    )


def from_flax(
    variables: Mapping[str, Any],
    layer: str | None = None,
    *,
    epsilon: float = 1e-3,
    warm_up_steps: int = 100_000,
    member: int | None = None,
    schedule: RenormSchedule | None = None,
) -> dict[str, Tensor]:
    """The state_dict of one layer, from the BatchRenorm of sbx or CrossQ (flax.linen)::

        adopt.from_flax({"params": qf.params, "batch_stats": qf.batch_stats},
        "VmapCritic_0/BatchRenorm_1", member=0)

    It averages the biased variance: running_std = sqrt(var + epsilon). The channel axis is the last
    in flax: bring inputs to [N, C, ...]. There is a weight and a bias for use_scale=True and
    use_bias=True; a bias alone gets a weight of ones.

    Args:
        variables: the nested mappings of arrays "batch_stats" and "params"; the former holds mean,
            var [C], r_max, d_max and steps of each layer, the latter scale and bias [C]. Any array
            type that numpy can read.
        layer: path in both of them, with slashes. None: the only layer there is.
        epsilon: the peer's, in units of x squared.
        warm_up_steps: the peer's: batches of BatchNorm before r_max and d_max apply at once.
        member: which one of an ensemble made by flax.linen.vmap, whose arrays are [members, C].
        schedule: what the layer goes on with, at step `steps`, in place of warm_up_steps, r_max and
            d_max.

    Raises:
        ValueError, TypeError: naming the argument or the array and what it got.
    """
    _require_eps("epsilon", epsilon)
    tree = _mapping(_mapping(variables, "variables").get("batch_stats"), "variables['batch_stats']")
    found = dict(_flax_layers(tree, ""))
    if layer is None and len(found) == 1:
        layer = next(iter(found))
    if layer not in found:
        raise ValueError(f"layer must be one of {sorted(found)}, got {layer!r}")

    entries: dict[str, Tensor] = {}
    for source in (found[layer], _at(variables.get("params", {}), layer)):
        for name, value in source.items():
            if not isinstance(value, Mapping):
                entries[name] = _member(_tensor(value, name), name, member)
    if schedule is None:
        r_max, d_max = float(entries.get("r_max", 3)), float(entries.get("d_max", 5))
        schedule = RenormSchedule(warm_up_steps, r_max, warm_up_steps, d_max, warm_up_steps)
    return _state(
        "",
        **_weight_beside(entries.get("scale"), entries.get("bias")),
        running_mean=entries["mean"],
        running_std=_root(entries["var"], epsilon, "var"),
        steps=entries.get("steps"),
        schedule=schedule,
    )


def _layers(
    state: Mapping[str, Any],
    required: tuple[str, ...],
    convert: Callable[[dict[str, Tensor], str], dict[str, Tensor]],
    pattern: str = "*",
) -> dict[str, Tensor]:
    """`state` with the entries of each layer, known by the names it must have, replaced by what
    `convert` makes of them."""
    by_layer: dict[str, dict[str, Any]] = {}
    for key, value in _mapping(state, "state").items():
        prefix, dot, name = key.rpartition(".")
        by_layer.setdefault(prefix + dot, {})[name] = value

    result: OrderedDict[str, Any] = OrderedDict()
    any_found = False
    for prefix, entries in by_layer.items():
        fits = fnmatchcase(prefix.removesuffix("."), pattern)
        ours = "schedule" in entries
        if ours or not fits or not entries.keys() >= {*required}:
            result.update({f"{prefix}{name}": value for name, value in entries.items()})
            continue
        any_found = True
        tensors = {name: _tensor(value, f"{prefix}{name}") for name, value in entries.items()}
        result.update({f"{prefix}{name}": t for name, t in convert(tensors, prefix).items()})
    if not any_found:
        of_names = "" if pattern == "*" else f" and a name like {pattern!r}"
        raise ValueError(
            f"state must have layers with {', '.join(required)}{of_names}, got {_listed(state)}"
        )
    if hasattr(state, "_metadata"):
        result._metadata = state._metadata  # type: ignore[attr-defined]
    return result


def _state(
    name: str,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_std: Tensor,
    steps: Tensor | None,
    schedule: RenormSchedule,
) -> dict[str, Tensor]:
    """The entries of one layer, checked."""
    if not isinstance(schedule, RenormSchedule):
        raise TypeError(f"schedule must be a RenormSchedule, got {type(schedule).__name__}")
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_std": running_std,
    }
    state = {key: _real(t).reshape(-1) for key, t in vectors.items() if t is not None}
    mean, std = state["running_mean"], state["running_std"]
    for key, t in state.items():
        if t.numel() != std.numel():
            raise ValueError(
                f"{name}{key} must have {std.numel()} channels, got {tuple(vectors[key].shape)}"
            )
    for key, t, right in (
        ("mean", mean, mean.isfinite()),
        ("standard deviation", std, std.isfinite() & (std > 0)),
    ):
        if not bool(right.all()):
            wanted = "finite" if key == "mean" else "finite and > 0"
            layer = name.removesuffix(".") or "the layer"
            raise ValueError(
                f"the moving {key} of {layer} must be {wanted}, got "
                f"{t[~right][0].item()} in {int((~right).sum())} of {t.numel()} channels"
            )
    steps = std.new_zeros(()) if steps is None else steps
    counter = steps.to(std.device, torch.int64)
    if steps.numel() != 1 or not bool((steps.isfinite() & (steps >= 0) & (counter >= 0)).all()):
        layer = name.removesuffix(".") or "the layer"
        raise ValueError(f"the step of {layer} must be one number >= 0, got {steps.tolist()}")
    state["num_batches_tracked"] = counter.reshape(())
    state["schedule"] = schedule.as_tensor(std.device)
    return state


def _given(entries: dict[str, Tensor], affine: bool = True) -> dict[str, Tensor | None]:
    return {name: entries.get(name) if affine else None for name in ("weight", "bias")}


def _weight_beside(weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor | None]:
    """A layer here has no bias without a weight."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return {"weight": weight, "bias": bias}


def _root(var: Tensor, eps: float, name: str) -> Tensor:
    """sqrt(var + eps), rounded once."""
    if not bool((var >= 0).all()):
        raise ValueError(f"{name} must be >= 0, got {var[~(var >= 0)][0].item()}")
    return (var.double() + eps).sqrt().to(_real(var).dtype)


def _real(t: Tensor) -> Tensor:
    return t if t.is_floating_point() else t.float()


def _tensor(value: Any, name: str) -> Tensor:
    """A new tensor, of float32, float64 or integers."""
    if isinstance(value, Tensor):
        t = value.detach().clone()
    else:
        if hasattr(value, "numpy"):  # a variable of TensorFlow or Keras
            value = value.numpy()
        if hasattr(value, "__array__"):
            value = value.__array__()
            if str(value.dtype) in ("float16", "bfloat16"):  # the latter of which torch cannot read
                value = value.astype("float32")
        try:
            t = torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}") from None
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names to tensors, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} must be a mapping of names to tensors, got the key {key!r}")
    return value


def _listed(names: Mapping[str, Any]) -> str:
    first = [str(name) for name in names][:8]
    return f"{', '.join(first) or 'nothing'}{', ...' if len(names) > len(first) else ''}"


def _require_eps(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _keras_limits(clipping: Mapping[str, float]) -> RenormSchedule:
    if not isinstance(clipping, Mapping) or clipping.keys() - {"rmax", "rmin", "dmax"}:
        raise ValueError(f"renorm_clipping must have rmax, rmin, dmax only, got {clipping!r}")
    given: dict[str, float] = {}
    for key, value in clipping.items():
        try:
            given |= {} if value is None else {key: float(value)}
        except (TypeError, ValueError):
            raise TypeError(f"renorm_clipping must have numbers, got {clipping!r}") from None
    r_max = given.get("rmax", math.inf)
    if not r_max >= 1:
        raise ValueError(f"renorm_clipping must have rmax >= 1, got {clipping!r}")
    if not math.isclose(given.get("rmin", 1 / r_max), 1 / r_max, rel_tol=1e-6):
        raise ValueError(f"renorm_clipping must have rmin = 1 / rmax, got {clipping!r}")
    return RenormSchedule.constant(r_max, given.get("dmax", math.inf))


def _flax_layers(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if {"mean", "var"} <= tree.keys():
        yield path, tree
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _flax_layers(branch, f"{path}/{name}" if path else name)


def _at(tree: Any, path: str) -> Mapping[str, Any]:
    """The branch of that path, empty if there is none: a layer without scale and bias has no
    params."""
    for name in filter(None, path.split("/")):
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree if isinstance(tree, Mapping) else {}


def _member(t: Tensor, name: str, member: int | None) -> Tensor:
    vector = name in ("mean", "var", "scale", "bias")
    if t.dim() == vector:
        return t
    if t.dim() != vector + 1:
        raise ValueError(f"{name} must have shape [C] or [members, C], got {tuple(t.shape)}")
    if not isinstance(member, Integral) or not -len(t) <= member < len(t):
        raise ValueError(f"member must be one of the {len(t)} in the ensemble, got {member!r}")
    return t[member]
