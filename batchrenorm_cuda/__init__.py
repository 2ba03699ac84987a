"""Batch Renormalization (Ioffe 2017) for PyTorch, in fused CUDA and CPU kernels.

    from batchrenorm_cuda import BatchRenorm2d, RenormSchedule

takes the place of torch.nn.BatchNorm2d. `functional.batch_renorm` is the layer without state,
`reference.batch_renorm` the same in plain torch operations, and `python -m batchrenorm_cuda` checks
an installation.
"""

from . import functional, reference
from .functional import batch_renorm
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .schedule import RenormSchedule

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "RenormSchedule",
    "batch_renorm",
    "functional",
    "reference",
]
