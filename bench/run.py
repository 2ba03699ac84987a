"""Times the layer beside PyTorch's own batch normalisation, on CUDA or on the CPU.

    python -m bench.run --suite resnet50 --dtype float32 bfloat16 --op forward,backward

Prints a row for every problem, operation and provider, then host overhead, memory, launches and the
acceptance table, and writes everything to bench/results/<chip>/<suite>.json (--quick only where
--json says)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from batchrenorm_cuda.parity import usable_device

from . import (
    OPS,
    PEER,
    acceptance,
    machine,
    memory,
    overhead,
    providers,
    roofline,
    shapes,
    table,
    timing,
)

RESULTS = Path(__file__).resolve().parent / "results"
EXTRAS = ("overhead", "memory", "launches")


def list_of(known: Sequence[str]):
    """An argparse type: names from `known`, separated by commas, or all."""

    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}, all")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.run",
        description="Lists are separated by commas; all is everything.",
    )
    p.add_argument("--device", help="cpu or cuda; by default cuda where the build can use it")
    p.add_argument("--suite", type=list_of(list(shapes.SUITES)), help="default: resnet50, or cpu")
    p.add_argument("--dtype", type=list_of(list(shapes.DTYPES)), help="default: all but float64")
    p.add_argument("--layout", type=list_of(shapes.LAYOUTS), default=list(shapes.LAYOUTS))
    p.add_argument("--at-least", type=float, default=0.0, metavar="MB", help="of one tensor")
    p.add_argument("--op", type=list_of(OPS), default=list(OPS))
    p.add_argument("--providers", type=list_of(list(providers.PROVIDERS)), default=None)
    p.add_argument("--threads", type=lambda t: [int(n) for n in t.split(",")], help="CPU: 1,2")
    p.add_argument(
        "--hot", choices=("no", "yes", "both"), help="inputs in the cache; default: rl both"
    )
    p.add_argument("--extras", type=list_of((*EXTRAS, "none")), default=list(EXTRAS))
    p.add_argument("--quick", action="store_true", help="few shapes, few samples")
    p.add_argument("--seconds", type=float, help="after which no other problem is started")
    p.add_argument("--json", type=Path, metavar="FILE", help="where results go")
    return p


def _defaults(args: argparse.Namespace) -> torch.device:
    device = usable_device(args.device)
    cuda = device.type == "cuda"
    args.suite = args.suite or (["resnet50"] if cuda else ["cpu"])
    if cuda and len(args.suite) > 1:  # as with --suite all
        args.suite = [suite for suite in args.suite if suite != "cpu"]
    args.dtype = args.dtype or (
        ["float32", "float16", "bfloat16"] if cuda else ["float32", "bfloat16"]
    )
    if args.providers is None:
        args.providers = list(providers.DEFAULT)
    if PEER in args.providers:  # before the others, which are compared with it
        args.providers = sorted(args.providers, key=lambda name: name != PEER)
    args.threads = args.threads or [torch.get_num_threads()]
    if args.json is None and not args.quick:
        directory = RESULTS / machine.directory_name(machine.header(device))
        args.json = directory / f"{'+'.join(args.suite)}.json"
    return device


def _row(
    problem: shapes.Problem, op: str, name: str, found: timing.Timing | Exception, peer, roof: float
) -> dict:
    row = {
        "shape": problem.name,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "op": op,
        "provider": name,
        "tensor_bytes": problem.tensor_bytes,
    }
    if isinstance(found, Exception):
        return row | {"error": timing.in_a_line(found)}
    speed = roofline.bytes_moved(problem, op) / found.seconds
    return row | {
        "us": found.seconds * 1e6,
        "spread": found.spread,
        "samples": found.samples,
        "method": found.method,
        "because": found.because,
        "gb_per_s": speed / 1e9,
        "of_roof": speed / roof,
        "ratio": peer.seconds / found.seconds if isinstance(peer, timing.Timing) else None,
    }


@dataclass(frozen=True)
class Setting:
    """One comparison: what is timed, on how warm inputs, with how many threads (None on CUDA)."""

    suite: str
    problem: shapes.Problem
    op: str
    hot: bool
    threads: int | None

    def __str__(self) -> str:
        problem = f"{self.problem.name} {self.problem.dtype} {self.problem.layout}"
        return f"{self.suite}: {self.op} {problem}"


def settings(args: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    temperatures = {"no": (False,), "yes": (True,), "both": (False, True)}
    for suite in args.suite:
        hots = temperatures[args.hot or ("both" if suite == "rl" else "no")]
        threads = args.threads if device.type == "cpu" else [None]
        for problem in shapes.problems(suite, args.dtype, args.layout, args.quick):
            if problem.tensor_bytes < args.at_least * 1e6:
                continue
            for op, hot, n in itertools.product(args.op, hots, threads):
                yield Setting(suite, problem, op, hot, n)


def compare(
    setting: Setting, args: argparse.Namespace, device: torch.device, roof: float
) -> list[dict]:
    """A row for each provider."""
    problem, op = setting.problem, setting.op
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    names = [name for name in args.providers if providers.PROVIDERS[name].measures(op, device)]
    budget = timing.Budget.of(device, args.quick)
    backend = ""
    try:
        backend = providers.backend_of_peer(problem, device, op != "inference")
        found = timing.time_operation(problem, op, names, device, hot=setting.hot, budget=budget)
    except Exception as error:  # one comparison must not take the others with it
        found = dict.fromkeys(names, error)
    # On the CPU an output takes the place of the last one, so that a small one never leaves the
    # cache.
    fits = roofline.bytes_moved(problem, op) < roofline.cache_bytes(device)
    return [
        _row(problem, op, name, found[name], found.get(PEER), roof)
        | {
            "suite": setting.suite,
            "hot": setting.hot,
            "threads": setting.threads,
            "backend": backend if name == PEER else "",
            "in_cache": fits and (setting.hot or device.type == "cpu"),
        }
        for name in names
    ]


def measure(
    args: argparse.Namespace, device: torch.device, roofs: dict, results: dict
) -> Iterator[list[dict]]:
    """The rows of one comparison after another, for as long as --seconds allows."""
    began = time.perf_counter()
    for setting in settings(args, device):
        if args.seconds is not None and time.perf_counter() - began > args.seconds:
            results["stopped_before"] = str(setting)
            print(f"stopped after {args.seconds:g} s, before {setting}")
            return
        yield compare(setting, args, device, roofs[setting.threads])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_launches(device: torch.device) -> list[dict]:
    """What runs in one forward and one backward, from the profiler."""
    from batchrenorm_cuda.parity import cases, situations

    found = []
    for case in cases.CASES:
        if case.name in ("4-D", "channels_last", "256 x 256", "several blocks a channel"):
            found.append({"case": case.name, "ran": situations.launches(case, device)})
    return found


def write(results: dict, path: Path | None) -> None:
    """Replaces the file in one step: a reader, or a run that is cut short, finds a whole one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".partial")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        device = _defaults(args)
    except ValueError as error:
        parser().error(str(error))
    roofs, fresh = {}, {}
    for threads in args.threads if device.type == "cpu" else [None]:
        if threads is not None:
            torch.set_num_threads(threads)
        roofs[threads] = roofline.roof(device, args.quick)
        if device.type == "cpu":
            fresh[threads] = roofline.fresh_speed(args.quick)
    head = machine.header(device)
    cache = roofline.cache_bytes(device)
    print(machine.text(head, roofs, cache, fresh), "", table.HEADER, sep="\n", flush=True)

    results = {
        "header": head,
        "quick": args.quick,
        "cache_bytes": cache,
        "roof": {str(threads): roof for threads, roof in roofs.items()},
        "fresh": {str(threads): speed for threads, speed in fresh.items()},
        "stopped_before": None,
        "rows": [],
        "overhead": [],
        "memory": [],
        "launches": [],
        "dram": [],
    }
    try:
        measure_all(args, device, roofs, results)
    finally:
        results["acceptance"] = acceptance.judge(results)
        write(results, args.json)
    print("", acceptance.text(results["acceptance"]), sep="\n")
    if args.json is not None:
        print(f"\nwritten to {args.json}")
    return 0


def measure_all(args: argparse.Namespace, device: torch.device, roofs: dict, results: dict) -> None:
    """Fills `results`, and writes them now and then."""
    written = time.perf_counter()
    for rows in measure(args, device, roofs, results):
        results["rows"] += rows
        print("\n".join(map(table.line, rows)), flush=True)
        if time.perf_counter() - written > 5.0:
            write(results, args.json)
            written = time.perf_counter()
    if "overhead" in args.extras:
        results["overhead"] = overhead.measure(device, args.quick)
        print("", overhead.text(results["overhead"]), sep="\n", flush=True)
    if "memory" in args.extras:
        results["memory"] = memory.measure(device)
        print("", memory.text(results["memory"]), sep="\n", flush=True)
    if "launches" in args.extras:
        results["launches"] = measure_launches(device)
        counts = {row["case"]: [len(names) for names in row["ran"]] for row in results["launches"]}
        print("", f"launches, forward and backward: {counts}", sep="\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
