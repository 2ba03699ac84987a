"""The specification against the paper, written out once more in NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchrenorm_cuda import RenormSchedule, reference

SHAPES = [(6, 3), (4, 3, 5), (3, 4, 2, 5), (2, 3, 2, 3, 2)]


def tensors(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    c = shape[1]
    x, weight, bias = normal(*shape) * 2 + 1, normal(c), normal(c)
    running_mean, running_std = normal(c) * 2, normal(c).exp()
    return [t.to(dtype) for t in (x, weight, bias, running_mean, running_std)]


def paper(x, weight, bias, mu, sigma, alpha, eps, r_max, d_max):
    """Algorithm 1 of the paper, channel by channel. Returns y and the new mu and sigma."""
    y, mu, sigma = np.empty_like(x), mu.copy(), sigma.copy()
    for c in range(x.shape[1]):
        mu_b = np.mean(x[:, c])
        sigma_b = np.sqrt(eps + np.mean((x[:, c] - mu_b) ** 2))
        r = np.clip(sigma_b / sigma[c], 1 / r_max, r_max)
        d = np.clip((mu_b - mu[c]) / sigma[c], -d_max, d_max)
        y[:, c] = weight[c] * ((x[:, c] - mu_b) / sigma_b * r + d) + bias[c]
        mu[c] += alpha * (mu_b - mu[c])
        sigma[c] += alpha * (sigma_b - sigma[c])
    return y, mu, sigma


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (np.inf, np.inf)], ids=str)
def test_training_is_algorithm_1(shape, limits):
    x, weight, bias, mean, std = tensors(shape)
    expected = paper(*(t.numpy() for t in (x, weight, bias, mean, std)), 0.1, 1e-3, *limits)
    y = reference.batch_renorm(x, mean, std, weight, bias, True, 0.1, 1e-3, *limits)
    for found, want in zip((y, mean, std), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_is_the_affine_map_of_the_moving_statistics(shape):
    x, weight, bias, mean, std = tensors(shape)
    y = reference.batch_renorm(x, mean, std, weight, bias)
    column = (-1, *[1] * (x.dim() - 2))
    expected = weight.view(column) * (x - mean.view(column)) / std.view(column) + bias.view(column)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_the_projection_of_the_paper(shape):
    x, weight, bias, mean, std = tensors(shape)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    before = mean.clone(), std.clone()
    y = reference.batch_renorm(x, mean, std, weight, bias, True, 0.1, 1e-3, 1.5, 0.5)
    dx, dweight, dbias = torch.autograd.grad(y, inputs, g)

    dims, keep = [0, *range(2, x.dim())], {"dim": [0, *range(2, x.dim())], "keepdim": True}
    column = (1, -1, *[1] * (x.dim() - 2))
    with torch.no_grad():
        batch_std = (x.var(dims, correction=0) + 1e-3).sqrt()
        r = (batch_std / before[1]).clamp(1 / 1.5, 1.5)
        d = ((x.mean(dims) - before[0]) / before[1]).clamp(-0.5, 0.5)
        x_norm = (x - x.mean(**keep)) / batch_std.view(column)
        projected = g - g.mean(**keep) - x_norm * (g * x_norm).mean(**keep)
        torch.testing.assert_close(dx, (weight * r / batch_std).view(column) * projected)
        torch.testing.assert_close(dweight, r * (g * x_norm).sum(dims) + d * g.sum(dims))
        torch.testing.assert_close(dbias, g.sum(dims))


def test_r_and_d_are_constants_in_every_mode_of_differentiation():
    x, weight, bias, mean, std = tensors((6, 3))
    mean, std = mean.zero_(), std.fill_(1)  # far from every limit

    def layer(x):
        return reference.batch_renorm(
            x, mean.clone(), std.clone(), weight, bias, True, 0.1, 1e-3, 100.0, 100.0
        )

    backward = torch.autograd.functional.jacobian(layer, x)
    forward = torch.func.jacfwd(layer)(x)
    torch.testing.assert_close(forward, backward)
    # The sum over the batch of x_norm * r + d, r and d constant, does not depend on x.
    assert backward.sum(0).abs().max() < 1e-12


def test_twice_differentiable():
    x, weight, bias, mean, std = tensors((4, 2, 3))
    mean, std = mean - 50, std * 0 + 0.05  # r and d at their limits, where they are constant
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def layer(x, weight, bias):
        return reference.batch_renorm(x, mean.clone(), std.clone(), weight, bias, True)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_the_schedule_and_the_cumulative_average_use_the_count_before_this_batch():
    schedule = RenormSchedule(1, 2.0, 3, 4.0, 3)
    counter, mean, std = torch.tensor(2), torch.tensor([1.0]), torch.tensor([1.0])
    x = torch.tensor([[90.0], [110.0]])
    y = reference.batch_renorm(
        x,
        mean,
        std,
        training=True,
        momentum=None,
        eps=0.0,
        num_batches_tracked=counter,
        schedule=schedule.as_tensor(),
    )
    assert y.flatten().tolist() == [2 - 1.5, 2 + 1.5]  # half way: r_max = 1.5, d_max = 2
    assert counter.item() == 3
    torch.testing.assert_close(mean, torch.tensor([1 + 99 / 3]))
    torch.testing.assert_close(std, torch.tensor([1 + 9 / 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, weight, bias, mean, std = tensors((8, 3, 5), torch.float32)
    x, state = x.to(dtype), (mean.clone(), std.clone())
    y = reference.batch_renorm(x, mean, std, weight, bias, True)
    wide = reference.batch_renorm(x.float(), *state, weight, bias, True)
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))
    assert torch.equal(mean, state[0]) and mean.dtype == torch.float32
