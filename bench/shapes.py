"""What is measured: the problem that a shape, a dtype and a layout make, and which are quick."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrenorm_cuda.suites import DTYPES, LAYOUTS, SUITES, layouts_of

__all__ = ["DTYPES", "LAYOUTS", "QUICK", "SUITES", "Problem", "layouts_of", "problems"]


@functools.lru_cache
def generator_of(device: torch.device) -> torch.Generator | None:
    """The benchmark's own: after a capture that has failed, torch's for the GPU raises."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]  # [N, C, ...]
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def tensor(self, device: torch.device) -> Tensor:
        """Normal values in the problem's layout."""
        order = list(range(len(self.shape)))
        if self.layout == "nhwc":
            order = [0, *order[2:], 1]
        dense = torch.empty(
            [self.shape[dim] for dim in order], dtype=DTYPES[self.dtype], device=device
        )
        dense.normal_(generator=generator_of(device))
        return dense.permute([order.index(dim) for dim in range(len(order))])


QUICK = {
    "resnet50": ((32, 256, 56, 56), (32, 512, 7, 7)),
    "resnet50-large": ((256, 256, 14, 14),),
    "segmentation": ((4, 128, 256, 256),),
    "3d": ((2, 64, 32, 64, 64),),
    "rl": ((256, 256),),
    "cpu": ((4, 256, 14, 14), (256, 256), (8, 65, 28, 28), (4, 8)),
}


def problems(
    suite: str, dtypes: list[str], layouts: list[str], quick: bool = False
) -> list[Problem]:
    shapes = (QUICK if quick else SUITES)[suite]
    return [
        Problem(shape, dtype, layout)
        for dtype in dtypes
        for shape in shapes
        for layout in layouts_of(shape, layouts)
    ]
