"""The shapes that are measured and explained, by suite, and the words for dtypes and layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Shape = tuple[int, ...]  # [N, C, ...]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
LAYOUTS = ("nchw", "nhwc")  # channels apart, channels together; volumes and sequences likewise

# Channels, height = width: the normalised maps of ResNet-50.
RESNET50 = (
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


def _resnet50(batch: int) -> tuple[Shape, ...]:
    return tuple((batch, channels, size, size) for channels, size in RESNET50)


SUITES: dict[str, tuple[Shape, ...]] = {
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


def layouts_of(shape: Shape, wanted: Sequence[str]) -> list[str]:
    """A 2-D input has one layout: it is rows of channels."""
    return ["nhwc"] if len(shape) == 2 else list(wanted)
