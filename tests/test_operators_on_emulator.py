"""The CUDA operators as users call them, without a GPU: csrc/binding/cuda.cpp, what it plans and
allocates, and the kernels under the emulator, in place of the CPU's operators. Each test is a
process of its own, since they take the place for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONDONTWRITEBYTECODE": "1"}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env=ENVIRONMENT, cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


PROGRAM = """
import torch
from batchrenorm_cuda import _C
from simt.operators import take_over

ops = torch.ops.batchrenorm
torch.manual_seed(0)


class Layer:
    def __init__(self, shape, format_=torch.contiguous_format, dtype=torch.float32):
        both = torch.randn(2, *shape, dtype=dtype)
        x, self.dy = (t.contiguous(memory_format=format_) for t in both.unbind())
        self.x = x * 3 + 1
        self.running_mean, self.running_std = torch.zeros(shape[1]), torch.ones(shape[1])
        self.steps = torch.zeros((), dtype=torch.long)
        self.schedule = torch.tensor([2, 3, 9, 5, 7], dtype=torch.float64)

    def step(self, skip_nonfinite=False):
        y, stats = ops.forward(
            self.x, None, None, self.running_mean, self.running_std, self.steps, self.schedule,
            0.1, 1e-5, 1.0, 0.0, skip_nonfinite,
        )
        return y, stats, *ops.backward(self.dy, self.x, None, stats)

    def state(self):
        return self.running_mean, self.running_std, self.steps


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


"""


def program(text: str) -> None:
    assert run("-W", "ignore", "-c", PROGRAM + text + '\nprint("done")\n') == "done\n"


@pytest.mark.parametrize(
    "file",
    ["functional", "autograd", "modules", "state", "edge_cases", "statistics", "averaging",
     "binding", "checkpoint_modes", "checkpoint_compiled", "limits", "schedule", "parity"],
)  # fmt: skip
def test_what_holds_on_the_cpu_holds_here(file):
    """On a chip of six SMs, where small tensors meet barriers and take several rounds. Not what is
    about the CPU kernels' threads, and what of _C the emulator has a copy of."""
    out = run(
        "-m", "pytest", "-q", "-p", "simt.operators", "-p", "no:cacheprovider",
        "-m", "not gpu", "-k", "not thread and not whose_hooks", f"tests/test_{file}.py",
    )  # fmt: skip
    assert " passed" in out


def test_parity_with_the_plans_of_an_h200():
    """What its owner would see first, every case of it."""
    run(
        "-W", "ignore", "-c",
        "import sys; from simt.operators import take_over; take_over(132);"
        "from batchrenorm_cuda.parity import main; sys.exit(main(['--device', 'cpu']))",
    )  # fmt: skip


@pytest.mark.parametrize("lent", [3, 0])
def test_a_chip_of_which_a_part_is_lent(lent):
    """MPS or a green context: the launch that was planned is refused, a smaller one is made. Blocks
    that wait for no other always fit."""
    program(f"""
shapes = [((8, 4, 56, 56), torch.contiguous_format), ((8, 24, 20, 20), torch.channels_last),
          ((300, 32, 5, 5), torch.contiguous_format), ((256, 32, 7, 7), torch.contiguous_format),
          ((192, 8, 19, 19), torch.contiguous_format, torch.bfloat16)]
assert _C.plan("forward", 300, 32, 25, sm_count=8).bundles
assert _C.plan("backward", 256, 32, 49, sm_count=8).bundles
for pass_ in ("forward", "backward"):
    plan = _C.plan(pass_, 192, 8, 361, dtype="bfloat16", sm_count=8)
    assert plan.unaligned and plan.team > 1
layers, on_cpu = ([Layer(*s) for s in shapes] for _ in range(2))
for layer, other in zip(layers, on_cpu):
    layer.x, layer.dy = other.x, other.dy
expected = [layer.step() for layer in on_cpu]
operators, shared = take_over(8, {lent}), []
for layer, other, want in zip(layers, on_cpu, expected):
    for got, wanted in zip((*layer.step(), *layer.state()), (*want, *other.state()), strict=True):
        near = 1e-4 if got.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, wanted, rtol=near, atol=near * float(wanted.abs().max()))
    shared.append(operators.last_dynamic_shared())
assert any(shared), "half the chip has shared memory too"
assert operators.refused() > 0 and operators.control_words_in_use() == 0
""")


@pytest.mark.parametrize("shape", [(16, 8, 8, 8), (8, 4, 56, 56)], ids=["lone blocks", "teams"])
def test_a_captured_step_is_the_next_one_at_every_replay(shape):
    """And meanwhile eager steps on another stream do not notice. The schedule and the counter are
    read by the kernels, so every replay finds them further on."""
    program(f"""
shape = {shape}
operators = take_over()
captured, eager, alone = Layer(shape), Layer(shape), Layer(shape)
alone.x, alone.dy = captured.x, captured.dy
before = [t.clone() for t in captured.state()]
operators.stream(1, capture=7)
results = captured.step()
operators.stream(2)
assert equal(captured.state(), before), "a capture has run"
assert operators.captured(7) == 2, "one launch each way"
for step in range(1, 12):
    operators.replay(7)
    eager.step()
    expected = alone.step()
    assert equal((*results, *captured.state()), (*expected, *alone.state())), step
    assert captured.steps == eager.steps == step
assert operators.control_words_in_use() == 0
""")


@pytest.mark.parametrize(
    "shape",
    [(16, 8, 8, 8), (8, 4, 56, 56), (256, 32, 7, 7), (64, 16, 19, 19)],
    ids=["lone blocks", "teams", "bundles", "unaligned"],
)
def test_a_batch_that_is_not_finite_is_skipped(shape):
    """Averages wait as proposals in memory that the binding has allocated."""
    program(f"""
shape = n, c, h, w = {shape}
dtype = torch.bfloat16 if c == 16 else torch.float32
plan = _C.plan("forward", n, c, h * w, dtype=str(dtype)[6:], sm_count=6)
assert (plan.bundles, plan.unaligned) == (c == 32, c == 16)
operators = take_over()
layer = Layer(shape, dtype=dtype)
layer.step(True)
before = [t.clone() for t in layer.state()]
x = layer.x.clone()
layer.x[1, 2, 3, 4] = float("nan")
layer.step(True)
assert equal(layer.state(), before), "moved by a NaN"
layer.x = x
layer.step(True)
assert layer.steps == 2 and not equal(layer.state(), before)
assert operators.control_words_in_use() == 0
""")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (209, "no forward kernel was built for this GPU. Build again with TORCH_CUDA_ARCH_LIST"),
        (98, "no forward kernel was built for this GPU"),
        (719, "batchrenorm_cuda: forward: cudaErrorLaunchFailure: "),
        (2, "batchrenorm_cuda: cudaMalloc of control words: "),
    ],
)
def test_a_launch_that_fails_is_one_error_and_changes_nothing(error, says):
    """And the next one is as if it had not been."""
    program(f"""
layer, alone = Layer((8, 4, 56, 56)), Layer((8, 4, 56, 56))
alone.x, alone.dy = layer.x, layer.dy
operators = take_over()
operators.fail({error})
before = [t.clone() for t in layer.state()]
try:
    layer.step()
except RuntimeError as error:
    assert {says!r} in str(error), error
else:
    raise AssertionError("no error")
assert equal(layer.state(), before)
operators.fail(0)
assert equal((*layer.step(), *layer.state()), (*alone.step(), *alone.state()))
assert operators.control_words_in_use() == 0
""")


def test_what_blocks_cannot_count_is_refused():
    """Of memory that nobody touches: 2^30 + 2 channels, and on one SM a plane of 2^30 slots for
    each of its three blocks, and one more."""
    program("""
take_over(sms=1)


def refuse(call, *words):
    try:
        call()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("no error")


channels = 2**30 + 2
layer = [torch.empty(channels) for _ in range(2)]
x = torch.empty(1, channels, dtype=torch.float16)
ops = torch.ops.batchrenorm
refuse(lambda: ops.inference(x, None, None, *layer), "2^30 channels", "1073741826")
x = torch.empty(1, 1, 3 * 2**30 + 1, dtype=torch.float16)
refuse(
    lambda: ops.backward(x, x, None, torch.empty(5, 1)),
    "x of 3221225473 elements",
    "1 multiprocessors",
)
""")
