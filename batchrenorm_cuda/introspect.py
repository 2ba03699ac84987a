"""What was built, what is here to run it, and how a launch would look: `doctor` and `explain`.

Neither needs a GPU. Every time that `explain` prints is an estimate.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import _C, __version__

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Chip(NamedTuple):
    """A GPU as the planner sees it. `copy` is in GB/s, bytes read and bytes written counted."""

    sm_count: int
    copy: float


# Copy bandwidths are 0.9 of the data sheet: what a copy reaches on an H200, 4.3 of 4.8 TB/s.
CHIPS = {
    "t4": Chip(40, 0.9 * 320),
    "a100": Chip(108, 0.9 * 2039),
    "3090": Chip(82, 0.9 * 936),
    "4090": Chip(128, 0.9 * 1008),
    "h100": Chip(132, 0.9 * 3350),
    "h200": Chip(132, 0.9 * 4800),
    "b200": Chip(148, 0.9 * 8000),
    "5090": Chip(170, 0.9 * 1792),
}

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def explain(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    device_like: str = "h200",
) -> str:
    """The launch plans of forward, backward and inference for an x of this shape, as text.

    Args:
        shape: of x, [N, C, ...].
        dtype: float32, float16, bfloat16 or float64.
        channels_last: whether x is in channels_last memory format; 2-D input always is.
        device_like: a key of `CHIPS`.

    Raises:
        ValueError: for a shape, dtype or chip that is none of these.
    """
    names = {value: name for name, value in DTYPES.items()}
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [N, C, ...] with every size at least 1, got {list(shape)}")
    if dtype not in names:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if device_like not in CHIPS:
        raise ValueError(f"device_like must be one of {', '.join(CHIPS)}, got {device_like!r}")
    chip = CHIPS[device_like]
    batch, channels, *spatial = shape
    pixels = math.prod(spatial)
    layout = "channels_last" if channels_last or pixels == 1 else "channels_first"
    sizes = (batch, channels, pixels)
    if channels == 1:  # one long row, as csrc/binding/checks.h sees it
        layout, sizes = "channels_first", (1, 1, batch * pixels)
    size = math.prod(shape) * dtype.itemsize
    lines = [
        f"x {list(shape)} {names[dtype]}, {layout}: {channels} channels of {batch * pixels} values,"
        f" {_bytes(size)}",
        f"on a chip like the {device_like}: {chip.sm_count} SMs, a copy at {chip.copy:.0f} GB/s",
        "",
        f"{'':10}{'grid':>14}{'block':>7}{'slots':>10}{'rounds':>8}{'waves':>7}"
        f"{'moved':>10}{'floor':>10}{'estimate':>10}{'of floor':>10}",
    ]
    for pass_ in ("forward", "backward", "inference"):
        plan = _C.plan(pass_, *sizes, layout=layout, dtype=names[dtype], sm_count=chip.sm_count)
        floor = plan.bytes_moved / chip.copy / 1e3
        time = _estimate(plan, floor)
        lines.append(
            f"{pass_:10}{f'{plan.teams} x {plan.team}':>14}{plan.threads:>7}"
            f"{f'{plan.slots} x {plan.slot_bytes} B':>10}{plan.rounds:>8}{plan.waves:>7}"
            f"{_bytes(plan.bytes_moved):>10}{floor:>7.1f} us{time:>7.1f} us{floor / time:>9.0%}"
        )
    return "\n".join(lines) + (
        "\n\n"
        "grid      teams x blocks of a team, which shares a slab of channels, kept in registers\n"
        "slots     registers of a thread that hold data x bytes of one memory access\n"
        "rounds    times a block fills its registers for a slab; all but the last are read twice\n"
        "waves     slabs that a team works through, one after the other\n"
        "floor     every byte that must move, at the speed of a copy\n"
        "estimate  the planner's model, NOT a measurement; bench/ measures"
    )


# The planner's model is of an H200 (csrc/core/plan.h, estimate()): a cost for the launch and the
# first load, which any chip has, and the rest at an H200's bandwidth for each SM, scaled here.
_FIXED_MICROSECONDS = 3.3
_MODEL_BYTES_PER_MICROSECOND_OF_SM = 4.3e6 / 132


def _estimate(plan: _C.Plan, floor: float) -> float:
    model_floor = plan.bytes_moved / (_MODEL_BYTES_PER_MICROSECOND_OF_SM * plan.sm_count)
    scaled = (plan.microseconds - _FIXED_MICROSECONDS) * floor / model_floor
    return max(floor, _FIXED_MICROSECONDS + scaled)


def _bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> str | None:
    """How kernels built for `architectures` run on a GPU of this compute capability.

    Args:
        architectures: as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "12.0+PTX".
        capability: major, minor.

    Returns:
        "native", "through PTX" (compiled by the driver when first used), or None: not at all.
    """
    major, minor = capability
    through_ptx = False
    for text in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        # Machine code runs on later chips of its generation; with "a" on its own chip alone.
        if built == (major, minor) or (built[0] == major and built[1] < minor and match[3] != "a"):
            return "native"
        through_ptx = through_ptx or (bool(match[4]) and not match[3] and built <= (major, minor))
    return "through PTX" if through_ptx else None


def doctor() -> tuple[str, list[str]]:
    """The state of this installation as text, and what is wrong with it, each with what to do."""
    info = _C.build_info()
    problems = []
    architectures = info["architectures"]
    lines = [
        f"batchrenorm_cuda {__version__} in {Path(__file__).parent}",
        f"  built       {info['version']}, against torch {info['torch']}, by {info['compiler']}",
        "  kernels     CPU" + (f"; CUDA by nvcc {info['nvcc']}" if info["cuda"] else " only"),
    ]
    if info["cuda"]:
        lines.append(f"  for         {' '.join(architectures)}")
    lines += [
        f"  python      {platform.python_version()} on {platform.platform()}",
        f"  torch       {torch.__version__}, "
        + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
    ]
    if info["version"] != __version__:
        problems.append(
            f"the compiled part is of version {info['version']}, the Python part of {__version__}:"
            f" {REBUILD}"
        )
    lines.append(f"  CPU         {_verdict(torch.device('cpu'), problems)}")

    if torch.version.cuda is None:
        lines.append("  GPU         not looked for: this torch has no CUDA")
    elif not torch.cuda.is_available():
        lines.append("  GPU         none visible")
    else:
        for index in range(torch.cuda.device_count()):
            lines.append(f"  GPU {index}       {_gpu(index, info, problems)}")
    return "\n".join(lines), problems


def _gpu(index: int, info: dict, problems: list[str]) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    chip = f"{capability[0]}.{capability[1]}"
    name = f"{properties.name}, {chip}, {properties.multi_processor_count} SMs"
    if not info["cuda"]:
        problems.append(
            f"GPU {index} is there, but the build has no CUDA kernels. Install a CUDA toolkit"
            f" {torch.version.cuda.split('.')[0]}.x (nvcc) or set CUDA_HOME to one; then: {REBUILD}"
        )
        return f"{name}: no kernels"
    how = covers(info["architectures"], capability)
    if how is None:
        problems.append(
            f"GPU {index} has compute capability {chip}, which this build does not cover:"
            f" TORCH_CUDA_ARCH_LIST={chip} {REBUILD}"
        )
        return f"{name}: not covered"
    return f"{name}: {how}, {_verdict(torch.device('cuda', index), problems)}"


def _verdict(device: torch.device, problems: list[str]) -> str:
    """Runs one training step with r = 1 and d = 0, where Batch Renormalization is BatchNorm."""
    x = torch.randn(8, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(8, 5, 7, 3, generator=torch.Generator().manual_seed(1))
    try:
        moved, cotangent = x.to(device), dy.to(device)
        y, stats = torch.ops.batchrenorm.forward(
            moved, None, None, None, None, None, None, 0.1, 1e-5, 1.0, 0.0, False
        )
        dx, _, _ = torch.ops.batchrenorm.backward(cotangent, moved, None, stats)
        truth = x.double().requires_grad_()
        expected = torch.nn.functional.batch_norm(truth, None, None, training=True)
        expected.backward(dy.double())
        error = max(
            (y.cpu() - expected).abs().max().item(), (dx.cpu() - truth.grad).abs().max().item()
        )
    except RuntimeError as failure:
        problems.append(f"a training step on {device} fails: {failure}")
        return "fails"
    if not error < 1e-5:
        problems.append(
            f"a training step on {device} is off by {error:.1e}. Please report it, with what"
            f" python -m batchrenorm_cuda parity --device {device.type} prints"
        )
        return "wrong"
    return f"a training step is right (largest error {error:.0e})"
