"""The CPU kernels by themselves: cuts, conversions, threads, instruction sets.

What the layer computes is the matter of the other files; here is what only these kernels could get
wrong. Sizes are chosen by how csrc/cpu cuts them.
"""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys

import pytest
import torch
from cases import each_case
from tolerance import assert_as_accurate_as

from batchrenorm_cuda import _C
from batchrenorm_cuda.parity import report, tensors
from batchrenorm_cuda.parity.cases import Case
from batchrenorm_cuda.parity.check import check

ops = torch.ops.batchrenorm

CUTS = [
    Case("S = 1", (37, 3, 1, 1), "a run of one value, or a row of three"),
    Case("C = 8", (4, 8), "two rows make a vector of floats"),
    Case("C = 3", (7000, 3), "the least common row of a vector's width is 48"),
    Case("C = 3, m = 5", (5, 3), "fewer rows than make one wide row"),
    Case("C = 17", (333, 17), "a vector and one channel"),
    Case("C = 65", (8, 65, 14, 14), "four vectors and one channel"),
    Case("C = 512", (13, 512), "eight rows are written together, then four, then one"),
    Case("wide", (16, 5000), "few rows of many channels are cut into columns"),
    Case("C = 2061", (150, 2061), "rows are reduced by two blocks of columns and 13 more"),
    Case("S = 7", (33, 5, 7), "runs shorter than a vector"),
    Case("S = 49", (32, 70, 7, 7), "runs of three vectors and one value"),
    Case("S = 17", (40, 200, 17), "many short planes, of more channels than go together"),
    Case("S = 63", (2, 37, 7, 9), "channels of few vectors, summed in groups, the last not full"),
    Case("S = 812", (1, 21, 29, 28), "a lone image, whose planes follow each other"),
    Case("S = 195", (9, 20, 15, 13), "with AVX-512 too long to go plane by plane"),
    Case("S = 289", (6, 33, 17, 17), "runs of 18 vectors and one value"),
    Case("parts", (2, 1, 400, 401), "one channel in several parts, cut within a plane"),
    Case("37 channels", (1, 37, 60, 60), "slabs of four channels and of five"),
    Case(
        "few rows",
        (49, 2070),
        "four slabs of columns, of whole lines but for the last, which is wider",
    ),
    Case("three channels", (2, 3, 300, 300), "more slabs than threads, but not evenly so"),
    Case("5-D", (2, 6, 5, 40, 41), "volumes"),
    Case("larger than a cache", (8, 24, 120, 120), "read in the order of memory"),
]
LAST = {3: "channels_last_1d", 4: "channels_last", 5: "channels_last_3d"}
CUTS += [
    Case(f"{case}, last", case.shape, case.why, form=LAST[len(case.shape)])
    for case in CUTS
    if len(case.shape) > 2
]
CPU = torch.device("cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = ["default", "avx2", "avx512"]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BOTH_LAYOUTS = pytest.mark.parametrize("form", ["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def step(t: tensors.Tensors, skip_nonfinite: bool = False) -> list[torch.Tensor]:
    """What one training step leaves: y, stats, dx, dweight, dbias, running_mean, running_std, and
    the number of steps."""
    moved = [t.running_mean.clone(), t.running_std.clone(), torch.tensor(7)]
    limits = (None, 0.1, 1e-5, 1.5, 0.5)
    y, stats = ops.forward(t.x, t.weight, t.bias, *moved, *limits, skip_nonfinite)
    dy = torch.empty_like(t.x).copy_(t.dy)
    return [y, stats, *ops.backward(dy, t.x, t.weight, stats), *moved]


@each_case(CUTS)
def test_every_cut_is_as_accurate_as_plain_torch(case, dtype):
    verdict = check(case, dtype, CPU)
    assert verdict.ok, report.line(verdict)


@each_case(CUTS, [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(case, dtype):
    t = tensors.make(case, dtype, CPU)
    torch.set_num_threads(1)
    alone = step(t)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, step(t))), f"{threads} threads"


def ranks_step(t: tensors.Tensors, ranks: int) -> list[torch.Tensor]:
    """What the operators for several ranks leave that all have one batch: message, stats, dx,
    dweight, dbias."""
    message = ops.moments(t.x, True)
    limits = (None, None, None, None, 0.1, 1e-5, 1.0, 0.0, False)
    stats, total = ops.merge(message.expand(ranks, -1), t.x.dtype, *limits)
    r, d = stats[3:]
    assert (r == 1).all() and (d == 0).all()
    # By 1 and 0 nothing is rounded.
    stats[3:].uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    dy = torch.empty_like(t.x).copy_(t.dy)
    sums, dweight, dbias = ops.backward_sums(dy, t.x, stats)
    dx = ops.backward_project(dy, t.x, t.weight, stats, sums * ranks, total)
    return [message, stats, dx, dweight, dbias]


@each_case(CUTS)
def test_one_rank_computes_what_the_ordinary_operators_compute(case, dtype):
    """To the last bit, but that the mean travels as one double."""
    t = tensors.make(case, dtype, CPU)
    _, wanted = ops.forward(t.x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
    message, stats, *gradients = ranks_step(t, 1)
    mean, found = wanted[0].double() + wanted[1].double(), message[: t.x.size(1)]
    rounded = 64 * torch.finfo(wanted.dtype).eps ** 2 / wanted[2].double()  # of the residue
    double = torch.finfo(torch.float64).eps
    assert ((found - mean).abs() <= 2 * double * mean.abs() + rounded).all()
    assert torch.equal(stats[2], wanted[2])
    dy = torch.empty_like(t.x).copy_(t.dy)
    assert all(map(torch.equal, gradients, ops.backward(dy, t.x, t.weight, stats)))


@each_case(CUTS, [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_of_several_ranks(case, dtype):
    t = tensors.make(case, dtype, CPU)
    torch.set_num_threads(1)
    alone = ranks_step(t, 3)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, ranks_step(t, 3))), f"{threads} threads"


@each_case(CUTS, [torch.float32])
def test_the_normalisation_alone_gives_the_same_bits(case, dtype):
    t = tensors.make(case, dtype, CPU)
    y, stats, *_ = step(t)
    assert torch.equal(ops.renormalize(t.x, t.weight, t.bias, stats), y)


# Outputs of more than 32 MB, on some processors of 8, go past the caches, in whole lines.
@BOTH_LAYOUTS
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((9, 32, 176, 176), id="aligned planes and rows"),
        pytest.param((9, 32, 175, 177), id="planes that begin anywhere"),
        pytest.param((9, 8100, 11, 11), id="planes of a few lines"),
        pytest.param((9, 21000, 7, 7), id="planes little longer than a line"),
        pytest.param((9, 115000, 3, 3), id="planes shorter than a line"),
        pytest.param((9, 16, 241, 243), id="parts that begin with the last few of a plane"),
        pytest.param((9, 37, 160, 168), id="rows that begin anywhere"),
        pytest.param((9, 3, 640, 512), id="rows narrower than a vector"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_output_has_the_bits_of_its_pieces(dtype, shape, form):
    large = (*shape[:1], shape[1] * torch.float32.itemsize // dtype.itemsize, *shape[2:])
    t = tensors.make(Case("", large, "", form=form), dtype, CPU)
    assert t.x.nbytes > 2**25 > 2**23 > t.x[0].nbytes
    still = (t.weight, t.bias, t.running_mean, t.running_std)
    y = ops.inference(t.x, *still)
    dy = torch.empty_like(t.x).copy_(t.dy)
    dx, _, _ = ops.inference_backward(dy, t.x, t.weight, *still[2:])
    for i in range(9):
        x_part, dy_part = t.x[i : i + 1], dy[i : i + 1]
        assert torch.equal(y[i : i + 1], ops.inference(x_part, *still))
        dx_part, _, _ = ops.inference_backward(dy_part, x_part, t.weight, *still[2:])
        assert torch.equal(dx[i : i + 1], dx_part)


def test_many_short_planes_go_past_the_caches_with_the_same_bits():
    """A training step writes them in an order of its own."""
    t = tensors.make(Case("", (64, 2100, 8, 8), ""), torch.float32, CPU)
    assert t.x.nbytes > 2**25
    y, stats = ops.forward(t.x, t.weight, t.bias, *[None] * 4, 0.1, 1e-5, 1.0, 0.0, False)
    assert torch.equal(ops.renormalize(t.x, t.weight, t.bias, stats), y)
    dy = torch.empty_like(t.x).copy_(t.dy)
    sums, *_ = ops.backward_sums(dy, t.x, stats)
    total = torch.tensor([t.x.numel() / t.x.size(1), 1.0], dtype=torch.float64)
    dx = ops.backward_project(dy, t.x, t.weight, stats, sums, total)
    assert torch.equal(ops.backward(dy, t.x, t.weight, stats)[0], dx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_written_as_it_is(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    y = ops.inference(x, None, None, torch.zeros(1), torch.ones(1))
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_to_the_nearest_and_to_even(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    below, above = every[:-1], every[1:]
    middle = below + (above - below) / 2
    inf, nan = float("inf"), float("nan")
    largest = torch.tensor([65519.996, 65520.0, 65536.0, 3.3953e38, 3.4e38, inf, -inf, nan])
    all_ones = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # another NaN
    nearly = [middle.nextafter(below), middle.nextafter(above)]
    values = torch.cat([middle, *nearly, largest, all_ones])
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    y = ops.inference(one.to(dtype).view(1, -1), values, None, zero, one)[0]
    assert torch.equal(y.nan_to_num(nan=1.25), values.to(dtype).nan_to_num(nan=1.25))


def _first_element(x):
    x.flatten(2)[0, :, 0] = 1000.0


def _first_elements(x):
    x.flatten(2)[0, :, :16] = 1000.0


def _planes(x):
    x += 1000.0 * torch.arange(x.size(0)).view(-1, 1, 1, 1)


def _all(x):
    x += 3000.0


@BOTH_LAYOUTS
@pytest.mark.parametrize("move", [_first_element, _first_elements, _planes, _all])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_cancels_in_the_moments(dtype, move, form):
    """Deviations are taken from a first element, or from a mean of few: what lies far from those,
    or all far from 0, must not cost precision. What they lose is 7 eps at the most. Channels of
    few vectors and of many, of runs shorter than a vector, of many short planes, and in several
    parts."""
    shapes = [
        (1, 3, 7, 7),
        (64, 3, 7, 7),
        (4, 3, 14, 14),
        (1, 3, 40, 40),
        (64, 3, 14, 14),
        (40, 3, 1, 7),
    ]
    for shape in [*shapes, (1, 2, 300, 300), (9, 70, 64, 16), (300, 33, 1, 1)]:
        torch.manual_seed(0)
        x = torch.randn(shape)
        move(x)
        x = x.to(dtype).contiguous(memory_format=FORMATS[form])
        _, stats = ops.forward(x, None, None, None, None, None, None, 0.1, 1e-30, 1.0, 0.0, False)
        centre, residue, inv_std, *_ = stats.double()
        std, mean = torch.std_mean(x.double(), (0, 2, 3), correction=0)
        eps = torch.finfo(torch.float32).eps
        assert (inv_std * std - 1).abs().max() <= 16 * eps, shape
        far = (x[0, :, 0, 0].double() - mean).abs()  # few elements are taken around the first
        assert ((centre + residue - mean).abs() <= 4 * eps * (std + far)).all(), shape


@pytest.mark.parametrize("shape", [(19006, 2, 15), (10000, 3, 7), (4450, 2, 33), (22332, 2, 12)])
def test_a_part_may_begin_with_less_than_a_vector_of_a_plane(shape):
    """Lanes that its first run leaves out deviate from an element as well, not from 0. Otherwise a
    constant channel of 1e6 has a negative variance, and y is NaN."""
    torch.manual_seed(0)
    for x in torch.full(shape, 1e6), torch.full(shape, 3e8), 1e4 + torch.randn(shape):
        _, stats = ops.forward(x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
        variance = x.double().var((0, 2), correction=0)
        error = stats[2].double() * (variance + 1e-5).sqrt() - 1
        assert error.abs().max() <= 16 * torch.finfo(torch.float32).eps


@BOTH_LAYOUTS
def test_sums_of_many_values_are_as_good_as_those_of_batch_norm(form):
    t = tensors.make(Case("many", (32, 4, 112, 112), "", form=form, mean=100.0), torch.float32, CPU)
    x, dy = t.x, torch.empty_like(t.x).copy_(t.dy)
    _, stats = ops.forward(x, None, None, None, None, None, None, 0.1, 1e-5, 1.0, 0.0, False)
    _, dweight, dbias = ops.backward(dy, x, None, stats)
    _, mean, inv_std = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    peer = torch.ops.aten.native_batch_norm_backward(
        dy, x, torch.ones(4), None, None, mean, inv_std, True, 1e-5, [True, True, True]
    )
    dims, wide = (0, 2, 3), dy.double()
    deviation = x.double() - x.double().mean(dims, keepdim=True)
    x_norm = deviation / (deviation.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    scale = wide.square().sum(dims).sqrt()
    for actual, native, terms in ((dweight, peer[1], wide * x_norm), (dbias, peer[2], wide)):
        assert_as_accurate_as(actual, native, terms.sum(dims), scale=scale)


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    "shape",
    [
        (32, 4, 112, 112),
        (1300, 4, 7, 7),
        (330, 4, 14, 14),
        (640, 4, 2, 4),
        (640, 4, 1, 4),
        (32, 64, 112, 30),
    ],
    ids=str,
)
def test_a_long_sum_keeps_what_its_additions_round_off(shape, form):
    """Equal terms round in the same direction each time. In long planes and in short ones, in rows
    that go together and one by one."""
    t = tensors.make(Case("equal", shape, "", form=form), torch.float32, CPU)
    *_, dbias = ops.inference_backward(torch.full_like(t.x, 0.1), t.x, None, *step(t)[5:7])
    terms = t.x.numel() // shape[1]
    truth = torch.full((shape[1],), 0.1, dtype=torch.float32).double() * terms
    torch.testing.assert_close(dbias.double(), truth, rtol=2**-22, atol=0)


@BOTH_LAYOUTS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape", [(32, 70, 7, 7), (32, 5, 14, 14), (2, 3, 300, 300), (700, 5, 1, 2)], ids=str
)
@pytest.mark.parametrize("at", [0, -1])
def test_a_value_that_is_not_finite_stays_in_its_channel(shape, at, value, form):
    t = tensors.make(Case("", shape, "", form=form), torch.float32, CPU)
    sound = step(t)
    t.x[at, 1, at, at] = value
    y, stats, dx, dweight, _, mean, std, _ = step(t)
    others = [c for c in range(shape[1]) if c != 1]
    assert y[:, 1].isnan().all() and dx[:, 1].isnan().all() and std[1].isnan()
    for found, before in zip((y, stats, dx), sound, strict=False):
        assert torch.equal(found[:, others], before[:, others])
    assert torch.equal(dweight[others], sound[3][others])

    *_, mean, std, steps = step(t, skip_nonfinite=True)
    assert torch.equal(mean, t.running_mean) and torch.equal(std, t.running_std) and steps == 7


@BOTH_LAYOUTS
def test_a_finite_batch_is_not_skipped(form):
    t = tensors.make(Case("", (6, 33, 17, 17), "", form=form), torch.float32, CPU)
    assert all(map(torch.equal, step(t), step(t, skip_nonfinite=True)))


@pytest.mark.skipif(not X86, reason="there is one instruction set")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is one of them")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_passes(capability):
    """The variable holds for torch as well, which takes it at its word, whatever the processor has;
    and its variance of many float64 values, which is the truth elsewhere, is off by 90 eps then."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    if capability == best:
        pytest.skip("the other tests of this file run by it")
    if best in CAPABILITIES[: CAPABILITIES.index(capability)]:
        pytest.skip(f"needs a processor with {capability}")
    chosen = "not (accurate and float64 and (parts or three or larger)) and not rank"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-k", chosen],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(not X86, reason="there is one instruction set")
@pytest.mark.skipif(platform.system() != "Linux", reason="knows the symbols of GCC's library")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="it is the same for all")
@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_no_instruction_set_defines_a_function_that_all_share(capability, tmp_path):
    """The linker takes one copy of an inline function for every file: were it the one with AVX-512,
    processors without would stop at it. Without optimisation, since inlining hides them."""
    source = f"{os.path.dirname(__file__)}/../csrc/cpu/isa_{capability}.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O0", "-c", source, "-o", f"{tmp_path}/isa.o"]
    subprocess.run([*compiler, *flags], check=True)
    command = ["nm", "-Cg", "--defined-only", f"{tmp_path}/isa.o"]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall("^[0-9a-f]+ [TWu] (.+)", symbols, re.MULTILINE)
    # Of headers that come before the instruction set is chosen.
    harmless = ("std::initializer_list<", "std::sqrt(float)")
    found = [name for name in functions if not name.startswith(harmless)]
    assert found == [f"brn::cpu::isa_{capability}()"]


def bits() -> str:
    """Of all that steps leave: of every cut, and of outputs of 26 and 13 MB, which some processors
    write past the caches."""
    digest = hashlib.sha256()
    large = [Case("", (6, 256, 75, 57), "", form=form) for form in ("contiguous", "channels_last")]
    for case in CUTS + large:
        for dtype in (torch.float32, torch.bfloat16):
            t = tensors.make(case, dtype, CPU)
            y = ops.inference(t.x, t.weight, t.bias, t.running_mean, t.running_std)
            for left in [y, *step(t)]:
                digest.update(left.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def test_the_settings_of_every_processor_give_the_same_bits():
    """Else only those of the processor that the tests run on would be tested."""
    script = "import test_cpu_kernels as t; print(t._C.cpu_info()['settings'], t.bits())"
    found = set()
    for name in _C.cpu_info()["known_settings"]:
        run = subprocess.run(
            [sys.executable, "-c", script],
            cwd=os.path.dirname(__file__),
            env={**os.environ, "BATCHRENORM_CPU_TRAITS": name},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        settings, digest = run.stdout.split()
        assert settings == name
        found.add(digest)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 16, 64, 64), (64, 32, 14, 14)], ids=str)
@BOTH_LAYOUTS
def test_the_mean_of_many_values_is_not_rounded_again_and_again(form, shape, dtype):
    """dweight is off by the mean's error times the sum of dy, which is no small number where dy has
    a mean."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).to(dtype, memory_format=FORMATS[form])
        _, stats = ops.forward(x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
        mean = x.double().mean((0, 2, 3))
        error = (stats[0].double() + stats[1].double() - mean).abs().max()
        most = {"contiguous": 0.5, "channels_last": 1.5}[form]  # last places of 1, which is the std
        assert error <= most * torch.finfo(torch.float32).eps
