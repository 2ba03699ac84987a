"""The emulator itself: it runs what is right and notices what is not."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from launches import LAST, SCHEDULES, Case, draw
from simt import build
from simt.emulator import (
    COOPERATIVE_LAUNCH_TOO_LARGE,
    LAUNCH_FAILURE,
    Emulator,
    MemoryError_,
    Order,
    Pass,
    Schedule,
    replace,
    sanitizing,
)

RULES = build.REPOSITORY / "tests/simt/rules.cu"
KERNELS = [
    line.split()[2].split("(")[0]
    for line in RULES.read_text().splitlines()
    if line.startswith("__global__")
]


@pytest.fixture(scope="module", params=["", "-DSIMT_UCONTEXT"], ids=["fibers", "ucontext"])
def rules(request) -> ctypes.CDLL:
    """With both ways to switch fibers: this machine's own, and the portable one."""
    defines = (request.param,) if request.param else ()
    sources = ("tests/simt/rules.cu",)
    path = build.library(sanitize=sanitizing(), defines=defines, sources=sources)
    library = ctypes.CDLL(str(path))
    library.rules_last_error.restype = ctypes.c_char_p
    return library


def run_rule(
    library: ctypes.CDLL,
    kernel: str,
    schedule: Schedule,
    blocks: int = 2,
    cooperative: bool = False,
):
    out = np.zeros(64, np.uint32)
    code = library.rules_run(
        KERNELS.index(kernel),
        blocks,
        int(cooperative),
        int(schedule.order),
        schedule.seed,
        ctypes.c_void_p(out.ctypes.data),
    )
    return code, library.rules_last_error().decode(), out


each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@each_schedule
def test_emulator_runs_what_is_right(rules, schedule):
    code, message, out = run_rule(rules, "obeys", schedule, blocks=9)
    assert (code, message) == (0, "") and (out[:9] == 64).all() and not out[9:].any()


@each_schedule
@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("leaves_a_thread_behind", "thread 5 in __syncwarp, rules.cu:"),
        ("meets_at_two_barriers", "divergent barrier"),
        ("shuffles_half_a_warp", "__shfl_down_sync of a part of the warp, rules.cu:"),
        ("shuffles_without_some_lanes", "a shuffle without part of its warp"),
        ("loads_misaligned", "misaligned access, rules.cu:"),
        ("ends_before_its_copy", "a thread ends before its asynchronous copies"),
        ("overwrites_what_it_copies", "overwritten before it landed, rules.cu:"),
        ("copies_twice_to_one_place", "two asynchronous copies to one place, rules.cu:"),
        ("copies_beyond_its_memory", "beyond the block's dynamic shared memory, rules.cu:"),
        ("reaches_beyond_its_memory", "beyond the block's dynamic shared memory, rules.cu:"),
        ("waits_for_ever", "deadlock, no block can go on"),
    ],
)
def test_emulator_notices(rules, schedule, kernel, says):
    code, message, _ = run_rule(rules, kernel, schedule)
    assert code == LAUNCH_FAILURE and says in message
    assert run_rule(rules, "obeys", schedule)[0] == 0, "the next launch is not affected"


@each_schedule
@pytest.mark.parametrize("kernel", ["reads_shared_memory_that_nobody_wrote", "reads_an_early_copy"])
def test_emulator_poisons_shared_memory(rules, schedule, kernel):
    code, _, out = run_rule(rules, kernel, schedule, blocks=20)
    assert code == 0 and (out[:20] == 0xFFFFFFFF).all()


@each_schedule
def test_emulator_copies(rules, schedule):
    code, message, out = run_rule(rules, "copies", schedule, blocks=9)
    assert (code, message) == (0, "") and (out[:9] == 64).all() and not out[9:].any()


@each_schedule
def test_emulator_runs_cooperative_blocks_side_by_side(rules, schedule):
    assert run_rule(rules, "waits_for_the_others", schedule, blocks=4, cooperative=True)[0] == 0
    code, message, _ = run_rule(rules, "waits_for_the_others", schedule, blocks=5, cooperative=True)
    assert code == COOPERATIVE_LAUNCH_TOO_LARGE and "5 blocks where 4 fit" in message


@each_schedule
def test_emulator_promises_an_ordinary_launch_nothing(rules, schedule):
    """Blocks that wait for one another without a cooperative launch hang a GPU on a bad day, and
    the emulator always."""
    code, message, _ = run_rule(rules, "waits_for_the_others", schedule, blocks=6)
    assert code == LAUNCH_FAILURE and "deadlock" in message


def test_emulator_orders_differ_and_repeat(rules):
    def order(schedule: Schedule) -> tuple[int, ...]:
        return tuple(run_rule(rules, "takes_tickets", schedule, blocks=8)[2][1:17])

    serial = [s for s in SCHEDULES if s.order != Order.PARALLEL]
    orders = [order(s) for s in serial]
    assert orders == [order(s) for s in serial]
    assert len(set(orders)) == len(serial)
    assert orders[0] == tuple(range(16)) and orders[1] == tuple(reversed(range(16)))


@pytest.mark.skipif(
    sanitizing(), reason="the sanitizer ends the process here, which is its way to notice"
)
def test_guard_zones_notice(emulator: Emulator):
    """Two plans that are wrong: a share too short leaves outputs unwritten, a slot too wide writes
    past the last one."""
    emulator.sm_count = 4
    emulator.schedule = SCHEDULES[0]
    case = Case("", n=1, c=3, s=1, layout=LAST)
    problem, data = case.problem("float32"), draw(case, "float32")
    tensors = {k: data[k] for k in ("running_mean", "running_std")}
    plan = emulator.plan(Pass.INFERENCE, problem)
    with pytest.raises(MemoryError_, match="not written"):
        emulator.inference(
            problem, data["x"], plan=replace(plan, slabs=1, teams=1, columns=2), **tensors
        )
    with pytest.raises(MemoryError_, match="bytes behind y were overwritten"):
        wide = replace(plan, slot_bytes=8, slots=16, columns=1, slabs=2, teams=2, share=1024)
        emulator.inference(problem, data["x"], plan=wide, **tensors)
