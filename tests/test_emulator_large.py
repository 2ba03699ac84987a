"""Tensors larger than this machine, under the emulator: indices beyond 2^32."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import pytest
from launches import FIRST, LAST, SCHEDULES, Case, draw, slots_per_thread
from simt.emulator import ITEM_SIZE, Emulator, Pass, Plan, Problem, decoded, encoded, replace


def sparse(count: int, dtype: type) -> np.ndarray:
    """Zeros that take no memory until they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE; in Python's mmap from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype)


@dataclass(frozen=True)
class Corner:
    """A few channels at the end of a tensor of more than 2^32 elements, and the same channels by
    themselves."""

    problem: Problem
    small: Problem
    wide: str = ""  # "bundles" or "unaligned": slots of 16 bytes that do not tile a plane

    def plan(self, emulator: Emulator, which: Pass) -> tuple[Plan, Plan]:
        small = self.small
        plan = emulator.plan(which, small)
        slot_bytes = 16 if self.wide else plan.slot_bytes
        columns = small.channels // (slot_bytes // ITEM_SIZE[small.dtype]) or 1
        columns = small.spatial if self.wide == "bundles" else columns
        if which != Pass.INFERENCE:
            choice = {"slot_bytes": slot_bytes, "columns": columns}
            choice["slots"] = slots_per_thread(which, slot_bytes)
            plan = emulator.cut(which, small, threads=256, team=1, **choice)
        elif self.wide:
            plan = emulator.plan_blocks(which, small, slot_bytes, columns)
        assert plan.slabs == (small.channels if self.wide == "unaligned" else 1)
        assert self.problem.channels % small.channels == 0
        slabs = self.problem.channels // small.channels * plan.slabs
        return replace(plan, slabs=slabs, teams=slabs), plan

    def view(self, x: np.ndarray) -> np.ndarray:
        """The channels at the end, [N, C, S]."""
        n, c, s = self.problem.shape
        if self.problem.layout == LAST:
            return x.reshape(n, s, c).transpose(0, 2, 1)[:, -self.small.channels :]
        return x.reshape(n, c, s)[:, -self.small.channels :]


CORNERS = [
    Corner(
        Problem(5, 2**16, 2**14 + 8, FIRST, "bfloat16"), Problem(5, 1, 2**14 + 8, FIRST, "bfloat16")
    ),
    Corner(Problem(3, 2**24, 173, FIRST, "float16"), Problem(3, 1, 173, FIRST, "float16")),
    Corner(Problem(9, 2**26, 8, LAST, "float16"), Problem(9, 128, 8, LAST, "float16")),
    Corner(Problem(9, 2**24, 49, FIRST, "float16"), Problem(9, 8, 49, FIRST, "float16"), "bundles"),
    # Which lane a channel begins in hangs on its number modulo 8.
    Corner(
        Problem(3, 2**22, 361, FIRST, "float16"), Problem(3, 8, 361, FIRST, "float16"), "unaligned"
    ),
]


@pytest.mark.parametrize("which", Pass, ids=lambda which: which.name.lower())
@pytest.mark.parametrize(
    "corner",
    CORNERS,
    ids=["long planes", "many channels", "long rows", "bundles", "unaligned"],
)
def test_more_than_two_to_the_32_elements(emulator: Emulator, corner: Corner, which: Pass):
    """Only the last blocks run. What they make of their channels is what they make of them alone,
    bit for bit."""
    problem, small = corner.problem, corner.small
    assert np.prod(problem.shape) > 2**32
    emulator.sm_count, emulator.schedule = 4, SCHEDULES[0]
    data = draw(Case("", *small.shape, layout=small.layout), small.dtype)
    plan, small_plan = corner.plan(emulator, which)
    channels, last = problem.channels, slice(-small.channels, None)
    stats = np.random.default_rng(1).uniform(0.5, 1.5, (5, small.channels)).astype(np.float32)

    tensors = {}
    for name in ("x", "dy"):
        stored = encoded(data[name], small.dtype)
        tensors[name] = sparse(int(np.prod(problem.shape)), stored.dtype)
        corner.view(tensors[name])[:] = stored
    out = sparse(int(np.prod(problem.shape)), stored.dtype)
    per_channel = sparse(7 * channels, np.float32).reshape(7, channels)
    if which != Pass.FORWARD:
        per_channel[:5, last] = stats
    big_stats, dweight, dbias = per_channel[:5], per_channel[5], per_channel[6]
    null = None
    if which == Pass.FORWARD:
        want = emulator.forward(small, data["x"], plan=small_plan)
        arrays = (tensors["x"], out, *(null,) * 6, big_stats, null, null, null)
        rest = ((ctypes.c_double * 4)(1.0, 0.0, 0.01, 1e-5), 0)
        function = emulator.library.simt_forward
    elif which == Pass.BACKWARD:
        want = emulator.backward(small, data["dy"], data["x"], stats=stats, plan=small_plan)
        arrays = (
            tensors["dy"],
            tensors["x"],
            out,
            null,
            big_stats,
            null,
            null,
            dweight,
            dbias,
            null,
            null,
        )
        rest, function = (), emulator.library.simt_backward
    else:
        want = emulator.inference(small, data["x"], stats=stats, plan=small_plan)
        arrays = (tensors["x"], out, null, null, big_stats, null, null)
        rest, function = (), emulator.library.simt_inference
    pointers = (ctypes.c_void_p * len(arrays))(
        *(None if a is None else a.ctypes.data for a in arrays)
    )
    blocks = small_plan.blocks
    emulator.library.simt_select_blocks(plan.blocks - blocks, blocks)
    try:
        assert function(problem.fields(), plan.fields(), pointers, *rest) == 0
    finally:
        emulator.library.simt_select_blocks(0, 0)
    got = {"dx" if which == Pass.BACKWARD else "y": decoded(corner.view(out), small.dtype)}
    if which == Pass.FORWARD:
        got["stats"] = big_stats[:, last]
    elif which == Pass.BACKWARD:
        got |= {"dweight": dweight[last], "dbias": dbias[last]}
    for name, value in got.items():
        assert np.ascontiguousarray(value).tobytes() == want[name].tobytes(), name
