"""torch.compile and the checks of torch.library: the layer as a graph.

A Batch Renormalization in plain torch operations gets silently wrong gradients from torch.compile,
which recomputes r from statistics that have moved; so every gradient here is compared with eager's,
under random cotangents.
"""

from __future__ import annotations

import copy
import functools
import gc
import traceback

import pytest
import torch
import torch._dynamo.testing
from devices import each_device
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    RenormSchedule,
    batch_renorm,
    checkpoint_context_fn,
    clipping,
    reference,
)

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Before and after: Dynamo runs in eager mode from then on what it once failed to compile."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps_of(model, call, shape, device, steps=3, dtype=torch.float32):
    """Outputs, gradients and state over a few steps of different inputs."""
    generator = torch.Generator().manual_seed(7)
    results = []
    for step in range(steps):
        x = torch.randn(*shape, generator=generator) * (1 + step) + step
        x = x.to(device, dtype).requires_grad_()
        y = call(x)
        dy = torch.randn(*y.shape, generator=generator).to(device, dtype)
        model.zero_grad()
        y.backward(dy)
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        # Copies: the next replay of a CUDA graph writes where this one has written.
        results.append([t.detach().clone() for t in (y, *gradients, *model.buffers())])
    return results


@each_device()
@BACKENDS
@MODES
def test_compiled_steps_are_eager_steps(training, backend, device):
    schedule = RenormSchedule(0, 2.0, 4, 3.0, 4)  # limits that move with every step
    model = nn.Sequential(
        nn.Linear(5, 4), BatchRenorm1d(4, momentum=0.3, schedule=schedule), nn.ReLU()
    )
    nn.init.normal_(model[1].weight)
    model.to(device).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = steps_of(model, compiled, (6, 5), device)
    want = steps_of(twin, twin, (6, 5), device)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert model[1].num_batches_tracked.item() == 3 * training


@each_device()
@MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_compiled_in_other_dtypes_and_channels_last(dtype, training, device):
    model = BatchRenorm2d(3, dtype=dtype, device=device).train(training)  # half-precision weights
    model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def last(call):
        return lambda x: call(x.to(memory_format=torch.channels_last))

    found = steps_of(model, last(compiled), (4, 3, 5, 5), device, 2, dtype)
    want = steps_of(twin, last(twin), (4, 3, 5, 5), device, 2, dtype)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


def test_the_schedule_moves_and_is_replaced_without_recompiling():
    model = BatchRenorm1d(4, schedule=RenormSchedule(1, 3.0, 5, 3.0, 5))
    twin = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert steps_of(model, compiled, (6, 4), "cpu", 1) is not None
    steps_of(twin, twin, (6, 4), "cpu", 1)
    frames = counter.frame_count
    for schedule in (None, RenormSchedule.constant(1.5, 0.1), RenormSchedule()):
        if schedule is not None:
            model.set_schedule(schedule), twin.set_schedule(schedule)
        found = steps_of(model, compiled, (6, 4), "cpu", 4)
        torch.testing.assert_close(found, steps_of(twin, twin, (6, 4), "cpu", 4))
    assert counter.frame_count == frames


@BACKENDS
def test_dynamic_shapes_compile_once(backend):
    model = BatchRenorm2d(4, schedule=RenormSchedule(0, 2.0, 9, 3.0, 9))
    twin = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    frames = None
    for n in (5, 7, 8, 12):
        shape = (n, 4, n + 4, 2 * n + 9)
        found = steps_of(model, compiled, shape, "cpu", 1)
        torch.testing.assert_close(
            found, steps_of(twin, twin, shape, "cpu", 1), rtol=1e-4, atol=1e-4
        )
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@MODES
def test_the_functional_form_compiles(training):
    weight = torch.rand(3, requires_grad=True)
    results = []
    for layer in (batch_renorm, reference.batch_renorm):
        torch.manual_seed(1)
        x, dy = torch.randn(2, 6, 3).unbind()
        mean, std = torch.randn(3), torch.rand(3) + 0.5
        x.requires_grad_()

        def call(x, mean, std, layer=layer):
            return layer(x * 2, mean, std, weight, None, training, 0.1, 1e-3, 2.0, 1.0).relu()

        if layer is batch_renorm:
            call = torch.compile(call, fullgraph=True)
        y = call(x, mean, std)
        results.append((y, mean, std, *torch.autograd.grad(y, (x, weight), dy)))
    torch.testing.assert_close(*results)


def test_a_compiled_call_without_gradients():
    model = BatchRenorm1d(3)
    twin = copy.deepcopy(model)
    x = torch.randn(6, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_bad_arguments_do_not_compile():
    compiled = torch.compile(lambda x, s: batch_renorm(x, s, torch.ones(3)), fullgraph=True)
    with pytest.raises(Exception, match="running_mean must have shape"):
        compiled(torch.ones(6, 3), torch.zeros(4))
    compiled = torch.compile(lambda x: batch_renorm(x, None, None, training=True), fullgraph=True)
    with pytest.raises(Exception, match="more than one value per channel"):
        compiled(torch.ones(1, 3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_and_transforms(backend):
    """A transform around what is compiled is compiled. One inside is not, and must not be wrong."""
    x, dy = torch.randn(2, 6, 3).unbind()

    def loss(x, layer=batch_renorm):
        state = torch.zeros(3), torch.ones(3)
        return (layer(x, *state, training=True, r_max=1.5, d_max=0.3) * dy).sum()

    want = torch.func.grad(functools.partial(loss, layer=reference.batch_renorm))(x)
    found = torch.func.grad(torch.compile(loss, backend=backend))(x)
    torch.testing.assert_close(found, want)
    found = torch.compile(torch.func.grad(loss), backend=backend)(x)
    torch.testing.assert_close(found, want)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not compile|Observed exception"):
        torch.compile(torch.func.grad(loss), backend=backend, fullgraph=True)(x)

    def ensemble(x, mean, std):
        return torch.func.vmap(lambda *a: batch_renorm(*a, training=True))(x, mean, std)

    members = torch.stack([x, 2 * x + 1])
    states = [(torch.zeros(2, 3), torch.ones(2, 3)) for _ in range(2)]
    found = torch.compile(ensemble, backend=backend)(members, *states[0])
    torch.testing.assert_close(found, ensemble(members, *states[1]))
    torch.testing.assert_close(*states)


def sample(shape, dtype=torch.float32, form=torch.contiguous_format):
    torch.manual_seed(0)
    c = shape[1]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = torch.randn(2, *shape, dtype=dtype).unbind()
    x = x.contiguous(memory_format=form)
    weight, bias, mean = torch.randn(3, c, dtype=real).unbind()
    return x, dy, weight, bias, mean, torch.rand(c, dtype=real) + 0.5


# Symbolic shapes are traced in opcheck's test_aot_dispatch_dynamic.
INPUTS = {
    "2-D": lambda: sample((6, 3)),
    "3-D": lambda: sample((6, 3, 5), torch.float64),
    "4-D": lambda: sample((2, 3, 5, 4), torch.bfloat16),
    "channels_last": lambda: sample((2, 3, 5, 4), form=torch.channels_last),
    "channels_last_3d": lambda: sample((2, 3, 5, 4, 2), torch.half, torch.channels_last_3d),
    "sliced": lambda: (sample((4, 3, 6))[0][::2, :, ::2], *sample((2, 3, 3))[1:]),
    "sliced channels_last": lambda: (
        sample((2, 3, 5, 8), form=torch.channels_last)[0][..., ::2],
        *sample((2, 3, 5, 4))[1:],
    ),
    "transposed": lambda: (sample((3, 6))[0].t(), *sample((6, 3))[1:]),
    "permuted": lambda: (sample((2, 3, 4, 5))[0].mT, *sample((2, 3, 5, 4))[1:]),
    "one channel": lambda: sample((4, 1, 6)),
    "one pixel": lambda: sample((4, 3, 1, 1)),
    "one example": lambda: sample((1, 3, 4, 1)),
    "empty": lambda: sample((0, 3, 4)),
}


@each_device()
@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name, device):
    x, dy, weight, bias, mean, std = (t.to(device) for t in INPUTS[name]())
    ops = torch.ops.batchrenorm
    counter = torch.tensor(3, device=device)
    schedule = RenormSchedule().as_tensor(device)
    numbers = (0.1, 1e-5, 3.0, 5.0, False)
    for w, b in ((weight, bias), (None, None))[: 2 if name == "2-D" else 1]:
        opcheck(ops.forward, (x, w, b, mean.clone(), std.clone(), counter, schedule, *numbers))
        opcheck(ops.forward, (x, w, b, None, None, None, None, *numbers))
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, w, b)]
        state = (mean.clone(), std.clone(), counter.clone(), schedule)
        opcheck(ops.training_step, (*leaves, *state, *numbers))
        _, stats = ops.forward(x, w, b, mean.clone(), std.clone(), None, None, *numbers)
        opcheck(ops.backward, (dy, x, w, stats))
        before = ops.before_step(mean, std, counter)
        counts = clipping.new_counts(x.shape[1], x.device)
        opcheck(ops.before_step, (mean, std, counter))
        opcheck(ops.count_clipping, (counts, stats, before, counter))
        opcheck(ops.renormalize, (x, w, b, stats))
        opcheck(ops.inference, (x, w, b, mean, std))
        opcheck(ops.inference_backward, (dy, x, w, mean, std))
        opcheck(ops.recall, (mean, True))
        opcheck(ops.record, (mean, std, stats, 1e-5))

        opcheck(ops.moments, (x, True))
        messages = ops.moments(x, True).expand(2, -1)
        moving = (mean.clone(), std.clone(), counter, schedule)
        opcheck(ops.merge, (messages, x.dtype, *moving, *numbers))
        opcheck(ops.merge, (messages, x.dtype, None, None, None, None, *numbers))
        stats, total = ops.merge(messages, x.dtype, None, None, None, None, *numbers)
        opcheck(ops.backward_sums, (dy, x, stats))
        sums, _, _ = ops.backward_sums(dy, x, stats)
        opcheck(ops.backward_project, (dy, x, w, stats, sums, total))


def test_every_operator_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in names if name.startswith("batchrenorm::")}
    alone = {"forward", "training_step", "renormalize", "inference"}
    together = {"moments", "merge", "backward_sums", "backward_project"}
    assert ours == alone | {"backward", "inference_backward"} | together | {
        "before_step",
        "count_clipping",
        "recall",
        "record",
    }


def blocks():
    torch.manual_seed(0)
    schedule = RenormSchedule.constant(2.0, 1.0)
    layers = [BatchRenorm2d(4, momentum=0.3, schedule=schedule) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), layers[0], nn.ReLU(), nn.Conv2d(4, 4, 3), layers[1], nn.ReLU()
    )


def convolutions_too(context, op, *args, **kwargs):
    saved = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {
    "ours alone": checkpoint_context_fn,
    "with a list": functools.partial(checkpoint_context_fn, [torch.ops.aten.convolution.default]),
    "with a function": functools.partial(checkpoint_context_fn, convolutions_too),
    "by hand": functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.batchrenorm.forward.default]
    ),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_checkpointing_that_saves_the_layer_is_exact(policy, backend):
    model, twin = blocks(), blocks()

    def call(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=POLICIES[policy])

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    found = steps_of(model, compiled, (4, 3, 8, 8), "cpu")
    torch.testing.assert_close(
        found, steps_of(twin, twin, (4, 3, 8, 8), "cpu"), rtol=1e-4, atol=1e-4
    )


def part_without_gradients(layer, x):
    with torch.no_grad():
        t = layer(x)
    return (x * t).sin() * t


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpointing_of_a_part_without_gradients(backend):
    """Another operator takes the step there, which is to be saved too."""
    policies = {"ours": POLICIES["ours alone"], "by hand": POLICIES["by hand"]}
    dy = torch.randn(4, 4, 5, 5)
    for policy, context_fn in policies.items():
        torch._dynamo.reset()
        layer, twin = blocks()[1], blocks()[1]
        x = torch.randn(4, 4, 5, 5, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        options = {"use_reentrant": False, "context_fn": context_fn}
        call = functools.partial(checkpoint, part_without_gradients, layer, **options)
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        if policy == "by hand":  # and does not save it
            with pytest.raises(Exception, match="statistics that it has moved already"):
                compiled(x)
            continue
        compiled(x).backward(dy)
        part_without_gradients(twin, z).backward(dy)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


def test_what_was_compiled_before_is_repeated_rightly_with_the_policy():
    """Not by the policy alone: tests/test_checkpoint_compiled.py does without."""
    model, twin = blocks(), blocks()
    compiled = torch.compile(model, fullgraph=True)
    steps_of(model, compiled, (4, 3, 8, 8), "cpu", 1), steps_of(twin, twin, (4, 3, 8, 8), "cpu", 1)

    def call(x):
        return checkpoint(compiled, x, use_reentrant=False, context_fn=checkpoint_context_fn)

    found = steps_of(model, call, (4, 3, 8, 8), "cpu")
    want = steps_of(twin, twin, (4, 3, 8, 8), "cpu")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_what_is_no_policy():
    with pytest.raises(
        TypeError, match="policy must be a list of operators or a function, got int"
    ):
        checkpoint_context_fn(3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpointing_is_refused_or_right(backend):
    """torch 2.11 happens to save what the layer computes when it compiles around a checkpoint."""
    model, twin = blocks(), blocks()
    call = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend=backend)
    try:
        found = steps_of(model, call, (4, 3, 8, 8), "cpu")
    except Exception as error:
        assert "statistics that it has moved already" in str(error)
        assert "context_fn=batchrenorm_cuda.checkpoint_context_fn" in str(error)
        assert model[1].num_batches_tracked == 0
        # An error inside a checkpoint leaves its saved-tensor hooks to the garbage collector in
        # torch 2.11, and other tests under them.
        traceback.clear_frames(error.__traceback__)
        del error
        gc.collect()
    else:
        want = steps_of(twin, twin, (4, 3, 8, 8), "cpu")
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_reduce_overhead_steps_on_as_eager_does():
    """Its CUDA graphs replay the layer: the schedule and the counter move on the device."""
    schedule = RenormSchedule(2, 2.0, 12, 3.0, 12)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchRenorm2d(4, momentum=0.3, schedule=schedule), nn.ReLU()
    ).cuda()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def call(x):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    shape = (4, 3, 8, 8)
    found = steps_of(model, call, shape, "cuda", steps=10)  # the first few are not replays yet
    want = steps_of(twin, twin, shape, "cuda", steps=10)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert model[1].num_batches_tracked.item() == 10


@pytest.mark.gpu
def test_graphed_callables_step_on_as_eager_does():
    schedule = RenormSchedule(2, 2.0, 20, 3.0, 20)
    model = BatchRenorm2d(4, momentum=0.3, schedule=schedule).cuda()
    twin = copy.deepcopy(model)
    shape = (4, 4, 8, 8)
    sample = torch.randn(shape, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (sample,))
    graphed.load_state_dict(twin.state_dict())  # without the steps of its warm-up
    found = steps_of(graphed, graphed, shape, "cuda", steps=10)
    want = steps_of(twin, twin, shape, "cuda", steps=10)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert graphed.num_batches_tracked.item() == 10


def step_under(option: str, value: object, backend: str) -> dict[str, torch.Tensor]:
    """Relative errors of gradients of two compiled steps, with limits that are not shut."""
    wide = RenormSchedule.constant(2.0, 1.0)
    norms = [BatchRenorm2d(8, momentum=0.3, schedule=wide) for _ in range(2)]
    convs = [nn.Conv2d(channels, 8, 3, bias=False) for channels in (3, 8)]
    model = nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])
    plain = copy.deepcopy(model)
    with torch._functorch.config.patch(option, value):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for x in torch.randn(2, 4, 3, 8, 8):
            dy = torch.randn(4, 8, 4, 4)
            for call in (compiled, plain):
                call.zero_grad()
                call(x).backward(dy)
    assert norms[0].num_batches_tracked == 2
    for got, want in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want)
    return {
        name: (mine.grad - its.grad).norm() / its.grad.norm()
        for (name, mine), its in zip(model.named_parameters(), plain.parameters(), strict=True)
    }


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_memory_budget", 0.9),
        ("activation_memory_budget", 0.1),
        ("aggressive_recomputation", True),
    ],
)
def test_a_backward_pass_that_saves_memory_takes_no_step_again(option, value, backend):
    """torch's partitioner chooses what the backward pass computes again, and does not see that
    statistics have moved."""
    errors = step_under(option, value, backend)
    assert max(errors.values()) < 1e-4, errors


def test_a_backward_pass_that_saves_nothing_is_an_error():
    with pytest.raises(Exception, match="activation_memory_budget=0 has torch.compile repeat"):
        step_under("activation_memory_budget", 0.0, "aot_eager_decomp_partition")
