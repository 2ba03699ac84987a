"""The parity harness: is this build, on this device, as accurate as PyTorch, deterministic, and
right in its state?

    python -m batchrenorm_cuda parity [--device cpu|cuda] [--dtype float32 ...] [--quick]
                                      [--only TEXT] [--list]

What to run after compiling on a new card. Exits with 0 if everything passed and with 1 if not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from . import report
from .cases import CASES, FLOATS, Case
from .check import Verdict, check
from .situations import SITUATIONS, Situation, Skip

_DTYPES = {report.dtype_name(dtype): dtype for dtype in FLOATS}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m batchrenorm_cuda parity",
        description="Compares the compiled operators with a float64 reference and plain PyTorch.",
    )
    p.add_argument(
        "--device",
        help="cpu, cuda or cuda:1; by default cuda where there is one that the build can use",
    )
    p.add_argument("--dtype", nargs="+", choices=[*_DTYPES, "all"], default=["all"])
    p.add_argument("--quick", action="store_true", help="the cases that find most faults")
    p.add_argument("--only", metavar="TEXT", help="cases whose name contains this")
    p.add_argument(
        "--list", action="store_true", help="print the cases and why they are there, and stop"
    )
    return p


def usable_device(name: str | None) -> torch.device:
    """The device of that name, by default CUDA where this build and this torch can use it.

    Raises:
        ValueError: for one that cannot be used, saying why.
    """
    from batchrenorm_cuda import _C

    built, there = bool(_C.build_info()["cuda"]), torch.cuda.is_available()
    if name is None:
        name = "cuda" if built and there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"there are kernels for cpu and cuda, not for {name!r}")
    if device.type == "cuda":
        if not built:
            raise ValueError(
                "this build has no CUDA kernels: see python -m batchrenorm_cuda doctor"
            )
        if not there or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"torch {torch.__version__} sees no device {name!r}")
    return device


def _selected(args: argparse.Namespace) -> tuple[list[Case], list[Situation]]:
    def wanted(item: Case | Situation) -> bool:
        return (item.quick or not args.quick) and (args.only is None or args.only in item.name)

    return [c for c in CASES if wanted(c)], [s for s in SITUATIONS if wanted(s)]


def check_situation(situation: Situation, device: torch.device) -> Verdict | None:
    """None where the device cannot show it."""
    verdict = Verdict(situation.name, torch.float32)
    try:
        verdict.faults = situation.check(device)
    except Skip as reason:
        print(f"{situation.name:32} skipped: {reason}")
        return None
    except Exception as error:  # as in check(): a verdict, not the end of the run
        verdict.faults = [f"{type(error).__name__}: {error}"]
    print(
        "\n".join(
            [
                f"{situation.name:32} {'ok' if verdict.ok else 'FAIL'}",
                *(f"    {f}" for f in verdict.faults),
            ]
        )
    )
    return verdict


def run(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[Verdict]:
    """Checks every case in every dtype, printing a line for each."""
    verdicts = []
    print(report.header())
    for case in cases:
        for dtype in dtypes:
            if dtype in case.dtypes:
                verdicts.append(check(case, dtype, device))
                print(report.line(verdicts[-1]), flush=True)
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    cases, situations = _selected(args)
    if args.list:
        items: list[Case | Situation] = [*cases, *situations]
        print("\n".join(f"{item.name:34} {item.why}" for item in items))
        return 0
    if not cases and not situations:
        parser().error(f"no case has {args.only!r} in its name")
    try:
        device = usable_device(args.device)
    except ValueError as error:
        parser().error(str(error))
    dtypes = FLOATS if "all" in args.dtype else [_DTYPES[name] for name in args.dtype]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _run_all(cases, situations, dtypes, device)


def _run_all(
    cases: Sequence[Case],
    situations: Sequence[Situation],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> int:
    started = time.perf_counter()
    print(*report.environment(device), report.LEGEND, "", sep="\n")
    verdicts = run(cases, dtypes, device)
    print()
    verdicts += [v for s in situations if (v := check_situation(s, device)) is not None]
    print()
    print(report.summary(verdicts, time.perf_counter() - started, device))
    return 0 if all(v.ok for v in verdicts) else 1
