"""python -m batchrenorm_cuda {doctor,explain,parity}"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import chips, explain, introspect, suites


def _doctor(_: argparse.Namespace) -> int:
    text, problems = introspect.doctor()
    print(text)
    for problem in problems:
        print(f"\nPROBLEM: {problem}")
    print(f"\n{len(problems)} problem(s)" if problems else "\nall is well")
    return 1 if problems else 0


def _shape(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 32,64,56,56, got {text}") from None


def _explain(args: argparse.Namespace) -> int:
    try:
        dtypes = explain.named("dtype", args.dtype, suites.DTYPES)
        layouts = explain.named("layout", args.layout, suites.LAYOUTS)
        shapes = [args.shape]
        if args.suite is not None:
            shapes = explain.shapes_of(explain.named("suite", args.suite, suites.SUITES))
        rows = explain.expectations(shapes, dtypes, layouts, args.device_like)
        if args.json is not None:
            args.json.write_text(explain.as_json(rows, args.device_like) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(explain.text(rows, args.device_like))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 1 if something is wrong, 2 with the arguments
    themselves."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["parity"]:  # has a parser of its own
        from . import parity

        return parity.main(argv[1:])

    parser = argparse.ArgumentParser(prog="python -m batchrenorm_cuda", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what was built, what is here, what is wrong")
    command.set_defaults(run=_doctor)
    command = commands.add_parser(
        "explain",
        help="the launch plans for a shape or for suites of shapes, without a GPU",
        description="Lists are separated by commas; all is everything.",
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", type=_shape, metavar="N,C,...")
    what.add_argument("--suite", metavar="NAMES", help=", ".join(suites.SUITES))
    command.add_argument(
        "--dtype", default="float32", metavar="NAMES", help=", ".join(suites.DTYPES)
    )
    command.add_argument(
        "--layout", default="nchw", metavar="NAMES", help=", ".join(suites.LAYOUTS)
    )
    command.add_argument(
        "--device-like", default="h200", metavar="CHIP", help=f"{', '.join(chips.CHIPS)}, or SMs"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="the same for a program")
    command.set_defaults(run=_explain)
    commands.add_parser("parity", help="every case against a float64 reference", add_help=False)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()  # which at the end of the interpreter could not be caught
    except BrokenPipeError:  # as in explain ... | head -1: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # what a shell says of a command that SIGPIPE ended
    sys.exit(status)
