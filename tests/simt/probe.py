"""Runs a short selection of launches from a given library and says what is wrong with the results,
if anything.

    python tests/simt/probe.py LIBRARY forward|backward|merge [--one-schedule]

A process of its own, because a kernel with a planted bug may crash or never end. Exit status 1 and
a line that begins with CAUGHT: the numbers are off, the bits depend on the schedule, a write went
astray, or the emulator stopped the launch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt import truth  # noqa: E402
from simt.emulator import (  # noqa: E402
    Buffer,
    Emulator,
    Layout,
    Order,
    Pass,
    Problem,
    Schedule,
    rounded,
)

# Beyond the last slot that a tile of any case below could have. A narrower zone lets a stray store
# into the allocator's own memory, where the process crashes or hangs.
Buffer.ZONE = 1 << 19

SCHEDULES = [
    Schedule(Order.ASCENDING),
    Schedule(Order.DESCENDING),
    *(Schedule(Order.RANDOM, seed) for seed in range(1, 6)),
    Schedule(Order.PARALLEL, 1),
]

UNALIGNED = {"slot_bytes": 16, "columns": 1}

# Problem, SMs, choice: one block a slab, teams with several slabs each, several rounds, stripes
# that end beyond C, more partial results a thread than are on their way at a time, one block a slab
# again, the next slab on its way, several rounds in shared memory: all, and all but a ragged one;
# bundles of planes; slots that reach over the ends of planes, some of them empty.
CASES = [
    (Problem(3, 5, 49), 4, {}),
    (Problem(6, 7, 200), 2, {"threads": 64, "team": 3}),
    (Problem(12, 5, 1000), 2, {"threads": 64, "team": 2}),
    (Problem(9, 65, 49, Layout.LAST), 2, {"columns": 8, "threads": 64, "team": 2}),
    (Problem(9, 128, 49, Layout.LAST), 2, {"columns": 16, "threads": 64, "team": 4}),
    (Problem(9, 64, 49, Layout.LAST), 5, {"columns": 16, "threads": 64, "team": 10}),
    (Problem(2, 40, 16), 1, {}),
    (Problem(6, 7, 200), 2, {"threads": 64, "team": 3, "prefetch": 1}),
    (Problem(5, 65, 49, Layout.LAST), 2, {"columns": 8, "threads": 64, "team": 2, "prefetch": 1}),
    (Problem(5, 5, 1000), 2, {"threads": 64, "team": 2, "retained": 9}),
    (Problem(13, 5, 1000), 2, {"threads": 64, "team": 2, "retained": 2}),
    (Problem(40, 40, 49, Layout.LAST), 2, {"columns": 8, "threads": 64, "team": 2, "retained": 2}),
    (Problem(7, 12, 49), 2, {"columns": 49, "threads": 128, "team": 2}),
    (Problem(14, 16, 67, dtype="float16"), 2, UNALIGNED | {"threads": 64, "team": 2}),
]
# What storing y and dx costs.
ROUNDING = {"float32": 3e-6, "float16": 6e-4}


def scaled_error(actual: np.ndarray, expected: np.ndarray) -> float:
    error = np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30)
    return float("inf") if np.isnan(error) else float(error)


def outcome(emulator: Emulator, which: Pass, problem: Problem, plan, data) -> dict[str, np.ndarray]:
    state = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    # A jump of the limits and a cumulative average: a block that reads the counter too late cannot
    # go unnoticed.
    step = {"num_batches_tracked": 3, "schedule": np.array([3, 3.0, 3, 5.0, 3]), "momentum": -1.0}
    want = truth.forward(data["x"], **state, **step)
    if which == Pass.FORWARD:
        got = emulator.forward(problem, data["x"], plan=plan, **state, **step)
        kept = emulator.forward(problem, data["x"], plan=plan, skip_nonfinite=True, **state, **step)
        for name in ("running_mean", "running_std", "num_batches_tracked"):
            if kept[name].tobytes() != got[name].tobytes():
                raise AssertionError(f"{name} differs with skip_nonfinite")
        want["stats"] = np.array([want[k] for k in ("inv_std", "r", "d")])
        got["stats"] = got["stats"][2:]
        names = ("y", "stats", "running_mean", "running_std", "num_batches_tracked")
    else:
        centre = want["mean"].astype(np.float32)
        rows = (centre, want["mean"] - centre, want["inv_std"], want["r"], want["d"])
        stats = np.array(rows).astype(np.float32)
        got = emulator.backward(
            problem, data["dy"], data["x"], weight=data["weight"], stats=stats, plan=plan
        )
        want = truth.backward(
            data["dy"],
            data["x"],
            data["weight"],
            **{k: want[k] for k in ("mean", "inv_std", "r", "d")},
        )
        names = ("dx", "dweight", "dbias")
    for name in names:
        error = scaled_error(got[name], want[name])
        if not error < (ROUNDING[problem.dtype] if name in ("y", "dx") else 3e-6):
            raise AssertionError(f"{name} is off by {error:.1e}")
    return {name: got[name] for name in names}


def merged(emulator: Emulator, channels: int, whole: np.ndarray, state: dict) -> dict:
    """Of three ranks, one of them empty, and with more channels than threads."""
    shares = [whole[:1], whole[:0], whole[1:]]
    gathered = np.zeros((3, 2 * channels + 2))
    for message, share in zip(gathered, shares, strict=True):
        if share.size:
            message[:channels] = share.mean((0, 2))
            message[channels:-2] = share.var((0, 2)) * share.shape[0] * share.shape[2]
        message[-2:] = share.shape[0] * share.shape[2], 1
    step = {"num_batches_tracked": 3, "schedule": np.array([3, 3.0, 3, 5.0, 3]), "momentum": -1.0}
    got = emulator.merge(gathered, "float32", **state, **step)
    kept = emulator.merge(gathered, "float32", skip_nonfinite=True, **state, **step)
    gathered[0, channels - 1] = np.nan
    skipped = emulator.merge(gathered, "float32", skip_nonfinite=True, **state, **step)
    want = truth.forward(whole, **state, **step)
    want["stats"] = np.array([want[k] for k in ("inv_std", "r", "d")])
    got["stats"] = got["stats"][2:]
    for name in ("stats", "running_mean", "running_std", "num_batches_tracked"):
        error = scaled_error(got[name], want[name])
        if not error < 3e-6:
            raise AssertionError(f"{name} is off by {error:.1e}")
        if name != "stats" and kept[name].tobytes() != got[name].tobytes():
            raise AssertionError(f"{name} differs with skip_nonfinite")
    for name in ("running_mean", "running_std"):
        if skipped[name].tobytes() != state[name].tobytes():
            raise AssertionError(f"{name} of a skipped batch has moved")
    if skipped["num_batches_tracked"] != 3 or got["total"].tolist() != [whole[:, 0].size, 3]:
        raise AssertionError("counted wrongly")
    return got


def probe_merge(emulator: Emulator, schedules: list[Schedule]) -> None:
    rng = np.random.default_rng(0)
    for channels in (5, 600):
        whole = rng.standard_normal((4, channels, 6)) * 2 + np.arange(4).reshape(-1, 1, 1)
        state = {
            "running_mean": rng.standard_normal(channels).astype(np.float32),
            "running_std": np.exp(rng.standard_normal(channels)).astype(np.float32),
        }
        first = None
        for emulator.schedule in schedules:
            try:
                got = merged(emulator, channels, whole, state)
                first = first or got
                if any(value.tobytes() != first[name].tobytes() for name, value in got.items()):
                    raise AssertionError("the result depends on the order of events")
            except (AssertionError, RuntimeError) as error:
                sys.exit(f"CAUGHT {channels} channels, {emulator.schedule}: {error}")


def main() -> None:
    emulator = Emulator(sys.argv[1])
    schedules = [Schedule(Order.RANDOM, 1)] if "--one-schedule" in sys.argv else SCHEDULES
    if sys.argv[2] == "merge":
        return probe_merge(emulator, schedules)
    which = Pass[sys.argv[2].upper()]
    rng = np.random.default_rng(0)
    for problem, sm_count, choice in CASES:
        n, c, s = problem.shape
        data = {
            "x": rounded(rng.standard_normal((n, c, s)) + 20, problem.dtype),
            "dy": rounded(rng.standard_normal((n, c, s)) + 0.5, problem.dtype),
            "weight": rng.standard_normal(c).astype(np.float32),
            "bias": rng.standard_normal(c).astype(np.float32),
            "running_mean": (20 + rng.standard_normal(c)).astype(np.float32),
            "running_std": np.exp(rng.standard_normal(c)).astype(np.float32),
        }
        emulator.sm_count = sm_count
        plan = emulator.plan(which, problem)
        if choice:
            made = {"columns": plan.columns, "threads": plan.threads, "team": plan.team}
            made |= {"slot_bytes": plan.slot_bytes, "slots": plan.slots, **choice}
            if problem.layout == Layout.FIRST and (made["columns"] > 1 or "slot_bytes" in choice):
                made |= {"slot_bytes": 16, "slots": 8 if which == Pass.FORWARD else 4}
            plan = emulator.cut(which, problem, **made)
            assert plan.prefetch == choice.get("prefetch", 0)
            assert (plan.retained > 0) == ("retained" in choice)
        first = None
        for emulator.schedule in schedules:
            try:
                got = outcome(emulator, which, problem, plan, data)
                first = first or got
                for name, value in got.items():
                    if value.tobytes() != first[name].tobytes():
                        raise AssertionError(f"{name} depends on the order of events")
            except (AssertionError, RuntimeError) as error:
                sys.exit(f"CAUGHT {problem}, {plan}, {emulator.schedule}: {error}")


if __name__ == "__main__":
    main()
