"""Runs checks in several processes at once, as the ranks of one gloo process group.

Starting a process costs seconds, so all checks of a world run in the same processes, one after the
other, and each is reported for itself. A check is a function of a Rank in one of the modules below.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

MODULES = ("sync_checks", "ddp_checks")
TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Rank:
    rank: int
    world: int


def find(check: str):
    for module in MODULES:
        if found := getattr(importlib.import_module(module), check, None):
            return found
    raise LookupError(f"none of {MODULES} has {check}")


def run(world: int, checks: list[str], folder: Path, patience: float = 600) -> list[dict]:
    """The outcome of each check by rank: "passed", or a traceback. What a rank did not come to is
    missing, and so is all that came after a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = (str(TESTS.parent), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    processes = []
    for rank in range(world):
        command = [sys.executable, __file__, str(rank), str(world), str(folder), *checks]
        log = open(folder / f"log{rank}", "w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    outcomes = []
    for rank in range(world):
        lines = folder.joinpath(f"outcomes{rank}")
        text = lines.read_text() if lines.exists() else ""
        outcome = dict(map(json.loads, text.splitlines()))
        outcome["log"] = folder.joinpath(f"log{rank}").read_text()
        outcomes.append(outcome)
    return outcomes


def main(rank: int, world: int, folder: Path, checks: list[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=240),
    )
    with open(folder / f"outcomes{rank}", "w") as outcomes:
        for check in checks:
            torch.manual_seed(0)
            torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
            try:
                find(check)(Rank(rank, world))
                outcome = "passed"
            except Exception:
                outcome = traceback.format_exc()
            print(json.dumps((check, outcome)), file=outcomes, flush=True)
            if outcome != "passed":
                os._exit(1)  # the other ranks may be waiting: let them fail at once
    os._exit(0)  # the group may have lost a rank by now: nothing may wait for it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
