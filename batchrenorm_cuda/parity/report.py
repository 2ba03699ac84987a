"""The report as plain text: it goes into an issue as it is."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from .check import RESULTS, Verdict
from .tolerance import CEILING, FACTOR, SPARE, Accuracy

_TITLES = {"running_mean": "mean", "running_std": "std"}
_CELL = 11

LEGEND = f"""\
Each cell: our error / that of plain PyTorch, in eps of the dtype, relative to each channel's scale.
Allowed for y, dx: {FACTOR:g} x PyTorch's, at most {CEILING["many"]:g} eps, + {SPARE["many"]:g} eps.
Allowed elsewhere: {FACTOR:g} x PyTorch's, at most {CEILING["one"]:g} eps, + {SPARE["one"]:g} eps.
"used" is the largest part of its allowance that a cell of the row took."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> Iterator[str]:
    """What a reader needs to know about the machine and the build."""
    import batchrenorm_cuda
    from batchrenorm_cuda import _C

    info = " ".join(f"{key}={value}" for key, value in _C.build_info().items())
    yield f"batchrenorm_cuda {batchrenorm_cuda.__version__} | build: {info}"
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        where = f"{chip.name}, sm_{chip.major}{chip.minor}, {chip.multi_processor_count} SMs"
        where += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}"
    system = f"Python {platform.python_version()}, {platform.system()}"
    yield f"torch {torch.__version__} | {device}: {where} | {system}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}".replace("e+0", "e")


def _cell(found: Accuracy | None) -> str:
    if found is None:
        return "-"
    return f"{_number(found.error)}/{_number(found.peer)}{'' if found.ok else ' !'}"


def header() -> str:
    titles = [_TITLES.get(name, name) for name in RESULTS]
    return (
        f"{'case':32} {'dtype':8} "
        + " ".join(f"{title:>{_CELL}}" for title in titles)
        + f" {'used':>5}"
    )


def line(verdict: Verdict) -> str:
    cells = " ".join(f"{_cell(verdict.results.get(name)):>{_CELL}}" for name in RESULTS)
    used = f"{100 * verdict.used:4.0f}%" if verdict.results else "     "
    text = f"{verdict.case:32} {dtype_name(verdict.dtype):8} {cells} {used} "
    text += "ok" if verdict.ok else "FAIL"
    return "\n".join([text, *(f"    {fault}" for fault in verdict.faults)])


def summary(verdicts: list[Verdict], seconds: float, device: torch.device) -> str:
    failed = sum(not v.ok for v in verdicts)
    result = f"{failed} of {len(verdicts)} FAILED" if failed else f"all {len(verdicts)} passed"
    worst = max(verdicts, key=lambda v: v.used, default=None)
    if worst is not None and worst.results:
        where = f"{worst.case}, {dtype_name(worst.dtype)}"
        result += f", worst {100 * worst.used:.0f}% of the allowance ({where})"
    return f"parity on {device}: {result}, torch {torch.__version__}, {seconds:.0f} s"
