"""Times the CPU kernels of several states of the code beside each other: does a change pay?

    python -m bench.variants HEAD . --shape 4x512x28x28,32x2048x7x7 --op backward

A state is a git revision, or a directory with a checkout (`.`: what is there now). It may name the
settings that it takes instead of this processor's, as in `.:zen5` (see csrc/cpu/traits.h). All run
in one process and take turns on the same memory, below autograd and the operators, so that a few
per cent show where two runs of bench.run differ by tens. Prints how many times as fast as the first
state the others are, for each shape and as geometric means. Needs a compiler with OpenMP."""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from batchrenorm_cuda import _C

from . import OPS, shapes, timing
from .machine import ROOT
from .run import list_of

BUILT = ROOT / "build" / "variants"
CPU = torch.device("cpu")
LEAST_SECONDS = 2e-3  # of a sample, for the clock


def tree_of(state: str) -> Path:
    """Where a state's sources are; those of a revision are exported, once."""
    if (Path(state) / "setup.py").is_file():
        return Path(state).resolve()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "-q", f"{state}^{{commit}}"], capture_output=True, text=True
    ).stdout.strip()
    if not commit:
        raise ValueError(f"a state must be a checkout or a revision of git, got {state!r}")
    tree = BUILT / commit[:12]
    if not (tree / "setup.py").is_file():
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run([*git, "archive", commit], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def parse(state: str) -> tuple[Path, str | None]:
    """The tree, and whose settings."""
    name, _, settings = state.partition(":")
    known = _C.cpu_info()["known_settings"]
    if settings and settings not in known:
        raise ValueError(f"settings must be one of {', '.join(known)}, got {settings!r}")
    return tree_of(name), settings or None


def objects_of(tree: Path) -> list[Path]:
    """The CPU kernels of a tree, compiled as its setup.py does."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/variants/lib"],
        cwd=tree,
        env={**os.environ, "BATCHRENORM_CUDA": "0"},
        check=True,
    )
    built = tree / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}-cpu"
    return [built / f"csrc/cpu/{source.name}.o" for source in (tree / "csrc/cpu").glob("*.cpp")]


def load(tree: Path, objects: Iterable[Path], settings: str | None) -> Callable[..., float]:
    """batchrenorm_seconds of variants.cpp, with these objects."""
    flags = "-std=c++17 -O3 -fPIC -shared -fopenmp -fvisibility=hidden".split()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/variant.so"
        command = [*compiler, *flags, f"-I{tree}/csrc", source, *objects, "-o", library]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(library).batchrenorm_seconds
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_double
    function.argtypes = [number] * 3 + [ctypes.c_int] * 4 + [number] + [pointer] * 4
    function.argtypes += [ctypes.c_int, number, number]
    tiny = shapes.Problem((2, 1), "float32", "nhwc")
    first = Comparison(tiny, "forward", threads=1, hot=True, reads=False)
    wish = {} if settings is None else {"BATCHRENORM_CPU_TRAITS": settings}
    with mock.patch.dict(os.environ, wish):  # the first call looks
        first.sample(function, first.outputs())
    return function


class Comparison:
    """One pass over one problem, for every state on the same inputs."""

    def __init__(
        self, problem: shapes.Problem, op: str, threads: int, hot: bool, reads: bool
    ) -> None:
        sets = timing.sets_needed(problem, CPU, hot)
        self._inputs = timing.inputs_of(problem, CPU, sets)
        self._rotation, self._calls = timing.Rotation(sets), 1
        batch, channels, *spatial = problem.shape
        self._problem = (
            batch,
            channels,
            math.prod(spatial),
            shapes.LAYOUTS.index(problem.layout),
            list(shapes.DTYPES).index(problem.dtype),
        )
        pointers = ctypes.c_void_p * sets
        x, dy = (pointers(*(pair[i].data_ptr() for pair in self._inputs)) for i in range(2))
        self._pass = (OPS.index(op), threads, sets, x, dy)
        self._reads = reads

    def outputs(self) -> tuple[Tensor, Tensor]:
        """y and dx. Every state has its own: what one leaves in the caches is not for another to
        clear away."""
        x, dy = self._inputs[0]
        return torch.empty_like(x), torch.empty_like(dy)

    def sample(self, function: Callable[..., float], outputs: tuple[Tensor, Tensor]) -> float:
        """Seconds of a call, on the inputs that were used longest ago."""
        first = self._rotation.take(self._calls).start
        y, dx = (output.data_ptr() for output in outputs)
        how = (y, dx, self._reads, first, self._calls)
        return function(*self._problem, *self._pass, *how) / self._calls

    def samples(
        self, functions: dict[str, Callable[..., float]], seconds: float
    ) -> dict[str, list[float]]:
        """Of each state, for `seconds` of it."""
        samplers = {
            name: functools.partial(self.sample, function, self.outputs())
            for name, function in functions.items()
        }
        for sample in samplers.values():  # the first call pays for pages and threads
            sample()
        a_call = next(iter(samplers.values()))()
        self._calls = max(1, math.ceil(LEAST_SECONDS / a_call))
        count = max(7, math.ceil(seconds / (a_call * self._calls)))
        return timing.take_turns(samplers, dict.fromkeys(samplers, count))


def shape_list(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.variants", description="Lists are separated by commas."
    )
    p.add_argument("states", nargs="+", metavar="STATE", help="a revision of git, or a directory")
    p.add_argument("--shape", type=shape_list, metavar="4x64x28x28", help="default: suite cpu")
    p.add_argument("--dtype", type=list_of(list(shapes.DTYPES)), default=["float32", "bfloat16"])
    p.add_argument("--layout", type=list_of(shapes.LAYOUTS), default=list(shapes.LAYOUTS))
    p.add_argument("--op", type=list_of(OPS), default=["forward", "backward", "inference"])
    p.add_argument("--threads", type=lambda t: [int(n) for n in t.split(",")], default=[1])
    p.add_argument("--hot", action="store_true", help="the same inputs in every call")
    p.add_argument("--reads", action="store_true", help="with a reader of what is written")
    p.add_argument("--seconds", type=float, default=0.1, help="of each state for each comparison")
    return p


def compare(
    functions: dict[str, Callable[..., float]], args: argparse.Namespace
) -> dict[tuple[str, ...], list[list[float]]]:
    """Prints a line for each comparison. Returns its ratios by what the means are taken over."""
    found = defaultdict(list)
    for dtype, shape in itertools.product(args.dtype, args.shape or shapes.SUITES["cpu"]):
        for layout in shapes.layouts_of(shape, args.layout):
            problem = shapes.Problem(shape, dtype, layout)
            for op, threads in itertools.product(args.op, args.threads):
                comparison = Comparison(problem, op, threads, args.hot, args.reads)
                samples = comparison.samples(functions, args.seconds)
                base, *others = (statistics.median(of_one) for of_one in samples.values())
                ratios = [base / other for other in others]
                found[op, dtype, layout, f"{threads} threads"].append(ratios)
                line = f"{op:9} {problem.name:16} {dtype:8} {layout} {threads} {base * 1e6:10.1f}"
                print(line, *(f"{ratio:7.2f}" for ratio in ratios), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        states = {state: parse(state) for state in args.states}
    except ValueError as error:
        parser().error(str(error))
    trees = dict.fromkeys(tree for tree, _ in states.values())
    built = {tree: objects_of(tree) for tree in trees}
    functions = {
        state: load(tree, built[tree], settings) for state, (tree, settings) in states.items()
    }
    first, *others = functions
    print(f"us of {first}; times as fast: {', '.join(others)}")
    means = compare(functions, args)
    print("\ngeometric means")
    for key, rows in means.items():
        print(
            " ".join(key),
            *(f"{statistics.geometric_mean(r):7.3f}" for r in zip(*rows, strict=True)),
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
