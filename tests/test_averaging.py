"""torch.optim.swa_utils.AveragedModel: what it makes of the layer's buffers.

It copies them (use_buffers=False) or averages them all (True), also the counter, which is an
integer, and the schedule, which may have infinite limits.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
)

from batchrenorm_cuda import BatchRenorm1d, RenormSchedule, update_stats

SCHEDULE = RenormSchedule(2, math.inf, 5, 3.0, 7)

AVERAGES = {
    "default": {},
    "swa": {"avg_fn": get_swa_avg_fn()},
    "ema": {"avg_fn": get_ema_avg_fn(0.9)},
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


def model_of():
    torch.manual_seed(0)
    layer = BatchRenorm1d(4, momentum=0.3, schedule=SCHEDULE)
    return nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 2))


def train(model, averaged, steps=12):
    """The states of the model that were averaged."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    states = []
    for step in range(steps):
        loss = (model(torch.randn(8, 5) + step / 4) - 1).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        averaged.update_parameters(model)
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    return states


def test_copied_buffers_and_an_update_of_the_statistics():
    """The usual way: averaged weights, then statistics for them."""
    model = model_of()
    averaged = AveragedModel(model)
    states = train(model, averaged)
    for name, t in model.named_buffers():
        assert torch.equal(averaged.module.get_buffer(name), t)
    mean = torch.stack([state["0.weight"] for state in states]).mean(0)
    torch.testing.assert_close(averaged.module[0].weight, mean)

    data = [torch.randn(8, 5) for _ in range(6)]
    update_stats(averaged, data)
    layer = averaged.module[1]
    activations = torch.stack([averaged.module[0](x) for x in data])
    torch.testing.assert_close(layer.running_mean, activations.mean((0, 1)))
    assert layer.num_batches_tracked == 12  # training could go on
    assert RenormSchedule.from_tensor(layer.schedule) == SCHEDULE


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_buffers(kind):
    model = model_of()
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[kind])
    states = train(model, averaged)
    layer = averaged.module[1]
    for name in ("running_mean", "running_std"):
        want = states[0][f"1.{name}"].double()
        for n, state in enumerate(states[1:], start=1):
            share = 0.1 if "ema" in kind else 1 / (n + 1)
            want += share * (state[f"1.{name}"] - want)
        torch.testing.assert_close(getattr(layer, name), want.float())

    # The schedule is what it was, though inf - inf and 0.9 + 0.1 have been averaged.
    assert layer.schedule.isfinite().all()
    fresh = model_of()
    fresh.load_state_dict(averaged.module.state_dict())
    assert RenormSchedule.from_tensor(fresh[1].schedule).r_max == math.inf
    x = torch.randn(8, 5)
    assert torch.equal(fresh.eval()(x), averaged.eval()(x))


def test_a_weighted_sum_of_checkpoints_loads():
    """Ten tenths of r_max = 1 are a little less than one."""
    model = model_of()
    model[1].set_limits(1.0, 0.0)
    state = model.state_dict()
    assert sum(0.1 * state["1.schedule"][1] for _ in range(10)) < 1
    model.load_state_dict({name: sum(0.1 * t for _ in range(10)) for name, t in state.items()})
    assert RenormSchedule.from_tensor(model[1].schedule) == RenormSchedule.constant(1.0, 0.0)
    assert model[1].schedule[1] == 1


@pytest.mark.parametrize("kind", AVERAGES)
def test_training_on_from_averaged_buffers_needs_the_counter(kind):
    """torch rounds the average of a counter down at every step; BatchNorm's fares no better. The
    schedule would begin again."""
    model, norm = model_of(), nn.BatchNorm1d(5)
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[kind])
    averaged_norm = AveragedModel(norm, use_buffers=True, **AVERAGES[kind])
    for _ in range(12):
        x = torch.randn(8, 5)
        model(x), norm(x)
        averaged.update_parameters(model), averaged_norm.update_parameters(norm)
    counter = averaged.module[1].num_batches_tracked
    assert counter == averaged_norm.module.num_batches_tracked < 12
    counter.copy_(model[1].num_batches_tracked)
    twin = copy.deepcopy(averaged.module)
    twin[1].num_batches_tracked.fill_(12)
    assert torch.equal(averaged.module(x), twin(x))
