"""One small convolutional network, with the normalizer left open."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from digits_regimes import Regime
from torch import Tensor, nn

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule

WIDTHS = (16, 16, 8)
STRIDES = (1, 2, 2)  # 8x8, 4x4, 2x2
GROUP = 4  # channels of a GroupNorm group


@dataclass(frozen=True)
class Statistics:
    """How BatchNorm and BatchRenorm keep their moving statistics, and BatchRenorm its limits.

    Everything is per optimizer step: in micro-batches of 4 a layer is called 8 times a step.
    The limits move between fractions of the whole run, by default those of the paper: BatchNorm for
    the first 5,000 of 130,000 steps, r_max = 3 at 40,000, d_max = 5 at 25,000.
    """

    momentum: float = 0.05  # weight of one step in the moving statistics, of both
    warmup: float = 5 / 130
    r_max: float = 3.0
    r_max_at: float = 40 / 130
    d_max: float = 5.0
    d_max_at: float = 25 / 130

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")
        self.schedule(Regime(""), steps=1)  # raises what would be raised in the middle of the runs

    def momentum_of_call(self, regime: Regime) -> float:
        return 1 - (1 - self.momentum) ** (1 / regime.groups)

    def schedule(self, regime: Regime, steps: int) -> RenormSchedule:
        calls = steps * regime.groups
        return RenormSchedule(
            self.warmup * calls,
            self.r_max,
            self.r_max_at * calls,
            self.d_max,
            self.d_max_at * calls,
        )


class InGroups(nn.Module):
    """Normalizes `together` examples at a time, as if each group went through alone.

    Only the normalizer lets examples see each other: the gradient is the one accumulated over such
    micro-batches, while the convolutions get all 32 at once. At inference there are no groups.
    """

    def __init__(self, normalizer: nn.Module, together: int) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.together:
            return self.normalizer(x)
        return torch.cat([self.normalizer(group) for group in x.split(self.together)])


def _batch_norm(channels: int, statistics: Statistics, regime: Regime, steps: int) -> nn.Module:
    momentum = statistics.momentum_of_call(regime)
    return InGroups(nn.BatchNorm2d(channels, momentum=momentum), regime.together)


def _batch_renorm(channels: int, statistics: Statistics, regime: Regime, steps: int) -> nn.Module:
    momentum, schedule = statistics.momentum_of_call(regime), statistics.schedule(regime, steps)
    return InGroups(BatchRenorm2d(channels, momentum=momentum, schedule=schedule), regime.together)


def _group_norm(channels: int, statistics: Statistics, regime: Regime, steps: int) -> nn.Module:
    return nn.GroupNorm(channels // GROUP, channels)


def _layer_norm(channels: int, statistics: Statistics, regime: Regime, steps: int) -> nn.Module:
    """Over channels and space, with the others' one weight and bias a channel."""
    return nn.GroupNorm(1, channels)


NORMALIZERS: dict[str, Callable[[int, Statistics, Regime, int], nn.Module]] = {
    "BatchNorm": _batch_norm,
    "BatchRenorm": _batch_renorm,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
}


def network(
    normalizer: str, statistics: Statistics, regime: Regime, steps: int, classes: int, seed: int
) -> nn.Sequential:
    """[N, 1, 8, 8] to [N, classes].

    The initial weights depend on `seed` alone: normalizers draw no random numbers.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            NORMALIZERS[normalizer](width, statistics, regime, steps),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )
