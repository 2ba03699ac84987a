"""A model trained with Batch Renorm runs in ONNX Runtime, which knows BatchNorm only.

    pip install onnx onnxscript onnxruntime
    python examples/export_onnx.py --out model.onnx

`fold` makes BatchNorm of the layers, and the exporter a BatchNormalization node of each, or nothing
at all where a convolution in front of it takes it up. Both are in this network: it has a norm
before its first convolution and after a sum, as pre-activation ResNets do, and one after a
convolution. Prints the nodes, and how far the two outputs are apart, for several batch sizes. Takes
10 s.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule, fold

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Network(nn.Module):
    """[N, 1, 8, 8] to logits [N, 2]."""

    def __init__(self, schedule: RenormSchedule) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return BatchRenorm2d(channels, momentum=0.05, schedule=schedule)

        self.norm0 = norm(1)
        self.stem = nn.Conv2d(1, 16, 3, 2, padding=1)
        self.norm1 = norm(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = norm(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm3 = norm(16)
        self.fc = nn.Linear(16 * 4 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(self.norm0(x)))
        y = F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))))
        x = F.relu(self.norm3(x + self.conv2(y)))
        return self.fc(x.flatten(1))


def stripes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of stripes in noise, lying (0) or standing (1)."""
    labels = torch.randint(2, (n,), generator=generator)
    phase = 6.3 * torch.rand(n, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(8.0).view(1, 8, 1) + phase).expand(n, 8, 8)
    images = torch.where(labels.view(-1, 1, 1) == 1, wave.mT, wave)
    return (images + torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), labels


def trained(steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    at = [round(steps * fraction) for fraction in (0.1, 0.5, 0.3)]
    model = Network(RenormSchedule(at[0], 3.0, at[1], 5.0, at[2]))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(steps):
        images, labels = stripes(4, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


class Result(NamedTuple):
    nodes: list[str]
    """Their types, in order."""
    apart: float
    """Largest difference of a logit."""
    agree: float
    """Fraction of images that both give the same class."""
    accuracy: float


@torch.no_grad()
def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, help="keep the file here (default: do not)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is missing: pip install {' '.join(PACKAGES)}")

    with torch.enable_grad():
        model = trained(chosen.steps, chosen.seed)
    images, labels = stripes(256, torch.Generator().manual_seed(chosen.seed + 1))

    with tempfile.TemporaryDirectory() as folder:
        path = chosen.out or Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about itself
            program = torch.onnx.export(
                fold(copy.deepcopy(model)),
                (images[:4],),
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )
        program.save(path)
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: x.numpy()})[0] for x in images.split([1, 3, 252])]
    there = torch.cat([torch.from_numpy(part) for part in parts])
    here = model(images)
    result = Result(
        nodes,
        (there - here).abs().max().item(),
        (there.argmax(1) == here.argmax(1)).float().mean().item(),
        (there.argmax(1) == labels).float().mean().item(),
    )
    print("nodes:", " ".join(nodes))
    print(f"logits of up to {here.abs().max():.1f} at most {result.apart:.1e} apart")
    print(f"the same class for {result.agree:.1%} of the images, the right one for", end=" ")
    print(f"{result.accuracy:.1%}")
    return result


if __name__ == "__main__":
    main()
