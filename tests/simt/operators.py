"""The CUDA operators in place of the CPU's, on the emulator: binding.cpp, for the whole process.

As a plugin of pytest it runs tests that know nothing of it, with tensors on the CPU:

    PYTHONPATH=tests python -m pytest -p simt.operators tests/test_functional.py
"""

from __future__ import annotations

import ctypes

import torch

from batchrenorm_cuda import checkpoint

from . import build


class Operators:
    """The library behind them."""

    def __init__(self, sms: int, lent: int, order: int, seed: int) -> None:
        path = build.binding()
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        counts = ("captured", "control_words_in_use", "refused", "last_dynamic_shared")
        for name in counts:
            getattr(self.library, f"simt_{name}").restype = ctypes.c_int64
        self.library.simt_chip(sms, lent, order, ctypes.c_uint(seed))
        self.library.simt_trust_saved_tensor_hooks(checkpoint._legible)

    def stream(self, number: int, capture: int = 0) -> None:
        """Where operators go from here on; into a capture, if that has a number."""
        self.library.simt_stream(ctypes.c_ulonglong(number), ctypes.c_ulonglong(capture))

    def captured(self, capture: int) -> int:
        """How many launches."""
        return self.library.simt_captured(ctypes.c_ulonglong(capture))

    def replay(self, capture: int) -> None:
        if error := self.library.simt_replay(ctypes.c_ulonglong(capture)):
            raise RuntimeError(f"a launch that was captured: CUDA error {error}")

    def fail(self, error: int) -> None:
        """Every launch does, with this CUDA error; allocations too, if it is of memory."""
        self.library.simt_fail(error)

    def refused(self) -> int:
        """Launches of more blocks than could be had at once."""
        return self.library.simt_refused()

    def last_dynamic_shared(self) -> int:
        """Bytes that the last launch asked for."""
        return self.library.simt_last_dynamic_shared()

    def control_words_in_use(self) -> int:
        """Those that are not as the next launch needs them."""
        return self.library.simt_control_words_in_use()


def take_over(sms: int = 6, lent: int | None = None, order: int = 0, seed: int = 0) -> Operators:
    """Puts them there. Of the chip's SMs, some may not be to be had."""
    return Operators(sms, sms if lent is None else lent, order, seed)


_running: Operators | None = None


def pytest_configure() -> None:
    global _running
    _running = take_over()


def pytest_sessionfinish(session) -> None:
    if _running.control_words_in_use():
        print("\ncontrol words are in use")
        session.exitstatus = 1
