"""A Batch Renorm in inference, computed by the layer in front of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchrenorm_cuda.fuse import fuse_conv_batch_renorm_eval, fuse_linear_batch_renorm_eval

torch.set_num_threads(1)

RENORMS = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
CONVS = {
    f"{'ConvTranspose' if transposed else 'Conv'}{dim}d": dim
    for dim in RENORMS
    for transposed in (False, True)
}


def filled(norm):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, t in (*norm.named_parameters(), *norm.named_buffers()):
            if name in ("weight", "bias", "running_mean", "running_std"):
                t.copy_(torch.rand_like(t) + 0.5)
    return norm.eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(name, groups, bias):
    dim = CONVS[name]
    options = {"groups": groups, "bias": bias, "padding": 1, "stride": 2, "dtype": torch.float64}
    conv = getattr(nn, name)(4, 6, 3, **options).eval()
    norm = filled(RENORMS[dim](6, dtype=torch.float64))
    x = torch.randn((2, 4, *[5] * dim), dtype=torch.float64)
    before = {name: t.clone() for name, t in conv.state_dict().items()}
    expected = norm(conv(x))
    fused = fuse_conv_batch_renorm_eval(conv, norm)
    close(fused(x), expected)
    assert type(fused) is type(conv) and fused is not conv and not fused.training
    assert all(torch.equal(t, before[name]) for name, t in conv.state_dict().items())


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(options, bias):
    linear = nn.Linear(3, 5, bias=bias, dtype=torch.float64).eval()
    norm = filled(BatchRenorm1d(5, dtype=torch.float64, **options))
    x = torch.randn(4, 3, dtype=torch.float64)
    close(fuse_linear_batch_renorm_eval(linear, norm)(x), norm(linear(x)))


def test_dtype_and_gradients_wanted_stay():
    conv, norm = nn.Conv2d(3, 4, 1).half().eval(), filled(BatchRenorm2d(4)).half()
    conv.weight.requires_grad_(False)
    fused = fuse_conv_batch_renorm_eval(conv, norm)
    assert fused.weight.dtype == fused.bias.dtype == torch.half
    assert not fused.weight.requires_grad and fused.bias.requires_grad
    x = torch.randn(2, 3, 4, 4).half()
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=5e-3, atol=5e-3)


def test_a_parametrized_weight_is_fused_as_it_is():
    conv = parametrizations.weight_norm(nn.Conv1d(3, 4, 1, dtype=torch.float64)).eval()
    norm = filled(BatchRenorm1d(4, dtype=torch.float64))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    fused = fuse_conv_batch_renorm_eval(conv, norm)
    close(fused(x), norm(conv(x)))
    assert type(fused) is nn.Conv1d
    assert [name for name, _ in fused.named_parameters()] == ["bias", "weight"]
    assert hasattr(conv, "parametrizations")


def test_a_channel_without_scale_gives_its_bias():
    conv, norm = nn.Conv1d(3, 4, 1).eval(), filled(BatchRenorm1d(4, eps=0.0))
    norm.running_std[2] = 0
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(fuse_conv_batch_renorm_eval(conv, norm)(x), norm(conv(x)))


CONV, NORM = nn.Conv2d(3, 4, 1).eval(), BatchRenorm2d(4).eval()


@pytest.mark.parametrize(
    ("fuse", "layer", "norm", "error", "message"),
    [
        ("conv", nn.Linear(3, 4), NORM, TypeError, "conv must be a convolution .* got Linear"),
        ("linear", CONV, NORM, TypeError, "linear must be a torch.nn.Linear, got Conv2d"),
        ("conv", CONV, nn.BatchNorm2d(4), TypeError, "norm must be a BatchRenorm, got BatchNorm2d"),
        ("conv", nn.Conv2d(3, 4, 1), NORM, ValueError, "conv must be in eval mode"),
        ("conv", CONV, BatchRenorm2d(4), ValueError, "norm must be in eval mode"),
        (
            "conv",
            CONV,
            BatchRenorm2d(5).eval(),
            ValueError,
            "norm must have the 4 channels.* got 5",
        ),
        (
            "conv",
            CONV,
            BatchRenorm2d(4, track_running_stats=False).eval(),
            ValueError,
            "norm must have moving statistics",
        ),
    ],
)
def test_bad_arguments(fuse, layer, norm, error, message):
    fuses = {"conv": fuse_conv_batch_renorm_eval, "linear": fuse_linear_batch_renorm_eval}
    with pytest.raises(error, match=message):
        fuses[fuse](layer, norm)


def test_a_weight_made_by_a_hook_is_refused():
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(ValueError, match="conv must have a weight of its own"):
        fuse_conv_batch_renorm_eval(conv, NORM)


def test_a_bias_that_a_hook_computes_is_refused():
    conv = nn.Conv1d(3, 4, 1).eval()
    prune.l1_unstructured(conv, "bias", 0.5)
    with pytest.raises(ValueError, match="conv must have a bias of its own, got one that a hook"):
        fuse_conv_batch_renorm_eval(conv, BatchRenorm1d(4).eval())
