"""Watches how often r and d are clipped, and finds the limits of the schedule by it.

    python examples/clip_rates.py

A limit that nothing reaches bounds nothing; one that clips at every step leaves a gap between
training and inference. `monitor_clipping` counts both on the device and is read when asked. Here it
is read every --window steps: a plain BatchNorm warm-up first, then limits that are as narrow as can
be and are widened, in place, wherever more than --aim of the corrections were clipped in the
window. The limits and steps it ends with are the schedule of the next run, printed as code: here
r_max of about 3 and d_max of 1, where the paper's 5 would bound nothing. Takes seconds.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule, monitor_clipping, set_limits


class Window(NamedTuple):
    r_max: float
    d_max: float
    r_clipped: float  # fractions, of the layer in which they are largest
    d_clipped: float


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, width in ((1, 8), (8, 16)):
        convolution = nn.Conv2d(before, width, 3, 2, padding=1, bias=False)
        layers += [convolution, BatchRenorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 2 * 2, 2))


def stripes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of stripes in noise, lying (0) or standing (1)."""
    labels = torch.randint(2, (n,), generator=generator)
    phase = 6.3 * torch.rand(n, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(8.0).view(1, 8, 1) + phase).expand(n, 8, 8)
    images = torch.where(labels.view(-1, 1, 1) == 1, wave.mT, wave)
    return (images + torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), labels


def main(arguments: list[str] | None = None) -> tuple[list[Window], RenormSchedule]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--windows", type=int, default=14)
    parser.add_argument("--window", type=int, default=50, help="steps between two looks")
    parser.add_argument("--warmup", type=int, default=2, help="windows of BatchNorm")
    parser.add_argument("--aim", type=float, default=0.02, help="largest fraction to be clipped")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(chosen.seed)
    generator = torch.Generator().manual_seed(chosen.seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)

    windows, reached = [], {"r_max": chosen.warmup, "d_max": chosen.warmup}
    r_max, d_max = 1.0, 0.0
    set_limits(model, r_max, d_max)
    with monitor_clipping(model) as monitor:
        for number in range(1, chosen.windows + 1):
            for _ in range(chosen.window):
                images, labels = stripes(chosen.batch, generator)
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            layers = monitor.read().values()
            monitor.reset()
            r_clipped = max(clipping.r_clipped for clipping in layers)
            d_clipped = max(clipping.d_clipped for clipping in layers)
            windows.append(Window(r_max, d_max, r_clipped, d_clipped))
            print(
                f"step {number * chosen.window:4}: r_max {r_max:.2f} clips {r_clipped:6.1%}, "
                f"d_max {d_max:.2f} clips {d_clipped:6.1%}"
            )
            if number >= chosen.warmup and r_clipped > chosen.aim:
                r_max, reached["r_max"] = round(r_max * 1.25, 2), number
            if number >= chosen.warmup and d_clipped > chosen.aim:
                d_max, reached["d_max"] = round(d_max + 0.25, 2), number
            set_limits(model, r_max, d_max)

    steps = {name: number * chosen.window for name, number in reached.items()}
    warmup = chosen.warmup * chosen.window
    schedule = RenormSchedule(warmup, r_max, steps["r_max"], d_max, steps["d_max"])
    print(f"for the next run: {schedule}")
    return windows, schedule


if __name__ == "__main__":
    main()
