"""What SyncBatchRenorm must hold, written as one of its ranks sees it: see ranks.py.

Every rank draws the same whole batch and takes its share of it; what one process makes of the whole
is the truth.
"""

from __future__ import annotations

import copy
import datetime
import math
import os
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Rank
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
    convert_sync,
    freeze_statistics,
    update_stats,
)

CHANNELS = 5
# In the middle of both ramps at step 3, where layers begin here.
SCHEDULE = RenormSchedule(1, 1.5, 9, 0.7, 7)
BEGIN = 3
ALONE = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}


def shares_of(world: int) -> list[list[int]]:
    """How many examples each rank has: equal, unequal, with empty ranks first, last and all but
    one."""
    return [
        [2] * world,
        [1 + 3 * r for r in range(world)],
        [0] + [3] * (world - 1),
        [3] * (world - 1) + [0],
        [0] * (world - 1) + [6],
    ]


def mine(rank: Rank, whole: Tensor, shares: list[int]) -> Tensor:
    """This rank's share, in the memory format of the whole."""
    return whole[sum(shares[: rank.rank]) :][: shares[rank.rank]].clone()


def draw(shares: list[int], shape: tuple[int, ...], dtype=torch.float64, mean=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    full = (sum(shares), CHANNELS, *shape)
    spread = torch.linspace(0.3, 3, CHANNELS).view(-1, *[1] * len(shape))
    # Examples that differ in their mean, so that shares do, too.
    drift = torch.linspace(-2, 2, full[0]).view(-1, *[1] * (len(shape) + 1))
    x = torch.randn(full, generator=generator, dtype=torch.float64) * spread + mean + drift
    return x.to(dtype), torch.randn(full, generator=generator, dtype=torch.float64).to(dtype)


def prepared(cls, dtype=torch.float64, **options):
    layer = cls(CHANNELS, dtype=dtype, **{"schedule": SCHEDULE, "momentum": 0.2, **options})
    with torch.no_grad():
        for t in layer.parameters():
            t.copy_(torch.linspace(0.5, 2, CHANNELS))
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.linspace(-1, 1, CHANNELS))
            layer.running_std.copy_(torch.linspace(0.5, 2, CHANNELS))
            layer.num_batches_tracked.fill_(BEGIN)
    return layer


def pair(dims: int, dtype=torch.float64, **options):
    """A synchronised layer and the ordinary one, in the same state."""
    return prepared(SyncBatchRenorm, dtype, **options), prepared(ALONE[dims], dtype, **options)


def assert_same_bits(*tensors: Tensor) -> None:
    """On every rank."""
    for t in tensors:
        bits = t.detach().reshape(-1).contiguous().view(torch.uint8)
        gathered = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, bits)
        assert all(torch.equal(bits, other) for other in gathered)


def summed(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t


def near(actual: Tensor, expected: Tensor, name: str, scale: float = 1.0) -> None:
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual, expected, rtol=8 * eps, atol=32 * eps * scale, msg=lambda m: f"{name}: {m}"
    )


def train(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def assert_equals_one_process(rank, shares, shape, dtype, steps=2, form=None, **options):
    sync, alone = pair(len(shape) + 2, dtype, **options)
    for step in range(steps):
        whole, dy = draw(shares, shape, dtype, seed=step)
        if form is not None:
            whole, dy = whole.contiguous(memory_format=form), dy.contiguous(memory_format=form)
        wanted_y, wanted_dx = train(alone, whole, dy)
        x = mine(rank, whole, shares)
        y, dx = train(sync, x, mine(rank, dy, shares))
        assert y.dtype == dtype and y.shape == x.shape and y.stride() == x.stride()
        near(y, mine(rank, wanted_y, shares), "y", 4)
        near(dx, mine(rank, wanted_dx, shares), "dx", 4)
    for name, buffer in sync.named_buffers():
        near(buffer.double(), dict(alone.named_buffers())[name].double(), name)
        assert_same_bits(buffer)
    assert torch.equal(sync.num_batches_tracked, alone.num_batches_tracked)
    for name, parameter in sync.named_parameters():
        size = whole.numel() / CHANNELS
        near(summed(parameter.grad), dict(alone.named_parameters())[name].grad, name, size)


def equals_one_process_in_every_dtype(rank: Rank) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        for shares in shares_of(rank.world)[:3]:
            sync, alone = pair(4, real)
            whole, dy = draw(shares, (4, 6), dtype)
            wanted_y, wanted_dx = train(alone, whole, dy)
            y, dx = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
            assert y.dtype == dtype
            near(y, mine(rank, wanted_y, shares), "y", 4)
            near(dx, mine(rank, wanted_dx, shares), "dx", 4)
            near(sync.running_mean, alone.running_mean, "running_mean")
            near(sync.running_std, alone.running_std, "running_std")
            near(summed(sync.weight.grad), alone.weight.grad, "weight.grad", whole.numel())
            assert_same_bits(sync.running_mean, sync.running_std, sync.num_batches_tracked)


def equals_one_process_with_any_shares(rank: Rank) -> None:
    for shares in shares_of(rank.world):
        assert_equals_one_process(rank, shares, (3, 4), torch.float64)


def equals_one_process_in_every_shape_and_format(rank: Rank) -> None:
    shares = shares_of(rank.world)[1]
    for shape in ((), (7,), (3, 4), (2, 3, 2)):
        assert_equals_one_process(rank, shares, shape, torch.float64)
    assert_equals_one_process(rank, shares, (3, 4), torch.float64, form=torch.channels_last)
    assert_equals_one_process(rank, shares, (2, 3, 2), torch.float64, form=torch.channels_last_3d)


def ranks_may_differ_in_shape_and_format(rank: Rank) -> None:
    """Images of other sizes and formats on every rank: all that has to agree is C."""
    shapes = [(2, 2), (5, 3), (1, 7), (4, 4)][: rank.world]
    sync = prepared(SyncBatchRenorm)
    parts = [draw([2 + r], shape, seed=r)[0] for r, shape in enumerate(shapes)]
    x = parts[rank.rank]
    x = x.contiguous(memory_format=torch.channels_last) if rank.rank % 2 else x
    y = sync(x)
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).t()
    wanted = prepared(BatchRenorm1d)(values).split([p.numel() // CHANNELS for p in parts])
    near(y.transpose(0, 1).flatten(1).t(), wanted[rank.rank], "y", 4)
    assert y.stride() == x.stride()
    assert_same_bits(sync.running_mean, sync.running_std)


def equals_one_process_through_the_schedule(rank: Rank) -> None:
    """From the warm-up through both ramps to their ends: every limit is met on the way."""
    shares = shares_of(rank.world)[1]
    schedule = RenormSchedule(5, 2.0, 11, 1.0, 9)
    assert_equals_one_process(rank, shares, (3,), torch.float64, steps=10, schedule=schedule)


def equals_one_process_with_a_cumulative_average(rank: Rank) -> None:
    assert_equals_one_process(rank, shares_of(rank.world)[1], (3,), torch.float64, momentum=None)


def equals_one_process_without_weight_bias_or_statistics(rank: Rank) -> None:
    shares = shares_of(rank.world)[1]
    assert_equals_one_process(rank, shares, (3,), torch.float64, affine=False)
    assert_equals_one_process(rank, shares, (3,), torch.float64, bias=False)
    for dtype, momentum in ((torch.float32, 0.1), (torch.float64, None)):
        sync, alone = pair(3, dtype, track_running_stats=False, momentum=momentum)
        whole, dy = draw(shares, (3,), dtype)
        wanted = train(alone, whole, dy)
        found = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
        for name, got, want in zip(("y", "dx"), found, wanted, strict=True):
            near(got, mine(rank, want, shares), name, 4)


def one_value_on_each_rank_is_a_batch(rank: Rank) -> None:
    """BatchRenorm1d refuses one value a channel; here others have more of them."""
    assert_equals_one_process(rank, [1] * rank.world, (), torch.float64)


def a_large_mean_loses_no_digits(rank: Rank) -> None:
    """|mean| / std = 1e4 and more in float32: naive sums would leave nothing of the variance."""
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (40, 40), torch.float32, mean=3e4)
    truth, wanted = prepared(BatchRenorm2d), prepared(BatchRenorm2d, torch.float32)
    sync = prepared(SyncBatchRenorm, torch.float32)
    y = sync(mine(rank, whole, shares))
    exact = mine(rank, truth(whole.double()).detach(), shares)
    peer = mine(rank, wanted(whole).detach(), shares)
    allowed = 2 * (peer - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (y - exact).abs().max() <= allowed
    assert (sync.running_std - truth.running_std).abs().max() < 1e-6


def a_constant_channel_is_finite(rank: Rank) -> None:
    for eps in (1e-5, 0.0):
        for dtype in (torch.float32, torch.float64):
            sync = prepared(SyncBatchRenorm, dtype, eps=eps)
            whole, dy = draw([2] * rank.world, (3,), dtype)
            whole[:, 1] = 3.1
            y, dx = train(
                sync, mine(rank, whole, [2] * rank.world), mine(rank, dy, [2] * rank.world)
            )
            assert y.isfinite().all() and dx.isfinite().all()
            assert (y[:, 1] == y[0, 1, 0]).all()
            assert sync.weight.grad.isfinite().all() and sync.running_std.isfinite().all()


def an_empty_batch_everywhere_moves_nothing(rank: Rank) -> None:
    sync = prepared(SyncBatchRenorm)
    before = copy.deepcopy(sync.state_dict())
    nothing = torch.empty(0, CHANNELS, 3, dtype=torch.float64)
    y, dx = train(sync, nothing, nothing)
    assert y.shape == dx.shape == (0, CHANNELS, 3)
    assert all(torch.equal(t, before[name]) for name, t in sync.state_dict().items())
    assert not sync.weight.grad.any() and not sync.bias.grad.any()


def an_empty_rank_gets_zero_gradients(rank: Rank) -> None:
    """DDP waits for gradients of every parameter from every rank."""
    shares = shares_of(rank.world)[2]
    sync = prepared(SyncBatchRenorm)
    whole, dy = draw(shares, (3,))
    train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
    assert bool(sync.weight.grad.any()) == (shares[rank.rank] > 0)


def a_batch_that_is_not_finite_on_one_rank_is_skipped_on_all(rank: Rank) -> None:
    for value in (math.nan, math.inf):
        shares = shares_of(rank.world)[1]
        sync = prepared(SyncBatchRenorm, skip_nonfinite=True)
        before = copy.deepcopy(sync.state_dict())
        whole, _ = draw(shares, (3,))
        x = mine(rank, whole, shares)
        if rank.rank == rank.world - 1:
            x[0, 1, 0] = value
        y = sync(x)
        assert y[:, 1].isnan().all() and y[:, [0, 2, 3, 4]].isfinite().all()
        assert all(torch.equal(t, before[name]) for name, t in sync.state_dict().items())
        sync(mine(rank, whole, shares))  # and a finite one is not
        assert sync.num_batches_tracked == BEGIN + 1
        assert not torch.equal(sync.running_mean, before["running_mean"])

        poisoned = prepared(SyncBatchRenorm)
        poisoned(x)
        finite = poisoned.running_mean.isfinite()
        assert finite.tolist() == [True, False, True, True, True]
        assert poisoned.num_batches_tracked == BEGIN + 1


def a_rank_that_wants_no_gradient_takes_part(rank: Rank) -> None:
    """The others need its share of the sums: without them they would wait for ever, or get another
    dx."""
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (3,))
    wanted = train(prepared(BatchRenorm1d, affine=False), whole, dy)[1]
    sync = prepared(SyncBatchRenorm, affine=False)
    x = mine(rank, whole, shares).requires_grad_(rank.rank == 0)
    sync(x).backward(mine(rank, dy, shares))
    if rank.rank == 0:
        near(x.grad, mine(rank, wanted, shares), "dx", 4)
    else:
        assert x.grad is None

    sync = prepared(SyncBatchRenorm)  # a first layer on one rank, and not on the others
    x = mine(rank, whole, shares).requires_grad_(rank.rank == 0)
    sync(x).backward(mine(rank, dy, shares))
    assert sync.weight.grad is not None


def nobody_wants_a_gradient(rank: Rank) -> None:
    """A frozen layer keeps no graph, and moves its statistics."""
    sync = prepared(SyncBatchRenorm, affine=False)
    x = torch.randn(2, CHANNELS, 3, dtype=torch.float64)
    assert not sync(x).requires_grad
    with torch.no_grad():
        assert not prepared(SyncBatchRenorm)(x).requires_grad
    assert sync.num_batches_tracked == BEGIN + 1
    assert_same_bits(sync.running_mean)


@contextmanager
def counted():
    """Counts collectives of this rank, by name."""
    counts = {"gather": 0, "reduce": 0}
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with pytest.MonkeyPatch.context() as patch:
        for name, key in ((gather, "gather"), ("all_reduce", "reduce")):

            def counting(original, key):
                def call(*args, **kwargs):
                    counts[key] += 1
                    return original(*args, **kwargs)

                return call

            patch.setattr(dist, name, counting(getattr(dist, name), key))
        yield counts


def one_collective_forward_and_one_back(rank: Rank) -> None:
    x, dy = torch.randn(2, CHANNELS, 3), torch.randn(2, CHANNELS, 3)
    with counted() as counts:
        train(prepared(SyncBatchRenorm, torch.float32), x, dy)
    assert counts == {"gather": 1, "reduce": 1}


def inference_exchanges_nothing(rank: Rank) -> None:
    """So a rank may validate by itself."""
    if rank.rank > 0:
        return
    x = torch.randn(4, CHANNELS, 3, dtype=torch.float64)
    for options in ({}, {"track_running_stats": False}):
        sync, alone = pair(3, **options)
        assert torch.equal(sync.eval()(x), alone.eval()(x))


def groups_of_some_ranks(rank: Rank) -> None:
    """Neighbours in pairs, as for local synchronisation; and groups of one, which are the ordinary
    layer to the last bit."""
    pairs = [dist.new_group([r, r + 1]) for r in range(0, rank.world, 2)]
    ones = [dist.new_group([r]) for r in range(rank.world)]
    whole, dy = draw([2] * rank.world, (3,))
    x, g = mine(rank, whole, [2] * rank.world), mine(rank, dy, [2] * rank.world)

    first = rank.rank // 2 * 2
    sync = prepared(SyncBatchRenorm, process_group=pairs[rank.rank // 2])
    alone = prepared(BatchRenorm1d)
    part = slice(2 * first, 2 * first + 4)
    wanted_y, wanted_dx = train(alone, whole[part], dy[part])
    y, dx = train(sync, x, g)
    place = slice(2 * (rank.rank - first), 2 * (rank.rank - first) + 2)
    near(y, wanted_y[place], "y", 4)
    near(dx, wanted_dx[place], "dx", 4)

    sync, alone = prepared(SyncBatchRenorm, process_group=ones[rank.rank]), prepared(BatchRenorm1d)
    with counted() as counts:
        assert all(map(torch.equal, train(sync, x, g), train(alone, x, g)))
    assert counts == {"gather": 0, "reduce": 0}

    other = ones[(rank.rank + 1) % rank.world]
    with pytest.raises(ValueError, match="process_group must have this process"):
        prepared(SyncBatchRenorm, process_group=other)(x)


def checkpointing_repeats_without_exchanging(rank: Rank) -> None:
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (3,))
    x, g = mine(rank, whole, shares), mine(rank, dy, shares)
    model = nn.Sequential(prepared(SyncBatchRenorm), nn.ReLU(), prepared(SyncBatchRenorm))
    plain = copy.deepcopy(model)
    wanted = train(plain, x, g)
    selective = partial(create_selective_checkpoint_contexts, [torch.ops.aten.relu.default])
    for style in (
        {"use_reentrant": False},
        {"use_reentrant": True},
        {"use_reentrant": False, "context_fn": selective},
    ):
        again = copy.deepcopy(model)

        def frozen_before_the_backward(x, again=again, style=style):
            y = checkpoint(again, x, **style)
            again.eval()
            return y

        with counted() as counts:
            found = train(frozen_before_the_backward, x, g)
        assert counts == {"gather": 2, "reduce": 2}
        assert all(map(torch.equal, found, wanted))
        for name, t in again.state_dict().items():
            assert torch.equal(t, plain.state_dict()[name]), name
        for p, q in zip(again.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def checkpointing_with_other_buffers_is_an_error(rank: Rank) -> None:
    """And exchanges nothing: a rank that waited for one would hang the others."""
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (3,))
    layer = prepared(SyncBatchRenorm)
    y = checkpoint(layer, mine(rank, whole, shares).requires_grad_(), use_reentrant=False)
    layer.float().double()
    before = {name: t.clone() for name, t in layer.named_buffers()}
    with counted() as counts, pytest.raises(RuntimeError, match="no record of what it did"):
        y.backward(mine(rank, dy, shares))
    assert counts == {"gather": 0, "reduce": 0}
    assert all(torch.equal(t, before[name]) for name, t in layer.named_buffers())


def compiled_it_is_the_same(rank: Rank) -> None:
    """There is a graph break around the layer; what is left and right of it is compiled."""
    shares = shares_of(rank.world)[1]
    model = nn.Sequential(
        nn.Linear(6, CHANNELS), prepared(SyncBatchRenorm, torch.float32), nn.ReLU()
    )
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x = torch.randn(sum(shares), 6, generator=torch.Generator().manual_seed(step))
        dy = torch.randn(sum(shares), CHANNELS, generator=torch.Generator().manual_seed(9 + step))
        x, dy = mine(rank, x, shares), mine(rank, dy, shares)
        for got, want in zip(train(compiled, x, dy), train(plain, x, dy), strict=True):
            torch.testing.assert_close(got, want)
    assert model[1].num_batches_tracked == BEGIN + 3
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


def what_there_is_no_derivative_of_says_so(rank: Rank) -> None:
    x = torch.randn(4, CHANNELS, 3, dtype=torch.float64)
    sync = prepared(SyncBatchRenorm)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((sync(leaf) ** 2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="SyncBatchRenorm has no second derivatives"):
        torch.autograd.grad((dx**2).sum(), leaf)
    y = sync(leaf)
    with pytest.raises(RuntimeError, match="fallback"):  # torch's: a collective has no vmap
        torch.autograd.grad(y, leaf, torch.randn(2, *y.shape).to(y), is_grads_batched=True)
    given = {"running_mean": torch.zeros(CHANNELS, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match="running_mean must not require a gradient"):
        torch.func.functional_call(sync, given, x)
    with pytest.raises(NotImplementedError, match="SyncBatchRenorm has neither"):
        torch.func.grad(lambda t: (sync(t) ** 2).sum())(x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="SyncBatchRenorm has neither"),
    ):
        sync(forward_ad.make_dual(x, x))
    assert sync.num_batches_tracked == BEGIN + 2


def a_training_step_is_not_recorded(rank: Rank) -> None:
    """The exchange would be a constant in it. In eval mode there is none."""
    x = torch.randn(4, CHANNELS)
    sync = prepared(SyncBatchRenorm, torch.float32)
    with pytest.raises(RuntimeError, match="cannot be recorded by torch.export"):
        torch.jit.trace(sync, x)
    with pytest.raises(RuntimeError, match="cannot be recorded by torch.export"):
        torch.export.export(sync, (x,), strict=False)
    assert sync.num_batches_tracked == BEGIN
    wanted = sync.eval()(x)
    torch.testing.assert_close(torch.export.export(sync, (x,), strict=False).module()(x), wanted)


def a_refusal_comes_before_the_exchange(rank: Rank) -> None:
    """Nothing has moved, and the group is as good as before."""
    sync = prepared(SyncBatchRenorm, torch.float32)
    before = copy.deepcopy(sync.state_dict())
    for x, complaint in (
        (torch.randn(4), "x must be 2D or 3D or 4D or 5D, got 1D"),
        (torch.randn(4, CHANNELS + 1), r"running_mean must have shape \(6,\)"),
        (torch.randn(4, CHANNELS).double(), "running_mean must be torch.float64"),
        (torch.ones(4, CHANNELS, dtype=torch.int64), "x must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=complaint):
            sync(x)
    assert all(torch.equal(t, before[name]) for name, t in sync.state_dict().items())
    with counted() as counts:
        sync(torch.randn(4, CHANNELS))
    assert counts["gather"] == 1


def autocast_keeps_the_dtype(rank: Rank) -> None:
    sync = prepared(SyncBatchRenorm, torch.float32)
    x = torch.randn(4, CHANNELS, 3).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y = sync(x.to(dtype))
        assert y.dtype == dtype
        y.backward(torch.randn_like(y))
    assert sync.running_std.dtype == torch.float32


def half_precision_weights_are_taken(rank: Rank) -> None:
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (3,), torch.bfloat16)
    sync, alone = pair(3, torch.bfloat16)
    wanted = train(alone, whole, dy)
    found = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
    for name, got, want in zip(("y", "dx"), found, wanted, strict=True):
        near(got, mine(rank, want, shares), name, 4)
    assert sync.running_std.dtype == torch.float32 and sync.weight.grad.dtype == torch.bfloat16


def converted_models_synchronise(rank: Rank) -> None:
    shares = shares_of(rank.world)[1]
    whole, dy = draw(shares, (3,))
    model = nn.Sequential(prepared(BatchRenorm1d), nn.Tanh(), prepared(BatchRenorm1d))
    alone = copy.deepcopy(model)
    sync = convert_sync(model)
    wanted = train(alone, whole, dy)
    found = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
    for name, got, want in zip(("y", "dx"), found, wanted, strict=True):
        near(got, mine(rank, want, shares), name, 16)


def copies_keep_their_group(rank: Rank) -> None:
    """AveragedModel and others copy layers, a group and all."""
    group = dist.new_group(list(range(rank.world)))
    layer = prepared(SyncBatchRenorm, process_group=group)
    again = copy.deepcopy(layer)
    assert again.process_group is group or again.process_group == group
    again(torch.randn(2, CHANNELS, dtype=torch.float64))
    assert_same_bits(again.running_mean)


def clipping_is_counted_as_by_one_process(rank: Rank) -> None:
    """In every rank, those without examples included."""
    for shares in shares_of(rank.world):
        sync, alone = pair(2)
        sync.monitor_clipping(), alone.monitor_clipping()
        for seed in range(3):
            whole, dy = draw(shares, (), seed=seed)
            train(alone, whole, dy)
            train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
        found, wanted = sync.read_clipping(), alone.read_clipping()
        assert found.steps == 3
        assert vars(found) == pytest.approx(vars(wanted), rel=1e-9)


def frozen_it_exchanges_nothing(rank: Rank) -> None:
    """Ranks that do different numbers of forwards do not wait for one another."""
    shares = [2] * rank.world
    sync, alone = pair(2)
    freeze_statistics(sync)
    whole, dy = draw(shares, ())
    before = [t.clone() for t in sync.buffers()]
    for _ in range(1 + rank.rank):
        y, dx = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
    wanted_y, wanted_dx = train(alone.eval(), whole, dy)
    near(y, mine(rank, wanted_y, shares), "y")
    near(dx, mine(rank, wanted_dx, shares), "dx")
    assert all(torch.equal(t, b) for t, b in zip(sync.buffers(), before, strict=True))


def an_update_of_the_statistics_is_over_all_ranks(rank: Rank) -> None:
    shares = [1 + 3 * r for r in range(rank.world)]
    sync, alone = pair(2)
    data = [draw(shares, (), seed=seed)[0] for seed in range(3)]
    update_stats(sync, [mine(rank, x, shares) for x in data])
    update_stats(alone, data)
    for (name, t), wanted in zip(sync.named_buffers(), alone.buffers(), strict=True):
        near(t.double(), wanted.double(), name)


def equals_one_process_on_gpus(rank: Rank) -> None:
    """A GPU a rank, and NCCL. Not in test_distributed.py, but in test_cuda.py."""
    torch.cuda.set_device(rank.rank)
    group = dist.new_group(backend="nccl")
    shares = shares_of(rank.world)[1]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        sync = prepared(SyncBatchRenorm, real, process_group=group).cuda()
        alone = prepared(BatchRenorm2d, real).cuda()
        whole, dy = (t.cuda() for t in draw(shares, (8, 8), dtype))
        wanted = train(alone, whole, dy)
        found = train(sync, mine(rank, whole, shares), mine(rank, dy, shares))
        for name, got, want in zip(("y", "dx"), found, wanted, strict=True):
            near(got, mine(rank, want, shares), name, 16)
        near(sync.running_std, alone.running_std, "running_std", 4)
        assert_same_bits(sync.running_mean.cpu(), sync.running_std.cpu())
        empty = whole[:0] if rank.rank else whole
        train(sync, empty, empty)
        assert sync.num_batches_tracked == BEGIN + 2


def a_rank_that_does_not_come_is_an_error(rank: Rank) -> None:
    """After the time that the group was made with; and nothing has moved."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if rank.rank == 0:
        sync = prepared(SyncBatchRenorm, process_group=group)
        before = copy.deepcopy(sync.state_dict())
        with pytest.raises(RuntimeError):
            sync(torch.randn(4, CHANNELS, dtype=torch.float64))
        assert all(torch.equal(t, before[name]) for name, t in sync.state_dict().items())
    dist.barrier()


def a_killed_rank_is_an_error(rank: Rank) -> None:
    """Not a hang; and nothing has moved. There is no world after it."""
    sync = prepared(SyncBatchRenorm)
    x = torch.randn(4, CHANNELS, dtype=torch.float64).requires_grad_()
    y = sync(x)
    dist.barrier()
    if rank.rank == rank.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    before = copy.deepcopy(sync.state_dict())
    with pytest.raises(RuntimeError):
        y.backward(torch.randn_like(y))
    with pytest.raises(RuntimeError):
        sync(x)
    assert all(torch.equal(t, before[name]) for name, t in sync.state_dict().items())
