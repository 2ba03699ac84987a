"""Gradient accumulation with a schedule that counts steps of the optimiser, not microbatches.

    python examples/micro_batches.py --accumulate 4

A layer sees every microbatch, so its counter runs `accumulate` times as fast as the optimiser.
`RenormSchedule(..., steps_per_update=accumulate)` makes the schedule's numbers those of the
optimiser; you write it once and accumulate as you like (`set_steps_per_update` changes it in
mid-training). Two more things are yours to do: divide the loss, and give a microbatch the weight in
the moving averages that leaves a step's what it was.

Prints where the layer is after steps of the optimiser: its counter, its limits, and how much it
did correct, which is nothing in the warm-up. With another --accumulate the limits are the same at
every step. Takes a few seconds.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchrenorm_cuda import BatchRenorm1d, RenormSchedule, monitor_clipping


class Step(NamedTuple):
    microbatches: int
    limits: tuple[float, float]  # r_max and d_max of the next microbatch
    corrected: float  # mean |log r| + mean |d| in the step, as clipped
    loss: float


def rings(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [n, 2], and which of two rings they are on."""
    labels = torch.randint(2, (n,), generator=generator)
    angle = 6.3 * torch.rand(n, generator=generator)
    radius = 1 + labels + 0.2 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def main(arguments: list[str] | None = None) -> list[Step]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of the optimiser")
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--accumulate", type=int, default=4, help="microbatches a step")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    per = chosen.accumulate
    if chosen.batch % per:
        parser.error(f"--batch must be a multiple of --accumulate ({per}), got {chosen.batch}")

    # In steps of the optimiser, all three.
    at = [round(chosen.steps * fraction) for fraction in (0.1, 0.5, 0.3)]
    schedule = RenormSchedule(at[0], 3.0, at[1], 5.0, at[2], steps_per_update=per)
    momentum = 1 - (1 - 0.05) ** (1 / per)
    torch.manual_seed(chosen.seed)
    norm = BatchRenorm1d(32, schedule=schedule, momentum=momentum)
    model = nn.Sequential(nn.Linear(2, 32, bias=False), norm, nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(chosen.seed)

    course = []
    with monitor_clipping(model) as monitor:
        for step in range(1, chosen.steps + 1):
            points, labels = rings(chosen.batch, generator)
            optimizer.zero_grad()
            total = 0.0
            for x, y in zip(points.chunk(per), labels.chunk(per), strict=True):
                loss = F.cross_entropy(model(x), y) / per
                loss.backward()
                total += loss.item()
            optimizer.step()

            (clipping,) = monitor.read().values()
            monitor.reset()
            corrected = clipping.log_r - clipping.log_r_excess + clipping.d - clipping.d_excess
            seen, limits = int(norm.num_batches_tracked), norm.read_limits()
            course.append(Step(seen, limits, corrected, total))
            if step % max(chosen.steps // 10, 1) == 0:
                print(
                    f"step {step:4}: {seen:4} microbatches, r_max {limits[0]:.2f}, "
                    f"d_max {limits[1]:.2f}, corrected by {corrected:.2f}, loss {total:.3f}"
                )
    points, labels = rings(1000, generator)
    with torch.no_grad():
        right = model.eval()(points).argmax(1) == labels
    print(f"accuracy {right.float().mean():.3f}")
    return course


if __name__ == "__main__":
    main()
