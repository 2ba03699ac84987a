"""What a figure was measured on. Figures of different headers are not compared."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import batchrenorm_cuda

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = "+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return commit + changed


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _allocator() -> str:
    """What the environment changes about memory for outputs, which beyond 32 MB decides."""
    names = ["GLIBC_TUNABLES", *sorted(name for name in os.environ if name.startswith("MALLOC_"))]
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    preloaded = re.split(r"[\s:]+", os.environ.get("LD_PRELOAD", ""))
    return " ".join([*filter(None, (Path(path).name for path in preloaded)), *found])


def header(device: torch.device) -> dict[str, str | int]:
    """Chip, driver, versions, commit."""
    found: dict[str, str | int] = {
        "device": device.type,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batchrenorm_cuda": batchrenorm_cuda.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "load": os.getloadavg()[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "settings": batchrenorm_cuda._C.cpu_info()["settings"],
    }
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found |= {
            "chip": chip.name,
            "sm": f"{chip.major}.{chip.minor}",
            "sm_count": chip.multi_processor_count,
            "memory": chip.total_memory,
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version() or 0,
            "driver, clocks, power limit": _output("nvidia-smi", query, "--format=csv,noheader"),
        }
    else:
        found["chip"] = found["processor"]
        found["allocator"] = _allocator()
    return found


def directory_name(head: dict) -> str:
    """Where results of this machine go: bench/results/<this>. Of processors there are too many to
    tell apart by name; settings and instructions decide how kernels run."""
    if head["device"] != "cpu":
        return _words(str(head["chip"]))
    return "cpu/" + _words(f"{head['settings']} {head['capability']}")


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _speeds(by_threads: dict[int, float], cpu: bool) -> str:
    return ", ".join(
        f"{speed / 1e9:.1f} GB/s" + (f" ({threads} threads)" if cpu else "")
        for threads, speed in by_threads.items()
    )


def text(
    head: dict, roofs: dict[int, float], cache: int, fresh: dict[int, float] | None = None
) -> str:
    """The lines above the tables. `roofs` by number of threads; on CUDA there is one. `fresh`: the
    same into new memory, on the CPU."""
    first = [str(head["chip"])]
    if head["device"] == "cuda":
        first += [f"sm_{str(head['sm']).replace('.', '')}", f"{head['sm_count']} SMs"]
        first += [
            f"driver, clocks, power limit: {head['driver, clocks, power limit'] or 'unknown'}"
        ]
        first += [f"CUDA {head['cuda']}", f"cuDNN {head['cudnn']}"]
    else:
        first += [
            f"{head['cores']} cores",
            str(head["capability"]),
            *filter(None, [head["allocator"]]),
        ]
    second = [f"torch {head['torch']}", f"Python {head['python']}", f"commit {head['commit']}"]
    copies = _speeds(roofs, head["device"] == "cpu")
    roof = f"a copy reaches {copies}, read and written: the roof below"
    if fresh:
        roof += f" | into new memory, as outputs beyond 32 MB: {_speeds(fresh, True)}"
    third = f"last-level cache {cache / 2**20:.0f} MiB | {roof}"
    if head["device"] == "cpu" and float(head["load"]) > 0.3 * int(head["cores"]):
        load = f"load average {head['load']:.1f} before the run, on {head['cores']} cores"
        third += f"\nWARNING: {load}: other work shares them, and these figures mean little"
    return "\n".join([" | ".join(first), " | ".join([*second, str(head["date"])]), third])
