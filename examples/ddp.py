"""DistributedDataParallel with statistics of all processes together: SyncBatchRenorm.

    torchrun --nproc-per-node 2 examples/ddp.py

`convert_sync(convert(model))` comes before the wrapping. Every process has `--batch` examples of
each step, and all are normalised as one batch. So statistics have the same bits everywhere (what
DDP broadcasts of buffers changes nothing, and may be turned off), and the network is, up to
rounding, the one that a single process trains on the whole batches; here that is trained, too, and
the largest difference printed. gloo on CPUs, NCCL if each process has a GPU. Takes 10 s.
"""

import argparse
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchrenorm_cuda import RenormSchedule, convert, convert_sync


class Result(NamedTuple):
    losses: list[float]
    """Of each step, the mean over all processes."""
    state: dict[str, Tensor]
    """Of the model after the last step, on the CPU."""
    alone: dict[str, Tensor]
    """The same, trained in one process on the whole batches."""


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, width in ((1, 8), (8, 16)):
        convolution = nn.Conv2d(before, width, 3, 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 2 * 2, 2))


def stripes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of stripes in noise, lying (0) or standing (1)."""
    labels = torch.randint(2, (n,), generator=generator)
    phase = 6.3 * torch.rand(n, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(8.0).view(1, 8, 1) + phase).expand(n, 8, 8)
    images = torch.where(labels.view(-1, 1, 1) == 1, wave.mT, wave)
    return (images + torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), labels


def train(
    model: nn.Module, steps: int, whole: int, part: slice, device: torch.device
) -> list[Tensor]:
    """Trains on the examples `part` of batches of `whole` ones, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        images, labels = (t[part].to(device) for t in stripes(whole, generator))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2, help="examples a process, each step")
    parser.add_argument("--rendezvous", default="env://", help="torchrun's, or file:///PATH")
    chosen = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        sys.exit("error: start it with torchrun --nproc-per-node 2 examples/ddp.py")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    on_gpu = torch.cuda.device_count() > local and dist.is_nccl_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", chosen.rendezvous, rank=rank, world_size=world
    )

    at = [round(chosen.steps * fraction) for fraction in (0.1, 0.5, 0.3)]
    schedule = RenormSchedule(at[0], 3.0, at[1], 5.0, at[2])
    torch.manual_seed(0)
    single = convert(network(), schedule=schedule, momentum=0.05).to(device)
    torch.manual_seed(0)
    model = convert_sync(convert(network(), schedule=schedule, momentum=0.05)).to(device)
    parallel = DistributedDataParallel(model)

    whole = world * chosen.batch
    part = slice(rank * chosen.batch, (rank + 1) * chosen.batch)
    losses = torch.stack(train(parallel, chosen.steps, whole, part, device))
    dist.all_reduce(losses)
    losses /= world
    dist.destroy_process_group()

    train(single, chosen.steps, whole, slice(None), device)
    state, alone = ({k: v.cpu() for k, v in m.state_dict().items()} for m in (model, single))
    if rank == 0:
        apart = max((state[k] - alone[k]).abs().max().item() for k in state)
        print(f"{world} processes on {device.type}, {chosen.steps} steps of {whole} examples")
        print(f"loss of the first step {losses[0]:.3f}, of the last ten {losses[-10:].mean():.3f}")
        print(f"parameters and statistics at most {apart:.1e} from those of one process")
    return Result(losses.tolist(), state, alone)


if __name__ == "__main__":
    main()
