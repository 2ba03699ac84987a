"""Batch Renormalization (Ioffe 2017) for PyTorch, in fused CUDA and CPU kernels.

    from batchrenorm_cuda import BatchRenorm2d, RenormSchedule

takes the place of torch.nn.BatchNorm2d; `convert(model)` does so for all of a model, `fold(model)`
makes BatchNorm of it again. `functional.batch_renorm` is the layer without state,
`reference.batch_renorm` the same in plain torch operations, and `python -m batchrenorm_cuda` checks
an installation.
"""

from . import adopt, functional, reference
from .checkpoint import checkpoint_context_fn
from .clipping import Clipping
from .convert import convert, convert_sync, fold
from .functional import batch_renorm
from .fuse import fuse_conv_batch_renorm_eval, fuse_linear_batch_renorm_eval
from .lazy import LazyBatchRenorm1d, LazyBatchRenorm2d, LazyBatchRenorm3d
from .limits import set_limits, set_schedule, set_steps_per_update
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .monitoring import ClippingMonitor, monitor_clipping
from .schedule import RenormSchedule
from .statistics import freeze_statistics, unfreeze_statistics, update_stats
from .sync import SyncBatchRenorm

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Clipping",
    "ClippingMonitor",
    "LazyBatchRenorm1d",
    "LazyBatchRenorm2d",
    "LazyBatchRenorm3d",
    "RenormSchedule",
    "SyncBatchRenorm",
    "adopt",
    "batch_renorm",
    "checkpoint_context_fn",
    "convert",
    "convert_sync",
    "fold",
    "freeze_statistics",
    "functional",
    "fuse_conv_batch_renorm_eval",
    "fuse_linear_batch_renorm_eval",
    "monitor_clipping",
    "reference",
    "set_limits",
    "set_schedule",
    "set_steps_per_update",
    "unfreeze_statistics",
    "update_stats",
]
