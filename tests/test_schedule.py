"""The schedule of the limits, on the host and on the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from devices import each_device

from batchrenorm_cuda import RenormSchedule, batch_renorm

INF = math.inf


@pytest.mark.parametrize(
    ("step", "limits"),
    [
        (0, (1.0, 0.0)),
        (5000, (1.0, 0.0)),
        (15000, (1 + 2 * 10000 / 35000, 2.5)),
        (25000, (1 + 2 * 20000 / 35000, 5.0)),
        (40000, (3.0, 5.0)),
        (10**9, (3.0, 5.0)),
    ],
)
def test_the_paper_schedule_is_the_default(step, limits):
    assert RenormSchedule().limits_at(step) == pytest.approx(limits, rel=1e-15)


def test_a_constant_schedule_does_not_move():
    schedule = RenormSchedule.constant(2.5, 0.5)
    assert {schedule.limits_at(step) for step in (0, 1, 10**6)} == {(2.5, 0.5)}


def test_limits_may_jump_and_be_infinite():
    jump = RenormSchedule(10, INF, 10, INF, 10)
    assert jump.limits_at(9) == (1.0, 0.0)
    assert jump.limits_at(10) == (INF, INF)
    line = RenormSchedule(10, INF, 20, INF, 30)  # no line leads to infinity
    assert line.limits_at(10) == (1.0, 0.0)
    assert line.limits_at(11) == (INF, INF)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be .* got -1"),
        ({"warmup_steps": INF}, ValueError, "warmup_steps must be finite .* got inf"),
        ({"r_max": 0.5}, ValueError, "r_max must be >= 1, got 0.5"),
        ({"r_max": math.nan}, ValueError, "r_max must be >= 1, got nan"),
        ({"d_max": -0.1}, ValueError, "d_max must be >= 0, got -0.1"),
        ({"d_max": math.nan}, ValueError, "d_max must be >= 0, got nan"),
        ({"r_max_step": 4999}, ValueError, "r_max_step must be .* got 4999"),
        ({"d_max_step": 4999}, ValueError, "d_max_step must be .* got 4999"),
        ({"d_max_step": math.nan}, ValueError, "d_max_step must be .* got nan"),
        ({"r_max_step": INF}, ValueError, "r_max_step must be finite .* got inf"),
        ({"r_max": "3"}, TypeError, "r_max must be a number, got '3'"),
        ({"d_max": torch.tensor(1.0)}, TypeError, "d_max must be a number"),
        ({"warmup_steps": True}, TypeError, "warmup_steps must be a number"),
        ({"steps_per_update": 0}, ValueError, "steps_per_update must be >= 1, got 0"),
        (
            {"steps_per_update": 10**400},
            ValueError,
            "steps_per_update must fit in a float, got an int of 1329 bits",
        ),
        ({"r_max": 10**400}, ValueError, "r_max must fit in a float, got an int of 1329 bits"),
        ({"steps_per_update": 10**306}, ValueError, r"r_max_step \* steps_per_update must fit in"),
        ({"steps_per_update": 1.5}, TypeError, "steps_per_update must be a whole number, got 1.5"),
    ],
)
def test_a_bad_schedule_names_its_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        RenormSchedule(**arguments)


@pytest.mark.parametrize(
    "schedule",
    [
        RenormSchedule(),
        RenormSchedule.constant(INF, 0.0),
        RenormSchedule(0.5, 2, 1.5, 3, 4),
        RenormSchedule(500, INF, 4000, 5.0, 2500, steps_per_update=6),
        RenormSchedule(2**100, 2**66, 1e200, 5.0, 1e200),  # never
    ],
)
def test_a_schedule_survives_its_tensor_and_its_repr(schedule):
    tensor = schedule.as_tensor()
    assert tensor.dtype == torch.float64 and tensor.shape == (5,)
    assert RenormSchedule.from_tensor(tensor, schedule.steps_per_update) == schedule
    assert eval(repr(schedule), {"RenormSchedule": RenormSchedule, "inf": INF}) == schedule
    assert (
        repr(RenormSchedule.from_tensor(tensor)) == repr(schedule) or schedule != RenormSchedule()
    )


def test_a_schedule_of_huge_steps_is_loaded():
    """Whatever number of microbatches it might be taken for."""
    for end in (1e30, 1e308):
        never = RenormSchedule(end, 3.0, end, 5.0, end)
        assert RenormSchedule().recognised_in(never.as_tensor()) == never


def test_from_tensor_refuses_what_is_no_schedule():
    with pytest.raises(TypeError, match="schedule must be a Tensor, got list"):
        RenormSchedule.from_tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"schedule must have shape \(5,\), got \(4,\)"):
        RenormSchedule.from_tensor(torch.zeros(4))
    with pytest.raises(ValueError, match="r_max must be >= 1, got 0.0"):
        RenormSchedule.from_tensor(torch.zeros(5))


def test_from_tensor_takes_an_average_of_ones_and_a_true_infinity():
    """What moving averages of buffers, and checkpoints of other makers, may hold."""
    tensor = torch.tensor([0, 1 - 1e-15, 0, INF, 0], dtype=torch.float64)
    assert RenormSchedule.from_tensor(tensor) == RenormSchedule.constant(1.0, INF)


def test_microbatches_are_fractions_of_a_step():
    updates, batches = RenormSchedule(2, 3.0, 6, 4.0, 4), RenormSchedule(8, 3.0, 24, 4.0, 16)
    schedule = RenormSchedule(2, 3.0, 6, 4.0, 4, steps_per_update=4)
    assert torch.equal(schedule.as_tensor(), batches.as_tensor())
    assert RenormSchedule.from_tensor(schedule.as_tensor()) == batches != schedule
    for step in range(30):
        assert schedule.limits_at(step) == batches.limits_at(step)
        assert schedule.limits_at(4 * step) == updates.limits_at(step)
    assert schedule.limits_at(10) == (1.25, 1.0)  # on the line between two updates
    assert repr(schedule).endswith("d_max_step=4, steps_per_update=4)")


def test_a_schedule_is_a_value():
    assert hash(RenormSchedule()) == hash(RenormSchedule(5000, 3.0, 40000, 5.0, 25000))
    with pytest.raises(AttributeError):
        RenormSchedule().r_max = 2.0
    # In int32, 40,000 steps of 100,000 microbatches are a negative number.
    i, f = np.int32, np.float32
    given = RenormSchedule(i(5000), f(3), i(40000), f(5), i(25000), steps_per_update=i(100_000))
    plain = RenormSchedule(5000, 3.0, 40000, 5.0, 25000, steps_per_update=100_000)
    assert given == plain and repr(given) == repr(plain)
    assert torch.equal(given.as_tensor(), plain.as_tensor())


@each_device()
@pytest.mark.parametrize(
    "schedule",
    [
        RenormSchedule(3, 4.0, 13, 2.0, 8),
        RenormSchedule(3, 4.0, 3, 2.0, 3),
        RenormSchedule(3, INF, 13, INF, 8),
        RenormSchedule.constant(1.0, 0.0),
        RenormSchedule.constant(1.5, INF),
    ],
    ids=str,
)
def test_the_kernels_follow_the_same_schedule(schedule, device):
    # Statistics so far off that both corrections reach their limits: y tells what the limits were.
    x = torch.tensor([[-1.0], [1.0]], device=device) * 1e6 + 1e7
    buffer = schedule.as_tensor(device)
    for step in range(16):
        counter = torch.tensor(step, device=device)
        running = torch.zeros(1, device=device), torch.ones(1, device=device)
        y = batch_renorm(
            x, *running, None, None, True, 0.1, 0.0, num_batches_tracked=counter, schedule=buffer
        )
        r_max, d_max = schedule.limits_at(step)
        r, d = min(1e6, r_max), min(1e7, d_max)
        torch.testing.assert_close(
            y.flatten().cpu(), torch.tensor([d - r, d + r]), rtol=1e-6, atol=0
        )
        assert counter.item() == step + 1
