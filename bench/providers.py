"""Who is measured. A provider makes a layer for a problem; the operations on it are the same for
all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    reference,
)

from . import OURS, PEER
from .shapes import Problem

EPS, MOMENTUM = 1e-5, 0.01


@dataclass
class Layer:
    """Training and inference as functions of x, and the parameters that backward also
    differentiates by."""

    train: Callable[[Tensor], Tensor]
    infer: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, Tensor]
    scope: Callable[[], object] = nullcontext  # what calls must run under


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Problem, torch.device], Layer]
    ops: tuple[str, ...] = ("forward", "backward", "inference", "train")
    devices: tuple[str, ...] = ("cpu", "cuda")

    def measures(self, op: str, device: torch.device) -> bool:
        return op in self.ops and device.type in self.devices


def _tensors(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, bias, and moving mean and std (or variance) that are neither 0 nor 1."""
    real = torch.float64 if problem.dtype == "float64" else torch.float32
    channels = problem.shape[1]
    weight = torch.linspace(0.5, 1.5, channels, dtype=real, device=device).requires_grad_()
    bias = torch.linspace(-1.0, 1.0, channels, dtype=real, device=device).requires_grad_()
    running = torch.full((channels,), 0.1, dtype=real, device=device)
    return weight, bias, running, running + 0.9


def _modules(
    kinds: dict[int, type[nn.Module]], problem: Problem, device: torch.device, **options
) -> Layer:
    """A module as users call it, counter and all: one in training mode and one in eval mode, with
    the same tensors."""
    weight, bias, mean, spread = _tensors(problem, device)
    kind = kinds[len(problem.shape)]
    layers = [
        kind(problem.shape[1], EPS, MOMENTUM, device=device, dtype=weight.dtype, **options)
        for _ in range(2)
    ]
    for layer in layers:
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        statistics = [name for name in layer._buffers if name.startswith("running_")]
        for name, value in zip(statistics, (mean, spread), strict=True):
            getattr(layer, name).copy_(value)
    training, inference = layers[0].train(), layers[1].eval()
    return Layer(training, inference, (training.weight, training.bias))


def _batchrenorm(problem: Problem, device: torch.device) -> Layer:
    """On the GPU too a module, as what it adds to the launch is to be timed: limits by a schedule
    and a counter that every replay moves on."""
    kinds = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
    limits = RenormSchedule(warmup_steps=0, r_max=3.0, r_max_step=0, d_max=5.0, d_max_step=0)
    return _modules(kinds, problem, device, schedule=limits)


def _reference(problem: Problem, device: torch.device, compiled: bool = False) -> Layer:
    weight, bias, mean, std = _tensors(problem, device)

    def call(x: Tensor, training: bool) -> Tensor:
        return reference.batch_renorm(x, mean, std, weight, bias, training, MOMENTUM, EPS, 3.0, 5.0)

    call = _compile(call) if compiled else call
    return Layer(lambda x: call(x, True), lambda x: call(x, False), (weight, bias))


def _batch_norm(
    problem: Problem, device: torch.device, compiled: bool = False, cudnn: bool = True
) -> Layer:
    # As a module on the CPU, where every microsecond of the host is in the figure. On CUDA a kernel
    # of its own for the module's counter would be in it, which is none of F.batch_norm's doing.
    if device.type == "cpu" and not compiled:
        kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        return _modules(kinds, problem, device)
    weight, bias, mean, var = _tensors(problem, device)

    def call(x: Tensor, training: bool) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)

    call = _compile(call) if compiled else call
    scope = nullcontext if cudnn else lambda: torch.backends.cudnn.flags(enabled=False)
    return Layer(lambda x: call(x, True), lambda x: call(x, False), (weight, bias), scope)


def _compile(call: Callable) -> Callable:
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()  # a program for each problem, not one for all of them
    torch._functorch.config.donated_buffer = (
        False  # backward is timed by itself, many times for one forward
    )
    return torch.compile(call, dynamic=False)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, _batchrenorm),
        Provider(PEER, _batch_norm),
        Provider("native", lambda p, d: _batch_norm(p, d, cudnn=False), devices=("cuda",)),
        Provider("compiled batch_norm", lambda p, d: _batch_norm(p, d, compiled=True)),
        Provider("reference", _reference),
        # Its gradients are wrong (see batchrenorm_cuda/reference.py), so only forward passes mean
        # something.
        Provider(
            "compiled reference",
            lambda p, d: _reference(p, d, compiled=True),
            ops=("forward", "inference"),
        ),
    )
}
DEFAULT = (OURS, PEER, "native")


def backend_of_peer(problem: Problem, device: torch.device, training: bool = True) -> str:
    """What F.batch_norm runs for the problem: PyTorch's own choice, asked for, not guessed."""
    if device.type != "cuda":
        return "native"
    weight, bias, mean, var = (t.detach() for t in _tensors(problem, device))
    x = problem.tensor(device)
    index = torch._batch_norm_impl_index(
        x, weight, bias, mean, var, training, MOMENTUM, EPS, torch.backends.cudnn.enabled
    )[-1]
    return {0: "native", 1: "cuDNN", 2: "MIOpen"}[index]


def operation(layer: Layer, op: str, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """The call to time. It returns what it made, so that the caller decides how long that lives."""
    if op == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return layer.infer(x)

        return infer

    x = x.detach().requires_grad_()
    inputs = (x, *layer.parameters)
    if op == "forward":
        return lambda: layer.train(x)
    if op == "train":
        return lambda: torch.autograd.grad(layer.train(x), inputs, dy)
    y = layer.train(x)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
