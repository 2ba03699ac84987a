"""A few small calls and nothing else: what compute-sanitizer looks at.

    compute-sanitizer --tool racecheck python -m bench.small

Every layout, slot width and way through the kernels: a block alone, a team, several rounds, in
shared memory or not, a prefetch, odd planes, skipped batches, inference. Results are not looked at,
as the parity harness does that; a sanitizer is slow enough without a reference beside it."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from batchrenorm_cuda import functional
from batchrenorm_cuda.parity import compute, tensors
from batchrenorm_cuda.parity.cases import CASES, Case

NAMES = (
    "2-D",
    "4-D",
    "65 channels",
    "odd plane",
    "channels_last",
    "channels_last, 65 channels",
    "misaligned",
    "in mid-ramp",
    "inference",
    "inference, odd plane, 16 channels",
    "inference, unaligned",
    "256 x 256",
)
# Few channels and many values: a team shares each, and with few SMs' worth of blocks fills its
# registers more than once. More channels than teams: on 132 SMs the next is prefetched, or what
# registers do not hold is retained in shared memory.
TEAMS = (
    Case("a team", (4, 2, 20000), ""),
    Case("teams, channels_last", (2, 16, 60, 60), "", form="channels_last"),
    Case("several rounds", (1, 1, 9_000_000), ""),
    Case("prefetch", (2, 128, 112, 112), ""),
    Case("prefetch, channels_last", (2, 256, 64, 64), "", form="channels_last"),
    Case("retained", (256, 8, 7, 7), ""),
    Case("bundles", (32, 800, 7, 7), ""),
    Case("bundles, prefetch or retained", (192, 512, 7, 7), ""),
    Case("unaligned, prefetch or retained", (2, 256, 65, 129), ""),
    Case("retained, channels_last", (2, 512, 64, 64), "", form="channels_last"),
)
DTYPES = (torch.float32, torch.float16)


def run(device: torch.device, teams: bool) -> int:
    """Runs the calls; returns how many there were."""
    cases = [case for case in CASES if case.name in NAMES] + [*(TEAMS if teams else ())]
    calls = 0
    for case in cases:
        case = replace(case, large=None)
        for dtype in DTYPES:
            compute.by_op(case, tensors.make(case, dtype, device))
            calls += 1
    t = tensors.make(CASES[0], torch.float32, device)
    t.x[0, 0] = float("nan")
    steps = torch.zeros((), dtype=torch.int64, device=device)
    functional.batch_renorm(
        t.x,
        t.running_mean,
        t.running_std,
        t.weight,
        t.bias,
        True,
        num_batches_tracked=steps,
        skip_nonfinite=True,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert int(steps) == 0
    return calls + 1


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.small", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--no-teams", action="store_true", help="small tensors only")
    args = p.parse_args()
    print(f"{run(torch.device(args.device), not args.no_teams)} calls ran")


if __name__ == "__main__":
    main()
