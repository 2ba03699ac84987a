"""Bytes that cross the memory bus, counted by ncu, against what the algorithm must move.

    ncu --profile-from-start off --clock-control none --csv --page raw --print-units base \\
        --log-file ncu.csv --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
        python -m bench.dram work
    python -m bench.dram read ncu.csv --into bench/results/<chip>/resnet50.json

Without --clock-control none ncu would lock the clocks, which not every machine allows; bytes do
not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from . import OURS, acceptance, providers, roofline
from .run import write
from .shapes import Problem

# So large that what the L2 still holds of y when the kernel ends is a small part.
PROBLEMS = (
    Problem((256, 64, 112, 112), "float32", "nchw"),
    Problem((256, 256, 56, 56), "float32", "nchw"),
    Problem((256, 256, 56, 56), "bfloat16", "nchw"),
)
OPS = ("forward", "backward")
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def work() -> None:
    """One forward and one backward of each problem, warm, and only they between profiler start and
    stop."""
    device = torch.device("cuda")
    for problem in PROBLEMS:
        layer = providers.PROVIDERS[OURS].make(problem, device)
        x, dy = problem.tensor(device).requires_grad_(), problem.tensor(device)
        inputs = (x, *layer.parameters)
        torch.autograd.grad(layer.train(x), inputs, dy)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        y = layer.train(x)
        torch.autograd.grad(y, inputs, dy)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del x, dy, y
        torch.cuda.empty_cache()


def read(lines: Iterable[str]) -> list[dict]:
    """Rows from ncu's raw page: its own remarks, a header, a row of units, a row for each
    kernel."""
    table = [line for line in lines if line.startswith('"')]
    kernels = list(csv.DictReader(table))[1:]
    expected = [(problem, op) for problem in PROBLEMS for op in OPS]
    if len(kernels) != len(expected):
        raise ValueError(f"expected {len(expected)} kernels, found {len(kernels)} in ncu's output")
    rows = []
    for kernel, (problem, op) in zip(kernels, expected, strict=True):
        counted = [float(kernel[metric].replace(",", "")) for metric in METRICS]
        rows.append(
            {
                "shape": problem.name,
                "dtype": problem.dtype,
                "layout": problem.layout,
                "op": op,
                "kernel": kernel["Kernel Name"],
                "dram_bytes": sum(counted),
                "floor_bytes": roofline.bytes_moved(problem, op),
            }
        )
    return rows


def text(rows: list[dict]) -> str:
    lines = ["DRAM bytes, read and written, by ncu"]
    for row in rows:
        what = f"{row['op']:9} {row['shape']:16} {row['dtype']:8} {row['layout']}"
        ratio = row["dram_bytes"] / row["floor_bytes"]
        lines.append(f"  {what} {row['dram_bytes'] / 1e6:9.1f} MB, {ratio:.3f} of the floor")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.dram", description=__doc__.splitlines()[0])
    p.add_argument("what", choices=("work", "read"))
    p.add_argument("csv", type=Path, nargs="?")
    p.add_argument("--into", type=Path, metavar="JSON", help="results of bench.run to add to")
    args = p.parse_args()
    if args.what == "work":
        work()
        return
    rows = read(args.csv.read_text().splitlines())
    print(text(rows))
    if args.into is not None:
        results = json.loads(args.into.read_text())
        results["dram"] = rows
        results["acceptance"] = acceptance.judge(results)
        write(results, args.into)
        print("", acceptance.text(results["acceptance"]), sep="\n")


if __name__ == "__main__":
    main()
