"""Checks of where and how a call runs: streams, graphs, launches, other devices, sizes past 32
bits.

Each takes a device, raises Skip where the device cannot show it, and returns what it found wrong,
in words. What is compared is bits, as the operators are deterministic. On the CPU, which has no
streams and no graphs, the same code runs with a stream and a graph that do nothing, so that a fault
of the check itself shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from batchrenorm_cuda import functional

from . import compute, tensors
from .cases import CASES, Case
from .check import differing
from .tolerance import accuracy


class Skip(Exception):
    """The device at hand cannot show it."""


@dataclass(frozen=True)
class Situation:
    name: str
    why: str
    check: Callable[[torch.device], list[str]]
    quick: bool = True


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Replay:
    """A step recorded once and repeated at will: a CUDA graph, and on the CPU the step itself."""

    def __init__(self, step: Callable[[], compute.Results], device: torch.device) -> None:
        self._step, self._graph = step, None
        if device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = step()

    def __call__(self) -> compute.Results:
        if self._graph is None:
            self._results = self._step()
        else:
            self._graph.replay()
        return self._results


class Trainer:
    """A layer in training with one input and one cotangent that stay where they are in memory."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.tensors = tensors.make(case, torch.float32, device)
        self.module = compute.make_module(case, self.tensors)
        self.x = self.tensors.x.clone().requires_grad_()

    def feed(self, step: int) -> None:
        """Another batch: each step's is different, and the same for every trainer."""
        with torch.no_grad():
            self.x.copy_(self.tensors.x * (1.0 + 0.5 * step) + step)

    def step(self) -> compute.Results:
        inputs = [self.x, self.module.weight, self.module.bias]
        y = self.module(self.x)
        return dict(
            zip(
                ("y", "dx", "dweight", "dbias"),
                (y, *torch.autograd.grad(y, inputs, self.tensors.dy)),
                strict=True,
            )
        )

    def state(self) -> compute.Results:
        return {name: buffer for name, buffer in self.module.named_buffers()}


def copied(results: compute.Results) -> compute.Results:
    return {name: t.detach().clone() for name, t in results.items()}


def _trained(case: Case, device: torch.device, steps: int) -> list[compute.Results]:
    """What each of several ordinary steps gives, state included: what every other way of running
    them must give."""
    trainer = Trainer(case, device)
    history = []
    for step in range(steps):
        trainer.feed(step)
        history.append(copied(trainer.step() | trainer.state()))
    return history


# The limits move with every one of the steps below.
_MOVING = Case(
    "moving limits",
    (4, 6, 20, 20),
    "",
    large=(32, 64, 56, 56),
    running="far",
    schedule=(1.0, 3.0, 5.0, 5.0, 4.0),
    module=True,
)


def other_stream(device: torch.device) -> list[str]:
    wanted = _trained(_MOVING, device, 3)
    trainer, stream = Trainer(_MOVING, device), _stream(device)
    faults = []
    with _on(stream):
        for step, want in enumerate(wanted):
            trainer.feed(step)
            found = copied(trainer.step() | trainer.state())
            if stream is not None:
                stream.synchronize()
            faults += [f"step {step}: {name} differs" for name in differing(want, found)]
    return faults


def two_streams(device: torch.device) -> list[str]:
    wanted = _trained(_MOVING, device, 6)
    trainers = [(Trainer(_MOVING, device), _stream(device)) for _ in range(2)]
    found: list[list[compute.Results]] = [[], []]
    for step in range(
        len(wanted)
    ):  # no synchronisation: the launches of both overlap where the device lets them
        for (trainer, stream), history in zip(trainers, found, strict=True):
            with _on(stream):
                trainer.feed(step)
                history.append(copied(trainer.step() | trainer.state()))
    synchronize(device)
    return [
        f"stream {which}, step {step}: {name} differs"
        for which, history in enumerate(found)
        for step, want in enumerate(wanted)
        for name in differing(want, history[step])
    ]


def graph_replay(device: torch.device) -> list[str]:
    wanted = _trained(_MOVING, device, 6)
    trainer, stream = Trainer(_MOVING, device), _stream(device)
    before = copied(trainer.state())
    with _on(stream):
        trainer.step()  # a graph records what a warm process does
        for name, buffer in trainer.state().items():
            buffer.copy_(before[name])
    synchronize(device)
    replay = Replay(trainer.step, device)
    faults = []
    for step, want in enumerate(wanted):
        trainer.feed(step)
        found = copied(replay() | trainer.state())
        _trained(_MOVING, device, 1)  # ordinary work beside the graph must not disturb it
        faults += [f"replay {step}: {name} differs" for name in differing(want, found)]
    return faults


def graph_sees_new_limits(device: torch.device) -> list[str]:
    trainer = Trainer(_MOVING, device)
    trainer.step()
    replay = Replay(trainer.step, device)
    schedule = trainer.module.schedule
    outcomes = []
    for r_max in (1.0, 3.0):
        trainer.module.running_std.fill_(1e-3)
        schedule.copy_(schedule.new_tensor([0.0, r_max, 0.0, 0.0, 0.0]))
        outcomes.append(replay()["y"].detach().clone())
    bias = tensors.column(trainer.module.bias.detach(), outcomes[0])
    spread = [(y - bias).abs().max().item() for y in outcomes]
    ratio = spread[1] / spread[0]
    return [] if abs(ratio - 3.0) < 1e-3 else [f"r_max from 1 to 3 scaled y by {ratio:.4g}"]


def empty_batch(device: torch.device) -> list[str]:
    trainer = Trainer(_MOVING, device)
    before = copied(trainer.state())
    x = trainer.x.detach()[:0].requires_grad_()
    y = trainer.module(x)
    dx, dweight, dbias = torch.autograd.grad(
        y, [x, trainer.module.weight, trainer.module.bias], torch.ones_like(y)
    )
    faults = [
        f"{name} has shape {tuple(t.shape)}"
        for name, t in {"y": y, "dx": dx}.items()
        if t.shape != x.shape
    ]
    faults += [
        f"{name} is not zero" for name, t in {"dweight": dweight, "dbias": dbias}.items() if t.any()
    ]
    return faults + [f"{name} changed" for name in differing(before, trainer.state())]


def other_device(device: torch.device) -> list[str]:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skip("needs two CUDA devices")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    case = _case("4-D")
    here, there = (
        compute.by_op(case, tensors.make(case, torch.float32, d))[0] for d in (device, other)
    )
    moved = {name: t.to(device) for name, t in there.items()}
    return [f"{name} differs" for name in differing(here, moved)]


# What would be a kernel of its own on CUDA; of its own accord the CPU shows only which operators
# ran.
_WORK = ("batchrenorm::", "aten::copy_", "aten::fill_", "aten::zero_", "aten::add", "aten::mul")


@contextmanager
def recorded(device: torch.device) -> Iterator[list[str]]:
    """Collects the names of what ran in the block: everything that the device executed, kernels,
    copies and fills; on the CPU the operators that do work."""
    names: list[str] = []
    cuda = device.type == "cuda"
    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        yield names
        synchronize(device)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA if cuda else event.name.startswith(_WORK):
            names.append(event.name)


def launches(case: Case, device: torch.device) -> tuple[list[str], list[str]]:
    """What runs in one warm forward and in one backward of the case in float32."""
    trainer = Trainer(case, device)
    trainer.step()
    with recorded(device) as forward:
        y = trainer.module(trainer.x)
    dy = torch.empty_like(y).copy_(trainer.tensors.dy)  # of another format it would need a copy
    inputs = [trainer.x, trainer.module.weight, trainer.module.bias]
    with recorded(device) as backward:
        torch.autograd.grad(y, inputs, dy)
    return forward, backward


def one_launch(device: torch.device) -> list[str]:
    faults = []
    for name in ("4-D", "channels_last", "256 x 256", "several blocks a channel", "several rounds"):
        passes = launches(_case(name), device)
        if not any(passes):
            raise Skip("the profiler sees nothing that the device does (may it use CUPTI?)")
        for way, ran in zip(("forward", "backward"), passes, strict=True):
            if len(ran) != 1:
                faults.append(f"{name}, {way}: {len(ran)} launches, not 1: {', '.join(ran)}")
    return faults


def no_synchronisation(device: torch.device) -> list[str]:
    if device.type != "cuda":
        raise Skip("the CPU does not wait for itself")
    trainer = Trainer(_MOVING, device)
    trainer.step()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    except RuntimeError as error:
        return [f"the host waited: {error}"]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return []


def repeated(device: torch.device, copies: int, spatial: int, channels_last: bool) -> list[str]:
    """A batch of `copies` of one example has that example's statistics, y and dx, and `copies`
    times its dweight."""
    case = Case("repeated", (1, 2, spatial), "", running="absent")
    t = tensors.make(case, torch.float16, device)
    truth, scale = compute.by_float64(case, t), compute.scales(case, t)

    def repeat(example: Tensor) -> Tensor:
        if not channels_last:
            return example.repeat(copies, 1, 1)
        return example.transpose(1, 2).repeat(copies, 1, 1).transpose(1, 2)

    x, dy = repeat(t.x).requires_grad_(), repeat(t.dy)
    weight, bias = t.weight.clone().requires_grad_(), t.bias.clone().requires_grad_()
    y = functional.batch_renorm(x, None, None, weight, bias, True, case.momentum, case.eps)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy)
    faults = []
    for name, of_all in {"y": y.detach(), "dx": dx}.items():
        if any(not torch.equal(example, of_all[0]) for example in of_all):
            faults.append(f"{name} is not the same for every copy")
        if not (found := accuracy(of_all[:1], None, truth[name], scale[name])).ok:
            faults.append(f"{name}: error {found.error:.3g} eps, allowed {found.allowed:.3g} eps")
    for name, of_all in {"dweight": dweight, "dbias": dbias}.items():
        if not (found := accuracy(of_all / copies, None, truth[name], scale[name])).ok:
            faults.append(f"{name}: error {found.error:.3g} eps, allowed {found.allowed:.3g} eps")
    return faults


def past_32_bits(device: torch.device) -> list[str]:
    copies, spatial = 5, 1 << 10
    if device.type == "cuda":
        copies, spatial = (1 << 10) + 1, 1 << 20
        needed = 6 * copies * spatial * 2 * torch.finfo(torch.float16).bits // 8
        if torch.cuda.mem_get_info(device)[0] < needed:
            raise Skip(f"needs {needed / 1e9:.0f} GB of free memory")
    faults = []
    for channels_last in (False, True):
        form = "channels_last" if channels_last else "contiguous"
        faults += [f"{form}: {fault}" for fault in repeated(device, copies, spatial, channels_last)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return faults


SITUATIONS = [
    Situation(
        "one launch each way",
        "the promise: one kernel forward, one backward, no fill and no copy",
        one_launch,
    ),
    Situation(
        "no synchronisation", "a training step never waits for the device", no_synchronisation
    ),
    Situation("other stream", "work goes to the caller's stream", other_stream),
    Situation("two streams at once", "blocks that meet must be of one launch", two_streams),
    Situation("graph replay", "limits and counter advance on replay", graph_replay),
    Situation(
        "graph sees new limits",
        "they are read from the buffer, not recorded",
        graph_sees_new_limits,
    ),
    Situation("empty batch", "an empty rank or the end of a loader: nothing happens", empty_batch),
    Situation(
        "other device", "the launch goes to x's device, not to the current one", other_device
    ),
    Situation("more than 2^31 elements", "offsets are 64 bits wide", past_32_bits, quick=False),
]
