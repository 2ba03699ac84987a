"""The one rule for "close enough". It lives in the package, as the parity harness uses it too."""

from batchrenorm_cuda.parity.tolerance import Accuracy, accuracy, assert_as_accurate_as

__all__ = ["Accuracy", "accuracy", "assert_as_accurate_as"]
