"""Where the rounding of a mean shows, under the emulator: dweight has it times the sum of dy, and
what centre and residue hold has to arrive in y and dx. Chips of a few SMs, plans as the planner
cuts them.
"""

from __future__ import annotations

import numpy as np
import pytest
from launches import LAST, SCHEDULES, Case, column
from simt import truth
from simt.emulator import Emulator, rounded

CASES = [
    Case("one block a channel", n=8, c=2, s=3136),
    Case("one block, odd planes", n=64, c=2, s=49),
    Case("a team", n=32, c=1, s=4096, sms=6),
    Case("a team, two rounds", n=4, c=1, s=50176, sms=6),
    Case("rows", n=8, c=8, s=3136, layout=LAST, sms=12),
    Case("rows, a block alone", n=40, c=8, s=49, layout=LAST, sms=1),
]
CEILING = 12  # roundings, as in the parity harness
EPS = np.finfo(np.float32).eps


# Mean, std, eps. Of the last the mean is many stds, but eps says that it is none.
VALUES = [(0.0, 1.0, 1e-5), (1.0, 1.0, 1e-5), (300.0, 1.0, 1e-5), (1e-7, 1e-10, 1e-3)]


@pytest.mark.parametrize("values", VALUES, ids=lambda v: f"mean-{v[0]:g}-std-{v[1]:g}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_of_the_mean_is_lost(emulator: Emulator, case: Case, dtype: str, values):
    """dweight by a dy that has a mean and nothing of x; y and dx by one of which most is projected
    out, that is all but rounding."""
    emulator.sm_count, emulator.schedule = case.sms, SCHEDULES[0]
    problem = case.problem(dtype)
    rng, (mean, spread, eps) = np.random.default_rng(0), values
    shape = (case.n, case.c, case.s)
    x = rounded(rng.standard_normal(shape) * spread + mean, dtype)
    forward, exact = emulator.forward(problem, x, eps=eps), truth.forward(x, eps=eps)
    statistics = {k: exact[k] for k in ("mean", "inv_std", "r", "d")}
    stats, std = forward["stats"], 1 / exact["inv_std"]
    x_norm = (x - column(exact["mean"])) / column(std)

    error = (x.astype(np.float32) - column(stats[0])) - (x - column(stats[0].astype(np.longdouble)))
    assert (np.abs(error.mean((0, 2))) <= 0.02 * EPS * std).all(), "x - centre is biased"

    dy = rounded(3 + rng.standard_normal(shape), dtype)
    got = emulator.backward(problem, dy, x, stats=stats)["dweight"]
    want = truth.backward(dy, x, **statistics)["dweight"]
    size = np.sqrt(((dy * x_norm) ** 2).sum((0, 2))) + np.abs(dy.sum((0, 2))) / 64
    assert (np.abs(got - want) <= CEILING * EPS * size).all(), np.abs(got - want) / EPS / size

    if dtype == "float32":
        dy = rounded(2 * x_norm, dtype)
        got = emulator.backward(problem, dy, x, stats=stats)["dx"]
        want = truth.backward(dy, x, **statistics)["dx"]
        for error, size in ((got - want, 2 / std), (forward["y"] - exact["y"], 1.0)):
            most = np.abs(error).max((0, 2)) / np.abs(x_norm).max((0, 2))
            assert (most <= 4 * EPS * size).all(), most / EPS / size
