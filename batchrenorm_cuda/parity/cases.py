"""The cases of the parity harness: each has a name, what it sets, and the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..suites import RESNET50

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
TRAINING_DTYPES = (torch.float32, torch.bfloat16)  # of the cases that are there for their size


@dataclass(frozen=True)
class Case:
    """One call, forward and backward, with the state before it.

    Values of x are mean + std * normal, of a mean and a std a little different in each channel.
    Where `schedule` or `momentum=None` or `module` say so the call goes through a module, else
    through the functional form.
    """

    name: str
    shape: tuple[int, ...]
    why: str
    # The shape on CUDA, where `shape` would not reach what the case is for.
    large: tuple[int, ...] | None = None
    form: str = "contiguous"  # of x: see tensors.FORMS
    dy_form: str = "contiguous"
    mean: float = 0.0
    std: float = 1.0
    dy_mean: float = 0.0  # of dy, whose values are this + normal
    poke: str = ""  # what is done to channel 0: see tensors.POKES
    running: str = "near"  # moving statistics before the call: see tensors.RUNNING
    weight: bool = True
    bias: bool = True
    half_weight: bool = False  # weight and bias in the dtype of x
    training: bool = True
    module: bool = False
    limits: tuple[float, float] = (3.0, 5.0)  # r_max, d_max
    # The fields of RenormSchedule, in its order.
    schedule: tuple[float, float, float, float, float] | None = None
    step: int = 0  # num_batches_tracked before the call
    momentum: float | None = 0.1
    eps: float = 1e-5
    dtypes: tuple[torch.dtype, ...] = FLOATS
    quick: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def through_module(self) -> bool:
        return self.module or self.schedule is not None or self.momentum is None

    def shape_on(self, device: torch.device) -> tuple[int, ...]:
        return self.large if self.large is not None and device.type == "cuda" else self.shape


_PAPER = (5000.0, 3.0, 40000.0, 5.0, 25000.0)
_INF = float("inf")
# Without d, which would be most of dweight. In float64 the truth itself is no better there.
_SHIFTED_DY: dict[str, Any] = {
    "limits": (3.0, 0.0),
    "dtypes": (torch.float32, torch.float16, torch.bfloat16),
}

SHAPES = [
    Case("2-D", (64, 48), "(N, C): rows of channels", quick=True),
    Case(
        "3-D",
        (8, 24, 50),
        "(N, C, L): planes of 50 are 8-byte, not 16-byte, friendly in half precision",
    ),
    Case("4-D", (4, 16, 12, 12), "(N, C, H, W): the ordinary image batch", quick=True),
    Case("5-D", (2, 12, 4, 6, 8), "(N, C, D, H, W): volumes come in small batches"),
    Case(
        "one value a pair",
        (2, 5),
        "m = 2 is the smallest batch that trains; dx is nothing but cancellation",
    ),
    Case("N = 1", (1, 7, 9, 11), "statistics over the plane alone"),
    Case(
        "C = 1",
        (16, 1, 14, 14),
        "one channel: one slab, and channels_last is also contiguous",
        quick=True,
    ),
    Case("C = 1, 2-D", (333, 1), "one column: no neighbouring channel to load with it"),
    Case("N = C = 1", (1, 1, 63), "all sizes but one are 1"),
    Case("65 channels", (8, 65, 14, 14), "no power of two and no multiple of a warp", quick=True),
    Case(
        "96 channels",
        (3, 96, 10, 10),
        "a grid rounded down to a power of two would leave 32 of them out",
    ),
    Case("prime channels", (5, 127, 6, 5), "no vector tiles 127 channels or 30 values"),
    Case(
        "odd plane",
        (4, 6, 7, 7),
        "49 values a plane: every second plane starts off a vector boundary",
    ),
    Case(
        "plane of one value", (32, 40, 1, 1), "a 4-D input that is really 2-D: after global pooling"
    ),
    Case("one row", (3, 9, 1, 257), "a size-1 dimension inside, whose stride means nothing"),
    Case("many channels", (4, 3001, 3), "more channels than blocks that fit a chip"),
]

FORMS = [
    Case(
        "channels_last",
        (4, 24, 9, 9),
        "kept as it comes: rows of channels",
        form="channels_last",
        quick=True,
    ),
    Case(
        "channels_last, 65 channels",
        (3, 65, 7, 5),
        "rows that no vector tiles",
        form="channels_last",
    ),
    Case(
        "channels_last, 3 channels",
        (4, 3, 16, 16),
        "rows shorter than a vector",
        form="channels_last",
    ),
    Case(
        "channels_last_3d", (2, 20, 3, 5, 7), "volumes, rows of channels", form="channels_last_3d"
    ),
    Case(
        "transposed [N, L, C]",
        (6, 32, 21),
        "sequences: the transpose of [N, L, C]",
        form="channels_last_1d",
    ),
    Case(
        "sliced rows", (4, 8, 6, 10), "planes with gaps: made contiguous first", form="sliced rows"
    ),
    Case(
        "sliced channels",
        (4, 8, 6, 10),
        "dense planes, a gap after each example",
        form="sliced channels",
    ),
    Case(
        "sliced channels_last",
        (4, 16, 6, 10),
        "rows of channels with gaps",
        form="sliced channels_last",
    ),
    Case("every second column", (4, 6, 5, 9), "no two neighbours in memory", form="strided"),
    Case(
        "misaligned",
        (4, 16, 8, 8),
        "storage offset 1: no 16-byte access is legal",
        form="misaligned",
        quick=True,
    ),
    Case(
        "misaligned channels_last",
        (4, 16, 8, 8),
        "the same, rows of channels",
        form="misaligned channels_last",
    ),
    Case("expanded", (6, 8, 5, 5), "one example seen six times: stride 0", form="expanded"),
    Case(
        "batch last", (6, 8, 10), "[L, C, N] permuted: dense, but neither format", form="permuted"
    ),
    Case(
        "dy channels_last",
        (4, 16, 6, 6),
        "dy of another format than x",
        dy_form="channels_last",
        quick=True,
    ),
    Case(
        "dy contiguous",
        (4, 16, 6, 6),
        "the same the other way round: what a Linear after flatten() sends back",
        form="channels_last",
    ),
    Case(
        "dy expanded", (4, 16, 6, 6), "one row seen by every example: stride 0", dy_form="expanded"
    ),
    Case("dy misaligned", (4, 16, 8, 8), "an aligned x does not make dy so", dy_form="misaligned"),
    Case(
        "dy sliced",
        (4, 16, 6, 6),
        "a part of a concatenation's gradient",
        dy_form="sliced channels",
    ),
]

VALUES = [
    Case(
        "mean 1e3 std",
        (16, 6, 32, 32),
        "E[x^2] - E[x]^2 would cancel six digits",
        mean=1e3,
        quick=True,
    ),
    Case("mean 1e4 std", (16, 6, 32, 32), "and eight: all that float32 has", mean=1e4),
    Case("mean 1e4 std, 2-D", (512, 40), "the same down the columns", mean=1e4),
    Case(
        "mean -1e4 std, std 1e3",
        (8, 4, 16, 16),
        "mean, std and moving mean all far from 1",
        mean=-1e7,
        std=1e3,
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
    ),
    Case("std 1e-4", (16, 6, 12, 12), "std below sqrt(eps): eps decides", std=1e-4),
    Case(
        "std 1e-10, eps = 1e-3",
        (16, 6, 12, 12),
        "a mean of many stds that eps makes look like none",
        mean=1e-7,
        std=1e-10,
        eps=1e-3,
        dtypes=(torch.float32, torch.float64),
    ),
    Case(
        "std 300",
        (16, 6, 12, 12),
        "squares overflow float16: statistics must not",
        std=300.0,
        quick=True,
    ),
    Case(
        "std 1e4",
        (16, 6, 12, 12),
        "squares of float32 are far from overflow, sums of float16 are not",
        std=1e4,
    ),
    Case(
        "dy of mean 3",
        (16, 6, 48, 48),
        "dweight has the error of the mean of x times the sum of dy",
        large=(32, 64, 56, 56),
        dy_mean=3.0,
        **_SHIFTED_DY,
        quick=True,
    ),
    Case(
        "dy of mean 3, mean 1 std",
        (16, 6, 48, 48),
        "a mean near 0 is rounded finely, one of 1 is not",
        large=(32, 64, 56, 56),
        mean=1.0,
        dy_mean=3.0,
        **_SHIFTED_DY,
    ),
    Case(
        "dy of mean 3, channels_last",
        (16, 24, 48, 48),
        "the same in rows of channels",
        large=(32, 64, 56, 56),
        form="channels_last",
        dy_mean=3.0,
        **_SHIFTED_DY,
    ),
    Case(
        "dy of mean 3, short planes",
        (32, 8, 14, 14),
        "the same with less to average over",
        large=(64, 1024, 14, 14),
        dy_mean=3.0,
        **_SHIFTED_DY,
    ),
    Case(
        "dy of mean 3, wide rows",
        (16, 512, 14, 14),
        "rows of which the CPU's caches hold few",
        form="channels_last",
        dy_mean=3.0,
        **_SHIFTED_DY,
    ),
    Case(
        "dy of mean 3, 2-D",
        (4096, 24),
        "the same down the columns",
        mean=1.0,
        dy_mean=3.0,
        **_SHIFTED_DY,
    ),
    Case(
        "constant channel",
        (8, 5, 6, 6),
        "no 0/0: y = weight * d + bias, dx finite",
        poke="constant",
        quick=True,
    ),
    Case(
        "constant channel of 1e4",
        (8, 5, 6, 6),
        "nor a variance made of rounding",
        poke="constant",
        mean=1e4,
    ),
    Case("NaN in a channel", (4, 6, 5, 5), "poisons its channel and no other", poke="nan"),
    Case(
        "inf in a channel",
        (4, 16, 5, 5),
        "the same beside other channels",
        poke="inf",
        form="channels_last",
    ),
    Case(
        "NaN in a channel of a bundle",
        (4, 16, 7, 7),
        "nor the neighbours that share its slots",
        large=(256, 1024, 7, 7),
        poke="nan",
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "NaN beside unaligned planes",
        (16, 16, 19, 19),
        "nor those whose first and last elements are in its slots",
        large=(64, 256, 19, 19),
        poke="nan",
        dtypes=HALF_DTYPES,
    ),
    Case("eps = 0", (8, 12, 6, 6), "legal where no channel is constant", eps=0.0),
    Case(
        "eps = 1e-3",
        (8, 12, 6, 6),
        "the default of Keras and of several Batch Renorms",
        eps=1e-3,
        std=0.03,
    ),
    Case(
        "weight of zero",
        (8, 6, 6, 6),
        "zero-initialised residual branches: dx = 0, dweight not",
        poke="zero weight",
    ),
]

STATE = [
    Case("no weight", (8, 12, 6, 6), "the paper fixes gamma = 1 before a ReLU", weight=False),
    Case("no bias", (8, 12, 6, 6), "either may be absent alone", bias=False),
    Case("neither", (8, 12, 6, 6), "affine=False", weight=False, bias=False, quick=True),
    Case(
        "half-precision weight",
        (8, 12, 6, 6),
        "model.half(): parameters in the dtype of x",
        half_weight=True,
    ),
    Case(
        "r and d clipped",
        (8, 12, 6, 6),
        "both limits from both sides, channel by channel",
        running="far",
        quick=True,
    ),
    Case(
        "clipped, channels_last",
        (8, 12, 6, 6),
        "the same in rows of channels",
        running="far",
        form="channels_last",
    ),
    Case(
        "no clipping",
        (8, 12, 6, 6),
        "infinite limits are legal",
        running="far",
        limits=(_INF, _INF),
    ),
    Case(
        "plain BatchNorm",
        (8, 12, 6, 6),
        "r_max = 1, d_max = 0: the paper's first steps",
        limits=(1.0, 0.0),
    ),
    Case(
        "no moving statistics", (8, 12, 6, 6), "r = 1, d = 0, nothing to update", running="absent"
    ),
    Case(
        "fresh moving statistics",
        (8, 12, 6, 6),
        "0 and 1, as a new layer has them",
        running="fresh",
        mean=5.0,
    ),
    Case("momentum = 0", (8, 12, 6, 6), "statistics frozen, r and d still from them", momentum=0.0),
    Case("momentum = 1", (8, 12, 6, 6), "statistics of the last batch", momentum=1.0),
    Case(
        "momentum = None",
        (8, 12, 6, 6),
        "cumulative average: 1 / (steps + 1)",
        momentum=None,
        step=6,
        quick=True,
    ),
    Case(
        "momentum = None, first step",
        (8, 12, 6, 6),
        "the average of one batch",
        momentum=None,
        running="fresh",
    ),
]

SCHEDULE = [
    Case(
        "before warm-up ends",
        (8, 12, 6, 6),
        "r_max = 1, d_max = 0",
        running="far",
        schedule=_PAPER,
        step=4999,
    ),
    Case(
        "in mid-ramp",
        (8, 12, 6, 6),
        "both limits between their ends, read from the counter on the device",
        running="far",
        schedule=_PAPER,
        step=15000,
        quick=True,
    ),
    Case(
        "d at its end, r not",
        (8, 12, 6, 6),
        "the ramps end apart",
        running="far",
        schedule=_PAPER,
        step=30000,
    ),
    Case(
        "after the ramps",
        (8, 12, 6, 6),
        "limits stay: one peer's grow on",
        running="far",
        schedule=_PAPER,
        step=90000,
    ),
    Case(
        "lifted after warm-up",
        (8, 12, 6, 6),
        "no clipping at once, the paper's conclusion",
        running="far",
        schedule=(100.0, _INF, 100.0, _INF, 100.0),
        step=101,
    ),
    Case(
        "counter past 2^31",
        (8, 12, 6, 6),
        "the counter is 64 bits wide",
        running="far",
        schedule=_PAPER,
        step=2**31 + 5,
    ),
]

INFERENCE = [
    Case(
        "inference",
        (8, 12, 6, 6),
        "one affine map a channel; gradients as well",
        training=False,
        quick=True,
    ),
    Case("inference, channels_last", (8, 13, 6, 6), "rows", training=False, form="channels_last"),
    Case("inference, 2-D", (50, 12), "(N, C)", training=False),
    Case("inference, N = 1", (1, 12), "one value a channel is enough here", training=False),
    Case(
        "inference, mean 1e4", (8, 12, 6, 6), "subtract first, then scale", training=False, mean=1e4
    ),
    Case(
        "inference, neither",
        (8, 12, 6, 6),
        "affine=False",
        training=False,
        weight=False,
        bias=False,
    ),
    Case(
        "inference, fresh module",
        (8, 12, 6, 6),
        "identity before any step",
        training=False,
        module=True,
        running="fresh",
    ),
    Case(
        "inference, no moving statistics",
        (8, 12, 6, 6),
        "track_running_stats=False: statistics of the batch, as torch's",
        training=False,
        module=True,
        running="absent",
    ),
    Case("inference, odd plane", (4, 6, 7, 7), "no vector access", training=False),
    Case(
        "inference, odd plane, 16 channels",
        (4, 16, 7, 7),
        "planes of which several together are whole vectors",
        training=False,
    ),
    Case(
        "inference, unaligned",
        (16, 16, 19, 19),
        "nothing is written beside a plane that begins and ends inside a vector",
        large=(64, 256, 19, 19),
        training=False,
        dtypes=HALF_DTYPES,
    ),
    Case("inference, misaligned", (4, 16, 8, 8), "nor here", training=False, form="misaligned"),
]

SIZES = [
    Case(
        "256 x 256",
        (256, 256),
        "a reinforcement learner's layer: all latency",
        quick=True,
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "1024 x 512",
        (1024, 512),
        "a wide critic: rows of channels down one long column",
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "long sum",
        (4, 2, 131072),
        "m = 524288: sums in one running float32 would lose four digits",
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "long sum, mean 1e3",
        (4, 2, 131072),
        "and the mean with them",
        mean=1e3,
        dtypes=(torch.float32,),
    ),
    Case("long column", (200000, 6), "the same down the columns", dtypes=TRAINING_DTYPES),
    Case(
        "several blocks a channel",
        (4, 3, 96, 96),
        "a team meets at a barrier",
        large=(32, 64, 112, 112),
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "several rounds",
        (4, 2, 40000),
        "a channel larger than all registers: read twice",
        large=(8, 3, 1500, 1000),
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "several rounds, channels_last",
        (4, 10, 90, 90),
        "the same in rows of channels",
        form="channels_last",
        large=(8, 40, 200, 200),
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "several slabs a team",
        (2, 300, 30, 30),
        "more channels in teams than the chip holds at once: barriers are used again",
        large=(16, 700, 56, 56),
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "bundles",
        (4, 16, 7, 7),
        "odd planes in bundles of channels, where there are enough of them; a team each",
        large=(256, 2048, 7, 7),
        dtypes=TRAINING_DTYPES,
    ),
    Case(
        "bundles, mean 1e3",
        (4, 16, 7, 7),
        "the lanes of a channel and their threads merge without losing digits",
        large=(256, 2048, 7, 7),
        mean=1e3,
        dtypes=(torch.float32,),
    ),
    Case(
        "unaligned",
        (16, 16, 19, 19),
        "a Go board: wide loads and stores that begin and end in other channels; a team each",
        large=(256, 256, 19, 19),
        dtypes=HALF_DTYPES,
    ),
    Case(
        "unaligned, a block each",
        (20, 16, 13, 27),
        "with several rounds, and empty slots at the end of some planes",
        large=(2, 256, 65, 131),
        dtypes=HALF_DTYPES,
    ),
    Case(
        "volumes",
        (2, 16, 8, 16, 16),
        "large planes, tiny batch",
        large=(2, 32, 64, 96, 96),
        form="channels_last_3d",
        dtypes=TRAINING_DTYPES,
    ),
    *(
        Case(
            f"resnet50 {c}x{size}",
            (2, c, size, size),
            "a shape of ResNet-50",
            large=(32, c, size, size),
            dtypes=TRAINING_DTYPES,
        )
        for c, size in RESNET50
    ),
    *(
        Case(
            f"resnet50 {c}x{size}, channels_last",
            (2, c, size, size),
            "the same as convolutions like it",
            large=(32, c, size, size),
            form="channels_last",
            dtypes=TRAINING_DTYPES,
        )
        for c, size in RESNET50[1::2]
    ),
]

CASES = [*SHAPES, *FORMS, *VALUES, *STATE, *SCHEDULE, *INFERENCE, *SIZES]
