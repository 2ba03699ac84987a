"""Mixed precision: autocast, GradScaler and the steps that it skips."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import each_device
from torch import nn

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, RenormSchedule

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
SCHEDULE = RenormSchedule(0, 2.0, 6, 3.0, 6)  # limits that move with every step


def network(layer=BatchRenorm2d, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), layer(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    )


def images(device, step=0, n=8):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(n, 3, 8, 8, generator=generator) * (1 + step) + step).to(device)


@each_device()
@HALVES
@MODES
def test_autocast_keeps_the_dtypes_that_batch_norm_has(half, training, device):
    """Of everything between the layers, and of every gradient; statistics stay float32."""
    seen = {}
    for cls in (nn.BatchNorm2d, BatchRenorm2d):
        model = network(cls).to(device).train(training)
        dtypes = seen[cls] = []
        for child in model:
            child.register_forward_hook(lambda _, x, y, to=dtypes: to.append((x[0].dtype, y.dtype)))
        x = images(device).requires_grad_()
        with torch.autocast(device, half):
            y = model(x)
        y.backward(torch.randn_like(y))
        dtypes += [p.grad.dtype for p in (x, *model.parameters())] + [model[1].running_mean.dtype]
    assert seen[BatchRenorm2d] == seen[nn.BatchNorm2d]
    assert seen[BatchRenorm2d][1] == (half, half)  # of the layer: as the convolution gives it


@each_device()
@HALVES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_under_autocast_is_training_in_float32_to_rounding(half, compiled, device):
    torch._dynamo.reset()
    options = {"momentum": 0.3, "schedule": SCHEDULE}
    plain, mixed = (network(**options).to(device) for _ in range(2))
    call = torch.compile(mixed, backend="aot_eager", fullgraph=True) if compiled else mixed
    for step in range(3):
        x = images(device, step)
        dy = torch.randn(8, 2, generator=torch.Generator().manual_seed(step)).to(device)
        plain(x).backward(dy)
        with torch.autocast(device, half):
            y = call(x)
        assert y.dtype == half
        y.float().backward(dy)
    eps = torch.finfo(half).eps
    for found, want in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert found.grad.dtype == torch.float32
        assert (found.grad - want.grad).norm() <= 8 * eps * want.grad.norm() + 8 * eps
    for name, t in plain.named_buffers():
        torch.testing.assert_close(mixed.get_buffer(name), t, rtol=4 * eps, atol=4 * eps)


def overflow(x):
    x = x.clone()
    x[1, 0, 0, 0] = torch.inf
    return x


def train(model, batches, device):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=1000)
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


@each_device()
def test_a_step_that_the_scaler_skips_leaves_no_trace(device):
    """With skip_nonfinite the model is the one that never saw the batch, to the last bit."""
    options = {"momentum": 0.3, "schedule": SCHEDULE, "skip_nonfinite": True}
    good = [images(device, step) for step in range(4)]
    bad = overflow(images(device, 9))
    without, seen = (network(**options).to(device) for _ in range(2))
    assert train(without, good, device) == 2.0**8
    assert train(seen, [*good[:2], bad, *good[2:]], device) == 2.0**7
    assert seen[1].num_batches_tracked.item() == 4
    for name, t in without.state_dict().items():
        if name in dict(without.named_buffers()):
            torch.testing.assert_close(seen.state_dict()[name], t, rtol=0, atol=0)
        else:  # the scale of a gradient is a power of two, but for what underflows
            torch.testing.assert_close(seen.state_dict()[name], t, rtol=1e-3, atol=1e-4)


@each_device()
def test_without_skip_nonfinite_such_a_step_poisons_the_statistics_as_in_torch(device):
    for cls in (nn.BatchNorm2d, BatchRenorm2d):
        model = network(cls).to(device)
        train(model, [overflow(images(device))], device)
        assert not model[1].running_mean.isfinite().all()
        assert all(p.isfinite().all() for p in model.parameters())
        assert model[1].num_batches_tracked.item() == 1


@each_device()
def test_a_gradient_that_overflows_after_a_finite_batch_skips_the_optimiser_alone(device):
    """The batch was a good one: its statistics count, as they do in torch."""
    for cls in (nn.BatchNorm2d, BatchRenorm2d):
        model = network(cls).to(device)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
        loss = model(images(device)).square().mean()
        scaler.scale(loss * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**7 and model[1].num_batches_tracked.item() == 1
        assert torch.equal(model[0].weight, before["0.weight"])
        assert model[1].running_mean.isfinite().all()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@each_device()
@HALVES
def test_a_half_precision_model_trains_without_autocast(half, device):
    """.half() and .bfloat16(): weights are half, statistics are not."""
    model = nn.Sequential(nn.Linear(5, 4), BatchRenorm1d(4)).to(device, half)
    x = torch.randn(16, 5, device=device, dtype=half)
    y = model(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == half and model[1].running_std.dtype == torch.float32
    assert all(p.grad.dtype == half and p.grad.isfinite().all() for p in model.parameters())
