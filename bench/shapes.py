"""What is measured: suites of shapes, and the problem that a shape, a dtype and a layout make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
LAYOUTS = ("nchw", "nhwc")  # channels apart, channels together; volumes and sequences likewise


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

    def tensor(self, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Normal values in the problem's layout."""
        order = list(range(len(self.shape)))
        if self.layout == "nhwc":
            order = [0, *order[2:], 1]
        dense = torch.empty(
            [self.shape[dim] for dim in order], dtype=DTYPES[self.dtype], device=device
        )
        dense.normal_(generator=generator)
        return dense.permute([order.index(dim) for dim in range(len(order))])


_RESNET50 = (
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 28),
    (512, 28),
    (256, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
)


def _resnet50(batch: int) -> tuple[tuple[int, ...], ...]:
    return tuple((batch, channels, size, size) for channels, size in _RESNET50)


SUITES: dict[str, tuple[tuple[int, ...], ...]] = {
    "resnet50": _resnet50(32),
    "resnet50-large": _resnet50(256),
    "segmentation": (
        (4, 64, 512, 512),
        (4, 128, 256, 256),
        (4, 256, 128, 128),
        (8, 19, 512, 1024),
        (2, 256, 65, 129),
    ),
    "3d": (
        (2, 32, 64, 128, 128),
        (2, 64, 32, 64, 64),
        (4, 128, 16, 32, 32),
        (1, 320, 8, 16, 16),
        (4, 24, 20, 30, 30),
    ),
    "rl": ((256, 256), (1024, 512)),
    "cpu": (
        *_resnet50(1),
        *_resnet50(4),
        *_resnet50(32),
        (256, 256),
        (4096, 1024),
        (4, 64, 32, 64, 64),
        (8, 65, 28, 28),
        (8, 127, 17, 17),
        (16, 3, 64, 64),
        (4, 8),
    ),
}
QUICK = {
    "resnet50": ((32, 256, 56, 56), (32, 512, 7, 7)),
    "resnet50-large": ((256, 256, 14, 14),),
    "segmentation": ((4, 128, 256, 256),),
    "3d": ((2, 64, 32, 64, 64),),
    "rl": ((256, 256),),
    "cpu": ((4, 256, 14, 14), (256, 256), (8, 65, 28, 28), (4, 8)),
}


def layouts_of(shape: tuple[int, ...], wanted: list[str]) -> list[str]:
    """A 2-D input has one layout: it is rows of channels."""
    return ["nhwc"] if len(shape) == 2 else wanted


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
