"""python -m batchrenorm_cuda {doctor,explain,parity}"""

from __future__ import annotations

import argparse
import sys

from . import introspect


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
        text = introspect.explain(
            args.shape,
            introspect.DTYPES[args.dtype],
            channels_last=args.channels_last,
            device_like=args.device_like,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: not 0 if something is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["parity"]:  # has a parser of its own
        from . import parity

        return parity.main(argv[1:])

    parser = argparse.ArgumentParser(prog="python -m batchrenorm_cuda", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what was built, what is here, what is wrong")
    command.set_defaults(run=_doctor)
    command = commands.add_parser("explain", help="the launch plans for a shape, without a GPU")
    command.add_argument("--shape", type=_shape, required=True, metavar="N,C,...")
    command.add_argument("--dtype", choices=introspect.DTYPES, default="float32")
    command.add_argument("--channels-last", action="store_true")
    command.add_argument("--device-like", choices=introspect.CHIPS, default="h200")
    command.set_defaults(run=_explain)
    commands.add_parser("parity", help="every case against a float64 reference", add_help=False)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
