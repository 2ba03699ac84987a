"""CUDA graphs of whole layers: every replay is the next step, as it is in eager mode.

Schedule and counter are on the device, so a captured forward finds the limits of its own step, and
what is set in place afterwards, limits and statistics, takes effect in graphs captured before.
tests/test_cuda.py looks at the operators' graphs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from batchrenorm_cuda import BatchRenorm1d, RenormSchedule, monitor_clipping, set_limits

pytestmark = pytest.mark.gpu

SCHEDULE = RenormSchedule(2, 1.5, 6, 0.7, 4)  # limits move in the middle of the batches below
STEPS = 8


def network():
    torch.manual_seed(0)
    layer = BatchRenorm1d(4, momentum=0.3, schedule=SCHEDULE)
    return nn.Sequential(nn.Linear(5, 4), layer, nn.ReLU(), nn.Linear(4, 3)).cuda()


def batches():
    """Inputs and cotangents."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        x = torch.randn(16, 5, generator=generator) * (1 + step % 3) + step
        found.append((x.cuda().requires_grad_(), torch.randn(16, 3, generator=generator).cuda()))
    return found


def step(model, x, dy):
    """Output and gradients, x's first."""
    y = model(x)
    return y, *torch.autograd.grad(y, (x, *model.parameters()), dy)


def assert_close(found, want):
    torch.testing.assert_close(list(found), list(want), rtol=1e-4, atol=1e-5)


def capture(model):
    """A graph of a training step, with what it reads and writes. The warm-up that torch asks for
    makes steps, too, so the state is put back."""
    x, dy = (t.detach().clone() for t in batches()[0])
    x.requires_grad_()
    state = copy.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(model, x, dy)
    model.load_state_dict(state)

    def replay(new_x, new_dy):
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        return [t.clone() for t in results]

    return replay


def test_a_captured_step_steps_on():
    model = network()
    twin = copy.deepcopy(model)
    replay = capture(model)
    for x, dy in batches():
        assert_close(replay(x, dy), step(twin, x, dy))
        assert_close(model.buffers(), twin.buffers())
    assert model[1].num_batches_tracked.item() == STEPS


def test_a_captured_step_sees_what_is_set_afterwards():
    model = network()
    twin = copy.deepcopy(model)
    replay = capture(model)
    changes = [
        lambda m: set_limits(m, 3.0, 0.1),
        lambda m: m[1].set_steps_per_update(4),
        lambda m: m[1].set_schedule(SCHEDULE),
        lambda m: m[1].reset_running_stats(),
    ]
    for change, (x, dy) in zip(changes, batches(), strict=False):
        change(model), change(twin)
        assert_close(replay(x, dy), step(twin, x, dy))
        assert_close(model.buffers(), twin.buffers())


def test_make_graphed_callables():
    """Its warm-up runs the model, so the state is put back, in place. In eval mode it runs the
    model as it is."""
    model = network()
    twin = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (batches()[0][0],))
    model.load_state_dict(state)
    for x, dy in batches():
        assert_close(step(graphed, x, dy), step(twin, x, dy))
        assert_close(model.buffers(), twin.buffers())
    assert model[1].num_batches_tracked.item() == STEPS
    x = batches()[0][0]
    assert_close([graphed.eval()(x)], [twin.eval()(x)])
    assert model[1].num_batches_tracked.item() == STEPS


@pytest.mark.parametrize("monitored", [False, True], ids=["alone", "monitored"])
def test_reduce_overhead(monitored):
    """torch.compile's own graphs: nothing is left out of them, and each call is one step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network()
    twin = copy.deepcopy(model)
    if monitored:
        monitor, expected = monitor_clipping(model), monitor_clipping(twin)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def compiled_step(x, dy):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        gradients = torch.autograd.grad(y, (x, *model.parameters()), dy)
        return [t.clone() for t in (y, *gradients)]

    for x, dy in batches():
        assert_close(compiled_step(x, dy), step(twin, x, dy))
        assert_close(model.buffers(), twin.buffers())
    assert model[1].num_batches_tracked.item() == STEPS
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    if monitored:
        (found,), (want,) = monitor.read().values(), expected.read().values()
        assert found.steps == STEPS
        assert vars(found) == pytest.approx(vars(want), rel=1e-4)


def test_reduce_overhead_in_inference():
    torch._dynamo.reset()
    model = network()
    for x, _ in batches():
        model(x)
    model.eval()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for x, _ in batches():
            torch.compiler.cudagraph_mark_step_begin()
            assert_close([compiled(x).clone()], [twin(x)])
    assert_close(model.buffers(), twin.buffers())


def test_limits_are_not_set_within_a_capture():
    """It would record a copy from memory that is gone when the graph is replayed."""
    layer = BatchRenorm1d(4, device="cuda")
    before, graph = layer.schedule.clone(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured: set it between"):
        with torch.cuda.graph(graph):
            layer.running_mean.add_(0)
            layer.set_limits(2.0, 1.0)
    assert torch.equal(layer.schedule, before)
