"""Launches of the CUDA kernels under the emulator of tests/simt: plans, tensors, orders of events,
and how far from float64 a result may be.

Small chips (a few SMs) and small teams make small tensors take the paths that only large ones take
on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from simt import truth
from simt.emulator import (
    DTYPES,
    ITEM_SIZE,
    Emulator,
    Layout,
    Order,
    Pass,
    Plan,
    Problem,
    Schedule,
    rounded,
    sanitizing,
)

FIRST, LAST = Layout.FIRST, Layout.LAST

# A missing barrier hides in one order and shows in another; none of them is enough alone.
SCHEDULES = [
    Schedule(Order.ASCENDING),
    Schedule(Order.DESCENDING),
    Schedule(Order.RANDOM, 1),
    Schedule(Order.RANDOM, 2),
    Schedule(Order.RANDOM, 3),
    Schedule(Order.PARALLEL, 4),
]


@dataclass(frozen=True)
class Case:
    why: str
    n: int
    c: int
    s: int
    layout: Layout = FIRST
    alignment: int = 16
    sms: int = 4
    # What the plan is made to be, beside what the planner says.
    choice: dict[str, int] = field(default_factory=dict)
    mean: float = 3.0
    std: float = 2.0

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def problem(self, dtype: str) -> Problem:
        alignment = max(self.alignment, ITEM_SIZE[dtype])
        return Problem(self.n, self.c, self.s, self.layout, dtype, alignment)


def ahead(why: str, team: int = 2, threads: int = 64, columns: int = 1, **geometry) -> Case:
    """A plan that prefetches, unless its slots have 2 bytes."""
    choice = {"threads": threads, "team": team, "columns": columns, "prefetch": 1}
    return Case(f"prefetch: {why}", choice=choice, **geometry)


def bundle(why: str, s: int = 49, threads: int = 64, **geometry) -> Case:
    """Planes side by side as whole slots, unless elements have 8 bytes."""
    choice = {"threads": threads, "team": 1, "columns": s} | geometry.pop("choice", {})
    return Case(f"bundle: {why}", choice=choice, s=s, **geometry)


def unaligned(why: str, s: int = 361, threads: int = 64, **geometry) -> Case:
    """Slots of 16 bytes that reach over the ends of planes, unless elements have more than 2."""
    choice = {"threads": threads, "team": 1, "unaligned": 1} | geometry.pop("choice", {})
    return Case(f"unaligned: {why}", choice=choice, s=s, **geometry)


def retaining(why: str, retained: int, threads: int = 64, **geometry) -> Case:
    """A plan of several rounds, of which as many before the last stay in shared memory, or all if
    it has not so many or they are wide."""
    choice = {"threads": threads, "team": 2, "columns": 1} | geometry.pop("choice", {})
    return Case(f"retain: {why}", choice={**choice, "retained": retained}, **geometry)


CASES = [
    Case("one value a channel", n=1, c=3, s=1),
    Case("two values a channel", n=2, c=3, s=1),
    Case("one channel, one value a plane", n=40, c=1, s=1),
    Case("odd plane", n=4, c=3, s=7),
    Case("7x7 plane", n=3, c=5, s=49),
    Case("14x14 plane", n=3, c=5, s=196),
    Case("plane of 4-byte slots", n=5, c=3, s=66),
    Case("plane of 16-byte slots", n=2, c=4, s=64),
    Case("view at 2 bytes", n=2, c=3, s=64, alignment=2),
    Case("view at 4 bytes", n=2, c=3, s=64, alignment=4),
    Case("view at 8 bytes", n=2, c=3, s=64, alignment=8),
    Case("more channels than resident blocks", n=2, c=130, s=16),
    Case("65 channels", n=5, c=65, s=36),
    Case("plane longer than a pass of the block", n=2, c=2, s=5000),
    Case("pass of the block longer than many planes", n=50, c=2, s=16),
    Case("team of two", n=6, c=3, s=64, choice={"threads": 64, "team": 2}),
    Case(
        "team of two, slabs in many waves", n=6, c=7, s=64, sms=1, choice={"threads": 64, "team": 2}
    ),
    Case(
        "team of three, last wave not full",
        n=6,
        c=7,
        s=200,
        sms=2,
        choice={"threads": 64, "team": 3},
    ),
    Case("last block of the team nearly empty", n=9, c=2, s=64, choice={"threads": 64, "team": 5}),
    Case("one team on the whole chip", n=48, c=3, s=64, choice={"threads": 64, "team": 12}),
    Case("team larger than a warp", n=40, c=2, s=64, sms=36, choice={"threads": 64, "team": 36}),
    Case("rounds without a team", n=9, c=3, s=1000, choice={"threads": 64}),
    Case("rounds in a team", n=12, c=5, s=1000, sms=2, choice={"threads": 64, "team": 2}),
    Case(
        "rounds in a team, first round nearly empty",
        n=1,
        c=4,
        s=8448,
        sms=2,
        choice={"threads": 64, "team": 2},
    ),
    Case(
        "rounds in a team, last block has one round less",
        n=1,
        c=4,
        s=4100,
        sms=2,
        choice={"threads": 64, "team": 2},
    ),
    Case(
        "rounds of odd planes in a team", n=90, c=3, s=49, sms=1, choice={"threads": 64, "team": 2}
    ),
    Case("large mean", n=8, c=3, s=256, mean=1e4, std=1.0),
    Case(
        "large mean in a team",
        n=8,
        c=3,
        s=256,
        mean=1e4,
        std=1.0,
        choice={"threads": 64, "team": 3},
    ),
    Case("small std", n=8, c=3, s=64, mean=0.0, std=1e-3),
    Case("rows: one channel", n=37, c=1, s=1, layout=LAST),
    Case("rows: one value a channel", n=1, c=5, s=1, layout=LAST),
    Case("rows: three channels", n=5, c=3, s=9, layout=LAST),
    Case("rows: 2-D input", n=37, c=100, s=1, layout=LAST),
    Case("rows: 2-D input of two examples", n=2, c=1000, s=1, layout=LAST),
    Case("rows: 65 channels", n=4, c=65, s=49, layout=LAST),
    Case("rows: 24 channels", n=4, c=24, s=49, layout=LAST),
    Case("rows: 64 channels", n=4, c=64, s=49, layout=LAST),
    Case("rows: view at 2 bytes", n=4, c=64, s=9, layout=LAST, alignment=2),
    Case("rows: view at 4 bytes", n=4, c=64, s=9, layout=LAST, alignment=4),
    Case("rows: view at 8 bytes", n=4, c=64, s=9, layout=LAST, alignment=8),
    Case("rows: last stripe partly beyond C", n=3, c=72, s=49, layout=LAST, choice={"columns": 8}),
    Case("rows: one column", n=3, c=72, s=49, layout=LAST, choice={"columns": 1, "threads": 64}),
    Case(
        "rows: widest stripe", n=3, c=200, s=49, layout=LAST, choice={"columns": 16, "threads": 256}
    ),
    Case(
        "rows: a block a row", n=3, c=130, s=49, layout=LAST, choice={"columns": 32, "threads": 128}
    ),
    Case(
        "rows: more partial results a thread than are on their way at a time",
        n=9,
        c=130,
        s=49,
        layout=LAST,
        sms=10,
        choice={"columns": 8, "threads": 64, "team": 20},
    ),
    Case(
        "rows: team of two",
        n=9,
        c=40,
        s=49,
        layout=LAST,
        choice={"columns": 4, "threads": 64, "team": 2},
    ),
    Case(
        "rows: team of three, slabs in many waves",
        n=9,
        c=136,
        s=49,
        layout=LAST,
        sms=2,
        choice={"columns": 2, "threads": 64, "team": 3},
    ),
    Case(
        "rows: team and a last stripe partly beyond C",
        n=9,
        c=65,
        s=49,
        layout=LAST,
        sms=2,
        choice={"columns": 8, "threads": 64, "team": 2},
    ),
    Case(
        "rows: team larger than a warp",
        n=90,
        c=8,
        s=49,
        layout=LAST,
        sms=40,
        choice={"columns": 1, "threads": 64, "team": 39},
    ),
    Case(
        "rows: rounds without a team",
        n=20,
        c=24,
        s=49,
        layout=LAST,
        choice={"columns": 4, "threads": 64},
    ),
    Case(
        "rows: rounds in a team",
        n=40,
        c=40,
        s=49,
        layout=LAST,
        sms=2,
        choice={"columns": 4, "threads": 64, "team": 2},
    ),
    Case(
        "rows: large mean in a team",
        n=64,
        c=8,
        s=9,
        layout=LAST,
        mean=1e4,
        std=1.0,
        choice={"team": 3},
    ),
    retaining("all rounds", 99, n=12, c=5, s=1000, sms=2),
    retaining("all but the ragged one", 1, n=12, c=5, s=1000, sms=2),
    retaining("one of many", 1, n=20, c=3, s=1000, sms=1, choice={"team": 1}),
    retaining("all rounds of a block alone", 99, n=9, c=7, s=1000, sms=1, choice={"team": 1}),
    retaining("first round nearly empty", 99, n=1, c=4, s=8448, sms=2),
    retaining("last block has one round less", 1, n=1, c=3, s=12292, sms=2),
    retaining("last block has one round less, all kept", 99, n=1, c=3, s=12292, sms=2),
    retaining("odd planes", 2, n=90, c=3, s=49, sms=1),
    retaining("7x7 planes, all kept", 99, n=90, c=3, s=49, sms=1),
    retaining("4-byte slots", 99, n=140, c=3, s=66, sms=1, alignment=4),
    retaining("8-byte slots", 2, n=140, c=3, s=68, sms=1, alignment=8),
    retaining("whole blocks", 1, n=9, c=3, s=6000, sms=2, threads=256),
    retaining("rows: all rounds", 99, n=40, c=40, s=49, layout=LAST, sms=2, choice={"columns": 4}),
    retaining("rows: one of many", 1, n=40, c=40, s=49, layout=LAST, sms=2, choice={"columns": 8}),
    retaining(
        "rows: last stripe partly beyond C",
        99,
        n=20,
        c=65,
        s=49,
        layout=LAST,
        sms=2,
        choice={"columns": 8},
    ),
    retaining(
        "rows: a block alone", 2, n=20, c=24, s=49, layout=LAST, choice={"columns": 4, "team": 1}
    ),
    bundle("7x7", n=3, c=16),
    bundle("one image", n=1, c=8),
    bundle("threads of several images", n=21, c=8, threads=256),
    bundle("a row of the block that no image fills", n=6, c=8, threads=256),
    bundle("fewest slots: 3x3", n=9, c=16, s=9),
    bundle("planes of 9x9, several passes", n=19, c=8, s=81, threads=128),
    bundle("a column a thread", n=3, c=8, s=255, threads=256),
    bundle("planes that are 8-byte slots", n=3, c=8, s=100, threads=128),
    bundle("boundaries between slots", n=3, c=16, s=16),
    bundle("no boundary inside a slot", n=3, c=8, s=64),
    bundle("rounds", n=40, c=8),
    bundle("large mean", n=12, c=8, s=25, mean=1e4, std=1.0),
    bundle("more slabs than blocks that run at a time", n=2, c=80, sms=1),
    bundle("team of two", n=11, c=24, choice={"team": 2}),
    bundle("team of three in many waves", n=11, c=40, sms=2, choice={"team": 3}),
    bundle("team of many, large mean", n=40, c=8, sms=10, mean=1e4, std=1.0, choice={"team": 20}),
    bundle("rounds in a team", n=50, c=24, sms=2, choice={"team": 2}),
    bundle("prefetch", n=8, c=56, sms=2, choice={"team": 2, "prefetch": 1}),
    bundle(
        "prefetch of whole blocks",
        n=38,
        c=40,
        sms=2,
        threads=256,
        choice={"team": 2, "prefetch": 1},
    ),
    bundle("retain all", n=50, c=24, sms=2, choice={"team": 2, "retained": 99}),
    bundle("retain one of many", n=50, c=16, sms=1, choice={"team": 1, "retained": 1}),
    unaligned("19x19", n=3, c=16),
    unaligned("one image", n=1, c=8),
    unaligned("planes that meet two slots", n=9, c=8, s=9),
    unaligned("a last slot that is empty in some channels", n=9, c=8, s=11),
    unaligned("planes of 7 and 8 slots", n=21, c=16, s=55, threads=128),
    unaligned("planes that are 4-byte slots", n=5, c=8, s=66),
    unaligned("planes that are 8-byte slots", n=5, c=8, s=100),
    unaligned("planes of many passes", n=1, c=8, s=8385),
    unaligned("a pass of many planes", n=120, c=8, s=9, threads=256),
    unaligned("rounds", n=14, c=8, s=361),
    unaligned("large mean", n=12, c=8, s=25, mean=1e4, std=1.0),
    unaligned("more slabs than blocks that run at a time", n=2, c=16, s=25, sms=1),
    unaligned("team of two", n=4, c=8, choice={"team": 2}),
    unaligned("team of three in many waves", n=5, c=16, sms=2, choice={"team": 3}),
    unaligned("team of many, large mean", n=9, c=8, sms=10, mean=1e4, std=1.0, choice={"team": 20}),
    unaligned("a share that is an empty slot", n=1, c=8, s=67, choice={"team": 10}),
    unaligned("rounds in a team", n=30, c=8, sms=2, choice={"team": 2}),
    unaligned("prefetch", n=4, c=16, sms=2, choice={"team": 2, "prefetch": 1}),
    unaligned(
        "prefetch, last slots empty", n=29, c=16, s=27, sms=2, choice={"team": 2, "prefetch": 1}
    ),
    unaligned("retain all", n=30, c=8, sms=2, choice={"team": 2, "retained": 99}),
    unaligned("retain one of many", n=30, c=8, sms=1, choice={"team": 1, "retained": 1}),
    ahead("one slab more than teams", n=6, c=4, s=64, sms=2, team=2),
    ahead("many slabs", n=6, c=23, s=64, sms=2, team=2),
    ahead("ragged shares, last wave not full", n=5, c=7, s=116, sms=2, team=3),
    ahead("last block of the team nearly empty", n=9, c=5, s=64, sms=5, team=5),
    ahead("8-byte slots", n=5, c=5, s=68, sms=2, team=2, alignment=8),
    ahead("4-byte slots", n=5, c=5, s=66, sms=2, team=2, alignment=4),
    ahead("no slot to copy, or 4 bytes", n=4, c=5, s=63, sms=2, team=2),
    ahead("whole blocks", n=4, c=7, s=1000, sms=2, team=2, threads=256),
    ahead("planes shorter than a step", n=100, c=5, s=8, sms=2, team=2),
    ahead("rows: many slabs", n=5, c=136, s=25, sms=2, layout=LAST, team=3, columns=2),
    ahead("rows: last stripe partly beyond C", n=4, c=72, s=30, sms=2, layout=LAST, columns=4),
    ahead("rows: channels of no vector", n=3, c=65, s=30, sms=2, layout=LAST, columns=8),
    ahead("rows: 8-byte slots", n=4, c=24, s=30, sms=2, layout=LAST, columns=2, alignment=8),
    ahead("rows: 4-byte slots", n=4, c=24, s=30, sms=2, layout=LAST, columns=2, alignment=4),
    ahead("rows: whole blocks", n=5, c=200, s=49, sms=2, layout=LAST, columns=8, threads=256),
]

# Of the tests of what a step leaves behind.
STATE_CASES = [
    Case("team of one", n=3, c=5, s=49),
    Case("a team", n=12, c=5, s=64, sms=2, choice={"threads": 64, "team": 2}),
    Case("more slabs than blocks that run at a time", n=2, c=40, s=16, sms=1),
    Case(
        "rows", n=9, c=40, s=49, layout=LAST, sms=2, choice={"columns": 4, "threads": 64, "team": 2}
    ),
    bundle("a team", n=11, c=24, sms=2, choice={"team": 2}),
    unaligned("a team", n=12, c=8, s=25, sms=2, choice={"team": 2}),
    ahead("a team", n=8, c=5, s=64, sms=2),
    ahead("rows", n=4, c=40, s=30, sms=2, layout=LAST, columns=4),
    retaining("a team", 99, n=12, c=5, s=1000, sms=2),
]


def makes_bundles(problem: Problem, choice: dict[str, int]) -> bool:
    """What bundle() asks for; elements of 8 bytes go channel by channel."""
    planes = problem.layout == FIRST and problem.dtype != "float64"
    return planes and choice.get("columns", 1) > 1


def goes_unaligned(problem: Problem, choice: dict[str, int]) -> bool:
    """What unaligned() asks for; there are no kernels for wider elements."""
    return bool(choice.get("unaligned")) and ITEM_SIZE[problem.dtype] == 2


def launches_of(cases: list[Case]) -> pytest.MarkDecorator:
    """Every case with the dtypes that get the plan that it is for."""
    made = [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in cases
        for dtype in DTYPES
        if ITEM_SIZE[dtype] == 2 or not case.choice.get("unaligned")
    ]
    return pytest.mark.parametrize(("case", "dtype"), made)


def plan_for_blocks(
    emulator: Emulator, slots: Pass, problem: Problem, choice: dict[str, int]
) -> Plan | None:
    """The plan of a pass without statistics, where the choice is not the planner's."""
    if makes_bundles(problem, choice):
        return emulator.plan_blocks(slots, problem, 16, problem.spatial)
    if goes_unaligned(problem, choice):
        return emulator.plan_blocks(slots, problem, 16, 1)
    return None


def plan_for_project(emulator: Emulator, problem: Problem, choice: dict[str, int]) -> Plan:
    made = plan_for_blocks(emulator, Pass.BACKWARD, problem, choice)
    return made or emulator.plan_project(problem)


def plan_for(emulator: Emulator, which: Pass, problem: Problem, choice: dict[str, int]) -> Plan:
    emulator.sm_count = emulator.sm_count or 4
    plan = emulator.plan(which, problem)
    if which == Pass.INFERENCE:
        return plan_for_blocks(emulator, which, problem, choice) or plan
    if not choice:
        return plan
    made = {
        "team": plan.team,
        "threads": plan.threads,
        "columns": plan.columns,
        "slot_bytes": plan.slot_bytes,
        "slots": plan.slots,
        **choice,
    }
    if problem.layout == FIRST and {"columns", "unaligned"} & choice.keys():
        # Bundles of planes, or channels one by one, of slots that tile them or do not.
        alone = not makes_bundles(problem, choice)
        tiled = alone and not goes_unaligned(problem, choice)
        slot_bytes = widest_slot(problem) if tiled else 16
        made |= {"slot_bytes": slot_bytes, "slots": slots_per_thread(which, slot_bytes)}
        made["columns"] = 1 if alone else made["columns"]
        made["threads"] = max(made["threads"], 1 << (made["columns"] - 1).bit_length())
    lanes = made["slot_bytes"] // ITEM_SIZE[problem.dtype]
    if problem.layout == LAST:
        # A block has at least one thread for each of its channels.
        made["columns"] = min(made["columns"], 128 // lanes)
        made["threads"] = max(made["threads"], made["columns"] * lanes)
    # float64 holds half as many blocks an SM.
    most = emulator.sm_count * blocks_per_sm(problem, made["columns"])
    made["team"] = min(made["team"], most)
    made.pop("unaligned", None)
    return emulator.cut(which, problem, **made)


def slots_per_thread(which: Pass, slot_bytes: int) -> int:
    """As the kernels are compiled for: csrc/core/geometry.h."""
    most = 128 if which == Pass.FORWARD else 64
    return min(most // slot_bytes, 16)


def widest_slot(problem: Problem) -> int:
    size = ITEM_SIZE[problem.dtype]
    row = problem.spatial * size
    return max(b for b in (2, 4, 8, 16) if b == size or not (row % b or problem.alignment % b))


def blocks_per_sm(problem: Problem, columns: int = 1) -> int:
    if problem.dtype == "float64":
        return 1
    return 3 if problem.layout == FIRST and columns == 1 else 2


def draw(case: Case, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Moving statistics near the batch's, so that r and d are clipped in some channels and free in
    others."""
    rng = np.random.default_rng(seed)
    real = np.float64 if dtype == "float64" else np.float32
    channel = (case.c, 1)
    centre = case.mean * rng.uniform(0.5, 1.5, channel) if case.mean < 100 else case.mean
    spread = case.std * rng.uniform(0.5, 1.5, channel)
    x = rng.standard_normal((case.n, case.c, case.s)) * spread + centre
    return {
        "x": rounded(x, dtype),
        "dy": rounded(rng.standard_normal(x.shape), dtype),
        "weight": rng.standard_normal(case.c).astype(real),
        "bias": rng.standard_normal(case.c).astype(real),
        "running_mean": (case.mean + case.std * rng.standard_normal(case.c)).astype(real),
        "running_std": (case.std * np.exp(rng.standard_normal(case.c))).astype(real),
    }


def epsilon(problem: Problem) -> float:
    return float(np.finfo(problem.real).eps)


def half_ulp(problem: Problem, values: np.ndarray) -> np.ndarray:
    """What storing these values costs at most."""
    mantissa, least = {
        "float32": (23, 2.0**-126),
        "float16": (10, 2.0**-14),
        "bfloat16": (7, 2.0**-126),
        "float64": (52, 2.0**-1022),
    }[problem.dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(values.astype(np.float64)), least)))
    return 2.0 ** (exponent - mantissa - 1)


def assert_within(name: str, actual: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    error = np.abs(actual.astype(np.longdouble) - expected)
    bound = np.broadcast_to(bound, error.shape)
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{name}: {bad.sum()} of {bad.size} are off, first at {np.argwhere(bad)[0]}: "
        f"got {actual[bad][0]}, want {float(expected[bad][0])} within {bound[bad][0]:.2e}"
    )


def column(values) -> np.ndarray:
    return np.asarray(values).reshape(-1, 1)


SLACK = 16  # roundings, in units of epsilon; the errors seen are about 2


def assert_centred(problem: Problem, residue: np.ndarray, want: dict[str, np.ndarray]) -> None:
    spacing = epsilon(problem) * (np.abs(want["mean"]) + 64 * want["std"])
    assert (np.abs(residue) <= spacing).all(), "the centre is far from the mean"


def check_forward(
    problem: Problem, got: dict, want: dict, weight, bias, running_mean=None, running_std=None
):
    unit = SLACK * epsilon(problem)
    w = 1.0 if weight is None else np.abs(column(weight))
    b = 0.0 if bias is None else np.abs(column(bias))
    # Where d is not clipped its error is that of mean - running_mean.
    shift = 0.0
    if running_mean is not None:
        shift = column((want["std"] + np.abs(want["mean"] - running_mean)) / running_std)
    x_norm = np.abs(want["y_norm"])
    amplitude = w * (column(want["r"]) * (x_norm + 1) + np.abs(column(want["d"])) + shift) + b
    assert_within("y", got["y"], want["y"], half_ulp(problem, want["y"]) * 1.001 + unit * amplitude)

    centre, residue, inv_std, r, d = got["stats"].astype(np.longdouble)
    assert_within("mean", centre + residue, want["mean"], 2 * epsilon(problem) * want["std"])
    assert_centred(problem, residue, want)
    assert_within("inv_std", inv_std, want["inv_std"], unit * want["inv_std"])
    assert_within("r", r, want["r"], unit * want["r"])
    if running_mean is None:
        assert (r == 1).all() and (d == 0).all()
        return
    assert_within("d", d, want["d"], unit * (shift.ravel() + np.abs(want["d"])))
    size = np.abs(want["running_mean"]) + np.abs(running_mean) + want["std"]
    assert_within("running_mean", got["running_mean"], want["running_mean"], unit * size)
    size = np.abs(want["running_std"]) + np.abs(running_std) + want["std"]
    assert_within("running_std", got["running_std"], want["running_std"], unit * size)


def stats_rows(want: dict[str, np.ndarray], real: type) -> np.ndarray:
    """The [5, C] tensor that backward reads, from truth.forward()."""
    centre = want["mean"].astype(real)
    rows = [centre, want["mean"] - centre, want["inv_std"], want["r"], want["d"]]
    return np.array(rows, np.longdouble).astype(real)


def expected_forward(x, **arguments) -> dict[str, np.ndarray]:
    want = truth.forward(x, **arguments)
    want["y_norm"] = (x - column(want["mean"])) * column(want["inv_std"])
    return want


def bits(out: dict[str, np.ndarray]) -> dict[str, bytes]:
    """What a launch leaves behind for its caller; its workspace is its own."""
    return {k: v.tobytes() for k, v in out.items() if k not in ("partials", "proposals")}


def over_schedules(emulator: Emulator, launch) -> dict[str, np.ndarray]:
    """The result of a launch, after making sure that it does not depend on the order of events."""
    first = None
    # Addresses, which are what sanitizers look at, are the same in every order: the first and the
    # one of several threads will do.
    for schedule in SCHEDULES[::5] if sanitizing() else SCHEDULES:
        emulator.schedule = schedule
        out = launch()
        if first is None:
            first = out
        for name, value in bits(out).items():
            assert value == bits(first)[name], (
                f"{name} differs between {SCHEDULES[0]} and {schedule}"
            )
    return first
