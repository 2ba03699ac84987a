"""A U-Net that is trained on one image, or one volume, at a time.

    python examples/unet.py
    python examples/unet.py --dims 3

With one image in a batch BatchNorm trains a network that sees every image normalised by itself, and
infers with one that sees it normalised by the average. Batch Renorm trains the one that infers, so
far as its limits allow. Printed for both, after training on the same images: the Dice score in eval
mode; and the gap, how much the logits of an image differ between training and inference (root mean
square, relative). The images are discs or balls on a background, of a brightness, contrast and
number of their own, made here.

In 2-D, seeds 0 to 4, the gap was 0.46 with BatchNorm and 0.21 with Batch Renorm, Dice 0.93 with
either (spread 0.02); in 3-D, seeds 0 to 2, 0.23 and 0.07, Dice 0.86 and 0.83. So the gap closes,
and that need not gain anything: an image that is normalised by itself has lost its brightness and
contrast, which helps to find the discs here (Dice 0.97 if BatchNorm could infer so). If your task
is like that, try InstanceNorm. Takes 15 s in 2-D, a minute in 3-D.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchrenorm_cuda import RenormSchedule, convert

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MOMENTUM = 0.02  # of the moving statistics, with both norms
POOL = {2: F.max_pool2d, 3: F.max_pool3d}


class UNet(nn.Module):
    """[N, 1, ...] to logits [N, 1, ...], each side of the image a multiple of 2 ** (levels - 1)."""

    def __init__(self, dims: int, width: int, levels: int) -> None:
        super().__init__()
        self.dims = dims
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(map(self.two_convolutions, [1, *widths], widths))
        both = [low + high for low, high in zip(widths[1:], widths[:-1], strict=True)]
        self.up = nn.ModuleList(map(self.two_convolutions, both, widths[:-1]))
        self.head = CONV[dims](width, 1, 1)

    def two_convolutions(self, channels: int, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before in (channels, width):
            convolution = CONV[self.dims](before, width, 3, padding=1, bias=False)
            layers += [convolution, NORM[self.dims](width, momentum=MOMENTUM), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(POOL[self.dims](x, 2) if level else x)
            skips.append(x)
        for skip, block in zip(skips[-2::-1], reversed(self.up), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)


def balls(n: int, dims: int, generator: torch.Generator, side: int) -> tuple[Tensor, Tensor]:
    """Images and masks of what is in them, [n, 1, side, ...]."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, side)] * dims, indexing="ij")
    grid = torch.stack(axes)
    images, masks = [], []
    for _ in range(n):
        mask = torch.zeros_like(axes[0], dtype=torch.bool)
        for _ in range(int(torch.randint(1, 5, (), generator=generator))):
            centre = torch.rand(dims, *[1] * dims, generator=generator) * 1.6 - 0.8
            radius = 0.2 + 0.3 * torch.rand((), generator=generator)
            mask |= (grid - centre).square().sum(0) < radius**2
        contrast, brightness = torch.rand(2, generator=generator)
        noise = 0.3 * torch.randn(mask.shape, generator=generator)
        images.append((0.5 + contrast) * mask + 0.5 * brightness + noise)
        masks.append(mask)
    return torch.stack(images).unsqueeze(1), torch.stack(masks).unsqueeze(1).float()


def train(model: UNet, steps: int, batch: int, side: int, seed: int) -> UNet:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        images, masks = balls(batch, model.dims, generator, side)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), masks).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def dice_and_gap(model: UNet, images: Tensor, masks: Tensor) -> tuple[float, float]:
    inferred = model.eval()(images)
    predicted = inferred > 0
    dice = 2 * (predicted * masks).sum() / (predicted.sum() + masks.sum())
    twin = copy.deepcopy(model).train()  # its statistics move, the model's do not
    trained = torch.cat([twin(image) for image in images.split(1)])
    gap = (trained - inferred).square().mean().sqrt() / inferred.square().mean().sqrt()
    return dice.item(), gap.item()


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--side", type=int, help="pixels or voxels (32, or 16 in 3-D)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    side = chosen.side or (32 if chosen.dims == 2 else 16)
    torch.manual_seed(chosen.seed)
    batch_norm = UNet(chosen.dims, width=8, levels=3)
    at = [round(chosen.steps * fraction) for fraction in (0.1, 0.5, 0.3)]
    schedule = RenormSchedule(at[0], 3.0, at[1], 5.0, at[2])
    renorm = convert(copy.deepcopy(batch_norm), schedule=schedule, momentum="keep")

    images, masks = balls(64, chosen.dims, torch.Generator().manual_seed(chosen.seed + 1), side)
    found = {}
    for name, model in {"BatchNorm": batch_norm, "Batch Renorm": renorm}.items():
        train(model, chosen.steps, chosen.batch, side, chosen.seed + 2)
        found[name] = dice, gap = dice_and_gap(model, images, masks)
        print(f"{name:12} Dice {dice:.3f}   gap between training and inference {gap:.2f}")
    return found


if __name__ == "__main__":
    main()
