"""What training with DistributedDataParallel and FSDP must hold, written as one rank sees it: see
ranks.py."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.distributed as dist
from ranks import Rank
from sync_checks import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule, SyncBatchRenorm, convert_sync

SCHEDULE = RenormSchedule(1, 1.5, 6, 0.8, 5)


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    options = {"schedule": SCHEDULE, "momentum": 0.2}
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        BatchRenorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        BatchRenorm2d(4, **options),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 2),
    ).to(dtype)


def batch(size: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(
        size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def part(whole: Tensor, rank: Rank) -> Tensor:
    return whole.chunk(rank.world)[rank.rank]


def loss(y: Tensor) -> Tensor:
    """The mean over the examples of something that a constant shift or scale of y changes."""
    return (y.tanh() * torch.linspace(-1, 2, y.size(1), dtype=y.dtype)).sum(1).mean()


def states_are_close(found: nn.Module, wanted: nn.Module) -> None:
    torch.testing.assert_close(
        dict(found.state_dict()), dict(wanted.state_dict()), rtol=1e-10, atol=1e-12
    )


def gradients_are_close(found: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name} {m}"
        )


def ddp_with_the_ordinary_layer(rank: Rank) -> None:
    """Each rank normalises by its own examples. With broadcast_buffers the statistics are rank 0's
    at each forward, without they are each rank's own; gradients are the ranks' mean."""
    for broadcast in (True, False):
        model = network()
        alone = [copy.deepcopy(model) for _ in range(rank.world)]
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        first: list[Tensor] = []  # rank 0's buffers
        for step in range(4):
            whole = batch(8, step)
            for p in model.parameters():
                p.grad = None
            loss(ddp(part(whole, rank))).backward()
            grads: list[list[Tensor]] = []
            for r, one in enumerate(alone):
                if broadcast and step > 0:
                    for buffer, of_first in zip(one.buffers(), first, strict=True):
                        buffer.copy_(of_first)
                one.zero_grad()
                loss(one(part(whole, Rank(r, rank.world)))).backward()
                grads.append([p.grad for p in one.parameters()])
            first = [b.clone() for b in alone[0].buffers()]
            for p, *all_ in zip(model.parameters(), *grads, strict=True):
                torch.testing.assert_close(p.grad, sum(all_) / rank.world, rtol=1e-9, atol=1e-12)
            states_are_close(model, alone[rank.rank])
        assert model[1].num_batches_tracked == 4


def ddp_with_the_synchronised_layer(rank: Rank) -> None:
    """As one process that trains on the whole batch; and the statistics have the same bits on every
    rank, whether buffers are broadcast or not."""
    for broadcast in (True, False):
        alone = network()
        model = convert_sync(copy.deepcopy(alone))
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        optimisers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (ddp, alone)]
        for step in range(6):
            whole = batch(8, step)
            for optimiser, network_, x in zip(
                optimisers, (ddp, alone), (part(whole, rank), whole), strict=True
            ):
                optimiser.zero_grad()
                loss(network_(x)).backward()
                optimiser.step()
            gradients_are_close(model, alone)
            states_are_close(model, alone)
        assert_same_bits(*model.buffers())
        model.eval(), alone.eval()
        torch.testing.assert_close(model(part(whole, rank)), alone(part(whole, rank)))


def ddp_two_forwards_before_a_backward(rank: Rank) -> None:
    """As in contrastive and adversarial training. A broadcast of buffers before the second forward
    must not touch what the first one's backward needs."""
    for synchronise in (False, True):
        for broadcast in (True, False):
            alone = network()
            model = copy.deepcopy(alone)
            model = convert_sync(model) if synchronise else model
            ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
            one, two = batch(8, 0), batch(8, 1)
            (loss(ddp(part(one, rank))) - 0.5 * loss(ddp(part(two, rank)))).backward()
            if synchronise:
                (loss(alone(one)) - 0.5 * loss(alone(two))).backward()
                gradients_are_close(model, alone)
                states_are_close(model, alone)
            assert model[1].num_batches_tracked == 2
            assert all(p.grad.isfinite().all() for p in model.parameters())
            assert_same_bits(*(p.grad for p in model.parameters()))


def ddp_accumulation_with_no_sync(rank: Rank) -> None:
    """Two micro-batches under no_sync, then one with it: the mean of the ranks' accumulated
    gradients, which with the synchronised layer are those of one process that accumulates."""
    alone = network()
    model = convert_sync(copy.deepcopy(alone))
    ddp = DistributedDataParallel(model)
    for micro in range(3):
        whole = batch(8, micro)
        with ddp.no_sync() if micro < 2 else nullcontext():
            (loss(ddp(part(whole, rank))) / 3).backward()
        (loss(alone(whole)) / 3).backward()
    gradients_are_close(model, alone)
    states_are_close(model, alone)
    assert_same_bits(*model.buffers())


def ddp_accumulation_equals_one_big_step_where_statistics_stand_still(rank: Rank) -> None:
    """In eval mode (fine-tuning with frozen statistics) how the batch is cut does not matter."""
    for make in (lambda m: m, convert_sync):
        alone = network().eval()
        model = make(copy.deepcopy(alone))
        ddp = DistributedDataParallel(model)
        whole = batch(16, 0)
        for micro, x in enumerate(part(whole, rank).chunk(4)):
            with ddp.no_sync() if micro < 3 else nullcontext():
                (loss(ddp(x)) / 4).backward()
        loss(alone(whole)).backward()
        gradients_are_close(model, alone)
        states_are_close(model, alone)


def ddp_with_an_empty_rank(rank: Rank) -> None:
    """The last rank has run out of examples: it takes part all the same, and adds zeros."""
    alone = network()
    model = convert_sync(copy.deepcopy(alone))
    ddp = DistributedDataParallel(model)
    whole = batch(4, 0)
    x = whole if rank.rank == 0 else whole[:0]
    # DDP divides by the number of ranks, so the sum over all examples is given that often.
    (ddp(x).tanh().sum() * rank.world).backward()
    alone(whole).tanh().sum().backward()
    gradients_are_close(model, alone)
    states_are_close(model, alone)
    assert_same_bits(*model.buffers())


def ddp_compares_with_sync_batch_norm(rank: Rank) -> None:
    """In the warm-up the layer is BatchNorm: torch's own SyncBatchNorm gives the same gradients.
    (On the CPU there is none: so a BatchNorm of the whole batch stands in.)"""
    torch.manual_seed(0)
    sync = SyncBatchRenorm(3, schedule=RenormSchedule(), dtype=torch.float64)
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    whole, dy = batch(8, 0), batch(8, 1)
    x, all_ = part(whole, rank).clone().requires_grad_(), whole.clone().requires_grad_()
    y, wanted = sync(x), norm(all_)
    y.backward(part(dy, rank))
    wanted.backward(dy)
    torch.testing.assert_close(y, part(wanted, rank))
    torch.testing.assert_close(x.grad, part(all_.grad, rank))
    dist.all_reduce(sync.weight.grad)
    torch.testing.assert_close(sync.weight.grad, norm.weight.grad)


def fsdp_in_mixed_precision(rank: Rank) -> None:
    """bfloat16 parameters and activations; statistics stay float32, and the step counter and the
    schedule what they are. The state_dict goes round."""
    mesh = init_device_mesh("cpu", (rank.world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for make in (lambda m: m, convert_sync):
        model = make(network(torch.float32))
        alone = copy.deepcopy(model)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimiser.zero_grad()
            y = model(part(batch(8, step, torch.float32), rank))
            assert y.dtype == torch.bfloat16
            loss(y.float()).backward()
            optimiser.step()
        for layer in (model[1], model[4]):
            assert layer.running_mean.dtype == layer.running_std.dtype == torch.float32
            assert layer.schedule.dtype == torch.float64 and layer.num_batches_tracked == 3
            assert layer.weight.dtype == torch.float32 and layer.weight.grad is not None
            if make is convert_sync:
                assert_same_bits(layer.running_mean, layer.running_std)
        whole_state = {
            name: t.full_tensor() if hasattr(t, "full_tensor") else t
            for name, t in model.state_dict().items()
        }
        alone.load_state_dict(whole_state)
        assert alone[1].num_batches_tracked == 3
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.zero_() if t.is_floating_point() else t.fill_(9)
        model.load_state_dict(state)
        x = part(batch(8, 7, torch.float32), rank)
        torch.testing.assert_close(
            model.eval()(x).float(),
            alone.eval().bfloat16()(x.bfloat16()).float(),
            rtol=0.05,
            atol=0.05,
        )
