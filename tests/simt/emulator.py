"""Runs the shipped kernels on the CPU from numpy arrays, with everything a GPU would not tell:
buffers between guard zones, outputs full of NaN beforehand, control words checked afterwards, and
the order of threads and blocks as a parameter.

Arrays are [N, C, S]; the layout decides how they lie in memory. bfloat16 values travel as float32
arrays.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np

from . import build

CUMULATIVE = -1.0  # momentum: the cumulative average
LAUNCH_FAILURE, COOPERATIVE_LAUNCH_TOO_LARGE = 719, 720


class Layout(IntEnum):
    FIRST = 0
    LAST = 1


class Pass(IntEnum):
    FORWARD = 0
    BACKWARD = 1
    INFERENCE = 2


class Order(IntEnum):
    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2
    PARALLEL = 3


@dataclass(frozen=True)
class Schedule:
    """In which order the emulator runs what a GPU runs in no particular order."""

    order: Order = Order.ASCENDING
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.order.name.lower()}{self.seed or ''}"


DTYPES = ("float32", "float16", "bfloat16", "float64")
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Problem:
    batch: int
    channels: int
    spatial: int
    layout: Layout = Layout.FIRST
    dtype: str = "float32"
    alignment: int = 16

    def fields(self) -> ctypes.Array:
        values = (
            self.batch,
            self.channels,
            self.spatial,
            self.layout,
            DTYPES.index(self.dtype),
            self.alignment,
        )
        return (ctypes.c_int64 * 6)(*values)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.channels, self.spatial

    @property
    def real(self) -> type:
        """The type of statistics, weight and bias."""
        return np.float64 if self.dtype == "float64" else np.float32


@dataclass(frozen=True)
class Plan:
    """csrc/core/geometry.h, field by field."""

    slot_bytes: int
    columns: int
    slots: int
    threads: int
    team: int
    teams: int
    rounds: int
    retained: int
    prefetch: int
    share: int
    slabs: int

    def fields(self) -> ctypes.Array:
        return (ctypes.c_int64 * 11)(*(getattr(self, f.name) for f in fields(self)))

    @property
    def blocks(self) -> int:
        return self.team * self.teams


class KernelError(RuntimeError):
    """A launch that did not end well: the cudaError_t and, for a failure inside a kernel, who
    waited where."""

    def __init__(self, code: int, message: str):
        super().__init__(f"error {code}: {message}")
        self.code = code


class MemoryError_(AssertionError):
    """A kernel wrote where it must not, or not where it must."""


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest even."""
    bits = np.asarray(x, np.float32, order="C").view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encoded(x: np.ndarray, dtype: str) -> np.ndarray:
    return to_bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


def decoded(x: np.ndarray, dtype: str) -> np.ndarray:
    return from_bfloat16(x) if dtype == "bfloat16" else x


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as a tensor of this dtype holds it."""
    with np.errstate(over="ignore"):
        return decoded(encoded(x, dtype), dtype)


class Buffer:
    """Memory of exactly the wanted alignment, between two guard zones."""

    ZONE = 256  # bytes
    PATTERN = 0xA5

    def __init__(self, library: ctypes.CDLL, size: int, alignment: int):
        self._library = library
        self._size = size
        self._memory = np.full(size + 2 * self.ZONE + 128, self.PATTERN, np.uint8)
        base = self._memory.ctypes.data + self.ZONE
        # At a multiple of `alignment` and of no larger power of two.
        self._begin = self.ZONE + (-base) % 64 + (alignment if alignment < 64 else 0)
        self.bytes = self._memory[self._begin : self._begin + size]
        self.address = self._memory.ctypes.data + self._begin
        self._mark(1)

    def __del__(self) -> None:
        self._mark(0)  # the allocator gives the same memory to somebody else

    def _mark(self, guarded: int) -> None:
        before = self._memory.ctypes.data
        self._library.simt_guard(ctypes.c_void_p(before), self._begin // 8 * 8, guarded)
        end = self.address + self._size
        zone = before + self._memory.size - end
        self._library.simt_guard(ctypes.c_void_p(end), zone, guarded)

    def release(self, name: str) -> None:
        """Lifts the guard and checks that nobody has crossed it."""
        self._mark(0)
        begin, end = self._begin, self._begin + self._size
        for side, zone in (("before", self._memory[:begin]), ("behind", self._memory[end:])):
            touched = np.flatnonzero(zone != self.PATTERN)
            if touched.size:
                raise MemoryError_(f"{touched.size} bytes {side} {name} were overwritten")


class Arena:
    """The buffers of one launch, by name."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._buffers: dict[str, tuple[Buffer, np.ndarray]] = {}
        self._constant: dict[str, np.ndarray] = {}

    def __call__(
        self, name: str, values: np.ndarray | None, *, alignment: int = 64, written: bool = False
    ) -> ctypes.c_void_p:
        """The address of a copy of ``values``; null for None. What is not ``written`` must come
        back unchanged."""
        if values is None:
            return ctypes.c_void_p(None)
        buffer = Buffer(self._library, values.nbytes, alignment)
        view = buffer.bytes.view(values.dtype) if values.size else values.ravel()
        view[:] = values.ravel()
        self._buffers[name] = (buffer, view)
        if not written:
            self._constant[name] = view.copy()
        return ctypes.c_void_p(buffer.address)

    def finish(self) -> dict[str, np.ndarray]:
        for name, (buffer, view) in self._buffers.items():
            buffer.release(name)
            if name in self._constant and view.tobytes() != self._constant[name].tobytes():
                raise MemoryError_(f"{name} was modified")
        return {name: view.copy() for name, (_, view) in self._buffers.items()}


def poison(shape: tuple[int, ...] | int, dtype: str | type) -> np.ndarray:
    """All bits set: NaN in every floating type."""
    width = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    array = np.empty(shape, width)
    array.view(np.uint8)[...] = 0xFF
    return array


class Emulator:
    """A library of tests/simt/build.py. Control words persist from launch to launch, as on a
    GPU."""

    def __init__(self, path: os.PathLike | str):
        self.library = ctypes.CDLL(str(path))
        self.library.simt_last_error.restype = ctypes.c_char_p
        self.library.simt_estimate.restype = ctypes.c_double
        self.library.simt_last_dynamic_shared.restype = ctypes.c_int64
        self.library.simt_guard.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.sm_count = 4
        self.blocks_per_sm = 0  # 0: what the kernels promise
        self.schedule = Schedule()
        self.control = np.zeros(1 << 15, np.uint32)

    def plan(self, which: Pass, problem: Problem, sm_count: int | None = None) -> Plan:
        out = (ctypes.c_int64 * 11)()
        sms = self.sm_count if sm_count is None else sm_count
        self.library.simt_plan(int(which), problem.fields(), sms, out)
        return Plan(*out)

    def plan_project(self, problem: Problem) -> Plan:
        out = (ctypes.c_int64 * 11)()
        self.library.simt_plan_backward_project(problem.fields(), self.sm_count, out)
        return Plan(*out)

    def plan_blocks(self, slots: Pass, problem: Problem, slot_bytes: int, columns: int) -> Plan:
        """Without statistics: for inference, or for backward_project with slots for backward."""
        out = (ctypes.c_int64 * 11)()
        self.library.simt_plan_blocks(int(slots), problem.fields(), slot_bytes, columns, out)
        return Plan(*out)

    def cut(
        self, which: Pass, problem: Problem, sm_count: int | None = None, **choice: int
    ) -> Plan:
        """The plan with this slot_bytes, columns, slots, threads and team, and, as far as they can
        be had, retained and prefetch."""
        out = Plan(**{**dict.fromkeys((f.name for f in fields(Plan)), 0), **choice}).fields()
        self.library.simt_cut(int(which), problem.fields(), sm_count or self.sm_count, out)
        return Plan(*out)

    def estimate(self, which: Pass, problem: Problem, plan: Plan, sm_count: int) -> float:
        return self.library.simt_estimate(int(which), problem.fields(), sm_count, plan.fields())

    def last_dynamic_shared(self) -> int:
        """Bytes of dynamic shared memory that a block of the last launch had."""
        return self.library.simt_last_dynamic_shared()

    def workspace_bytes(self, problem: Problem, plan: Plan) -> tuple[int, int, int]:
        """Of control words, partial results and proposals."""
        out = (ctypes.c_int64 * 3)()
        self.library.simt_workspace(problem.fields(), plan.fields(), out)
        return tuple(out)

    def forward(
        self,
        problem: Problem,
        x: np.ndarray,
        *,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        running_mean: np.ndarray | None = None,
        running_std: np.ndarray | None = None,
        num_batches_tracked: int | None = None,
        schedule: np.ndarray | None = None,
        limits: tuple[float, float] = (1.0, 0.0),
        momentum: float = 0.01,
        eps: float = 1e-5,
        skip_nonfinite: bool = False,
        plan: Plan | None = None,
    ) -> dict[str, np.ndarray]:
        """y [N, C, S], stats [5, C], and the state afterwards."""
        plan = plan or self.plan(Pass.FORWARD, problem)
        real, channels = problem.real, problem.channels
        arena = Arena(self.library)
        needed = num_batches_tracked is not None or skip_nonfinite
        control, partials, proposals = self._workspace(arena, problem, plan, needed, skip_nonfinite)
        counter = None if num_batches_tracked is None else np.array([num_batches_tracked], np.int64)
        pointers = (
            self._tensor(arena, "x", problem, x),
            self._output(arena, "y", problem),
            arena("weight", _typed(weight, real)),
            arena("bias", _typed(bias, real)),
            arena("running_mean", _typed(running_mean, real), written=True),
            arena("running_std", _typed(running_std, real), written=True),
            arena("num_batches_tracked", counter, written=True),
            arena("schedule", _typed(schedule, np.float64)),
            arena("stats", poison((5, channels), real), written=True),
            control,
            partials,
            proposals,
        )
        numbers = (ctypes.c_double * 4)(*limits, momentum, eps)
        out = self._launch(
            problem, plan, arena, self.library.simt_forward, pointers, numbers, int(skip_nonfinite)
        )
        out["y"] = self._logical(out["y"], problem)
        out["stats"] = _written("stats", out["stats"]).reshape(5, channels)
        return out

    def backward(
        self,
        problem: Problem,
        dy: np.ndarray,
        x: np.ndarray,
        *,
        weight: np.ndarray | None = None,
        stats: np.ndarray | None = None,
        running_mean: np.ndarray | None = None,
        running_std: np.ndarray | None = None,
        plan: Plan | None = None,
    ) -> dict[str, np.ndarray]:
        """dx [N, C, S], dweight [C], dbias [C]."""
        plan = plan or self.plan(Pass.BACKWARD, problem)
        real, channels = problem.real, problem.channels
        arena = Arena(self.library)
        control, partials, _ = self._workspace(arena, problem, plan, False, False)
        pointers = (
            self._tensor(arena, "dy", problem, dy),
            self._tensor(arena, "x", problem, x),
            self._output(arena, "dx", problem),
            arena("weight", _typed(weight, real)),
            arena("stats", _typed(stats, real)),
            arena("running_mean", _typed(running_mean, real)),
            arena("running_std", _typed(running_std, real)),
            arena("dweight", poison(channels, real), written=True),
            arena("dbias", poison(channels, real), written=True),
            control,
            partials,
        )
        out = self._launch(problem, plan, arena, self.library.simt_backward, pointers)
        out["dx"] = self._logical(out["dx"], problem)
        for name in ("dweight", "dbias"):
            _written(name, out[name])
        return out

    def inference(
        self,
        problem: Problem,
        x: np.ndarray,
        *,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        stats: np.ndarray | None = None,
        running_mean: np.ndarray | None = None,
        running_std: np.ndarray | None = None,
        plan: Plan | None = None,
    ) -> dict[str, np.ndarray]:
        """y [N, C, S], from the stats of an earlier forward or from the moving statistics."""
        plan = plan or self.plan(Pass.INFERENCE, problem)
        real = problem.real
        arena = Arena(self.library)
        pointers = (
            self._tensor(arena, "x", problem, x),
            self._output(arena, "y", problem),
            arena("weight", _typed(weight, real)),
            arena("bias", _typed(bias, real)),
            arena("stats", _typed(stats, real)),
            arena("running_mean", _typed(running_mean, real)),
            arena("running_std", _typed(running_std, real)),
        )
        out = self._launch(problem, plan, arena, self.library.simt_inference, pointers)
        out["y"] = self._logical(out["y"], problem)
        return out

    def moments(
        self, problem: Problem, x: np.ndarray, *, backward: bool = True, plan: Plan | None = None
    ) -> np.ndarray:
        """The message [2 * C + 2] of a rank."""
        plan = plan or self.plan(Pass.FORWARD, problem)
        arena = Arena(self.library)
        control, partials, _ = self._workspace(arena, problem, plan, False, False)
        pointers = (
            self._tensor(arena, "x", problem, x),
            arena("message", poison(2 * problem.channels + 2, np.float64), written=True),
            control,
            partials,
        )
        out = self._launch(problem, plan, arena, self.library.simt_moments, pointers, int(backward))
        return _written("message", out["message"])

    def merge(
        self,
        gathered: np.ndarray,
        dtype: str,
        *,
        running_mean: np.ndarray | None = None,
        running_std: np.ndarray | None = None,
        num_batches_tracked: int | None = None,
        schedule: np.ndarray | None = None,
        limits: tuple[float, float] = (1.0, 0.0),
        momentum: float = 0.01,
        eps: float = 1e-5,
        skip_nonfinite: bool = False,
    ) -> dict[str, np.ndarray]:
        """stats [5, C], total [2], and the state afterwards, from messages [ranks, 2 * C + 2]."""
        channels = gathered.shape[1] // 2 - 1
        problem = Problem(1, channels, 1, dtype=dtype)
        real = problem.real
        arena = Arena(self.library)
        counter = None if num_batches_tracked is None else np.array([num_batches_tracked], np.int64)
        pointers = (
            arena("gathered", _typed(gathered, np.float64)),
            arena("running_mean", _typed(running_mean, real), written=True),
            arena("running_std", _typed(running_std, real), written=True),
            arena("num_batches_tracked", counter, written=True),
            arena("schedule", _typed(schedule, np.float64)),
            arena("stats", poison((5, channels), real), written=True),
            arena("total", poison(2, np.float64), written=True),
        )
        numbers = (ctypes.c_double * 4)(*limits, momentum, eps)
        plan = self.plan(Pass.INFERENCE, problem)
        rest = (numbers, len(gathered), int(skip_nonfinite))
        out = self._launch(problem, plan, arena, self.library.simt_merge, pointers, *rest)
        out["stats"] = _written("stats", out["stats"]).reshape(5, channels)
        _written("total", out["total"])
        return out

    def backward_sums(
        self,
        problem: Problem,
        dy: np.ndarray,
        x: np.ndarray,
        stats: np.ndarray,
        plan: Plan | None = None,
    ) -> dict[str, np.ndarray]:
        """sums [2, C], dweight [C], dbias [C]."""
        plan = plan or self.plan(Pass.BACKWARD, problem)
        real, channels = problem.real, problem.channels
        arena = Arena(self.library)
        control, partials, _ = self._workspace(arena, problem, plan, False, False)
        pointers = (
            self._tensor(arena, "dy", problem, dy),
            self._tensor(arena, "x", problem, x),
            arena("stats", _typed(stats, real)),
            arena("sums", poison((2, channels), np.float64), written=True),
            arena("dweight", poison(channels, real), written=True),
            arena("dbias", poison(channels, real), written=True),
            control,
            partials,
        )
        out = self._launch(problem, plan, arena, self.library.simt_backward_sums, pointers)
        for name in ("sums", "dweight", "dbias"):
            _written(name, out[name])
        out["sums"] = out["sums"].reshape(2, channels)
        return out

    def backward_project(
        self,
        problem: Problem,
        dy: np.ndarray,
        x: np.ndarray,
        stats: np.ndarray,
        sums: np.ndarray,
        total: np.ndarray,
        *,
        weight: np.ndarray | None = None,
        plan: Plan | None = None,
    ) -> np.ndarray:
        """dx [N, C, S], with the sums and the count of all ranks."""
        plan = plan or self.plan_project(problem)
        arena = Arena(self.library)
        pointers = (
            self._tensor(arena, "dy", problem, dy),
            self._tensor(arena, "x", problem, x),
            self._output(arena, "dx", problem),
            arena("weight", _typed(weight, problem.real)),
            arena("stats", _typed(stats, problem.real)),
            arena("sums", _typed(sums, np.float64)),
            arena("total", _typed(total, np.float64)),
        )
        out = self._launch(problem, plan, arena, self.library.simt_backward_project, pointers)
        return self._logical(out["dx"], problem)

    def _workspace(
        self,
        arena: Arena,
        problem: Problem,
        plan: Plan,
        control_needed: bool,
        proposals_needed: bool,
    ) -> list[ctypes.c_void_p]:
        """What launch.h says a launch needs, and null for the rest."""
        control, partials, proposals = self.workspace_bytes(problem, plan)
        assert control <= self.control.nbytes
        needed = control_needed or plan.team > 1
        return [
            ctypes.c_void_p(self.control.ctypes.data if needed else None),
            arena("partials", poison(partials, np.uint8) if partials else None, written=True),
            arena(
                "proposals", poison(proposals, np.uint8) if proposals_needed else None, written=True
            ),
        ]

    def _tensor(self, arena: Arena, name: str, problem: Problem, x: np.ndarray) -> ctypes.c_void_p:
        assert x.shape == problem.shape, (x.shape, problem.shape)
        if problem.layout == Layout.LAST:
            x = x.transpose(0, 2, 1)
        return arena(name, encoded(x, problem.dtype), alignment=problem.alignment)

    def _output(self, arena: Arena, name: str, problem: Problem) -> ctypes.c_void_p:
        values = poison(int(np.prod(problem.shape)), problem.dtype)
        return arena(name, values, alignment=problem.alignment, written=True)

    def _logical(self, values: np.ndarray, problem: Problem) -> np.ndarray:
        unwritten = np.flatnonzero(values.view(f"u{values.itemsize}") == _all_bits(values.itemsize))
        if unwritten.size:
            raise MemoryError_(f"{unwritten.size} elements of the output were not written")
        values = decoded(values, problem.dtype)
        n, c, s = problem.shape
        if problem.layout == Layout.LAST:
            return np.ascontiguousarray(values.reshape(n, s, c).transpose(0, 2, 1))
        return values.reshape(n, c, s)

    def _launch(self, problem: Problem, plan: Plan, arena: Arena, function, pointers, *rest):
        self.library.simt_configure(
            problem.fields(),
            plan.fields(),
            self.sm_count,
            self.blocks_per_sm,
            int(self.schedule.order),
            self.schedule.seed,
        )
        array = (ctypes.c_void_p * len(pointers))(*(p.value for p in pointers))
        code = function(problem.fields(), plan.fields(), array, *rest)
        if code != 0:
            self.control[:] = 0
            raise KernelError(code, self.library.simt_last_error().decode())
        out = arena.finish()
        # Bit 31 of a barrier's word is its phase; everything else must be as it was.
        left = np.flatnonzero(self.control & 0x7FFFFFFF)
        if left.size:
            raise MemoryError_(
                f"control words {left[:4]} are {self.control[left[:4]]} after the launch"
            )
        return out


def _all_bits(size: int) -> int:
    return (1 << 8 * size) - 1


def _typed(values: np.ndarray | None, dtype: type) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(values, dtype)


def _written(name: str, values: np.ndarray) -> np.ndarray:
    if (values.view(f"u{values.itemsize}") == _all_bits(values.itemsize)).any():
        raise MemoryError_(f"{name} was not written everywhere")
    return values


def sanitizing() -> bool:
    """Whether this process was started by ``python tests/simt/sanitize.py``."""
    return os.environ.get("SIMT_SANITIZE") == "1"


def load() -> Emulator:
    return Emulator(build.library(sanitize=sanitizing()))


__all__ = [
    "COOPERATIVE_LAUNCH_TOO_LARGE",
    "CUMULATIVE",
    "DTYPES",
    "ITEM_SIZE",
    "LAUNCH_FAILURE",
    "Emulator",
    "KernelError",
    "Layout",
    "MemoryError_",
    "Order",
    "Pass",
    "Plan",
    "Problem",
    "Schedule",
    "decoded",
    "encoded",
    "load",
    "replace",
    "rounded",
    "sanitizing",
]
