"""Monitoring of how often and how far r and d are clipped."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from devices import each_device
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    Clipping,
    LazyBatchRenorm1d,
    RenormSchedule,
    checkpoint_context_fn,
    convert,
    fold,
    freeze_statistics,
    functional,
    monitor_clipping,
    monitoring,
    update_stats,
)

SCHEDULE = RenormSchedule(1, 1.5, 4, 0.7, 6)


def made_for_inference():
    with torch.inference_mode():
        return torch.zeros(9, 4, dtype=torch.float64)


def layer_of(**options):
    return BatchRenorm1d(4, momentum=0.3, schedule=SCHEDULE, **options)


def batches(count=8, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    scales, shifts = torch.rand(2, count, 1, 4, generator=generator) * 2 + 0.3
    x = torch.randn(count, 6, 4, generator=generator) * scales + shifts
    return [t.to(device) for t in x]


def truth(data, schedule=SCHEDULE, momentum=0.3, eps=1e-5, steps=None):
    """In float64, by the paper: what a layer of these options clips on these batches."""
    mean, std = torch.zeros(4).double(), torch.ones(4).double()
    sizes = []
    for step, x in enumerate(data):
        x = x.double().cpu()
        r_max, d_max = schedule.limits_at(step)
        batch_mean, batch_std = x.mean(0), (x.var(0, correction=0) + eps).sqrt()
        log_r, d = (batch_std / std).log().abs(), ((batch_mean - mean) / std).abs()
        r_excess, d_excess = (log_r - math.log(r_max)).relu(), (d - d_max).relu()
        sizes.append(torch.stack([log_r, d, r_excess, d_excess]))
        mean += momentum * (batch_mean - mean)
        std += momentum * (batch_std - std)
    log_r, d, r_excess, d_excess = torch.stack(sizes, 1)[:, slice(steps)]
    return Clipping(
        len(log_r),
        *(t.gt(0).double().mean().item() for t in (r_excess, d_excess)),
        *(t.mean().item() for t in (log_r, d, r_excess, d_excess)),
        *(t.max().item() for t in (log_r, d)),
    )


def assert_close(found, want):
    assert found.steps == want.steps
    assert vars(found) == pytest.approx(vars(want), rel=1e-5)


@each_device()
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
def test_counts_are_those_of_the_paper(grad, device):
    layer, twin = layer_of(device=device), layer_of(device=device)
    monitor = monitor_clipping(layer)
    data = batches(device=device)
    want = truth(data)
    assert 0.2 < want.r_clipped < 0.9 and 0.2 < want.d_clipped < 0.9  # the case is worth it
    for x in data:
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(x), twin(x))
    (found,) = monitor.read().values()
    assert_close(found, want)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)

    monitor.reset()
    assert math.isnan(layer.read_clipping().r_clipped) and layer.read_clipping().steps == 0


@pytest.mark.parametrize(
    ("limits", "clipped"), [((1.0, 0.0), (1, 1)), ((math.inf, 0.0), (0, 1)), ((1e9, 1e9), (0, 0))]
)
def test_all_and_nothing_clipped(limits, clipped):
    layer = layer_of()
    layer.set_limits(*limits)
    with monitor_clipping(layer):
        for x in batches():
            layer(x)
        found = layer.read_clipping()
    assert (found.r_clipped, found.d_clipped) == clipped
    assert (found.log_r_excess > 0, found.d_excess > 0) == clipped


def test_rounding_is_not_clipping():
    """Limits wide open, data far from where its first element is, float32."""
    layer = BatchRenorm1d(4, momentum=0.3)
    layer.set_limits(1e9, 1e9)
    layer.monitor_clipping()
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    x[0] = -1e5
    for _ in range(4):
        layer(x)
    assert layer.read_clipping().r_clipped == layer.read_clipping().d_clipped == 0


def test_half_precision_and_several_dimensions():
    layer = BatchRenorm2d(4, momentum=0.3, schedule=SCHEDULE, dtype=torch.bfloat16)
    layer.monitor_clipping()
    data = [x.bfloat16() for x in batches()]
    for x in data:
        layer(x.view(3, 2, 1, 4).permute(0, 3, 1, 2))
    assert_close(layer.read_clipping(), truth(data))


def test_a_model_with_shared_and_other_layers():
    """A shared layer counts each of its calls, once; evaluation and frozen layers nothing."""
    shared = layer_of()
    model = nn.Sequential(shared, nn.Sequential(shared, layer_of(track_running_stats=False)))
    model.append(frozen := layer_of())
    freeze_statistics(frozen)
    with monitor_clipping(model) as monitor:
        for x in batches(3):
            model.train()(x)
            model.eval()(x)
        found = monitor.read()
    assert {name: c.steps for name, c in found.items()} == {"0": 6, "2": 0}
    assert not shared.monitors_clipping and not frozen.monitors_clipping


@each_device()
def test_steps_that_do_not_count_are_not_counted(device):
    layer = layer_of(skip_nonfinite=True).to(device)
    layer.monitor_clipping()
    data = batches(device=device)
    for x in data:
        layer(x)
        poisoned = x.clone()
        poisoned[1, 2] = math.nan
        layer(poisoned)
        layer(x[:0])
        layer(x / 0)
    assert_close(layer.read_clipping(), truth(data))


def test_channels_that_say_nothing_do_not_spoil_the_others():
    """A NaN, and a constant without eps, for which r would be 0."""
    layer = layer_of(eps=0.0)
    layer.monitor_clipping()
    data = batches()
    for x in data:
        x = x.clone()
        x[0, 3] = math.nan
        x[:, 2] = 7
        layer(x)
    found = layer.read_clipping()
    want = layer_of(eps=0.0)
    want.monitor_clipping()
    for x in data:
        want(x)
    torch.testing.assert_close(layer._clipping[:, :2], want._clipping[:, :2])
    assert found.steps == 8 and layer._clipping[0].tolist() == [8, 8, 0, 0]
    assert all(math.isfinite(value) for value in vars(found).values())


def saves(op):
    return functools.partial(create_selective_checkpoint_contexts, op)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "saves the layer": {
        "use_reentrant": False,
        "context_fn": saves([torch.ops.batchrenorm.forward.default]),
    },
    # A repetition would otherwise take results of the count's own arithmetic for the model's.
    "saves all else": {
        "use_reentrant": False,
        "context_fn": saves(lambda c, op, *a, **k: op is not torch.ops.batchrenorm.forward.default),
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_repetition_by_checkpointing_is_not_counted(kind):
    layer, twin = layer_of(), layer_of()
    monitor_clipping(layer), monitor_clipping(twin)

    def region(x, layer):
        return layer(x * 2).abs().add(1).log().exp().sin()

    for x in batches():
        dy = torch.randn(6, 4)
        found, want = (x.clone().requires_grad_() for _ in range(2))
        checkpoint(region, found, layer, **CHECKPOINTS[kind]).backward(dy)
        region(want, twin).backward(dy)
        torch.testing.assert_close(found.grad, want.grad)
    assert layer.read_clipping() == twin.read_clipping()
    assert layer.read_clipping().steps == 8


def test_policies_of_selective_checkpointing_are_not_asked_about_counts():
    """What they save is kept until the backward pass, and a repetition would not ask for it."""
    layer, seen = layer_of(), set()
    layer.monitor_clipping()
    policy = saves(lambda context, op, *_, **__: seen.add(op) or False)
    y = checkpoint(layer, batches()[0].requires_grad_(), use_reentrant=False, context_fn=policy)
    y.sum().backward()
    assert {op.name() for op in seen} == {"batchrenorm::forward"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_steps_are_counted(backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), layer_of(), nn.ReLU())
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    twin = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def compare(x):
        dy = torch.randn(6, 4)
        model.zero_grad(), twin.zero_grad()
        (compiled(x) * dy).sum().backward(), (twin(x) * dy).sum().backward()
        found = [p.grad for p in model.parameters()]
        torch.testing.assert_close(found, [p.grad for p in twin.parameters()])

    data = batches()
    compare(data[0])
    with monitor_clipping(model) as monitor, monitor_clipping(twin) as expected:
        for x in data[1:4]:
            compare(x)
        (found,), (want,) = monitor.read().values(), expected.read().values()
        assert_close(found, want)
        monitor.reset(), expected.reset()
        for x in data[4:]:
            compare(x)
        (found,), (want,) = monitor.read().values(), expected.read().values()
        assert_close(found, want)
        assert found.steps == 4
    compare(data[0])
    assert counter.frame_count == 2  # with and without
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpointing_counts_once(backend):
    torch._dynamo.reset()
    layer, twin = layer_of(), layer_of()
    layer.monitor_clipping(), twin.monitor_clipping()

    def call(x):
        region = nn.Sequential(layer, nn.ReLU())
        return checkpoint(region, x, use_reentrant=False, context_fn=checkpoint_context_fn)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for x in batches():
        dy = torch.randn(6, 4)
        found, want = (x.clone().requires_grad_() for _ in range(2))
        compiled(found).backward(dy)
        twin(want).relu().backward(dy)
        torch.testing.assert_close(found.grad, want.grad)
    assert_close(layer.read_clipping(), twin.read_clipping())
    assert layer.read_clipping().steps == 8


def test_counts_are_no_state_and_no_buffers():
    """Whoever keeps a list of the buffers, or pairs those of two models, does not notice."""
    model = nn.Sequential(layer_of())
    keys, buffers = list(model.state_dict()), len(list(model.buffers()))
    averaged = AveragedModel(model, use_buffers=True)
    with monitor_clipping(model):
        for x in batches():
            model(x)
            averaged.update_parameters(model)
        assert list(model.state_dict()) == keys and len(list(model.buffers())) == buffers
        other = nn.Sequential(layer_of())
        other.load_state_dict(model.state_dict())
        assert not other[0].monitors_clipping


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_count_for_themselves(copied):
    layer = layer_of()
    layer.monitor_clipping()
    data = batches()
    for x in data[:3]:
        layer(x)
    twin = copied(layer)
    for x in data[3:]:
        twin(x)
    assert_close(layer.read_clipping(), truth(data, steps=3))
    assert_close(twin.read_clipping(), truth(data))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        pytest.param(lambda m: m.cuda(), marks=pytest.mark.gpu),
        pytest.param(lambda m: m.to("cuda", torch.half), marks=pytest.mark.gpu),
    ],
)
def test_counts_move_with_the_layer_and_stay_exact(move):
    layer = layer_of()
    layer.monitor_clipping()
    for x in batches():
        layer(x)
    want = layer.read_clipping()
    moved = move(nn.Sequential(layer))[0]
    assert moved.read_clipping() == want
    assert moved._clipping.dtype == torch.float64
    moved(torch.randn(6, 4, device=moved.weight.device, dtype=moved.weight.dtype))
    assert moved.read_clipping().steps == 9


def test_a_meta_layer_becomes_real():
    layer = layer_of(device="meta")
    layer.monitor_clipping()
    layer(torch.empty(6, 4, device="meta"))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.read_clipping().steps == 0


def test_a_meta_layer_becomes_real_by_assignment():
    """Counts that stay behind would be added to nowhere."""
    layer = layer_of(device="meta")
    layer.monitor_clipping()
    layer.load_state_dict(layer_of().state_dict(), assign=True)
    layer(batches()[0])
    assert layer.read_clipping().steps == 1


def test_what_inference_mode_starts_training_goes_on_with():
    layer = layer_of()
    with torch.inference_mode():
        layer.monitor_clipping()
    layer(batches()[0])
    assert layer.read_clipping().steps == 1


def test_without_a_monitor_nothing_is_done(monkeypatch):
    monkeypatch.setattr(functional, "counting", lambda *_: pytest.fail("counted"))
    layer = layer_of()
    with monitor_clipping(layer):
        pass
    for x in batches():
        layer(x.requires_grad_()).sum().backward()


def test_an_update_of_the_statistics_is_not_counted():
    layer = layer_of()
    with monitor_clipping(layer):
        for x in batches(3):
            layer(x)
        before = layer.read_clipping()
        update_stats(layer, batches())
        assert layer.read_clipping() == before


def test_monitors_may_be_nested_and_closed_by_an_exception():
    layer = layer_of()
    with monitor_clipping(layer) as outer:
        layer(batches()[0])
        with monitor_clipping(nn.Sequential(layer)) as inner:
            layer(batches()[1])
            assert inner.read()["0"].steps == outer.read()[""].steps == 2
        assert layer.monitors_clipping
        layer.monitor_clipping(True)
        assert layer.read_clipping().steps == 2
    with pytest.raises(KeyError), monitor_clipping(layer):
        raise KeyError
    assert not layer.monitors_clipping


def test_monitors_may_be_closed_in_any_order():
    model = nn.Sequential(layer_of(), layer_of())
    model[1].monitor_clipping()  # by hand, and so for good
    first = monitor_clipping(model[0])
    model(batches()[0])
    second = monitor_clipping(model)
    model(batches()[1])
    first.close()
    assert model[0].monitors_clipping
    model(batches()[2])
    assert [clipping.steps for clipping in second.read().values()] == [3, 3]
    copied = copy.deepcopy(model)
    first.close(), second.close(), second.close()
    assert [layer.monitors_clipping for layer in model] == [False, True]
    assert copied[0].monitors_clipping  # no monitor's to end
    with monitor_clipping(model) as third:
        model(batches()[3])
        assert third.read()["0"].steps == 1
    assert not model[0].monitors_clipping and not {*model} & {*monitoring._open}


def test_conversions_end_it():
    layer = layer_of()
    layer.monitor_clipping()
    norm = fold(layer)
    assert not hasattr(norm, "_clipping") and not convert(norm).monitors_clipping


def test_a_model_folded_in_the_context_can_leave_it():
    model = nn.Sequential(layer_of(), layer_of())
    with monitor_clipping(model) as monitor:
        fold(model, skip="1")
        with pytest.raises(ValueError, match="0 must be a Batch Renorm .* BatchNorm1d, folded"):
            monitor.read()
        monitor.reset()
    assert not model[1].monitors_clipping


def test_what_cannot_be_monitored():
    with pytest.raises(ValueError, match="clipping must be monitored to be read"):
        layer_of().read_clipping()
    with pytest.raises(ValueError, match="clipping cannot be monitored on a layer with track"):
        layer_of(track_running_stats=False).monitor_clipping()
    lazy = LazyBatchRenorm1d()
    with pytest.raises(ValueError, match="cannot be monitored before the layer has seen a batch"):
        lazy.monitor_clipping()
    model = nn.Sequential(layer_of(), lazy)
    with pytest.raises(ValueError, match="1 must have seen a batch, got a LazyBatchRenorm1d"):
        monitor_clipping(model)
    assert not model[0].monitors_clipping
    model(batches()[0])
    monitor_clipping(model)
    assert lazy.monitors_clipping
    with pytest.raises(ValueError, match="model must have a Batch Renorm .* got a BatchNorm1d"):
        monitor_clipping(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        monitor_clipping([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipping": torch.zeros(9, 3).double()}, r"clipping must be .* \(9, 4\), got"),
        ({"clipping": torch.zeros(9, 4)}, "clipping must be float64"),
        ({"num_batches_tracked": None}, "num_batches_tracked must be given with clipping"),
        ({"running_mean": None, "running_std": None}, "running_mean must be given with clipping"),
        ({"clipping": torch.zeros(9, 4, device="meta").double()}, "clipping must be on the device"),
        ({"clipping": [1]}, "clipping must be a Tensor, got list"),
        ({"clipping": torch.zeros(9, 1).double().expand(9, 4)}, r"a place for each .* \(1, 0\)"),
        ({"clipping": torch.zeros(9, 4).double().to_sparse()}, "a dense tensor .*sparse_coo"),
        ({"clipping": torch.zeros(9, 4).double().requires_grad_()}, "that requires a gradient"),
        ({"clipping": made_for_inference()}, "clipping must not be an inference tensor"),
        ({"running_mean": torch.zeros(5)}, "running_mean must have shape"),
    ],
)
def test_bad_counts_change_nothing(arguments, message):
    mean, std, steps = torch.zeros(4), torch.ones(4), torch.tensor(0)
    given = {"running_mean": mean, "running_std": std, "num_batches_tracked": steps}
    given |= {"clipping": torch.zeros(9, 4).double()} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        functional.batch_renorm(batches()[0], training=True, **given)
    assert mean.eq(0).all() and std.eq(1).all() and steps == 0


@pytest.mark.gpu
def test_counting_does_not_wait_for_the_gpu():
    layer = layer_of(device="cuda")
    layer.monitor_clipping()
    data = batches(device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in data:
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(layer.read_clipping(), truth(data))


@pytest.mark.gpu
def test_a_replayed_graph_counts():
    layer = layer_of(device="cuda")
    data = batches(device="cuda")
    layer.monitor_clipping()
    x = torch.empty_like(data[0])
    copy.deepcopy(layer)(data[0])  # torch's own kernels load on their first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    for t in data:
        x.copy_(t)
        graph.replay()
    assert_close(layer.read_clipping(), truth(data))
    layer.reset_clipping()
    graph.replay()
    assert layer.read_clipping().steps == 1
