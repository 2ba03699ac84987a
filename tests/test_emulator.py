"""The shipped CUDA kernels on the CPU, under the emulator of tests/simt: right against float64, the
same bits in whatever order threads and blocks run, every output written and nothing else, control
words as they were. Every geometry, every dtype, every pass.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from launches import (
    CASES,
    SCHEDULES,
    SLACK,
    Case,
    assert_within,
    bits,
    check_forward,
    column,
    draw,
    epsilon,
    expected_forward,
    half_ulp,
    launches_of,
    over_schedules,
    plan_for,
    stats_rows,
)
from simt import truth
from simt.emulator import (
    COOPERATIVE_LAUNCH_TOO_LARGE,
    DTYPES,
    Emulator,
    KernelError,
    Layout,
    Order,
    Pass,
    Problem,
    Schedule,
    replace,
)

each_team_pass = pytest.mark.parametrize("which", (Pass.FORWARD, Pass.BACKWARD))


@launches_of(CASES)
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


@launches_of(CASES)
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
        stats = stats_rows(forward, problem.real)
        given = {"stats": stats}
    else:
        given = {k: data[k] for k in ("running_mean", "running_std")}
        one, zero = np.ones(case.c, problem.real), np.zeros(case.c, problem.real)
        stats = np.array(
            [data["running_mean"], zero, 1 / data["running_std"], one, zero], problem.real
        )
    centre, residue, inv_std, r, d = stats.astype(np.longdouble)
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
        dy, x, weight, mean=centre + residue, inv_std=inv_std, r=r, d=d, training=training
    )
    unit = SLACK * epsilon(problem)
    m = case.n * case.s
    x_norm = np.abs((x - column(centre + residue)) * column(inv_std))
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


@launches_of(CASES)
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


@launches_of([case for case in CASES if case.choice.keys() & {"prefetch", "retained"}])
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
