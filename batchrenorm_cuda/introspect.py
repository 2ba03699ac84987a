"""What was built, and what is here to run it: `doctor`. It needs no GPU."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _C, __version__

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


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
    info, cpu = _C.build_info(), _C.cpu_info()
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
        f"  processor   {cpu['instructions']}, settings for {cpu['settings']}",
        f"  python      {platform.python_version()} on {platform.platform()}",
        f"  torch       {torch.__version__}, "
        + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
    ]
    if info["version"] != __version__:
        problems.append(
            f"the compiled part is of version {info['version']}, the Python part of {__version__}:"
            f" {REBUILD}"
        )
    wish = os.environ.get("BATCHRENORM_CPU_TRAITS")
    if wish is not None and wish not in cpu["known_settings"]:
        known = ", ".join(cpu["known_settings"])
        problems.append(f"BATCHRENORM_CPU_TRAITS must be one of {known}, got {wish!r}")
    lines.append(f"  CPU         {_verdict(torch.device('cpu'), problems)}")

    if torch.version.cuda is None:
        lines.append("  GPU         not looked for: this torch has no CUDA")
    elif not torch.cuda.is_available():
        lines.append("  GPU         none visible")
    else:
        for index in range(torch.cuda.device_count()):
            lines.append(f"  GPU {index}       {_gpu(index, info, problems)}")
    return "\n".join(lines), problems


def _gpu(index: int, info: _C.BuildInfo, problems: list[str]) -> str:
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
