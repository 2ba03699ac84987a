"""What a training step does to its state, under the emulator: moving averages, the counter and the
schedule, what may be missing, and what an inf or NaN may touch."""

from __future__ import annotations

import numpy as np
import pytest
from launches import (
    SCHEDULES,
    SLACK,
    STATE_CASES,
    Case,
    assert_within,
    bits,
    check_forward,
    draw,
    epsilon,
    expected_forward,
    launches_of,
    over_schedules,
    plan_for,
)
from simt import truth
from simt.emulator import CUMULATIVE, DTYPES, Emulator, Layout, Pass, Problem, rounded

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


@launches_of(STATE_CASES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_nonfinite_value_stays_in_its_channel(
    emulator: Emulator, case: Case, dtype: str, value: float
):
    data = draw(case, dtype)
    tensors = {k: data[k] for k in ("weight", "bias", "running_mean", "running_std")}
    clean = train(emulator, case, data, dtype, num_batches_tracked=3, **tensors)
    data["x"][0, 1, 0] = data["x"][case.n - 1, 1, case.s - 1] = value  # beside others'
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


@launches_of(STATE_CASES)
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("batch", "plane"), [(128, 49), (512, 9)])
def test_outliers_that_are_the_pivot_of_unaligned_planes(
    emulator: Emulator, batch: int, plane: int, dtype: str
):
    """Threads begin where few lanes of a slot count, or none. What stands in for the others must
    not be far from what they hold."""
    emulator.sm_count, emulator.schedule = 4, SCHEDULES[0]
    problem = Problem(batch, 8, plane, dtype=dtype)
    choice = {"slot_bytes": 16, "slots": 8, "columns": 1, "threads": 64, "team": 1}
    x = np.zeros(problem.shape)
    x[0, :, -1 if plane < 32 else slice(32)] = 333  # a pivot is the mean of 32, the last again
    got = emulator.forward(
        problem, rounded(x, dtype), plan=emulator.cut(Pass.FORWARD, problem, **choice)
    )
    want = expected_forward(rounded(x, dtype))["inv_std"]
    assert_within("inv_std", got["stats"][2], want, SLACK * epsilon(problem) * want)


@launches_of(STATE_CASES)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_backward_keeps_a_nan_in_its_channel(
    emulator: Emulator, case: Case, dtype: str, where: str
):
    emulator.sm_count = case.sms
    problem, data = case.problem(dtype), draw(case, dtype)
    plan = plan_for(emulator, Pass.BACKWARD, problem, case.choice)
    stats = np.random.default_rng(1).uniform(0.5, 1.5, (5, case.c)).astype(problem.real)

    def backward():
        return emulator.backward(problem, data["dy"], data["x"], stats=stats, plan=plan)

    clean = backward()
    data[where][0, 1, 0] = data[where][case.n - 1, 1, case.s - 1] = np.nan  # beside others'
    got = over_schedules(emulator, backward)
    others = np.arange(case.c) != 1
    assert np.isnan(got["dx"][:, 1]).all() and np.isnan(got["dweight"][1])
    assert (got["dx"][:, others] == clean["dx"][:, others]).all()
    for name in ("dweight", "dbias"):
        assert (got[name][others] == clean[name][others]).all()
