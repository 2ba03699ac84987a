"""One rule for "close enough", used by the parity harness and by every numerical test.

An error is measured against a float64 truth, divided by the scale of the channel it happened in,
and then held to

    error <= min(factor * peer, ceiling * eps) + spare * eps

where `peer` is the error, measured the same way, of plain PyTorch computing the same thing in the
same dtype, and eps is the rounding unit of the dtype that the result is stored in.

* The scale is the size of the terms that the result is made of, channel by channel, not the size of
  the result: a sum may cancel, and dx of two values a channel is nothing but cancellation. A scale
  common to all channels would hide a wrong channel behind one with a small std. Where no scale is
  given it is the largest truth of the channel.
* Alone, the peer is too tight where it is right by luck. Of a result with many values a channel (y,
  dx) it is the largest of many errors, and luck averages out: one spare eps, since storing an exact
  result may cost half. A result of one number a channel (dweight, dbias, moving averages) has as
  many errors as channels, perhaps one, and in float64 the moving averages of peer and truth may
  agree to the last bit: four spare eps, about what a sum of right terms is off by.
* Alone, the peer is too loose where PyTorch itself is bad: at mean / std = 1e4 its error is
  hundreds of eps. The kernels subtract a pivot first, so nothing of that is theirs, and the ceiling
  says so. It counts roundings, doubled: y takes six of half an eps each. A sum in chains of n
  additions is off by 0.2 sqrt(n) eps of its terms' root sum of squares, and its worst channel of
  hundreds by four times that: six for chains of 64, as a tile of a kernel makes them.
* Alone, the ceiling is too loose where PyTorch is good, as in half precision, where an error is all
  storage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
CEILING = {"many": 8.0, "one": 12.0}  # eps, by how many values a result has a channel
SPARE = {"many": 1.0, "one": 4.0}


@dataclass(frozen=True)
class Accuracy:
    """What was found and what the rule allows, both in units of eps."""

    error: float
    peer: float
    allowed: float

    @property
    def used(self) -> float:
        """The part of the allowance that the error took: above 1 the rule is broken."""
        return self.error / self.allowed

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for a NaN


def by_channel(t: Tensor) -> Tensor:
    """[N, C, ...] or [C] as [C, values]; the layout that the rule works on."""
    return t.unsqueeze(1) if t.dim() == 1 else t.transpose(0, 1).flatten(1)


def largest_error(actual: Tensor, truth: Tensor, scale: Tensor | None, eps: float) -> float:
    """The largest error of any channel, in units of eps of that channel's scale [C]. NaN and inf
    are right only where the truth is not finite either, and then not compared further; anywhere
    else they are an infinite error."""
    if actual.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    found, wanted = by_channel(actual.double()), by_channel(truth.double())
    finite = torch.isfinite(wanted)
    if bool((torch.isfinite(found) != finite).any()):
        return float("inf")
    zero = wanted.new_zeros(())
    difference = torch.where(finite, found - wanted, zero).abs().amax(1)
    if scale is None:
        scale = torch.where(finite, wanted, zero).abs().amax(1)
    scale = torch.nan_to_num(scale.double(), nan=0.0, posinf=0.0)
    relative = torch.where(difference > 0, difference / (eps * scale), zero)
    return relative.max().item()


def accuracy(
    actual: Tensor,
    peer: Tensor | None,
    truth: Tensor,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Accuracy:
    """Judges `actual` by the rule above.

    All tensors are [N, C, ...] or [C] and have the truth's shape; `scale` is [C]. `dtype` is the
    one whose eps counts, by default that of `actual`. Without a peer only the ceiling holds.
    """
    limits = torch.finfo(dtype or actual.dtype)
    if scale is None:
        scale = (
            by_channel(truth.double()).abs().nan_to_num(0.0, 0.0).amax(1) if truth.numel() else None
        )
    if scale is not None:  # below the smallest normal number, numbers are no denser
        scale = scale.double().clamp_min(limits.tiny)
    error = largest_error(actual, truth, scale, limits.eps)
    values = "one" if truth.dim() == 1 else "many"
    of_peer = float("inf") if peer is None else largest_error(peer, truth, scale, limits.eps)
    return Accuracy(error, of_peer, min(FACTOR * of_peer, CEILING[values]) + SPARE[values])


def assert_as_accurate_as(
    actual: Tensor,
    peer: Tensor | None,
    truth: Tensor,
    *,
    scale: Tensor | None = None,
    name: str = "",
) -> None:
    """Raises AssertionError, naming `name`, where the rule does not hold."""
    found = accuracy(actual, peer, truth, scale)
    if not found.ok:
        raise AssertionError(
            f"{name}: error {found.error:.3g} eps, allowed {found.allowed:.3g} eps "
            f"(plain PyTorch: {found.peer:.3g} eps)"
        )
