"""The shipped CUDA kernels on the CPU, under the emulator of tests/simt: right against float64, the
same bits in whatever order threads and blocks run, every output written and nothing else, control
words as they were.

Small chips (a few SMs) and small teams make small tensors take the paths that only large ones take
on a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from simt import build, truth
from simt.emulator import (
    COOPERATIVE_LAUNCH_TOO_LARGE,
    CUMULATIVE,
    DTYPES,
    ITEM_SIZE,
    LAUNCH_FAILURE,
    Emulator,
    KernelError,
    Layout,
    MemoryError_,
    Order,
    Pass,
    Plan,
    Problem,
    Schedule,
    decoded,
    encoded,
    load,
    replace,
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


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return load()


@dataclass(frozen=True)
class Case:
    why: str
    n: int
    c: int
    s: int
    layout: Layout = FIRST
    alignment: int = 16
    sms: int = 4
    choice: dict[str, int] = field(
        default_factory=dict
    )  # what the plan is made to be, beside what the planner says
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


def plan_for(emulator: Emulator, which: Pass, problem: Problem, choice: dict[str, int]) -> Plan:
    emulator.sm_count = emulator.sm_count or 4
    plan = emulator.plan(which, problem)
    if not choice or which == Pass.INFERENCE:
        return plan
    made = {"team": plan.team, "threads": plan.threads, "columns": plan.columns, **choice}
    # A block has at least one thread for each of its channels.
    most = 128 // (plan.slot_bytes // ITEM_SIZE[problem.dtype])
    made["columns"] = min(made["columns"], most)
    # float64 holds half as many blocks an SM.
    made["team"] = min(made["team"], emulator.sm_count * blocks_per_sm(problem))
    if problem.layout == LAST:
        channels = made["columns"] * plan.slot_bytes // ITEM_SIZE[problem.dtype]
        made["threads"] = max(made["threads"], channels)
    return emulator.cut(which, problem, slot_bytes=plan.slot_bytes, slots=plan.slots, **made)


def blocks_per_sm(problem: Problem) -> int:
    if problem.dtype == "float64":
        return 1
    return 3 if problem.layout == FIRST else 2


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


def check_forward(
    problem: Problem, got: dict, want: dict, weight, bias, running_mean=None, running_std=None
):
    unit = SLACK * epsilon(problem)
    w = 1.0 if weight is None else np.abs(column(weight))
    b = 0.0 if bias is None else np.abs(column(bias))
    # Where d is not clipped its error is that of mean - running_mean.
    shift = 0.0
    if running_mean is not None:
        shift = column(
            (np.abs(want["mean"] - want["pivot"]) + np.abs(want["pivot"] - running_mean))
            / running_std
        )
    x_norm = np.abs(want["y_norm"])
    amplitude = w * (column(want["r"]) * (x_norm + 1) + np.abs(column(want["d"])) + shift) + b
    assert_within("y", got["y"], want["y"], half_ulp(problem, want["y"]) * 1.001 + unit * amplitude)

    pivot, offset, inv_std, r, d = got["stats"].astype(np.longdouble)
    assert (pivot == want["pivot"]).all(), "the pivot is the channel's first element"
    scale = np.abs(want["mean"] - want["pivot"]) + want["std"]
    assert_within("offset", offset, want["mean"] - want["pivot"], unit * scale)
    assert_within("inv_std", inv_std, want["inv_std"], unit * want["inv_std"])
    assert_within("r", r, want["r"], unit * want["r"])
    if running_mean is None:
        assert (r == 1).all() and (d == 0).all()
        return
    assert_within("d", d, want["d"], unit * (shift.ravel() + np.abs(want["d"])))
    size = np.abs(want["running_mean"]) + np.abs(running_mean) + scale
    assert_within("running_mean", got["running_mean"], want["running_mean"], unit * size)
    size = np.abs(want["running_std"]) + np.abs(running_std) + want["std"]
    assert_within("running_std", got["running_std"], want["running_std"], unit * size)


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
    for schedule in SCHEDULES:
        emulator.schedule = schedule
        out = launch()
        if first is None:
            first = out
        for name, value in bits(out).items():
            assert value == bits(first)[name], (
                f"{name} differs between {SCHEDULES[0]} and {schedule}"
            )
    return first


# ---- every geometry, every dtype, every pass ----

each_team_pass = pytest.mark.parametrize("which", (Pass.FORWARD, Pass.BACKWARD))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(emulator: Emulator, case: Case, dtype: str):
    emulator.sm_count = case.sms
    problem = case.problem(dtype)
    plan = plan_for(emulator, Pass.FORWARD, problem, case.choice)
    data = draw(case, dtype)
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    scalars = {"limits": (1.5, 0.7), "momentum": 0.25, "eps": 1e-5}
    got = over_schedules(
        emulator,
        lambda: emulator.forward(
            problem, data["x"], plan=plan, num_batches_tracked=41, **tensors, **scalars
        ),
    )
    want = expected_forward(data["x"], num_batches_tracked=41, **tensors, **scalars)
    check_forward(problem, got, want, **tensors)
    assert got["num_batches_tracked"] == 42


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_backward(emulator: Emulator, case: Case, dtype: str, training: bool):
    emulator.sm_count = case.sms
    problem = case.problem(dtype)
    plan = plan_for(emulator, Pass.BACKWARD, problem, case.choice)
    data = draw(case, dtype)
    if training:
        forward = truth.forward(
            data["x"],
            running_mean=data["running_mean"],
            running_std=data["running_std"],
            limits=(1.5, 0.7),
        )
        rows = [
            forward["pivot"],
            forward["mean"] - forward["pivot"],
            forward["inv_std"],
            forward["r"],
            forward["d"],
        ]
        stats = np.array(rows, np.longdouble).astype(problem.real)
        given = {"stats": stats}
    else:
        given = {k: data[k] for k in ("running_mean", "running_std")}
        one, zero = np.ones(case.c, problem.real), np.zeros(case.c, problem.real)
        stats = np.array(
            [data["running_mean"], zero, 1 / data["running_std"], one, zero], problem.real
        )
    pivot, offset, inv_std, r, d = stats.astype(np.longdouble)
    if not training:
        inv_std = 1 / data["running_std"].astype(np.longdouble)
    got = over_schedules(
        emulator,
        lambda: emulator.backward(
            problem, data["dy"], data["x"], weight=data["weight"], plan=plan, **given
        ),
    )
    dy, x = data["dy"].astype(np.longdouble), data["x"].astype(np.longdouble)
    weight = data["weight"].astype(np.longdouble)
    # truth.backward takes the mean as one number; in longdouble it is as good as the pair.
    want = truth.backward(
        dy, x, weight, mean=pivot + offset, inv_std=inv_std, r=r, d=d, training=training
    )
    unit = SLACK * epsilon(problem)
    m = case.n * case.s
    x_norm = np.abs((x - column(pivot + offset)) * column(inv_std))
    # The kernel subtracts the pivot and then the offset: cancellation costs a rounding of the
    # larger of the two.
    x_norm = x_norm + np.abs(column(offset * inv_std)) * 2
    sum_g, sum_gx = np.abs(dy).sum((0, 2)), (np.abs(dy) * x_norm).sum((0, 2))
    assert_within("dbias", got["dbias"], want["dbias"], unit * sum_g)
    assert_within(
        "dweight", got["dweight"], want["dweight"], unit * (r * sum_gx + np.abs(d) * sum_g)
    )
    amplitude = np.abs(dy)
    if training:
        amplitude = amplitude + column(sum_g) / m + x_norm * column(sum_gx) / m
    amplitude = amplitude * np.abs(column(weight * r * inv_std))
    assert_within(
        "dx", got["dx"], want["dx"], half_ulp(problem, want["dx"]) * 1.001 + unit * amplitude
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference(emulator: Emulator, case: Case, dtype: str):
    emulator.sm_count = case.sms
    problem = case.problem(dtype)
    plan = plan_for(emulator, Pass.INFERENCE, problem, case.choice)
    data = draw(case, dtype)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    affine = {k: data[k] for k in ("weight", "bias")}
    got = over_schedules(
        emulator, lambda: emulator.inference(problem, data["x"], plan=plan, **affine, **moving)
    )
    want = truth.inference(data["x"], **affine, **moving)
    x_norm = (data["x"] - column(moving["running_mean"])) / column(moving["running_std"])
    amplitude = np.abs(column(affine["weight"])) * (np.abs(x_norm) + 1) + np.abs(
        column(affine["bias"])
    )
    bound = half_ulp(problem, want) * 1.001 + SLACK * epsilon(problem) * amplitude
    assert_within("y", got["y"], want, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.choice.keys() & {"prefetch", "retained"}], ids=str
)
def test_shared_memory_changes_no_bit(emulator: Emulator, case: Case, dtype: str):
    emulator.sm_count = case.sms
    problem, data = case.problem(dtype), draw(case, dtype)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    affine = {k: data[k] for k in ("weight", "bias")}
    step = {"num_batches_tracked": 7, "schedule": np.array([5, 3.0, 15, 5.0, 10])}
    stats = np.random.default_rng(1).uniform(0.5, 1.5, (5, case.c)).astype(problem.real)
    launches = {
        Pass.FORWARD: (
            lambda **plan: emulator.forward(problem, data["x"], **affine, **moving, **step, **plan),
            lambda **plan: emulator.forward(
                problem, data["x"], **affine, **moving, **step, skip_nonfinite=True, **plan
            ),
        ),
        Pass.BACKWARD: (
            lambda **plan: emulator.backward(problem, data["dy"], data["x"], stats=stats, **plan),
            lambda **plan: emulator.backward(problem, data["dy"], data["x"], **moving, **plan),
        ),
    }
    for which, calls in launches.items():
        on = plan_for(emulator, which, problem, case.choice)
        if "prefetch" in case.choice:
            assert on.prefetch == (on.slot_bytes >= 4), "what this case is here for"
        else:
            assert 0 < on.retained < on.rounds, "what this case is here for"
        off = replace(on, prefetch=0, retained=0)
        for call in calls:
            emulator.schedule = SCHEDULES[0]
            want = bits(call(plan=off))
            assert bits(over_schedules(emulator, partial(call, plan=on))) == want


@each_team_pass
def test_only_what_can_be_copied_is_prefetched(emulator: Emulator, which: Pass):
    emulator.sm_count = 2
    problem = Problem(6, 7, 64)
    choice = {"slot_bytes": 16, "columns": 1, "slots": 4, "threads": 64, "prefetch": 1}
    assert emulator.cut(which, problem, team=2, **choice).prefetch == 1
    assert emulator.cut(which, problem, team=1, **choice).prefetch == 0, "nobody to wait for"
    few = replace(problem, channels=2)
    assert emulator.cut(which, few, team=2, **choice).prefetch == 0, "one wave"
    rounds = emulator.cut(which, replace(problem, spatial=4096), team=2, **choice)
    assert rounds.rounds > 1 and rounds.prefetch == 0


@each_team_pass
@pytest.mark.parametrize("team", [1, 2])
def test_as_much_is_retained_as_there_is_room_and_rounds(
    emulator: Emulator, which: Pass, team: int
):
    """On an H200, whose SMs have 228 KB for 3 blocks; a round of full blocks takes 32 KB."""
    emulator.sm_count = 2
    choice = {"slot_bytes": 16, "columns": 1, "slots": 8 if which == Pass.FORWARD else 4}
    for rounds, wanted, got in ((1, 9, 0), (2, 9, 1), (3, 9, 2), (4, 9, 2), (4, 1, 1), (4, 0, 0)):
        problem = Problem(team, 3, rounds * 256 * choice["slots"] * 4)
        plan = emulator.cut(which, problem, threads=256, team=team, retained=wanted, **choice)
        assert (plan.rounds, plan.retained) == (rounds, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", Layout)
def test_renormalize_repeats_the_forward_bit_for_bit(
    emulator: Emulator, layout: Layout, dtype: str
):
    """What activation checkpointing recomputes: y from the statistics of the first forward."""
    emulator.sm_count = 4
    emulator.schedule = SCHEDULES[0]
    case = Case("", n=5, c=12, s=36, layout=layout)
    problem, data = case.problem(dtype), draw(case, dtype)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    affine = {k: data[k] for k in ("weight", "bias")}
    forward = emulator.forward(problem, data["x"], limits=(3, 5), **affine, **moving)
    again = emulator.inference(problem, data["x"], stats=forward["stats"], **affine)
    assert again["y"].tobytes() == forward["y"].tobytes()


# ---- the state of a training step ----

STATE_CASES = [
    Case("team of one", n=3, c=5, s=49),
    Case("a team", n=12, c=5, s=64, sms=2, choice={"threads": 64, "team": 2}),
    Case("more slabs than blocks that run at a time", n=2, c=40, s=16, sms=1),
    Case(
        "rows", n=9, c=40, s=49, layout=LAST, sms=2, choice={"columns": 4, "threads": 64, "team": 2}
    ),
    ahead("a team", n=8, c=5, s=64, sms=2),
    ahead("rows", n=4, c=40, s=30, sms=2, layout=LAST, columns=4),
    retaining("a team", 99, n=12, c=5, s=1000, sms=2),
]
state = pytest.mark.parametrize("case", STATE_CASES, ids=str)


def train(
    emulator: Emulator, case: Case, data: dict, dtype: str = "float32", **arguments
) -> dict[str, np.ndarray]:
    problem = case.problem(dtype)
    emulator.sm_count = case.sms
    plan = plan_for(emulator, Pass.FORWARD, problem, case.choice)
    return emulator.forward(problem, data["x"], plan=plan, **arguments)


@state
@pytest.mark.parametrize("missing", ["weight", "bias", "running", "num_batches_tracked"])
def test_what_may_be_null(emulator: Emulator, case: Case, missing: str):
    data = draw(case, "float32")
    arguments = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    arguments.update(num_batches_tracked=3, limits=(3.0, 5.0))
    for name in ("running_mean", "running_std") if missing == "running" else (missing,):
        del arguments[name]
    got = over_schedules(emulator, lambda: train(emulator, case, data, **arguments))
    tensors = {k: arguments.get(k) for k in ("weight", "bias", "running_mean", "running_std")}
    check_forward(case.problem("float32"), got, expected_forward(data["x"], **arguments), **tensors)
    assert ("num_batches_tracked" in got) == (missing != "num_batches_tracked")


@state
@pytest.mark.parametrize("step", [0, 4, 5, 6, 9, 10, 14, 15, 2**40], ids=lambda n: f"step-{n}")
def test_the_schedule_is_read_before_the_counter_moves(emulator: Emulator, case: Case, step: int):
    """Warm-up to step 5, then r_max to 3 at 15 and d_max to 5 at 10. A block that came late must
    not see step + 1."""
    data = draw(case, "float32")
    arguments = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    arguments.update(num_batches_tracked=step, schedule=np.array([5, 3.0, 15, 5.0, 10]))
    got = over_schedules(emulator, lambda: train(emulator, case, data, **arguments))
    tensors = {k: arguments[k] for k in ("weight", "bias", "running_mean", "running_std")}
    check_forward(case.problem("float32"), got, expected_forward(data["x"], **arguments), **tensors)
    assert got["num_batches_tracked"] == step + 1


@state
def test_limits_may_jump_to_infinity(emulator: Emulator, case: Case):
    """Plain batch normalisation up to the step, no clipping at all after it: y becomes (x -
    running_mean) / running_std."""
    data = draw(case, "float32")
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    schedule = np.array([7, np.inf, 7, np.inf, 7])
    before = train(emulator, case, data, num_batches_tracked=6, schedule=schedule, **tensors)
    assert (before["stats"][3] == 1).all() and (before["stats"][4] == 0).all()
    after = train(emulator, case, data, num_batches_tracked=7, schedule=schedule, **tensors)
    want = expected_forward(data["x"], limits=(np.inf, np.inf), num_batches_tracked=7, **tensors)
    check_forward(case.problem("float32"), after, want, **tensors)
    affine = truth.inference(data["x"], **tensors)
    np.testing.assert_allclose(after["y"], affine, rtol=0, atol=1e-3)


@state
@pytest.mark.parametrize("step", [0, 1, 9])
def test_cumulative_average(emulator: Emulator, case: Case, step: int):
    data = draw(case, "float32")
    tensors = {k: data[k] for k in ("running_mean", "running_std")}
    arguments = {
        "num_batches_tracked": step,
        "momentum": CUMULATIVE,
        "limits": (3.0, 5.0),
        **tensors,
    }
    got = over_schedules(emulator, lambda: train(emulator, case, data, **arguments))
    want = expected_forward(data["x"], **arguments)
    check_forward(case.problem("float32"), got, want, weight=None, bias=None, **tensors)
    if step == 0:
        np.testing.assert_allclose(got["running_mean"], want["mean"], rtol=1e-5)


@state
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_nonfinite_value_stays_in_its_channel(
    emulator: Emulator, case: Case, dtype: str, value: float
):
    data = draw(case, dtype)
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    clean = train(emulator, case, data, dtype, num_batches_tracked=3, **tensors)
    data["x"][case.n - 1, 1, case.s - 1] = value
    got = over_schedules(
        emulator, lambda: train(emulator, case, data, dtype, num_batches_tracked=3, **tensors)
    )
    others = np.arange(case.c) != 1
    assert np.isnan(got["y"][:, 1]).all()
    assert (got["y"][:, others] == clean["y"][:, others]).all()
    assert (got["stats"][:, others] == clean["stats"][:, others]).all()
    assert not np.isfinite(got["running_mean"][1]) and not np.isfinite(got["running_std"][1])
    assert (got["running_mean"][others] == clean["running_mean"][others]).all()
    assert got["num_batches_tracked"] == 4


@state
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", ["first", "last"])
def test_skip_nonfinite_keeps_the_state(emulator: Emulator, case: Case, value: float, where: str):
    data = draw(case, "float32")
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    place = (0, 0, 0) if where == "first" else (case.n - 1, case.c - 1, case.s - 1)
    data["x"][place] = value
    got = over_schedules(
        emulator,
        lambda: train(emulator, case, data, num_batches_tracked=3, skip_nonfinite=True, **tensors),
    )
    assert np.isnan(got["y"][:, place[1]]).all()
    assert (got["running_mean"] == tensors["running_mean"]).all()
    assert (got["running_std"] == tensors["running_std"]).all()
    assert got["num_batches_tracked"] == 3


@state
@pytest.mark.parametrize("missing", [None, "running", "num_batches_tracked"])
def test_skip_nonfinite_takes_a_finite_batch(emulator: Emulator, case: Case, missing: str | None):
    data = draw(case, "float32")
    tensors = {k: data[k] for k in ("running_mean", "running_std")} if missing != "running" else {}
    counter = {} if missing == "num_batches_tracked" else {"num_batches_tracked": 3}
    arguments = {"limits": (3.0, 5.0), "momentum": 0.5, **tensors, **counter}
    plain = train(emulator, case, data, **arguments)
    got = over_schedules(
        emulator, lambda: train(emulator, case, data, skip_nonfinite=True, **arguments)
    )
    assert bits(got) == bits(plain)


@state
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_a_constant_channel_is_finite(
    emulator: Emulator, case: Case, dtype: str, eps: float, value: float
):
    """No 0 / 0 and no 0 * inf, with eps = 0 either; y is weight * d + bias."""
    data = draw(case, dtype)
    data["x"][:, 1] = value
    problem = case.problem(dtype)
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    got = train(emulator, case, data, dtype, eps=eps, limits=(3.0, 5.0), **tensors)
    shift = data["weight"][1] * np.clip(
        (rounded(np.array(value), dtype) - data["running_mean"][1]) / data["running_std"][1], -5, 5
    )
    tolerance = {"float32": 1e-5, "float64": 1e-12}.get(dtype, 5e-2)
    np.testing.assert_allclose(
        got["y"][:, 1], shift + data["bias"][1], rtol=tolerance, atol=tolerance
    )
    assert np.isfinite(got["stats"]).all() and np.isfinite(got["running_std"]).all()
    plan = plan_for(emulator, Pass.BACKWARD, problem, case.choice)
    back = emulator.backward(
        problem, data["dy"], data["x"], weight=data["weight"], stats=got["stats"], plan=plan
    )
    for name in ("dx", "dweight", "dbias"):
        assert np.isfinite(back[name]).all(), name


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_where_a_thread_begins(emulator: Emulator, layout: Layout, dtype: str):
    """Moments are taken about a thread's first values; these are the worst ones to take them
    about."""
    emulator.sm_count, emulator.schedule = 4, SCHEDULES[0]
    case = Case("", n=16, c=8, s=128, layout=layout, mean=0.0, std=1.0)
    problem, data = case.problem(dtype), draw(case, dtype)
    data["x"][0] += 1000
    got = emulator.forward(problem, rounded(data["x"], dtype))
    want = expected_forward(rounded(data["x"], dtype))
    check_forward(problem, got, want, weight=None, bias=None)


@state
@pytest.mark.parametrize("where", ["x", "dy"])
def test_backward_keeps_a_nan_in_its_channel(emulator: Emulator, case: Case, where: str):
    emulator.sm_count = case.sms
    problem, data = case.problem("float32"), draw(case, "float32")
    plan = plan_for(emulator, Pass.BACKWARD, problem, case.choice)
    stats = np.random.default_rng(1).uniform(0.5, 1.5, (5, case.c)).astype(np.float32)

    def backward():
        return emulator.backward(problem, data["dy"], data["x"], stats=stats, plan=plan)

    clean = backward()
    data[where][case.n - 1, 1, case.s - 1] = np.nan
    got = over_schedules(emulator, backward)
    others = np.arange(case.c) != 1
    assert np.isnan(got["dx"][:, 1]).all() and np.isnan(got["dweight"][1])
    assert (got["dx"][:, others] == clean["dx"][:, others]).all()
    for name in ("dweight", "dbias"):
        assert (got[name][others] == clean[name][others]).all()


def test_workspace_serves_any_sequence_of_launches(emulator: Emulator):
    """One set of control words for plans of every team size, forward and backward, never cleared in
    between."""
    emulator.schedule = Schedule(Order.RANDOM, 5)
    emulator.sm_count = 4
    case = Case("", n=24, c=3, s=64)
    problem, data = case.problem("float32"), draw(case, "float32")
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    want = expected_forward(data["x"], num_batches_tracked=0, **tensors)
    for team in (2, 3, 1, 12, 5, 2, 7, 11):
        plan = plan_for(emulator, Pass.FORWARD, problem, {"threads": 64, "team": team})
        assert plan.team == team
        got = emulator.forward(problem, data["x"], plan=plan, num_batches_tracked=0, **tensors)
        check_forward(problem, got, want, **tensors)
        plan = plan_for(emulator, Pass.BACKWARD, problem, {"threads": 64, "team": team})
        emulator.backward(problem, data["dy"], data["x"], stats=got["stats"], plan=plan)


def test_a_grid_beyond_the_chip_is_an_error_and_not_a_hang(emulator: Emulator):
    emulator.schedule = SCHEDULES[0]
    case = Case("", n=24, c=3, s=64)
    problem, data = case.problem("float32"), draw(case, "float32")
    emulator.sm_count = 8
    plan = plan_for(emulator, Pass.FORWARD, problem, {"threads": 64, "team": 20})
    emulator.sm_count = 4
    with pytest.raises(KernelError) as error:
        emulator.forward(problem, data["x"], plan=plan)
    assert error.value.code == COOPERATIVE_LAUNCH_TOO_LARGE


@pytest.mark.parametrize("which", Pass)
def test_unknown_slot_width_is_an_error(emulator: Emulator, which: Pass):
    case = Case("", n=2, c=2, s=8)
    problem, data = case.problem("float64"), draw(case, "float64")
    emulator.sm_count = 4
    plan = replace(emulator.plan(which, problem), slot_bytes=4)  # half a double
    with pytest.raises(KernelError):
        if which == Pass.FORWARD:
            emulator.forward(problem, data["x"], plan=plan)
        elif which == Pass.BACKWARD:
            emulator.backward(problem, data["dy"], data["x"], stats=np.ones((5, 2)), plan=plan)
        else:
            emulator.inference(problem, data["x"], stats=np.ones((5, 2)), plan=plan)


# ---- tensors larger than this machine ----


def sparse(count: int, dtype: type) -> np.ndarray:
    """Zeros that take no memory until they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE; in Python's mmap from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype)


@dataclass(frozen=True)
class Corner:
    """A few channels at the end of a tensor of more than 2^32 elements, and the same channels by
    themselves."""

    problem: Problem
    small: Problem

    def plan(self, emulator: Emulator, which: Pass) -> tuple[Plan, Plan]:
        plan = emulator.plan(which, self.small)
        if which != Pass.INFERENCE:
            columns = self.small.channels // (plan.slot_bytes // ITEM_SIZE[self.small.dtype]) or 1
            choice = {"slot_bytes": plan.slot_bytes, "slots": plan.slots, "columns": columns}
            plan = emulator.cut(which, self.small, threads=256, team=1, **choice)
        slabs = self.problem.channels // self.small.channels
        assert plan.slabs == 1 and slabs * self.small.channels == self.problem.channels
        return replace(plan, slabs=slabs, teams=slabs), plan

    def view(self, x: np.ndarray) -> np.ndarray:
        """The channels at the end, [N, C, S]."""
        n, c, s = self.problem.shape
        if self.problem.layout == LAST:
            return x.reshape(n, s, c).transpose(0, 2, 1)[:, -self.small.channels :]
        return x.reshape(n, c, s)[:, -self.small.channels :]


CORNERS = [
    Corner(
        Problem(5, 2**16, 2**14 + 8, FIRST, "bfloat16"), Problem(5, 1, 2**14 + 8, FIRST, "bfloat16")
    ),
    Corner(Problem(3, 2**24, 173, FIRST, "float16"), Problem(3, 1, 173, FIRST, "float16")),
    Corner(Problem(9, 2**26, 8, LAST, "float16"), Problem(9, 128, 8, LAST, "float16")),
]


@pytest.mark.parametrize("which", Pass, ids=lambda which: which.name.lower())
@pytest.mark.parametrize("corner", CORNERS, ids=["long planes", "many channels", "long rows"])
def test_more_than_two_to_the_32_elements(emulator: Emulator, corner: Corner, which: Pass):
    """Only the last block runs. What it makes of its channels is what it makes of them alone, bit
    for bit."""
    problem, small = corner.problem, corner.small
    assert np.prod(problem.shape) > 2**32
    emulator.sm_count, emulator.schedule = 4, SCHEDULES[0]
    data = draw(Case("", *small.shape, layout=small.layout), small.dtype)
    plan, small_plan = corner.plan(emulator, which)
    channels, last = problem.channels, slice(-small.channels, None)
    stats = np.random.default_rng(1).uniform(0.5, 1.5, (5, small.channels)).astype(np.float32)

    tensors = {}
    for name in ("x", "dy"):
        stored = encoded(data[name], small.dtype)
        tensors[name] = sparse(int(np.prod(problem.shape)), stored.dtype)
        corner.view(tensors[name])[:] = stored
    out = sparse(int(np.prod(problem.shape)), stored.dtype)
    per_channel = sparse(7 * channels, np.float32).reshape(7, channels)
    if which != Pass.FORWARD:
        per_channel[:5, last] = stats
    big_stats, dweight, dbias = per_channel[:5], per_channel[5], per_channel[6]
    null = None
    if which == Pass.FORWARD:
        want = emulator.forward(small, data["x"], plan=small_plan)
        arrays = (tensors["x"], out, *(null,) * 6, big_stats, null, null, null)
        rest = ((ctypes.c_double * 4)(1.0, 0.0, 0.01, 1e-5), 0)
        function = emulator.library.simt_forward
    elif which == Pass.BACKWARD:
        want = emulator.backward(small, data["dy"], data["x"], stats=stats, plan=small_plan)
        arrays = (
            tensors["dy"],
            tensors["x"],
            out,
            null,
            big_stats,
            null,
            null,
            dweight,
            dbias,
            null,
            null,
        )
        rest, function = (), emulator.library.simt_backward
    else:
        want = emulator.inference(small, data["x"], stats=stats, plan=small_plan)
        arrays = (tensors["x"], out, null, null, big_stats, null, null)
        rest, function = (), emulator.library.simt_inference
    pointers = (ctypes.c_void_p * len(arrays))(
        *(None if a is None else a.ctypes.data for a in arrays)
    )
    emulator.library.simt_select_blocks(plan.blocks - plan.team, plan.team)
    try:
        assert function(problem.fields(), plan.fields(), pointers, *rest) == 0
    finally:
        emulator.library.simt_select_blocks(0, 0)
    got = {"dx" if which == Pass.BACKWARD else "y": decoded(corner.view(out), small.dtype)}
    if which == Pass.FORWARD:
        got["stats"] = big_stats[:, last]
    elif which == Pass.BACKWARD:
        got |= {"dweight": dweight[last], "dbias": dbias[last]}
    for name, value in got.items():
        assert np.ascontiguousarray(value).tobytes() == want[name].tobytes(), name


# ---- the emulator itself ----

RULES = build.REPOSITORY / "tests/simt/rules.cu"
KERNELS = [
    line.split()[2].split("(")[0]
    for line in RULES.read_text().splitlines()
    if line.startswith("__global__")
]


@pytest.fixture(scope="module", params=["", "-DSIMT_UCONTEXT"], ids=["fibers", "ucontext"])
def rules(request) -> ctypes.CDLL:
    """With both ways to switch fibers: this machine's own, and the portable one."""
    defines = (request.param,) if request.param else ()
    sources = ("tests/simt/rules.cu",)
    path = build.library(sanitize=sanitizing(), defines=defines, sources=sources)
    library = ctypes.CDLL(str(path))
    library.rules_last_error.restype = ctypes.c_char_p
    return library


def run_rule(
    library: ctypes.CDLL,
    kernel: str,
    schedule: Schedule,
    blocks: int = 2,
    cooperative: bool = False,
):
    out = np.zeros(64, np.uint32)
    code = library.rules_run(
        KERNELS.index(kernel),
        blocks,
        int(cooperative),
        int(schedule.order),
        schedule.seed,
        ctypes.c_void_p(out.ctypes.data),
    )
    return code, library.rules_last_error().decode(), out


each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@each_schedule
def test_emulator_runs_what_is_right(rules, schedule):
    code, message, out = run_rule(rules, "obeys", schedule, blocks=9)
    assert (code, message) == (0, "") and (out[:9] == 64).all() and not out[9:].any()


@each_schedule
@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("leaves_a_thread_behind", "thread 5 in __syncwarp, rules.cu:"),
        ("meets_at_two_barriers", "divergent barrier"),
        ("shuffles_half_a_warp", "__shfl_down_sync of a part of the warp, rules.cu:"),
        ("shuffles_without_some_lanes", "a shuffle without part of its warp"),
        ("loads_misaligned", "misaligned access, rules.cu:"),
        ("ends_before_its_copy", "a thread ends before its asynchronous copies"),
        ("overwrites_what_it_copies", "overwritten before it landed, rules.cu:"),
        ("copies_twice_to_one_place", "two asynchronous copies to one place, rules.cu:"),
        ("copies_beyond_its_memory", "beyond the block's dynamic shared memory, rules.cu:"),
        ("reaches_beyond_its_memory", "beyond the block's dynamic shared memory, rules.cu:"),
        ("waits_for_ever", "deadlock, no block can go on"),
    ],
)
def test_emulator_notices(rules, schedule, kernel, says):
    code, message, _ = run_rule(rules, kernel, schedule)
    assert code == LAUNCH_FAILURE and says in message
    assert run_rule(rules, "obeys", schedule)[0] == 0, "the next launch is not affected"


@each_schedule
@pytest.mark.parametrize("kernel", ["reads_shared_memory_that_nobody_wrote", "reads_an_early_copy"])
def test_emulator_poisons_shared_memory(rules, schedule, kernel):
    code, _, out = run_rule(rules, kernel, schedule, blocks=20)
    assert code == 0 and (out[:20] == 0xFFFFFFFF).all()


@each_schedule
def test_emulator_copies(rules, schedule):
    code, message, out = run_rule(rules, "copies", schedule, blocks=9)
    assert (code, message) == (0, "") and (out[:9] == 64).all() and not out[9:].any()


@each_schedule
def test_emulator_runs_cooperative_blocks_side_by_side(rules, schedule):
    assert run_rule(rules, "waits_for_the_others", schedule, blocks=4, cooperative=True)[0] == 0
    code, message, _ = run_rule(rules, "waits_for_the_others", schedule, blocks=5, cooperative=True)
    assert code == COOPERATIVE_LAUNCH_TOO_LARGE and "5 blocks where 4 fit" in message


@each_schedule
def test_emulator_promises_an_ordinary_launch_nothing(rules, schedule):
    """Blocks that wait for one another without a cooperative launch hang a GPU on a bad day, and
    the emulator always."""
    code, message, _ = run_rule(rules, "waits_for_the_others", schedule, blocks=6)
    assert code == LAUNCH_FAILURE and "deadlock" in message


def test_emulator_orders_differ_and_repeat(rules):
    def order(schedule: Schedule) -> tuple[int, ...]:
        return tuple(run_rule(rules, "takes_tickets", schedule, blocks=8)[2][1:17])

    serial = [s for s in SCHEDULES if s.order != Order.PARALLEL]
    orders = [order(s) for s in serial]
    assert orders == [order(s) for s in serial]
    assert len(set(orders)) == len(serial)
    assert orders[0] == tuple(range(16)) and orders[1] == tuple(reversed(range(16)))


@pytest.mark.skipif(
    sanitizing(), reason="the sanitizer ends the process here, which is its way to notice"
)
def test_guard_zones_notice(emulator: Emulator):
    """Two plans that are wrong: a share too short leaves outputs unwritten, a slot too wide writes
    past the last one."""
    emulator.sm_count = 4
    emulator.schedule = SCHEDULES[0]
    case = Case("", n=1, c=3, s=1, layout=LAST)
    problem, data = case.problem("float32"), draw(case, "float32")
    tensors = {k: data[k] for k in ("running_mean", "running_std")}
    plan = emulator.plan(Pass.INFERENCE, problem)
    with pytest.raises(MemoryError_, match="not written"):
        emulator.inference(
            problem, data["x"], plan=replace(plan, slabs=1, teams=1, columns=2), **tensors
        )
    with pytest.raises(MemoryError_, match="bytes behind y were overwritten"):
        wide = replace(plan, slot_bytes=8, slots=16, columns=1, slabs=2, teams=2, share=1024)
        emulator.inference(problem, data["x"], plan=wide, **tensors)
