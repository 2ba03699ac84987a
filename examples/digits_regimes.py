"""What a batch is made of, and which of its examples are normalized together.

Every step of every regime takes the gradient of 32 examples. In the micro-batch regimes they are
normalized in groups of 4 or 2, as in section 4.2 of the paper: the normalizer sees few examples,
the optimizer does not. In the non-i.i.d. regime (section 4.3) all 32 are normalized together, but
come from few classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 32


@dataclass(frozen=True)
class Regime:
    title: str
    together: int = BATCH  # examples normalized together; divides BATCH
    classes: int | None = None  # of one batch, at most; None: i.i.d.; divides BATCH
    control: bool = False  # where BatchNorm is at home

    @property
    def groups(self) -> int:
        return BATCH // self.together


REGIMES = {
    "iid": Regime("Control: 32 i.i.d. examples", control=True),
    "micro4": Regime("Micro-batches: normalized 4 by 4", together=4),
    "micro2": Regime("Micro-batches: normalized 2 by 2", together=2),
    "non-iid": Regime("Non-i.i.d.: 32 examples of 2 classes", classes=2),
}


def batches(labels: Tensor, regime: Regime, generator: torch.Generator) -> list[Tensor]:
    """One epoch: int64 [32] indices each, every example at least once.

    The pool is the whole set, or each class by itself; each is shuffled and cut into chunks, and a
    batch is as many random chunks as it may have classes. What a last chunk or batch lacks is taken
    again from the start of the same shuffle.
    """
    labels = labels.cpu()
    pools = [torch.arange(len(labels))]
    if regime.classes:
        pools = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    chunks_per_batch = regime.classes or 1
    chunks = []
    for pool in pools:
        shuffled = pool[torch.randperm(len(pool), generator=generator)]
        chunks += _whole(shuffled, BATCH // chunks_per_batch)
    order = torch.randperm(len(chunks), generator=generator)
    drawn = [torch.cat([chunks[i] for i in some]) for some in _whole(order, chunks_per_batch)]
    return [batch[torch.randperm(BATCH, generator=generator)] for batch in drawn]


def _whole(values: Tensor, size: int) -> list[Tensor]:
    """`values` in pieces of exactly `size`, the last one filled up from the start."""
    pieces = -(-len(values) // size)
    return list(values[torch.arange(pieces * size) % len(values)].split(size))
