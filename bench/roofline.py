"""The bytes that a problem must move, and how fast this machine moves bytes.

The bytes are a property of the problem and the same for every provider: a forward pass reads x and
writes y, a backward pass reads x and dy and writes dx. The roof is a copy, measured in the same
run, counting bytes read and bytes written.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .shapes import Problem
from .stopwatch import Stopwatch

TENSORS_MOVED = {"forward": 2, "inference": 2, "backward": 3, "train": 5}


def bytes_moved(problem: Problem, op: str) -> int:
    return TENSORS_MOVED[op] * problem.tensor_bytes


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: what inputs have to rotate past."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        _kibibytes(path.read_text())
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 10) << 10


def _kibibytes(text: str) -> int:
    number = int(text.strip().rstrip("KMG"))
    return number << {"K": 0, "M": 10, "G": 20}.get(text.strip()[-1], 0)


def _copy_seconds(size: int, device: torch.device, repeats: int) -> list[float]:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source).zero_()  # its pages are touched: a roof has no page faults
    seconds, stopwatch = [], Stopwatch()
    for _ in range(repeats + 2):
        if device.type == "cuda":
            seconds.append(stopwatch.seconds(lambda: target.copy_(source)))
        else:
            begin = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def copy_speeds(device: torch.device, quick: bool = False) -> dict[int, float]:
    """Bytes of one tensor -> bytes per second, read and written, of the median copy of it."""
    mebibytes = [256, 512, 1024] if device.type == "cuda" else [128, 256]
    speeds = {}
    for size in [m << 20 for m in (mebibytes[:1] if quick else mebibytes)]:
        seconds = sorted(_copy_seconds(size, device, 5 if quick else 15))
        speeds[size] = 2 * size / seconds[len(seconds) // 2]
    return speeds


def fresh_speed(quick: bool = False) -> float:
    """Bytes per second, read and written, of a copy on the CPU into memory that is new each time,
    as the outputs of operators beyond 32 MB are: the C library gives such blocks back to the
    system, which clears their pages again."""
    source = torch.empty(128 << 18, dtype=torch.float32).normal_()
    seconds = []
    for _ in range(5 if quick else 15):
        begin = time.perf_counter()
        copy = source.clone()
        seconds.append(time.perf_counter() - begin)
        del copy
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]


def roof(device: torch.device, quick: bool = False) -> float:
    """Bytes per second: the best median over sizes well beyond the cache."""
    return max(copy_speeds(device, quick).values())
