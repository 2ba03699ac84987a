"""How launches would look and what they would move, on a machine without a GPU.

Nothing here is measured: plans are the planner's own (csrc/core/plan.h), times come from its model
(csrc/core/cost.h).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from . import _C, chips
from .suites import DTYPES, LAYOUTS, SUITES, Shape, layouts_of

OPS = ("forward", "backward", "inference")
_WORD = 4  # bytes of a control word


class Expectation(NamedTuple):
    """One operation on one problem, as the planner would launch it.

    The first four fields are the words of bench/results, so that expected and measured rows can be
    joined.
    """

    shape: str  # 32x64x56x56
    dtype: str
    layout: str
    op: str
    tensor_bytes: int
    team: int  # blocks that share a slab of channels
    teams: int  # slabs in work at a time
    threads: int  # of a block
    slab_channels: int
    slabs: int
    waves: int  # slabs that a team works through, one after the other
    slot_bytes: int  # of one memory access
    slots: int  # of a tensor, that a thread keeps in registers
    rounds: int  # fillings of the registers for one slab
    retained: int  # of those before the last, kept in shared memory
    prefetch: int  # slabs on their way to shared memory while a team meets: 0 or 1
    kept: float  # share of a slab in registers or shared memory until it is normalised
    times_read: float  # each input
    floor_bytes: int  # every tensor of the problem once
    reread_bytes: int  # that were not kept, from L2 or memory
    moved_bytes: int  # over the memory bus: the floor, and what is read again and not in L2
    workspace_bytes: int  # partial results and barriers of the teams
    launches: int
    copy_us: float  # the floor at the speed of a copy
    model_us: float  # the planner's model, not a measurement


def expect(
    shape: Sequence[int], dtype: str, layout: str, op: str, device_like: str = "h200"
) -> Expectation:
    """What the planner expects of one operation.

    Args:
        shape: of x, [N, C, ...].
        dtype: a key of `suites.DTYPES`.
        layout: "nchw" or "nhwc", for any number of dimensions; 2-D input is always "nhwc".
        op: "forward", "backward" or "inference".
        device_like: a key of `chips.CHIPS`, or a number of SMs.

    Raises:
        ValueError: for a shape or a name that is none of these.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [N, C, ...] with every size at least 1, got {list(shape)}")
    if math.prod(shape) > 2**40 or shape[1] >= 2**31:  # the planner counts in 32 bits
        raise ValueError(
            "shape must have at most 2**40 elements and fewer than 2**31 channels, got "
            f"{list(shape)}"
        )
    for argument, got, known in (("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
        _require_known(argument, got, known)
    _require_known("op", op, OPS)
    chip = chips.find(device_like)
    batch, channels, *spatial = shape
    pixels = math.prod(spatial)
    last = layout == "nhwc" or pixels == 1
    sizes = (batch, channels, pixels)
    if channels == 1:  # one long row, as csrc/binding/checks.h sees it
        last, sizes = False, (1, 1, batch * pixels)
    plan = _C.plan(
        op,
        *sizes,
        layout="channels_last" if last else "channels_first",
        dtype=dtype,
        sm_count=chip.sm_count,
        l2_bytes=chip.l2,
        shared_bytes=chip.shared,
        capability=chip.capability,
    )
    tensor_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    read = tensor_bytes * (2 if op == "backward" else 1)
    left = plan.bytes_reread / read
    moved = plan.bytes_moved + plan.bytes_missed
    return Expectation(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        layout="nhwc" if len(shape) == 2 else layout,
        op=op,
        tensor_bytes=tensor_bytes,
        team=plan.team,
        teams=plan.teams,
        threads=plan.threads,
        slab_channels=plan.slab_channels,
        slabs=plan.slabs,
        waves=plan.waves,
        slot_bytes=plan.slot_bytes,
        slots=plan.slots,
        rounds=plan.rounds,
        retained=plan.retained,
        prefetch=plan.prefetch,
        kept=1.0 - left,
        times_read=1.0 + left,
        floor_bytes=plan.bytes_moved,
        reread_bytes=plan.bytes_reread,
        moved_bytes=moved,
        workspace_bytes=0
        if plan.team == 1 or op == "inference"
        else plan.partials_bytes + _WORD * plan.control_words,
        launches=1,
        copy_us=plan.bytes_moved / chip.copy / 1e3,
        model_us=_model_us(plan, chip, moved),
    )


# The planner's model is of an H200 (csrc/core/cost.h, estimate()): a cost for the launch and the
# first load, which any chip has, and the rest at an H200's bandwidth for each SM, scaled here.
_FIXED_US = 3.3
_MODEL_BYTES_PER_US_OF_SM = 4.3e6 / 132


def _model_us(plan: _C.Plan, chip: chips.Chip, moved: int) -> float:
    copy = chip.copy * 1e3  # bytes per us
    slower = _MODEL_BYTES_PER_US_OF_SM * plan.sm_count / copy
    return max(moved / copy, _FIXED_US + (plan.microseconds - _FIXED_US) * slower)


def _require_known(argument: str, got: str, known: Iterable[str]) -> None:
    if got not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {got!r}")


def named(argument: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a list separated by commas, each once; "all" is all of `known`.

    Raises:
        ValueError: for a name that is not in `known`.
    """
    known = list(known)
    names = known if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        _require_known(argument, name, [*known, "all"])
    return names


def shapes_of(suites: Sequence[str]) -> list[Shape]:
    """The shapes of some suites in order, each once."""
    return list(dict.fromkeys(shape for suite in suites for shape in SUITES[suite]))


def expectations(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str] = ("float32",),
    layouts: Sequence[str] = ("nchw",),
    device_like: str = "h200",
) -> list[Expectation]:
    """One for every shape, dtype, layout and operation; arguments and errors as for `expect`."""
    return [
        expect(shape, dtype, layout, op, device_like)
        for dtype in dtypes
        for shape in shapes
        for layout in dict.fromkeys(layouts_of(tuple(shape), layouts))
        for op in OPS
    ]


def explain(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    device_like: str = "h200",
) -> str:
    """The launch plans of forward, backward and inference for an x of this shape, as text.

    Args:
        shape: of x, [N, C, ...].
        dtype: float32, float16, bfloat16 or float64.
        channels_last: whether x is in channels_last memory format; 2-D input always is.
        device_like: a key of `chips.CHIPS`, or a number of SMs.

    Raises:
        ValueError: for a shape, dtype or chip that is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    layout = "nhwc" if channels_last else "nchw"
    return text(expectations([shape], [name], [layout], device_like), device_like)


_LEGEND = """\
teams     teams x blocks of a team, which shares a slab of channels and meets at a barrier
waves     slabs that a team works through, one after the other
slots     of a tensor that a thread keeps in registers x bytes of one memory access
shared    of the parts that a block's registers do not hold, those kept in shared memory
ahead     slabs on their way to shared memory while a team meets
kept      share of a slab in registers or shared memory until it is normalised; the rest is read
          again
read      times that each input is read, from memory or L2
moved     bytes over the memory bus; of floor: against each tensor of the problem once
space     workspace: partial results and barriers of the teams
copy us   the floor at the speed of a copy
model us  the planner's estimate, NOT a measurement; bench/ measures"""


def text(rows: Sequence[Expectation], device_like: str) -> str:
    """A header, a line for each row, a legend."""
    chip = chips.find(device_like)
    width = max(len(row.shape) for row in rows)
    lines = [
        f"on a chip like {device_like}: {chip.sm_count} SMs, a copy at {chip.copy:.0f} GB/s,"
        f" {chip.l2 / 1e6:.0f} MB of L2; expectations, NOT measurements",
        "",
        f"{'shape':{width}} {'dtype':8} layout {'op':9} {'teams':>10} {'threads':>7} {'waves':>5}"
        f" {'slots':>9} {'shared':>6} {'ahead':>5} {'kept':>5} {'read':>5} {'moved':>10}"
        f" {'of floor':>8} {'space':>9} launches {'copy us':>8} {'model us':>8}",
    ]
    for row in rows:
        lines.append(
            f"{row.shape:{width}} {row.dtype:8} {row.layout:6} {row.op:9}"
            f" {f'{row.teams} x {row.team}':>10} {row.threads:>7} {row.waves:>5}"
            f" {f'{row.slots} x {row.slot_bytes} B':>9} {_shared(row):>6} {row.prefetch or '-':>5}"
            f" {row.kept:>5.0%}"
            f" {row.times_read:>5.2f} {_bytes(row.moved_bytes):>10}"
            f" {row.moved_bytes / row.floor_bytes:>8.2f}"
            f" {_bytes(row.workspace_bytes):>9} {row.launches:>8} {row.copy_us:>8.1f}"
            f" {row.model_us:>8.1f}"
        )
    return "\n".join([*lines, "", _LEGEND])


def as_json(rows: Sequence[Expectation], device_like: str) -> str:
    """The rows' fields by name, and the chip's."""
    chip = {"name": device_like, **chips.find(device_like)._asdict()}
    found = {"measured": False, "chip": chip, "rows": [row._asdict() for row in rows]}
    return json.dumps(found, indent=1)


def _shared(row: Expectation) -> str:
    return "-" if row.rounds == 1 else f"{row.retained}/{row.rounds - 1}"


def _bytes(count: int) -> str:
    if count == 0:
        return "-"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"
