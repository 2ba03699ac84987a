"""`explain`: what the planner expects of every shape of every suite, and how it is printed."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from batchrenorm_cuda import _C, chips, explain, suites
from batchrenorm_cuda.__main__ import main

ITEM_SIZE = {name: dtype.itemsize for name, dtype in suites.DTYPES.items()}
SHAPES = explain.shapes_of(list(suites.SUITES))
REGISTER_BYTES = 128  # of tensors that a thread holds
THREADS = 256
L2_REACH = 28e6  # bytes that an H200's L2 still holds when they are read again: kernels.md


def everything(device_like: str) -> list[explain.Expectation]:
    return explain.expectations(SHAPES, list(suites.DTYPES), suites.LAYOUTS, device_like)


def sizes_of(row: explain.Expectation) -> list[int]:
    return [int(size) for size in row.shape.split("x")]


def blocks_of_an_sm(row: explain.Expectation) -> int:
    """The kernels' launch bounds."""
    if row.dtype == "float64":
        return 1
    return 3 if row.layout == "nchw" and row.slab_channels == 1 else 2


def rows_printed(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if " x " in line and line[0].isdigit()]


@pytest.mark.parametrize("device_like", ["h200", "t4", "b200", "7"])
def test_every_shape_of_every_suite_has_a_plan_that_fits(device_like):
    sm_count = chips.find(device_like).sm_count
    rows = everything(device_like)
    keys = {(row.shape, row.dtype, row.layout, row.op) for row in rows}
    layouts = {shape: 1 if len(shape) == 2 else 2 for shape in SHAPES}
    assert len(keys) == len(rows) == sum(layouts.values()) * len(suites.DTYPES) * 3
    for row in rows:
        batch, channels, *spatial = sizes_of(row)
        size = ITEM_SIZE[row.dtype]
        pixels = row.tensor_bytes // size // batch // channels
        side_by_side = pixels * row.slab_channels if row.layout == "nchw" else channels
        over_the_ends = size == 2 and channels % 8 == 0 and row.layout == "nchw"
        assert side_by_side * size % row.slot_bytes == 0 or over_the_ends, row
        assert row.slabs * row.slab_channels >= channels, row
        assert row.waves * row.teams >= row.slabs, row
        if row.op != "inference" and row.team > 1:
            assert row.team * row.teams <= sm_count * blocks_of_an_sm(row), row
            assert row.workspace_bytes > 0
        else:
            assert row.workspace_bytes == 0, "a lone block meets nobody"
        assert row.launches == 1


@pytest.mark.parametrize("device_like", ["h200", "t4"])
def test_expected_bytes_lie_between_one_reading_and_two(device_like):
    for row in everything(device_like):
        reads = {"forward": 1, "backward": 2, "inference": 1}[row.op]
        assert row.floor_bytes == (reads + 1) * row.tensor_bytes
        assert row.floor_bytes <= row.moved_bytes <= row.floor_bytes + row.reread_bytes, row
        again = (row.times_read - 1.0) * reads * row.tensor_bytes
        assert row.reread_bytes == pytest.approx(again, abs=1.0)
        assert 1.0 <= row.times_read < 2.0 and 0.0 < row.kept <= 1.0
        assert 0 <= row.retained < row.rounds
        all_kept = row.retained == row.rounds - 1
        assert all_kept == (row.reread_bytes == 0) == (row.kept == 1.0), row
        assert row.model_us >= row.copy_us > 0
        if row.op == "inference":
            assert row.moved_bytes == row.floor_bytes, "an affine map reads x once"


def test_large_nchw_tensors_move_what_the_design_says():
    """A slab that half the chip's registers and shared memory hold crosses the memory bus once; of
    a larger one, only what neither they nor L2 hold is read again."""
    held = 132 * 3 * THREADS * REGISTER_BYTES * 3  # two more rounds in shared memory
    beyond = set()
    for row in everything("h200"):
        if row.layout != "nchw" or row.tensor_bytes < 25e6 or row.dtype == "float64":
            continue
        slab = (row.floor_bytes - row.tensor_bytes) / sizes_of(row)[1]
        if slab <= held / 2:
            assert row.reread_bytes == 0, row
        excess = max(0.0, row.teams * slab - L2_REACH) * row.slabs / row.teams
        assert row.moved_bytes <= row.floor_bytes + excess, row
        if row.moved_bytes > 1.08 * row.floor_bytes:
            beyond.add((row.shape, row.dtype, row.op))
    assert not beyond


def test_what_is_kept_is_what_the_kernel_does_not_load_again():
    """Against a walk through the blocks of a slab and their rounds, as in csrc/kernels."""
    several, some = 0, 0
    cases = itertools.product(SHAPES, suites.LAYOUTS, explain.OPS[:2], ("t4", "h200"))
    for shape, layout, op, device_like in cases:
        row = explain.expect(shape, "float32", layout, op, device_like)
        pixels = row.tensor_bytes // 4 // shape[0] // shape[1]
        words = {"nchw": "channels_first", "nhwc": "channels_last"}[row.layout]
        t4 = {"sm_count": 40, "l2_bytes": 4e6, "capability": 75, "shared_bytes": 64 << 10}
        chip = t4 if device_like == "t4" else {}
        plan = _C.plan(op, *shape[:2], pixels, layout=words, **chip)
        kept = 0
        for block in range(plan.team):
            own = min(plan.share, plan.positions - block * plan.share)
            pieces = range(0, plan.rounds * plan.positions_per_round, plan.positions_per_round)
            held = [max(0, min(own - piece, plan.positions_per_round)) for piece in pieces]
            assert sum(held) == own
            taken = [held[-1], *held[:-1]]  # the ragged one is taken first
            shared = [r for r in range(plan.rounds) if plan.retains(r)]
            assert len(shared) == plan.retained and plan.rounds - 1 not in shared
            kept += taken[-1] + sum(taken[r] for r in shared)
        assert row.kept == pytest.approx(kept / plan.positions)
        several += plan.rounds > 1 and plan.team > 1
        some += 0 < plan.retained < plan.rounds - 1
    assert several > 20, "the cases must include slabs that registers do not hold"
    assert some > 10, "and some that do not fit with shared memory either"


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "op", "retained", "rounds"),
    [
        ((256, 64, 112, 112), "float32", "nchw", "backward", 2, 4),
        ((256, 512, 28, 28), "bfloat16", "nhwc", "backward", 3, 6),
        ((1, 64, 112, 112), "float32", "nchw", "backward", 2, 4),
    ],
)
def test_full_rounds_are_kept_and_not_what_is_left_over(shape, dtype, layout, op, retained, rounds):
    row = explain.expect(shape, dtype, layout, op)
    assert (row.retained, row.rounds) == (retained, rounds)
    assert 1 > row.kept >= (retained + 1) / rounds
    assert rows_printed(explain.text([row], "h200"))[0][13] == f"{retained}/{rounds - 1}"


def test_what_runs_at_once_is_what_l2_has_to_hold():
    """2044 lone blocks, 396 of them resident: 50 MB are read again, 10 at a time."""
    sizes = 256, 2044, 49
    plan = _C.plan("forward", *sizes, dtype="bfloat16", l2_bytes=60e6, shared_bytes=0)
    assert plan.team == 1 and plan.teams == 2044 and plan.bytes_reread > L2_REACH
    assert plan.bytes_in_flight == plan.bytes_reread * plan.resident_blocks // plan.slabs
    assert plan.bytes_missed == 0
    planned = _C.plan("backward", 8, 19, 512 * 1024, shared_bytes=0, l2_bytes=30e6)
    part = 1 - L2_REACH / 2 / planned.bytes_in_flight
    assert 0 < part < 1
    assert planned.bytes_missed == pytest.approx(planned.bytes_reread * part, rel=1e-6)


def test_a_smaller_l2_costs_bytes():
    shape = (256, 64, 112, 112)
    found = [
        explain.expect(shape, "float16", "nhwc", "backward", chip) for chip in ("h100", "h200")
    ]
    assert found[0].teams == found[1].teams, "132 SMs each: the same plan"
    assert found[0].moved_bytes > found[1].moved_bytes > found[1].floor_bytes


def test_one_long_channel_is_planned_as_one_row():
    for layout in suites.LAYOUTS:
        row = explain.expect((4, 1, 9, 9), "float32", layout, "forward")
        assert (row.slabs, row.slot_bytes, row.layout) == (1, 16, layout)


def test_what_is_prefetched_is_kept_and_shown():
    shape = (64, 128, 28, 28)
    on = explain.expect(shape, "bfloat16", "nchw", "backward")
    off = explain.expect(shape, "bfloat16", "nchw", "backward", "t4")
    assert (on.prefetch, on.rounds, off.prefetch) == (1, 1, 0)
    printed = [rows_printed(explain.text([row], "h200"))[0] for row in (on, off)]
    assert [words[13:15] for words in printed] == [["-", "1"], ["-", "-"]]


@pytest.mark.parametrize("device_like", chips.CHIPS)
def test_chips_are_what_their_makers_say(device_like):
    chip = chips.find(device_like)
    assert 40 <= chip.sm_count <= 170 and 4e6 <= chip.l2 <= 128e6
    assert 0 < chip.copy < chip.bandwidth <= 8000
    assert 75 <= chip.capability <= 120 and 64 << 10 <= chip.shared <= 228 << 10


def test_the_copy_of_an_h200_is_the_one_that_was_measured():
    assert chips.find("h200").copy == pytest.approx(4300, rel=0.01)


def test_a_number_of_sms_is_a_part_of_an_h200():
    assert chips.find("132") == chips.CHIPS["h200"]
    assert chips.find("66").copy == pytest.approx(chips.CHIPS["h200"].copy / 2)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_the_text_has_a_line_for_each_row(suite):
    rows = explain.expectations(suites.SUITES[suite], ["bfloat16"], suites.LAYOUTS)
    text = explain.text(rows, "h200")
    printed = rows_printed(text)
    assert [words[:4] for words in printed] == [
        [row.shape, row.dtype, row.layout, row.op] for row in rows
    ]
    assert "132 SMs" in text and text.count("NOT") == 2


def test_explain_says_what_the_kernel_will_do():
    plan = _C.plan("backward", 32, 64, 56 * 56, layout="channels_last", dtype="bfloat16")
    text = explain.explain([32, 64, 56, 56], torch.bfloat16, channels_last=True)
    forward, backward, inference = rows_printed(text)
    assert backward[3] == "backward"
    assert backward[4:7] == [str(plan.teams), "x", str(plan.team)]
    assert backward[7:9] == [str(plan.threads), str(plan.waves)]
    assert backward[9:12] == [str(plan.slots), "x", str(plan.slot_bytes)]
    # x and dy read, dx written
    assert f" {3 * 32 * 64 * 56 * 56 * 2 / 1e6:.1f} MB     1.00 " in text
    assert inference[-4:-2] == ["-", "1"], "no workspace, one launch"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(shape=[4]), "shape must be"),
        (dict(shape=[4, 0, 2]), "shape must be"),
        (dict(shape=[4, 4], dtype=torch.int32), "dtype must be one of float32, .* got 'int32'"),
        (dict(shape=[4, 4], device_like="v100"), "device_like must be .*h200.* got 'v100'"),
        (dict(shape=[4, 4], device_like="0"), "device_like must be a number of SMs up to 1024"),
    ],
)
def test_explain_refuses(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        explain.explain(**arguments)


def test_the_command_line():
    command = [sys.executable, "-m", "batchrenorm_cuda", "explain"]
    options = ["--suite", "resnet50", "--device-like", "h200"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert len(rows_printed(done.stdout)) == 9 * 3
    wrong = subprocess.run(
        [*command, "--shape", "32,0"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: shape must be")


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    """As head does. The text is shorter than a buffer, so that the failure comes with the last
    flush; the pipe is closed before the command starts, so that it surely comes."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "batchrenorm_cuda", "explain", "--shape", "32,64"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.stderr, done.returncode) == ("", 141)


def test_lists_of_names_and_json(tmp_path, capsys):
    file = tmp_path / "plans.json"
    options = ["--suite", "rl,3d", "--dtype", "float16,bfloat16", "--layout", "all"]
    assert main(["explain", *options, "--device-like", "80", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert not found["measured"] and found["chip"]["sm_count"] == 80
    assert len(found["rows"]) == (2 + 5 * 2) * 2 * 3 == len(rows_printed(capsys.readouterr().out))
    assert (
        found["rows"][0] == explain.expect((256, 256), "float16", "nhwc", "forward", "80")._asdict()
    )


def test_a_shape_in_two_suites_is_explained_once():
    assert explain.named("suite", "rl,3d,rl", suites.SUITES) == ["rl", "3d"]
    shapes = explain.shapes_of(["resnet50", "cpu"])
    assert len(shapes) == len(set(shapes)) == len(set(suites.SUITES["cpu"]))


@pytest.mark.parametrize(
    ("options", "known"),
    [
        (["--suite", "resnet50,resnet18"], "suite must be one of resnet50, resnet50-large, "),
        (["--suite", "rl", "--dtype", "int8"], "dtype must be one of float32, float16, "),
        (["--suite", "rl", "--layout", "nchw,"], "layout must be one of nchw, nhwc, all, got ''"),
        (["--suite", "rl", "--device-like", "v100"], "device_like must be a number of SMs up to "),
        # The number in a chip's name is no number of SMs.
        (["--suite", "rl", "--device-like", "4090"], "got '4090': is it rtx4090?"),
        (["--suite", "rl", "--json", "/dev/null/x"], "Not a directory"),
        (["--shape", "3"], "shape must be [N, C, ...] with every size at least 1, got [3]"),
        # The planner counts in 32 bits.
        (["--shape", "9223372036854775807,3"], "fewer than 2**31 channels, got [92233720368547"),
        (["--shape", "4294967296,4294967296,4"], "shape must have at most 2**40 elements"),
        (["--shape", "2,3", "--device-like", "1025"], "a number of SMs up to 1024 or one of"),
    ],
)
def test_a_bad_name_is_one_clear_error(options, known, capsys):
    assert main(["explain", *options]) == 2
    printed = capsys.readouterr()
    message = printed.err.removesuffix("\n")
    assert message.startswith("error: ") and known in message and "\n" not in message
    assert printed.out == ""


@pytest.mark.parametrize("sizes", [(2**40, 1), (2**9, 2**31 - 1), (1, 1, 2**40), (2**20, 2**20)])
@pytest.mark.parametrize("device_like", ["1", "h200", "1024"])
def test_the_largest_shapes_are_planned_without_overflow(sizes, device_like):
    for row in explain.expectations([sizes], ["float64"], ["nchw", "nhwc"], device_like):
        assert row.tensor_bytes > 2**42 and row.floor_bytes >= 2 * row.tensor_bytes
        assert row.moved_bytes >= row.floor_bytes and row.times_read >= 1 and row.slabs > 0


@pytest.mark.parametrize("options", [[], ["--suite", "rl", "--shape", "4,4"]])
def test_either_a_shape_or_suites(options, capsys):
    with pytest.raises(SystemExit):
        main(["explain", *options])
    assert "--s" in capsys.readouterr().err
