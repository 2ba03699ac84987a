"""What only a GPU can show of the CUDA binding: launches, streams, graphs, devices."""

import json
import subprocess
import sys
from itertools import product

import pytest
import ranks
import torch

from batchrenorm_cuda import _C

pytestmark = pytest.mark.gpu

ops = torch.ops.batchrenorm

# Lone blocks, teams that meet at a barrier, teams whose next slab is on its way meanwhile, teams
# with more of a slab than their registers hold, teams for bundles of channels, and these in shares
# of bfloat16, teams whose slots reach over the ends of planes, in bfloat16;
# test_the_shapes_are_what_they_are_for says so.
LONE, TEAM, AHEAD, RETAIN = (16, 64, 8, 8), (64, 8, 56, 56), (32, 128, 28, 28), (64, 4, 224, 224)
BUNDLES, SHARED_BUNDLES = (256, 2048, 7, 7), (48, 2048, 7, 7)
UNALIGNED = (256, 256, 19, 19)
each_kind = pytest.mark.parametrize(
    "shape",
    [LONE, TEAM, AHEAD, RETAIN, BUNDLES, UNALIGNED],
    ids=["lone blocks", "teams", "prefetch", "retain", "bundles", "unaligned"],
)


class Layer:
    """State of a layer, and a training step both ways on it."""

    def __init__(self, shape, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        dtype = torch.bfloat16 if shape == UNALIGNED else torch.float32
        made = {"device": "cuda", "dtype": dtype, "generator": generator}
        self.x = torch.randn(shape, **made) * 3 + 1
        self.dy = torch.randn(shape, **made)
        self.running_mean = torch.zeros(shape[1], device="cuda")
        self.running_std = torch.ones(shape[1], device="cuda")
        self.steps = torch.zeros((), dtype=torch.long, device="cuda")
        self.schedule = torch.tensor([2, 3, 9, 5, 7], dtype=torch.float64, device="cuda")

    def step(self):
        y, stats = ops.forward(
            self.x, None, None, self.running_mean, self.running_std, self.steps, self.schedule,
            0.1, 1e-5, 1.0, 0.0, False,
        )  # fmt: skip
        return y, stats, *ops.backward(self.dy, self.x, None, stats)

    def state(self):
        return self.running_mean, self.running_std, self.steps


def after(steps, shape, seed=0):
    """Results and state after a number of eager steps on the current stream, alone on the GPU."""
    layer = Layer(shape, seed)
    for _ in range(steps):
        results = layer.step()
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in (*results, *layer.state())]


def assert_same_bits(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_the_shapes_are_what_they_are_for():
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for shape, has_teams in ((LONE, False), (TEAM, True)):
        for pass_ in ("forward", "backward"):
            plan = _C.plan(pass_, shape[0], shape[1], shape[2] * shape[3], sm_count=sms)
            assert (plan.team > 1) == has_teams
    if sms == 132:  # as many as the shape is made for
        for pass_ in ("forward", "backward"):
            assert _C.plan(pass_, 32, 128, 28 * 28).prefetch
            plan = _C.plan(pass_, 64, 4, 224 * 224)
            assert plan.team > 1 and plan.retained
            plan = _C.plan(pass_, 256, 2048, 7 * 7)
            assert plan.bundles and plan.team > 1
            plan = _C.plan(pass_, 256, 256, 19 * 19, dtype="bfloat16")
            assert plan.unaligned and plan.team > 1
            for share in (16, 32):
                assert _C.plan(pass_, share, 2048, 7 * 7, dtype="bfloat16").bundles


def profile_of_a_step(layer):
    """Of the second one: the first one also loads the kernels."""
    layer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        layer.step()
        torch.cuda.synchronize()
    return profile


@each_kind
def test_one_kernel_each_way_and_nothing_else(shape):
    profile = profile_of_a_step(Layer(shape))
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]
    assert len(names) == 2, names
    assert "forward" in names[0] and "backward" in names[1]


@pytest.mark.parametrize("shape", [AHEAD, RETAIN], ids=["prefetch", "retain"])
def test_what_is_planned_to_be_in_shared_memory_is(shape, tmp_path):
    """A launch that is refused falls back to a plan without it, and is as right."""
    device = torch.cuda.get_device_properties(0)
    plans = [
        _C.plan(
            pass_, shape[0], shape[1], shape[2] * shape[3], sm_count=device.multi_processor_count,
            l2_bytes=device.L2_cache_size, capability=10 * device.major + device.minor,
            shared_bytes=device.shared_memory_per_multiprocessor,
        )
        for pass_ in ("forward", "backward")
    ]  # fmt: skip
    trace = tmp_path / "trace.json"
    profile_of_a_step(Layer(shape)).export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    for kernel, plan in zip(kernels, plans, strict=True):
        # The trace counts the static arrays too, a few hundred bytes in these kernels.
        static = kernel["args"]["shared memory"] - plan.dynamic_shared_bytes
        assert 0 <= static < 4096


def test_plans_of_different_sizes_alternate():
    """Each asks for its own amount of the shared memory that its kernel is allowed."""
    shapes = [(12, 128, 28, 28), (6, 128, 56, 56), AHEAD, TEAM]
    for pass_ in ("forward", "backward"):
        taken = {_C.plan(pass_, n, c, h * w).dynamic_shared_bytes for n, c, h, w in shapes}
        assert len(taken) == 3, "on an H200"
    layers = [Layer(shape) for shape in shapes]
    for _ in range(3):
        for layer in layers:
            y, _, dx, *_ = layer.step()
            assert y.isfinite().all() and dx.isfinite().all()
    for shape, layer in zip(shapes, layers, strict=True):
        assert_same_bits([*layer.step(), *layer.state()], after(4, shape))


@pytest.mark.parametrize("shape", [RETAIN, (256, 32, 7, 7)], ids=["teams", "lone blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_retained_is_as_right_as_on_the_cpu(shape, dtype, format_):
    """Several rounds of every slot width that these have. dy is around zero: else dweight shows the
    last bit of the mean, times all dy."""
    results = []
    x, dy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    x = x * 3 + 1
    for device in ("cuda", "cpu"):
        x_, dy_ = (t.to(device, dtype).contiguous(memory_format=format_) for t in (x, dy))
        y, stats = ops.forward(x_, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
        results.append([t.cpu() for t in (y, stats, *ops.backward(dy_, x_, None, stats))])
    for got, want in zip(*results, strict=True):
        loose = 2e-2 if got.dtype == torch.bfloat16 else 1e-4 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=2e-2 if loose == 2e-2 else 1e-4, atol=loose)


@each_kind
def test_the_same_bits_on_every_run(shape):
    expected = after(3, shape)
    for _ in range(10):
        assert_same_bits(after(3, shape), expected)


def test_streams_do_not_disturb_each_other():
    expected = [after(20, TEAM, seed) for seed in range(4)]
    layers = [Layer(TEAM, seed) for seed in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results = [None] * 4
    for _ in range(20):
        for index, (layer, stream) in enumerate(zip(layers, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[index] = layer.step()
    torch.cuda.synchronize()
    for result, layer, wanted in zip(results, layers, expected, strict=True):
        assert_same_bits([*result, *layer.state()], wanted)


@each_kind
def test_a_graph_steps_on_and_does_not_disturb_eager_work(shape):
    """The schedule and the counter live on the device: every replay is the next step."""
    expected, eagerly_expected = after(20, shape, 0), after(20, shape, 1)
    captured, eager = Layer(shape, 0), Layer(shape, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured.step()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(stream):
            graph.replay()
        eager_results = eager.step()
    torch.cuda.synchronize()
    assert captured.steps.item() == 20
    assert_same_bits([*results, *captured.state()], expected)
    assert_same_bits([*eager_results, *eager.state()], eagerly_expected)


def test_two_graphs_do_not_disturb_each_other():
    expected = [after(20, TEAM, seed) for seed in range(2)]
    layers, graphs, results = [Layer(TEAM, seed) for seed in range(2)], [], []
    for layer in layers:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(layer.step())
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for result, layer, wanted in zip(results, layers, expected, strict=True):
        assert_same_bits([*result, *layer.state()], wanted)


@pytest.mark.parametrize("shape", [TEAM, AHEAD, RETAIN], ids=["teams", "prefetch", "retain"])
def test_the_first_call_of_a_process_may_be_captured(shape):
    """Memory for the barriers is then allocated, and the kernel allowed more shared memory, while
    the capture is under way."""
    program = f"""
import torch, batchrenorm_cuda
x = torch.randn({shape}, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y, stats = torch.ops.batchrenorm.forward(x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
graph.replay()
expected = torch.nn.functional.batch_norm(x, None, None, training=True)
torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_waits_for_the_gpu():
    layer = Layer(TEAM)
    layer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Ranks:
    """What two ranks compute of one batch, exchanges done by hand; a training step on its state."""

    def __init__(self, shape, device="cuda", dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(2, *shape, generator=generator).to(device, dtype) * 3 + 1).unbind()
        self.shares = [(t[: len(x) // 3], t[len(x) // 3 :]) for t in (x, dy)]
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.running_mean = torch.zeros(shape[1], device=device, dtype=real)
        self.running_std = torch.ones(shape[1], device=device, dtype=real)
        self.steps = torch.zeros((), dtype=torch.long, device=device)
        self.schedule = torch.tensor([2, 3, 9, 5, 7], dtype=torch.float64, device=device)

    def step(self):
        gathered = torch.stack([ops.moments(x, True) for x in self.shares[0]])
        state = (self.running_mean, self.running_std, self.steps, self.schedule)
        dtype = self.shares[0][0].dtype
        stats, total = ops.merge(gathered, dtype, *state, 0.1, 1e-5, 1.0, 0.0, True)
        shares = list(zip(*self.shares, strict=True))
        y = [ops.renormalize(x, None, None, stats) for x, _ in shares]
        parts = [ops.backward_sums(dy, x, stats) for x, dy in shares]
        sums = sum(part[0] for part in parts)
        dx = [ops.backward_project(dy, x, None, stats, sums, total) for x, dy in shares]
        dweight, dbias = (sum(part[k] for part in parts) for k in (1, 2))
        return torch.cat(y), torch.cat(dx), dweight, dbias, stats, total, *state[:3]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *product(
            [LONE, TEAM, (48, 100)],
            [torch.float32, torch.float64, torch.bfloat16],
        ),
        (SHARED_BUNDLES, torch.bfloat16),
    ],
    ids=str,
)
def test_several_ranks_compute_what_they_do_on_the_cpu(shape, dtype):
    on_gpu, on_cpu = Ranks(shape, "cuda", dtype), Ranks(shape, "cpu", dtype)
    for _ in range(4):
        found, wanted = on_gpu.step(), on_cpu.step()
    for got, want in zip(found, wanted, strict=True):
        loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        if dtype == torch.float32:
            loose = {"rtol": 1e-4, "atol": 1e-4 * float(want.abs().max())}
        torch.testing.assert_close(got.cpu(), want, **loose)


@each_kind
def test_a_step_of_several_ranks_can_be_captured(shape):
    """Nothing in it waits for the host, and state moves on with every replay."""
    eager, captured = Ranks(shape), Ranks(shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured.step()
    for _ in range(5):
        graph.replay()
        expected = eager.step()
    torch.cuda.synchronize()
    assert captured.steps.item() == 5
    assert_same_bits(results, expected)


def test_synchronised_on_several_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for outcome in ranks.run(2, ["equals_one_process_on_gpus"], tmp_path):
        assert outcome.get("equals_one_process_on_gpus") == "passed", outcome


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(TEAM, device="cuda:1")
    with torch.cuda.device(0):
        y, stats = ops.forward(x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
        assert torch.cuda.current_device() == 0
    assert y.device == stats.device == x.device
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_tensors_of_different_devices_are_refused():
    x, column = torch.randn(4, 3, device="cuda"), torch.ones(3, device="cuda")
    with pytest.raises(
        RuntimeError, match="running_std must be on the device of x, cuda:0, got cpu"
    ):
        ops.inference(x, None, None, column, column.cpu())
    with pytest.raises(RuntimeError, match="x must be on the device of the other tensors"):
        ops.inference(x.cpu(), None, None, column, column)
