"""The verdict on one case in one dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import compute, tensors
from .cases import Case
from .tolerance import Accuracy, accuracy

RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_std")


@dataclass
class Verdict:
    case: str
    dtype: torch.dtype
    results: dict[str, Accuracy] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # what is wrong other than a number's accuracy

    @property
    def used(self) -> float:
        """The largest part of its allowance that a result took."""
        return max((a.used for a in self.results.values()), default=0.0)

    @property
    def ok(self) -> bool:
        return not self.faults and all(a.ok for a in self.results.values())


def _bits(t: Tensor) -> Tensor:
    """Bit patterns: two NaN are the same, 0 and -0 are not."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(integers)


def differing(first: compute.Results, second: compute.Results) -> list[str]:
    """The names of the results that are not the same to the last bit."""
    return [name for name in first if not torch.equal(_bits(first[name]), _bits(second[name]))]


def judge(verdict: Verdict, found: compute.Results, case: Case, t: tensors.Tensors) -> None:
    """Fills in the accuracies. Where PyTorch refuses the case, only the ceiling holds."""
    truth, scale = compute.by_float64(case, t), compute.scales(case, t)
    try:
        peer = compute.by_pytorch(case, t)
    except (RuntimeError, ValueError):
        peer = {}
    for name in RESULTS:
        if (name in found) != (name in truth):
            verdict.faults.append(
                f"{name} is {'missing' if name in truth else 'there and should not be'}"
            )
        elif name in truth:
            verdict.results[name] = accuracy(found[name], peer.get(name), truth[name], scale[name])


def check(case: Case, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Runs the case twice and compares with the truth, with the peer, and with itself. Never raises
    for a fault of the operators: an exception is a verdict too."""
    verdict = Verdict(case.name, dtype)
    try:
        t = tensors.make(case, dtype, device)
        found, steps = compute.by_op(case, t)
        again, _ = compute.by_op(case, t)
        judge(verdict, found, case, t)
    except Exception as error:  # the remaining cases are worth running, whatever it is
        verdict.faults.append(f"{type(error).__name__}: {error}")
        return verdict

    if changed := differing(found, again):
        verdict.faults.append(f"two runs differ in {', '.join(changed)}")
    if steps is not None and steps != case.step + case.training:
        verdict.faults.append(f"num_batches_tracked is {steps}, not {case.step + case.training}")
    if not tensors.has_strides(found["y"], tensors.expected_strides(t.x)):
        verdict.faults.append(f"y has strides {found['y'].stride()}, x {t.x.stride()}")
    for name, like in {"y": t.x, "dx": t.x, "dweight": t.weight, "dbias": t.bias}.items():
        if name in found and found[name].dtype != like.dtype:
            verdict.faults.append(f"{name} is {found[name].dtype}, not {like.dtype}")
    return verdict
