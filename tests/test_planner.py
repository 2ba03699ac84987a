"""Properties of the launch planner, for any shape and any number of SMs: csrc/core/plan.h decides,
and no GPU is needed."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simt.emulator import DTYPES, ITEM_SIZE, Emulator, Layout, Pass, Problem, load

from batchrenorm_cuda import _C
from batchrenorm_cuda.suites import SUITES

PASSES = ("forward", "backward", "inference")
LAYOUTS = ("channels_first", "channels_last")
MAX_REGISTER_BYTES = 128  # of tensors that a thread holds between statistics and normalisation
THREADS = 256  # of a block, at most
SETTINGS = settings(max_examples=300, deadline=None)


@st.composite
def problems(draw, largest: int = 2**36):
    """Sizes from 1 to `largest` elements, with plenty of small, of round and of odd numbers."""
    small = st.integers(1, 70)
    common = st.sampled_from([64, 65, 96, 100, 128, 192, 256, 512, 1000, 1024, 2048, 4096])
    spatial = st.sampled_from(
        [1, 7 * 7, 14 * 14, 28 * 28, 56 * 56, 112 * 112, 224 * 224, 16 * 112 * 112]
    )
    large = st.integers(1, 2**33)
    n = draw(st.one_of(small, common, st.integers(1, 2**20)))
    c = draw(st.one_of(small, common, st.integers(1, 100_000)))
    s = draw(st.one_of(small, spatial, large))
    assume(n * c * s <= largest)
    dtype = draw(st.sampled_from(DTYPES))
    alignment = draw(st.sampled_from([a for a in (2, 4, 8, 16) if a >= ITEM_SIZE[dtype]]))
    return {
        "batch": n,
        "channels": c,
        "spatial": s,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "alignment": alignment,
    }


sm_counts = st.integers(1, 160)


def wide(got) -> bool:
    """Slots of 16 bytes in planes that they do not tile."""
    return got.bundles or got.unaligned


def promised(got, plain) -> float:
    """How much slower the plan may be than another. Wide slots have to promise a tenth over narrow
    ones, unaligned ones a twentieth over bundles: what they would have saved less may be let
    lie."""
    if wide(plain) and not wide(got):
        return 1.1
    return 1.05 if plain.unaligned and got.bundles else 1.0


def plan(which: str, p: dict, sm_count: int):
    keywords = {k: p[k] for k in ("layout", "dtype", "alignment")}
    return _C.plan(which, p["batch"], p["channels"], p["spatial"], sm_count=sm_count, **keywords)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def blocks_per_sm(p: dict, bundles: bool = False) -> int:
    """The second argument of the kernels' launch bounds: what the registers allow."""
    if p["dtype"] == "float64":
        return 1
    return 3 if p["layout"] == "channels_first" and not bundles else 2


each_pass = pytest.mark.parametrize("which", PASSES)
each_team_pass = pytest.mark.parametrize("which", ("forward", "backward"))


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_a_slot_is_one_aligned_access_of_whole_elements(which, p, sm_count):
    got = plan(which, p, sm_count)
    size = ITEM_SIZE[p["dtype"]]
    row = (p["spatial"] if p["layout"] == "channels_first" else p["channels"]) * size
    assert got.slot_bytes in (2, 4, 8, 16)
    assert got.slot_bytes % size == 0 and got.lanes == got.slot_bytes // size
    assert p["alignment"] % got.slot_bytes == 0
    if got.bundles:
        # As many planes as a slot has lanes are whole slots; none meets more than two of them.
        assert p["layout"] == "channels_first" and got.slot_bytes == 16
        assert row % 16 and p["channels"] % got.lanes == 0 and p["spatial"] >= got.lanes
        return
    if got.unaligned:
        # Channels begin in the same lane in all images, and the last slot ends with the tensor.
        assert p["layout"] == "channels_first" and (size, got.slot_bytes) == (2, 16)
        assert row % 8 and p["channels"] % 8 == 0 and p["spatial"] >= 8
        return
    assert row % got.slot_bytes == 0, "a row of slots ends where the row of elements does"
    wider = 2 * got.slot_bytes
    assert wider > 16 or row % wider != 0 or p["alignment"] % wider != 0, "and it is the widest"


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_every_position_has_one_owner(which, p, sm_count):
    got = plan(which, p, sm_count)
    per_position = got.lanes if p["layout"] == "channels_first" else 1
    if got.bundles:
        per_position = p["spatial"]
    if got.unaligned:  # a plane that begins in the last lane of a slot meets so many
        assert got.positions == p["batch"] * ceil_div(7 + p["spatial"], 8)
    else:
        assert got.positions * per_position == p["batch"] * p["spatial"]
    assert (got.team - 1) * got.share < got.positions <= got.team * got.share, (
        "and no block is empty"
    )
    assert (got.slabs - 1) * got.slab_channels < p["channels"] <= got.slabs * got.slab_channels


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_rounds_cover_a_share_and_no_more(which, p, sm_count):
    got = plan(which, p, sm_count)
    idle = got.threads - got.positions_per_pass * got.columns
    assert 0 <= idle < (got.columns if got.bundles else 1)
    assert got.positions_per_round == got.positions_per_pass * got.slots
    assert (got.rounds - 1) * got.positions_per_round < got.share
    # Inference blocks own a whole round each, the last one whatever is left.
    assert got.share <= got.rounds * got.positions_per_round


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_every_slab_has_one_team(which, p, sm_count):
    got = plan(which, p, sm_count)
    assert 1 <= got.teams <= got.slabs
    assert got.waves == ceil_div(got.slabs, got.teams)
    assert got.blocks == got.team * got.teams
    assert got.blocks < 2**31, "gridDim.x"
    if which == "inference" or got.team == 1:
        assert got.teams == got.slabs, "nobody waits, so every slab has blocks of its own"


@each_pass
@SETTINGS
@given(
    batch=st.integers(1, 512),
    channels=st.integers(1, 256).map(lambda slots: 8 * slots),
    side=st.sampled_from([3, 5, 7, 9, 11, 15]),
    sm_count=sm_counts,
)
def test_bundles_have_blocks_for_the_chip(which, batch, channels, side, sm_count):
    """Channel by channel there are eight times as many slabs to go round."""
    got = _C.plan(which, batch, channels, side * side, dtype="bfloat16", sm_count=sm_count)
    assert not got.bundles or 4 * got.blocks >= 3 * sm_count


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((256, 2048, 49), "bfloat16", "bundles bundles bundles"),
        ((256, 2048, 49), "float32", "bundles bundles bundles"),
        ((32, 2048, 49), "float32", "narrow narrow bundles"),  # blocks that wait for nobody
        ((32, 512, 49), "bfloat16", "narrow narrow narrow"),  # 64 bundles for 132 SMs
        ((16, 64, 121), "float16", "narrow narrow narrow"),  # 8
        ((256, 2044, 49), "bfloat16", "narrow narrow narrow"),  # no bundles of 8
        ((256, 2044, 49), "float32", "bundles bundles bundles"),
        ((256, 2048, 49), "float64", "narrow narrow narrow"),
        ((256, 2048, 196), "bfloat16", "narrow narrow narrow"),  # slots of 8 bytes
        ((256, 256, 361), "bfloat16", "unaligned unaligned unaligned"),  # 361 columns, 256 threads
        ((256, 256, 361), "float32", "narrow narrow narrow"),  # of 4 bytes
        ((256, 256, 169), "float16", "unaligned unaligned unaligned"),  # 87 threads would be idle
        ((4, 256, 129 * 129), "float16", "unaligned unaligned unaligned"),
        ((256, 256, 162), "float16", "narrow narrow narrow"),  # slots of 4 bytes
        ((256, 260, 361), "float16", "narrow narrow narrow"),  # channels begin in any lane
        ((256, 2048, 3), "bfloat16", "narrow narrow narrow"),  # slots that meet three channels
    ],
    ids=str,
)
def test_how_planes_that_no_vector_tiles_are_taken(shape, dtype, expected):
    plans = [_C.plan(which, *shape, dtype=dtype) for which in PASSES]
    kinds = ["bundles" if p.bundles else "unaligned" if p.unaligned else "narrow" for p in plans]
    assert " ".join(kinds) == expected


@each_team_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_blocks_that_meet_are_resident_at_once(which, p, sm_count):
    got = plan(which, p, sm_count)
    assert got.resident_blocks == sm_count * blocks_per_sm(p, got.bundles)
    if got.team > 1:
        assert got.blocks <= got.resident_blocks


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_threads_fit_the_kernels(which, p, sm_count):
    got = plan(which, p, sm_count)
    assert is_power_of_two(got.threads) and _C.MIN_THREADS <= got.threads <= _C.MAX_THREADS
    assert got.threads % 32 == 0
    if got.bundles:
        assert got.columns == p["spatial"] <= got.threads
        assert got.slab_channels == got.lanes
    else:
        assert is_power_of_two(got.columns) and got.columns <= 32, (
            "a warp reduces what lies a power of two apart"
        )
    assert is_power_of_two(got.slab_channels) and got.slab_channels <= _C.MAX_SLAB_CHANNELS
    assert got.slab_channels <= got.threads, "each channel has a thread that finishes it"
    if p["layout"] == "channels_first" and not got.bundles:
        assert got.columns == 1 and got.slab_channels == 1
    held = got.slots * got.slot_bytes * (2 if which == "backward" else 1)
    assert 1 <= got.slots <= 16 and held <= MAX_REGISTER_BYTES


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_workspace(which, p, sm_count):
    got = plan(which, p, sm_count)
    statistic = 8 if p["dtype"] == "float64" else 4
    assert got.control_words >= _C.LINE_WORDS * (1 + got.teams)
    assert got.proposals_bytes == 2 * p["channels"] * statistic
    if got.team == 1:
        assert got.partials_bytes == 0
    else:
        # Two sets of (channels of a slab) pairs for each block.
        assert got.partials_bytes == 2 * got.blocks * got.slab_channels * 2 * statistic


# Compute capability and shared memory of an SM in bytes.
CHIPS = [(75, 64 << 10), (80, 164 << 10), (86, 100 << 10), (90, 228 << 10), (120, 100 << 10)]


@each_pass
@SETTINGS
@given(p=problems(2**30), sm_count=sm_counts, chip=st.sampled_from([*CHIPS, (90, 64 << 10)]))
def test_a_prefetch_has_a_next_slab_and_room(which, p, sm_count, chip):
    keywords = {k: p[k] for k in ("layout", "dtype", "alignment")} | {"sm_count": sm_count}
    sizes = p["batch"], p["channels"], p["spatial"]
    capability, shared = chip
    got = _C.plan(which, *sizes, capability=capability, shared_bytes=shared, **keywords)
    plain = _C.plan(which, *sizes, shared_bytes=0, **keywords)
    assert got.prefetch in (0, 1) and plain.prefetch == 0
    most = promised(got, plain) * plain.microseconds
    assert got.microseconds <= most, "the planner takes nothing that it thinks worse"
    if not got.prefetch:
        return
    assert which != "inference" and capability >= 80
    assert got.team > 1 and got.rounds == 1 and got.waves > 1
    assert got.slot_bytes >= 4, "the hardware copies 4, 8 and 16 bytes"
    tensors = 2 if which == "backward" else 1
    assert _C.PREFETCH_BYTES >= THREADS * got.slots * got.slot_bytes * tensors
    # Each resident block takes 1 KB for the system, and shared memory in units of 128 bytes.
    block = ceil_div(got.shared_bytes + 1024, 128) * 128
    assert block > _C.PREFETCH_BYTES and blocks_per_sm(p, got.bundles) * block <= shared


@each_team_pass
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip[0]}")
def test_every_chip_with_asynchronous_copies_has_room_to_prefetch(which, layout, chip):
    for n, c, side in ((32, 64, 28), (32, 128, 28)):
        capability, shared = chip
        keywords = {"layout": layout, "capability": capability, "shared_bytes": shared}
        if _C.plan(which, n, c, side * side, **keywords).prefetch:
            assert capability >= 80
            return
    assert capability < 80


@each_pass
@SETTINGS
@given(
    p=problems(2**30),
    sm_count=sm_counts,
    chip=st.one_of(st.sampled_from(CHIPS), st.tuples(st.just(90), st.integers(0, 228 << 10))),
)
def test_what_is_retained_has_room_and_is_not_read_again(which, p, sm_count, chip):
    keywords = {k: p[k] for k in ("layout", "dtype", "alignment")} | {"sm_count": sm_count}
    sizes = p["batch"], p["channels"], p["spatial"]
    capability, shared = chip
    got = _C.plan(which, *sizes, capability=capability, shared_bytes=shared, **keywords)
    assert 0 <= got.retained < got.rounds
    assert (got.bytes_reread == 0) == (got.retained == got.rounds - 1)
    if not got.retained:
        return
    assert which != "inference" and not got.prefetch
    tensors = 2 if which == "backward" else 1
    assert got.dynamic_shared_bytes == (
        got.retained * tensors * got.slots * got.slot_bytes * THREADS
    )
    # Each resident block takes 1 KB for the system, and shared memory in units of 128 bytes. So
    # one block takes no more than it may on any of the chips: 64 KB, or all of the SM's but 1 KB.
    assert got.shared_bytes >= got.dynamic_shared_bytes
    block = ceil_div(got.shared_bytes + 1024, 128) * 128
    assert blocks_per_sm(p, got.bundles) * block <= shared
    if got.retained < got.rounds - 1:
        more = got.shared_bytes + got.dynamic_shared_bytes // got.retained
        assert blocks_per_sm(p, got.bundles) * ceil_div(more + 1024, 128) * 128 > shared, (
            "as many as fit"
        )


@each_team_pass
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_retained_fits_whatever_the_size_of_shared_memory(which, layout, dtype):
    """At every size of an SM's."""
    most = 0
    for shared in range(0, 228 << 10, 512):
        got = _C.plan(which, 128, 2, 49 * 1024, layout=layout, dtype=dtype, shared_bytes=shared)
        blocks = blocks_per_sm({"layout": layout, "dtype": dtype})
        if got.dynamic_shared_bytes:
            assert blocks * ceil_div(got.shared_bytes + 1024, 128) * 128 <= shared
        most = max(most, got.retained)
    assert most >= 1


@each_pass
@SETTINGS
@given(p=problems(), sm_count=sm_counts)
def test_a_plan_is_a_value(which, p, sm_count):
    got = plan(which, p, sm_count)
    assert got == plan(which, p, sm_count) and repr(got) == repr(plan(which, p, sm_count))
    assert (
        f".team = {got.team}, .teams = {got.teams}, .rounds = {got.rounds}, "
        f".retained = {got.retained}, .prefetch = {got.prefetch}, .share = {got.share}" in repr(got)
    )
    assert got.microseconds > 0


@each_pass
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("n", "c", "s"),
    [
        (2**11, 2**10, 2**10 + 8),  # just over 2^31 elements
        (1, 1, 2**31 + 16),  # one plane longer than an int
        (2**31 + 2, 1, 1),  # more rows than an int
        (1, 2**15, 2**18),  # 2^33
        (2**13, 64, 2**14),  # 2^33
        (1, 3, 2**33 + 1),  # an odd plane
        (1, 396, 2**31 + 1),  # a channel for every resident block, too long for one
        (2**20, 2**14, 1),  # 2^34, 2-D
    ],
)
def test_more_elements_than_an_int_counts(which, layout, dtype, n, c, s):
    p = {"batch": n, "channels": c, "spatial": s, "layout": layout, "dtype": dtype, "alignment": 16}
    for sm_count in (1, 132, 160):
        got = plan(which, p, sm_count)
        per_position = got.lanes if layout == "channels_first" else 1
        assert got.positions * per_position == n * s
        assert (got.team - 1) * got.share < got.positions <= got.team * got.share
        assert (
            (got.rounds - 1) * got.positions_per_round
            < got.share
            <= got.rounds * got.positions_per_round
        )
        assert 0 < got.blocks < 2**31
        # The kernels count a share in 32 bits. On one SM the launch is refused.
        assert sm_count == 1 or got.share <= 2**30
        assert got.bytes_moved == (3 if which == "backward" else 2) * n * c * s * ITEM_SIZE[dtype]


# ---- what is expected of shapes that matter ----

# Channels, height = width.
RESNET50 = [shape[1:3] for shape in SUITES["resnet50"]]
H200 = 132


@pytest.fixture(scope="module")
def planner() -> Emulator:
    """The same header, compiled for the emulator, which also completes a choice that is not the
    planner's."""
    return load()


def resnet_plan(which, batch, channels, side, layout, dtype):
    p = {
        "batch": batch,
        "channels": channels,
        "spatial": side * side,
        "layout": layout,
        "dtype": dtype,
        "alignment": 16,
    }
    return plan(which, p, H200)


@each_team_pass
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [128, 256])
@pytest.mark.parametrize(("channels", "side"), [(c, side) for c, side in RESNET50 if side >= 14])
def test_resnet50_nchw_reads_large_batches_once(which, batch, channels, side, dtype):
    """Large enough that time is memory traffic: a channel that half the chip's registers and shared
    memory hold is read once.

    Half, because a single team runs in lockstep: all of it reads, all of it waits, all of it
    writes. The shared memory of an SM holds two rounds of each of its three blocks.
    """
    tensors = 2 if which == "backward" else 1
    held = 3 * THREADS * MAX_REGISTER_BYTES
    got = resnet_plan(which, batch, channels, side, "channels_first", dtype)
    slab = batch * side * side * ITEM_SIZE[dtype] * tensors
    if slab <= got.resident_blocks // 2 * held:
        assert got.bytes_reread == 0


@each_team_pass
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [32, 64, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), RESNET50)
def test_resnet50_no_plan_that_reads_once_is_expected_to_be_faster(
    planner, which, batch, channels, side, layout, dtype
):
    """The planner tries a few team sizes; here every width of a slab that registers hold is, by the
    same estimate."""
    got = resnet_plan(which, batch, channels, side, layout, dtype)
    problem = Problem(batch, channels, side * side, Layout(LAYOUTS.index(layout)), dtype)
    step = Pass[which.upper()]
    for columns in (got.columns,) if layout == "channels_first" else (1, 2, 4, 8, 16, 32):
        if layout == "channels_last" and columns * got.lanes > _C.MAX_SLAB_CHANNELS:
            break
        team = ceil_div(got.positions, THREADS // columns * got.slots)
        if team > got.resident_blocks // 2:  # one team alone has nobody to work while it waits
            continue
        choice = {
            "slot_bytes": got.slot_bytes,
            "columns": columns,
            "slots": got.slots,
            "threads": THREADS,
        }
        once = planner.cut(step, problem, H200, team=team, **choice)
        assert once.rounds == 1
        assert got.microseconds <= planner.estimate(step, problem, once, H200) * 1.0001, once


@pytest.mark.parametrize(
    ("batch", "channels", "side", "layout", "dtype", "retained"),
    [
        # Two teams hold a channel of x in work each; of x and dy together, three quarters.
        (256, 64, 112, "channels_first", "float32", ((2, 1), (4, 2))),
        (256, 64, 112, "channels_first", "bfloat16", ((1, 0), (2, 1))),
        # 2-byte slots: a block alone has a channel in four rounds. Of 512, bundles of 8 fit teams.
        (256, 510, 7, "channels_first", "bfloat16", ((4, 3), (4, 3))),
        (256, 512, 7, "channels_first", "bfloat16", ((1, 0), (1, 0))),
        # A pixel's channels lie together: stripes of 32 to 128 of them are large slabs.
        (256, 1024, 14, "channels_last", "bfloat16", ((4, 3), (4, 3))),
        (256, 512, 28, "channels_last", "bfloat16", ((3, 2), (6, 3))),
        # One round holds it, or time is the launch.
        (32, 256, 14, "channels_first", "bfloat16", ((1, 0), (1, 0))),
        (32, 2048, 7, "channels_first", "float32", ((1, 0), (1, 0))),
    ],
)
def test_resnet50_retains_what_registers_do_not_hold(
    batch, channels, side, layout, dtype, retained
):
    for which, expected in zip(PASSES, retained, strict=False):
        got = resnet_plan(which, batch, channels, side, layout, dtype)
        assert (got.rounds, got.retained) == expected


@each_team_pass
@pytest.mark.parametrize("suite", ["resnet50", "resnet50-large"])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip[0]}")
def test_no_plan_is_expected_to_lose_by_shared_memory(which, suite, chip):
    capability, shared = chip
    for (n, c, h, w), layout, dtype in itertools.product(SUITES[suite], LAYOUTS, DTYPES):
        keywords = {"layout": layout, "dtype": dtype, "capability": capability}
        got = _C.plan(which, n, c, h * w, shared_bytes=shared, **keywords)
        plain = _C.plan(which, n, c, h * w, shared_bytes=0, **keywords)
        assert plain.dynamic_shared_bytes == 0
        assert got.microseconds <= promised(got, plain) * plain.microseconds


@each_team_pass
@pytest.mark.parametrize("suite", sorted(SUITES))
def test_merging_is_a_small_part_of_the_time(which, suite):
    """Each block of a team merges what all of them have published, of every channel of the slab:
    200 blocks on 128 channels take longer for that than for the tensor."""
    for (n, c, *sides), layout, dtype in itertools.product(SUITES[suite], LAYOUTS, DTYPES):
        got = _C.plan(which, n, c, math.prod(sides), layout=layout, dtype=dtype)
        assert got.merging * got.waves <= 0.3 * got.microseconds, got


@each_team_pass
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), RESNET50)
def test_resnet50_keeps_every_sm_busy(which, layout, channels, side):
    got = resnet_plan(which, 64, channels, side, layout, "bfloat16")
    assert got.blocks >= 0.75 * H200


def test_a_small_2d_layer_is_one_wave_without_barriers():
    """The reinforcement-learning case, 256 x 256: latency counts, so no cooperative launch and many
    blocks."""
    p = {
        "batch": 256,
        "channels": 256,
        "spatial": 1,
        "layout": "channels_last",
        "dtype": "float32",
        "alignment": 16,
    }
    for which in PASSES:
        got = plan(which, p, H200)
        assert got.rounds == 1 and got.waves == 1
        if which != "inference":
            assert got.team == 1


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("layout", "nchw"),
        ("dtype", "int8"),
        ("sm_count", 0),
        ("shared_bytes", -1),
        ("alignment", 3),
        ("alignment", 1),
        ("alignment", 32),
    ],
)
def test_a_wrong_argument_is_named(keyword, value):
    with pytest.raises(ValueError, match=keyword):
        _C.plan("forward", 2, 3, 4, **{keyword: value})
