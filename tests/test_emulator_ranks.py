"""The kernels of a step that several ranks take together, under the emulator: moments, merge,
backward_sums and backward_project. See test_emulator.py: the cases are the same."""

from __future__ import annotations

import numpy as np
import pytest
from launches import (
    CASES,
    SCHEDULES,
    SLACK,
    STATE_CASES,
    Case,
    assert_centred,
    assert_within,
    bits,
    column,
    draw,
    epsilon,
    half_ulp,
    launches_of,
    over_schedules,
    plan_for,
    plan_for_project,
)
from simt import truth
from simt.emulator import CUMULATIVE, DTYPES, Emulator, Pass, replace

STATE = ("weight", "bias", "running_mean", "running_std")


@launches_of(CASES)
def test_one_rank_computes_what_the_ordinary_kernels_compute(emulator, case: Case, dtype: str):
    """To the last bit, but that the mean comes as one double: the same sums in the same order, cut
    where the other ranks come in."""
    emulator.sm_count = case.sms
    emulator.schedule = SCHEDULES[0]
    problem, data = case.problem(dtype), draw(case, dtype)
    plan = plan_for(emulator, Pass.FORWARD, problem, case.choice)
    stats = emulator.forward(problem, data["x"], plan=plan)["stats"]
    message = over_schedules(
        emulator, lambda: {"message": emulator.moments(problem, data["x"], plan=plan)}
    )["message"]
    mean, m2 = message[:-2].reshape(2, -1)
    exact = stats[:2].astype(np.longdouble).sum(0)
    rounded = 64 * epsilon(problem) ** 2 / stats[2]  # of the residue
    assert_within("mean", mean, exact, np.spacing(np.abs(mean)) + rounded)
    assert message[-2:].tolist() == [case.n * case.s, 1]
    std = np.sqrt(m2.astype(problem.real) / problem.real(case.n * case.s) + problem.real(1e-5))
    np.testing.assert_array_max_ulp(stats[2], (1 / std).astype(problem.real), 1)

    plan = plan_for(emulator, Pass.BACKWARD, problem, case.choice)
    emulator.schedule = SCHEDULES[0]
    stats[3:] = np.random.default_rng(1).uniform(0.5, 1.5, (2, case.c))
    both = data["dy"], data["x"]
    whole = emulator.backward(problem, *both, weight=data["weight"], stats=stats, plan=plan)
    parts = over_schedules(
        emulator, lambda: emulator.backward_sums(problem, *both, stats, plan=plan)
    )
    assert parts["dweight"].tobytes() == whole["dweight"].tobytes()
    assert parts["dbias"].tobytes() == whole["dbias"].tobytes()
    assert (parts["sums"][0] == whole["dbias"]).all()
    rest = (*both, stats, parts["sums"], message[-2:])
    plan = plan_for_project(emulator, problem, case.choice)
    dx = over_schedules(
        emulator,
        lambda: {"dx": emulator.backward_project(problem, *rest, weight=data["weight"], plan=plan)},
    )["dx"]
    assert dx.tobytes() == whole["dx"].tobytes()


@pytest.mark.parametrize("what", [{"prefetch": 1}, {"retained": 1}], ids=str)
def test_what_only_reads_retains_nothing(emulator, what: dict):
    """The plan is that of the whole pass; memory for its rounds would be of no use."""
    emulator.sm_count, emulator.schedule = 2, SCHEDULES[0]
    size = 64 if "prefetch" in what else 2048
    case = Case("", n=6, c=7, s=size, choice={"threads": 64, "team": 2, **what})
    problem, data = case.problem("float32"), draw(case, "float32")
    both = data["dy"], data["x"]
    plans = [plan_for(emulator, which, problem, case.choice) for which in Pass][:2]
    assert all(plan.prefetch or plan.retained for plan in plans)
    backward = {"stats": np.ones((5, case.c), np.float32)}
    for whole, part, plan, given, more in (
        (emulator.forward, emulator.moments, plans[0], both[1:], {}),
        (emulator.backward, emulator.backward_sums, plans[1], both, backward),
    ):
        whole(problem, *given, plan=plan, **more)
        assert emulator.last_dynamic_shared() == 32 << 10
        part(problem, *given, plan=plan, **more)
        assert emulator.last_dynamic_shared() == plan.prefetch * 32 << 10


def test_a_rank_says_whether_it_takes_part_in_the_backward_pass(emulator):
    emulator.sm_count, emulator.schedule = 4, SCHEDULES[0]
    case = Case("", n=2, c=3, s=5)
    problem, data = case.problem("float32"), draw(case, "float32")
    taking = emulator.moments(problem, data["x"])
    leaving = emulator.moments(problem, data["x"], backward=False)
    assert leaving[-1] == 0 and (taking[:-1] == leaving[:-1]).all()


# How the examples of a case are shared out: an empty rank in the middle, shares of every size.
RANKS = (1, 0, 5, 2)


def messages_of(emulator: Emulator, case: Case, dtype: str, data: dict) -> np.ndarray:
    emulator.sm_count = case.sms
    ends = np.cumsum((0, *RANKS))
    gathered = np.zeros((len(RANKS), 2 * case.c + 2))
    for rank, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if begin < end:
            part = replace(case, n=int(end - begin)).problem(dtype)
            gathered[rank] = emulator.moments(part, data["x"][begin:end], backward=rank != 2)
    return gathered


def check_merged(problem, got: dict, want: dict, running_mean=None, running_std=None) -> None:
    unit = SLACK * epsilon(problem)
    centre, residue, inv_std, r, d = got["stats"].astype(np.longdouble)
    # One double holds the mean on its way: of float64 values that is no more than they are.
    unit = unit + 4 * np.finfo(np.float64).eps * np.abs(want["mean"]) / want["std"]
    assert_within("mean", centre + residue, want["mean"], unit * want["std"])
    assert_centred(problem, residue, want)
    assert_within("inv_std", inv_std, want["inv_std"], unit * want["inv_std"])
    assert_within("r", r, want["r"], unit * want["r"])
    if running_mean is None:
        assert (r == 1).all() and (d == 0).all()
        return
    reach = np.abs(want["mean"]) + np.abs(running_mean)
    assert_within("d", d, want["d"], unit * (reach / running_std + np.abs(want["d"])))
    assert_within("running_mean", got["running_mean"], want["running_mean"], unit * reach)
    reach = want["std"] + np.abs(running_std)
    assert_within("running_std", got["running_std"], want["running_std"], unit * reach)


MERGED = [
    Case("five channels", n=8, c=5, s=12),
    Case("more channels than threads", n=8, c=300, s=3),
    Case("large mean", n=8, c=3, s=64, mean=1e4, std=1.0),
]
merged = pytest.mark.parametrize("case", MERGED, ids=str)


@merged
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0, 5, 7, 12, 40])
def test_merged_moments_are_those_of_the_whole_batch(emulator, case: Case, dtype: str, step: int):
    """And r, d, moving averages and counter follow, before, in and after the ramps."""
    emulator.schedule = SCHEDULES[0]
    problem, data = case.problem(dtype), draw(case, dtype)
    gathered = messages_of(emulator, case, dtype, data)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    given = {"num_batches_tracked": step, "schedule": np.array([5, 3.0, 15, 5.0, 10]), **moving}
    got = over_schedules(emulator, lambda: emulator.merge(gathered, dtype, momentum=0.2, **given))
    check_merged(problem, got, truth.forward(data["x"], momentum=0.2, **given), **moving)
    assert got["total"].tolist() == [case.n * case.s, 2]
    assert got["num_batches_tracked"] == step + 1


@merged
def test_what_merge_may_do_without(emulator, case: Case):
    emulator.schedule = SCHEDULES[0]
    problem, data = case.problem("float32"), draw(case, "float32")
    gathered = messages_of(emulator, case, "float32", data)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    check_merged(problem, emulator.merge(gathered, "float32"), truth.forward(data["x"]))
    for given in (
        {"limits": (3.0, 5.0), **moving},
        {"num_batches_tracked": 4, "momentum": CUMULATIVE, "limits": (3.0, 5.0), **moving},
    ):
        got = emulator.merge(gathered, "float32", **given)
        check_merged(problem, got, truth.forward(data["x"], **given), **moving)


@merged
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_batch_that_is_not_finite_on_one_rank(emulator, case: Case, value: float):
    data = draw(case, "float32")
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    given = {"num_batches_tracked": 3, "limits": (3.0, 5.0), **moving}
    emulator.schedule = SCHEDULES[0]
    clean = messages_of(emulator, case, "float32", data)
    want = emulator.merge(clean, "float32", **given)
    assert bits(emulator.merge(clean, "float32", skip_nonfinite=True, **given)) == bits(want)

    data["x"][3, case.c - 1, 1] = value
    gathered = messages_of(emulator, case, "float32", data)
    others = slice(0, case.c - 1)
    got = over_schedules(emulator, lambda: emulator.merge(gathered, "float32", **given))
    assert (got["stats"][:, others] == want["stats"][:, others]).all()
    assert (got["running_mean"][others] == want["running_mean"][others]).all()
    assert not np.isfinite(got["running_std"][-1]) and got["num_batches_tracked"] == 4
    kept = over_schedules(
        emulator, lambda: emulator.merge(gathered, "float32", skip_nonfinite=True, **given)
    )
    assert kept["stats"].tobytes() == got["stats"].tobytes()
    assert all((kept[name] == moving[name]).all() for name in moving)
    assert kept["num_batches_tracked"] == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("skip", [False, True])
def test_nothing_from_anybody_moves_nothing(emulator, dtype: str, skip: bool):
    data = draw(MERGED[0], dtype)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    gathered = np.zeros((3, 2 * MERGED[0].c + 2))
    got = over_schedules(
        emulator,
        lambda: emulator.merge(
            gathered, dtype, num_batches_tracked=3, skip_nonfinite=skip, **moving
        ),
    )
    assert not got["stats"].any() and not got["total"].any()
    assert all((got[name] == moving[name]).all() for name in moving)
    assert got["num_batches_tracked"] == 3


@launches_of(STATE_CASES)
def test_the_ranks_together_are_one_process(emulator, case: Case, dtype: str):
    """All four kernels, with the two exchanges between them: y and dx of the whole batch."""
    case = replace(case, n=sum(RANKS))
    emulator.sm_count, emulator.schedule = case.sms, SCHEDULES[2]
    problem, data = case.problem(dtype), draw(case, dtype)
    given = {"num_batches_tracked": 3, "limits": (1.5, 0.7)}
    want = truth.forward(data["x"], **{k: data[k] for k in STATE}, **given)
    want |= truth.backward(
        data["dy"], data["x"], data["weight"], **{k: want[k] for k in ("mean", "inv_std", "r", "d")}
    )

    gathered = messages_of(emulator, case, dtype, data)
    moving = {k: data[k] for k in ("running_mean", "running_std")}
    merged = emulator.merge(gathered, dtype, **given, **moving)
    stats, total = merged["stats"], merged["total"]
    ends = np.cumsum((0, *RANKS))
    shares = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]
    problems = [replace(case, n=int(s.stop - s.start)).problem(dtype) for s in shares]
    affine = {k: data[k] for k in ("weight", "bias")}
    y, back, dx = [], [], []
    for p, share in zip(problems, shares, strict=True):
        y.append(emulator.inference(p, data["x"][share], stats=stats, **affine)["y"])
        back.append(emulator.backward_sums(p, data["dy"][share], data["x"][share], stats))
    sums = sum(b["sums"] for b in back)
    for p, share in zip(problems, shares, strict=True):
        both = data["dy"][share], data["x"][share]
        dx.append(emulator.backward_project(p, *both, stats, sums, total, weight=data["weight"]))

    unit = 4 * SLACK * epsilon(problem)
    x_norm = np.abs((data["x"] - column(want["mean"])) * column(want["inv_std"]))
    weight = np.abs(column(data["weight"]))
    amplitude = weight * (x_norm * column(want["r"]) + 10) + np.abs(column(data["bias"]))
    bound = half_ulp(problem, want["y"]) * 1.001 + unit * amplitude
    assert_within("y", np.concatenate(y), want["y"], bound)
    scale = weight * column(want["r"] * want["inv_std"])
    bound = half_ulp(problem, want["dx"]) * 1.001 + unit * scale * (np.abs(data["dy"]) + 2 + x_norm)
    assert_within("dx", np.concatenate(dx), want["dx"], bound)
    for name in ("dweight", "dbias"):
        size = (np.abs(data["dy"]) * (1 + x_norm)).sum((0, 2)) * (1 + np.abs(want["d"]))
        assert_within(name, sum(b[name] for b in back), want[name], unit * size)
