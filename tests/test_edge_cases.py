"""The edge cases of the contract, one test or more for each row of its table."""

from __future__ import annotations

import math

import pytest
import torch
from devices import each_device
from torch import nn

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, RenormSchedule, batch_renorm, reference

NAN, INF = math.nan, math.inf
LATE = RenormSchedule.constant(3.0, 5.0)  # after the warm-up, where r and d are at work
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def step(module, x, dy=None):
    """One training step. Returns y and all gradients."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(torch.randn_like(y) if dy is None else dy)
    gradients = [x.grad, *(p.grad.clone() for p in module.parameters())]
    module.zero_grad()
    return y.detach(), *gradients


def state_of(module):
    return {name: t.clone() for name, t in module.named_buffers()}


def unchanged(module, state):
    return all(torch.equal(t, state[name]) for name, t in module.named_buffers())


# One value per channel


@each_device()
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
def test_one_value_per_channel_in_training_is_refused(shape, device):
    layer = BatchRenorm2d if len(shape) == 4 else BatchRenorm1d
    module = layer(4, device=device)
    state = state_of(module)
    x = torch.randn(shape, device=device)
    with pytest.raises(ValueError, match="more than one value per channel in training, got shape"):
        module(x)
    assert unchanged(module, state)
    assert module.eval()(x).isfinite().all()


@each_device()
@pytest.mark.parametrize("shape", [(2, 4), (1, 4, 2), (1, 4, 1, 2)], ids=str)
def test_two_values_per_channel_are_enough(shape, device):
    layer = BatchRenorm2d if len(shape) == 4 else BatchRenorm1d
    module = layer(4, schedule=LATE, device=device)
    assert all(t.isfinite().all() for t in step(module, torch.randn(shape, device=device)))


# An empty batch


@each_device()
@each_dtype
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_an_empty_batch_changes_nothing(training, shape, dtype, device):
    layer = BatchRenorm2d if len(shape) == 4 else BatchRenorm1d
    module = layer(3, schedule=LATE, device=device, dtype=dtype).train(training)
    state = state_of(module)
    y, dx, dweight, dbias = step(module, torch.empty(shape, device=device, dtype=dtype))
    assert y.shape == dx.shape == shape and y.dtype == dtype
    assert dweight.tolist() == dbias.tolist() == [0, 0, 0]
    assert unchanged(module, state)


# A constant channel


@each_device()
@each_dtype
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.0, 7.0, 1e4])
def test_a_constant_channel_stays_finite_for_ever(value, eps, dtype, device):
    module = BatchRenorm1d(3, eps=eps, momentum=0.5, schedule=LATE, device=device, dtype=dtype)
    for _ in range(300):  # until its moving standard deviation underflows, with eps = 0
        x = torch.randn(8, 3, device=device).to(dtype)
        x[:, 1] = value
        results = step(module, x)
        assert all(t.isfinite().all() for t in results)
        assert all(t.isfinite().all() for t in module.buffers())
    assert module.eval()(x).isfinite().all()
    if eps == 0:
        assert module.running_std[1] < 1e-38 and results[1][:, 1].eq(0).all()


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_moving_std_of_zero_gives_no_correction(training, device):
    x = torch.tensor([[1.0], [3.0]], device=device, requires_grad=True)
    mean, std = torch.tensor([1.0], device=device), torch.tensor([0.0], device=device)
    y = batch_renorm(x, mean.clone(), std.clone(), training=training, eps=0.0)
    assert y.flatten().tolist() == ([-1.0, 1.0] if training else [0.0, 0.0])
    truth = reference.batch_renorm(x, mean.clone(), std.clone(), training=training, eps=0.0)
    assert torch.equal(y, truth)


# NaN and inf


@each_device()
@each_dtype
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_poison_stays_in_its_channel(poison, dtype, device):
    torch.manual_seed(0)
    module = BatchRenorm2d(5, schedule=LATE, device=device, dtype=dtype)
    clean = BatchRenorm2d(5, schedule=LATE, device=device, dtype=dtype)
    norm = nn.BatchNorm2d(5, device=device, dtype=torch.float32)
    x = torch.randn(4, 5, 3, 3, device=device).to(dtype)
    bad, dy = x.clone(), torch.randn_like(x)
    bad[2, 3, 1, 1] = poison
    others = [0, 1, 2, 4]
    for found, want in zip(step(module, bad, dy), step(clean, x, dy), strict=True):
        c = 0 if found.dim() == 1 else 1
        index = torch.tensor(others, device=device)
        assert torch.equal(found.index_select(c, index), want.index_select(c, index))
    y = module.train()(bad)
    assert y[:, 3].isnan().all()
    norm(bad.float())
    # Its statistics are poisoned as torch's are, and only its.
    assert module.running_mean.isfinite().tolist() == norm.running_mean.isfinite().tolist()
    assert module.running_std.isfinite().tolist() == norm.running_var.isfinite().tolist()
    assert module.running_mean.isfinite().sum() == 4


@each_device()
@each_dtype
def test_poison_can_be_skipped(dtype, device):
    options = {"schedule": LATE, "device": device, "dtype": dtype}
    module = BatchRenorm2d(5, skip_nonfinite=True, **options)
    unguarded = BatchRenorm2d(5, **options)
    x = torch.randn(4, 5, 3, 3, device=device).to(dtype)
    module(x)
    state = state_of(module)
    assert module.num_batches_tracked.item() == 1
    bad = x.clone()
    bad[2, 3, 1, 1] = INF
    module(bad)
    assert unchanged(module, state)
    unguarded(bad)
    assert not unguarded.running_std.isfinite().all()


# float16 with a standard deviation of 300


@each_device()
@pytest.mark.parametrize("std", [300.0, 3000.0])
def test_wide_float16_inputs_keep_statistics_finite(std, device):
    module = BatchRenorm1d(4, momentum=1.0, device=device, dtype=torch.float16)
    x = (torch.randn(256, 4, device=device) * std).half()
    assert all(t.isfinite().all() for t in step(module, x))
    torch.testing.assert_close(
        module.running_std, x.float().std(0, correction=0), rtol=1e-5, atol=0
    )


# Memory layouts: test_functional and the parity harness have the rest


@each_device()
@each_dtype
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_storage(offset, dtype, device):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 4, 3, 8, 8, device=device).to(dtype).unbind()

    def shifted(t):
        return (
            torch.empty(t.numel() + offset, dtype=dtype, device=device)[offset:]
            .view(t.shape)
            .copy_(t)
        )

    module, twin = (BatchRenorm2d(3, schedule=LATE, device=device) for _ in range(2))
    if dtype == torch.float64:
        module.double(), twin.double()
    for found, want in zip(step(module, shifted(x), shifted(dy)), step(twin, x, dy), strict=True):
        torch.testing.assert_close(found, want)


# More than 2^31 elements: in the parity harness, where a GPU can hold them


# Everything that is refused: test_functional. Here, that layers pass it on


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eps", -1.0, "eps must be >= 0, got -1.0"),
        ("momentum", 2.0, "momentum must be .* got 2.0"),
        ("momentum", NAN, "momentum must be .* got nan"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_attributes_set_to_nonsense_are_refused(name, value, message, training):
    module = BatchRenorm1d(3).train(training)
    setattr(module, name, value)
    state = state_of(module)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(6, 3))
    assert unchanged(module, state)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_half_precision_statistics_are_refused(training):
    module = BatchRenorm1d(3).train(training)
    module.running_std = module.running_std.half()
    with pytest.raises(TypeError, match="running_std must be torch.float32 .* got torch.float16"):
        module(torch.randn(6, 3).half())


# Inference before training


@each_device()
@each_dtype
def test_inference_before_training_is_the_identity(dtype, device):
    module = BatchRenorm2d(3, device=device, dtype=dtype).eval()
    x = torch.randn(4, 3, 5, 5, device=device).to(dtype) * 100
    assert torch.equal(module(x), x)


# Large means: numerics of the contract


@each_device()
@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
def test_a_large_mean_costs_nothing(mean, device):
    """Errors of a one-pass variance grow as (mean / std)^2, and would be 1 or more at 1e4."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, 512, device=device) + mean
    module = BatchRenorm1d(2, momentum=1.0, schedule=LATE, device=device)
    nn.init.constant_(module.running_mean, mean)
    y = module(x)
    wide = x.double()
    std = (wide.var((0, 2), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(module.running_std.double(), std, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.running_mean.double(), wide.mean((0, 2)), rtol=2e-7, atol=0)
    truth = reference.batch_renorm(
        wide,
        torch.full((2,), mean, dtype=torch.float64, device=device),
        torch.ones(2, dtype=torch.float64, device=device),
        training=True,
    )
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-6)
