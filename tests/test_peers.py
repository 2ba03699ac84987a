"""Defects of other implementations of Batch Renormalization, none of which may be one of this one.

Each test says whose it was.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from devices import each_device
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule

SHORT = RenormSchedule(2, 3.0, 8, 5.0, 5)


@each_device()
def test_1_limits_hold_past_the_end_of_the_schedule(device):
    """torchrl: r and d scale without limit past twice the warm-up (|d| = 20 with a limit of 5)."""
    module = BatchRenorm1d(1, affine=False, eps=0.0, momentum=0.0, schedule=SHORT, device=device)
    x = torch.tensor([[-1.0], [1.0]], device=device) * 1e3 + 1e5  # wants r = 1e3, d = 1e5
    for _ in range(100):
        y = module(x)
    assert y.flatten().tolist() == [5 - 3, 5 + 3]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_2_checkpointing_repeats_the_forward_exactly(use_reentrant):
    """Four peers: the recomputation reads updated statistics; dx is off by about 4%."""
    torch.manual_seed(0)
    module = BatchRenorm1d(4, momentum=0.5, schedule=RenormSchedule.constant(3.0, 5.0))
    twin = copy.deepcopy(module)
    x, dy = (torch.randn(2, 8, 4) * 2 + 1).unbind()
    x, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(module, x, use_reentrant=use_reentrant).backward(dy)
    twin(z).backward(dy)
    assert torch.equal(x.grad, z.grad)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), twin.buffers(), strict=True))


@each_device()
@pytest.mark.parametrize("step", [0, 10**6], ids=["warm-up", "after it"])
def test_3_constant_features_have_finite_gradients(step, device):
    """sb3-contrib after the warm-up, sbx even during it: NaN."""
    module = BatchRenorm1d(4, device=device)
    module.num_batches_tracked.fill_(step)
    for _ in range(50):
        x = torch.zeros(16, 4, device=device, requires_grad=True)
        y = module(x)
        y.backward(torch.randn_like(y))
        tensors = (y, x.grad, module.weight.grad, module.bias.grad, *module.buffers())
        assert all(t.isfinite().all() for t in tensors)


@each_device()
def test_4_a_single_example_poisons_nothing(device):
    """sb3-contrib: NaN output. torchrl: statistics poisoned in silence."""
    module = BatchRenorm1d(4, device=device)
    with pytest.raises(ValueError, match="more than one value per channel"):
        module(torch.randn(1, 4, device=device))
    assert module.num_batches_tracked == 0 and module.running_std.eq(1).all()
    y = module(torch.randn(1, 4, 9, device=device))  # one example with several values is a batch
    assert y.isfinite().all()


@each_device()
def test_5_an_empty_batch_poisons_nothing(device):
    """Four peers: statistics become NaN."""
    module = BatchRenorm1d(4, device=device)
    assert module(torch.randn(0, 4, device=device)).shape == (0, 4)
    assert module.num_batches_tracked == 0
    assert module.running_mean.eq(0).all() and module.running_std.eq(1).all()


@each_device()
def test_6_half_precision_stays_finite_and_half(device):
    """Three peers: float16 with a std of 300 gives non-finite moving statistics. All four return
    float32 under bfloat16 autocast."""
    module = BatchRenorm2d(4, momentum=1.0, device=device)
    y = module((torch.randn(8, 4, 8, 8, device=device) * 300).half())
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert all(t.isfinite().all() for t in module.buffers())

    model = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Conv2d(4, 4, 3)).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert model[:2](torch.randn(2, 3, 8, 8, device=device)).dtype == torch.bfloat16
        model(torch.randn(2, 3, 8, 8, device=device)).float().square().sum().backward()
    assert module.weight.grad.dtype == module.running_mean.dtype == torch.float32


@each_device()
def test_7_a_mean_of_1e4_with_a_std_of_1(device):
    """keras on torch: NaN. sbx: output 32 times too large."""
    torch.manual_seed(0)
    module = BatchRenorm1d(4, momentum=1.0, device=device)
    x = torch.randn(256, 4, device=device) + 1e4
    y = module(x)
    assert y.isfinite().all()
    torch.testing.assert_close(
        y.std(0, correction=0), torch.ones(4, device=device), rtol=1e-4, atol=0
    )
    std = x.double().std(0, correction=0)
    torch.testing.assert_close(module.running_std.double(), std, rtol=1e-5, atol=0)


def test_8_statistics_are_state_and_limits_do_not_overshoot():
    """avalanche: statistics are not in the state_dict, a fresh eval is not finite, limits
    overshoot."""
    module = BatchRenorm2d(4)
    names = {"running_mean", "running_std", "num_batches_tracked", "schedule"}
    assert names <= set(module.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(BatchRenorm2d(4).eval()(x), x)
    for step in range(0, 100_000, 77):
        r_max, d_max = RenormSchedule().limits_at(step)
        assert 1 <= r_max <= 3 and 0 <= d_max <= 5
    module(x)
    fresh = BatchRenorm2d(4)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.eval()(x), module.eval()(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_9_compile_without_graph_breaks_and_export(training):
    """ludvb, sb3-contrib: torch.compile(fullgraph=True) fails. Three of four: torch.export in
    training fails."""
    torch._dynamo.reset()
    module = BatchRenorm2d(4, schedule=SHORT).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 4, 5, 5)
    exported = torch.export.export(copy.deepcopy(module), (x,)).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(10):
        want = twin(x)
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(exported(x), want)
    assert module.num_batches_tracked == twin.num_batches_tracked == 10 * training


def test_10_pickling_and_no_parameters_without_affine():
    """ludvb: cannot be pickled; affine=False still makes parameters."""
    module = BatchRenorm3d(4, affine=False)
    assert list(module.parameters()) == [] and module.weight is None and module.bias is None
    module(torch.randn(2, 4, 2, 3, 3))
    x = torch.randn(2, 4, 2, 3, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(other.eval()(x), module.eval()(x))


@each_device()
def test_11_float64(device):
    """tf_keras: crashes."""
    module = BatchRenorm1d(4, schedule=SHORT, dtype=torch.float64, device=device)
    for _ in range(10):
        x = torch.randn(8, 4, dtype=torch.float64, device=device, requires_grad=True)
        y = module(x)
        y.backward(torch.randn_like(y))
    assert y.dtype == x.grad.dtype == module.running_std.dtype == torch.float64
    assert math.isfinite(module.eval()(x).sum().item())
