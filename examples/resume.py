"""A run that is broken off in the middle of the schedule and goes on as if it had not been.

    python examples/resume.py

Trains once without a break and once with one: at half the steps everything is saved to a file, and
a new model, optimiser and data generator load it. The losses after the break have the same bits.
Counter and schedule are buffers, so the model's state_dict has all that the limits depend on: the
new model is made with the default schedule and takes that of the checkpoint. Takes seconds.

On a GPU the layer has the same bits from run to run too; whether a whole model does is up to its
other layers (torch.use_deterministic_algorithms).
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule


class Run:
    """All that a step depends on, and no more."""

    def __init__(self, steps: int, schedule: RenormSchedule, seed: int) -> None:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, width in ((1, 8), (8, 16)):
            convolution = nn.Conv2d(before, width, 3, 2, padding=1, bias=False)
            layers += [convolution, BatchRenorm2d(width, schedule=schedule), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 2 * 2, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.data = torch.Generator().manual_seed(seed)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            images, labels = stripes(4, self.data)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.decay.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "decay")}
        torch.save(parts | {"data": self.data.get_state()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "decay"):
            getattr(self, name).load_state_dict(saved[name])
        self.data.set_state(saved["data"])

    def limits(self) -> tuple[float, float]:
        return self.model[1].read_limits()


def stripes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of stripes in noise, lying (0) or standing (1)."""
    labels = torch.randint(2, (n,), generator=generator)
    phase = 6.3 * torch.rand(n, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(8.0).view(1, 8, 1) + phase).expand(n, 8, 8)
    images = torch.where(labels.view(-1, 1, 1) == 1, wave.mT, wave)
    return (images + torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), labels


class Result(NamedTuple):
    whole: list[float]
    """Losses of the run without a break."""
    resumed: list[float]
    """Losses of the one with it, from the first step to the last."""
    limits: tuple[float, float]
    """r_max and d_max with which it went on."""


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    steps, half = chosen.steps, chosen.steps // 2
    schedule = RenormSchedule(steps // 10, 3.0, steps, 5.0, steps * 8 // 10)

    whole = Run(steps, schedule, chosen.seed).train(steps)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        first = Run(steps, schedule, chosen.seed)
        resumed = first.train(half)
        first.save(path)
        second = Run(steps, RenormSchedule(), seed=chosen.seed + 1)  # nothing in common
        second.load(path)
    limits = second.limits()
    resumed += second.train(steps - half)

    same = sum(a == b for a, b in zip(whole, resumed, strict=True))
    print(
        f"broken off after {half} steps, went on with r_max {limits[0]:.2f}, d_max {limits[1]:.2f}"
    )
    print(f"loss of the last step {whole[-1]!r}, resumed {resumed[-1]!r}")
    print(f"{same} of {steps} losses have the same bits")
    return Result(whole, resumed, limits)


if __name__ == "__main__":
    main()
