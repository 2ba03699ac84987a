"""Activation checkpointing: gradients equal to those without it, statistics moved once.

Every scenario runs without checkpointing and with each kind of it, and all results are compared:
gradients of inputs and parameters, moving statistics, counters.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from devices import each_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from batchrenorm_cuda import BatchRenorm2d, RenormSchedule, batch_renorm, checkpoint_context_fn

FRONT, BACK = slice(None, 3), slice(3, None)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(device):
    torch.manual_seed(0)
    schedule = RenormSchedule.constant(2.0, 1.0)

    def block(channels):
        layer = BatchRenorm2d(4, momentum=0.3, schedule=schedule)
        return [nn.Conv2d(channels, 4, 3), layer, nn.ReLU()]

    return nn.Sequential(*block(3), *block(4)).to(device)


def batches(device):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 4, 3, 8, 8, generator=generator)
    return [(t * (i + 1) + i).to(device).requires_grad_() for i, t in enumerate(x)]


def loss(y, seed=0):
    """With a gradient that is not constant, which a normaliser would not pass on."""
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return (y * cotangent.to(y.device)).sum()


# Scenarios: model, how to call (plainly, or through a checkpoint), inputs.


def in_turn(model, call, xs):
    for i, x in enumerate(xs):
        loss(call(model, x), i).backward()


def outstanding(model, call, xs):
    """All forwards before all backwards, and these in another order."""
    ys = [call(model, x) for x in xs]
    for i in (1, 2, 0):
        loss(ys[i], i).backward()


def one_backward(model, call, xs):
    sum(loss(call(model, x), i) for i, x in enumerate(xs)).backward()


def several_times_in_a_region(model, call, xs):
    def region(x):
        return model(x) + 2 * model(x) - model(x + 1).cos()  # twice with the very same input

    for i, x in enumerate(xs):
        loss(call(region, x), i).backward()


def the_same_batch_again(model, call, xs):
    """Nothing in the data tells these apart; r and d differ."""
    ys = [call(model, xs[0]) for _ in range(3)]
    for i in (1, 0, 2):
        loss(ys[i], i).backward()


def nested(model, call, xs):
    def region(x):
        return call(model[BACK], call(model[FRONT], x))

    ys = [call(region, x) for x in xs]
    for i in (1, 2, 0):
        loss(ys[i], i).backward()


def backward_twice(model, call, xs):
    first = loss(call(model, xs[0]))
    first.backward(retain_graph=True)
    second = loss(call(model, xs[1]), 1)
    first.backward()
    second.backward()


def evaluation_in_between(model, call, xs):
    y = call(model, xs[0])
    with torch.no_grad():
        model.eval()(xs[1])
    model.train()
    loss(y).backward()


def other_forwards_in_between(model, call, xs):
    y = call(model, xs[0])
    with torch.no_grad():
        model(xs[1])  # statistics move, without a graph
    model(xs[2])  # and with one that is dropped
    loss(y).backward()


def backward_inside_a_region(model, call, xs):
    def region(x):
        inner = model(x)
        (penalty,) = torch.autograd.grad(loss(inner, 7), x, create_graph=True)
        return inner + penalty.square().mean()

    loss(call(region, xs[0])).backward()


SCENARIOS = [
    in_turn,
    outstanding,
    one_backward,
    several_times_in_a_region,
    the_same_batch_again,
    nested,
    backward_twice,
    evaluation_in_between,
    other_forwards_in_between,
]


def of_kinds(*kinds):
    """Calls through checkpoints of these kinds in turn; inside a region, on from its own."""
    turns, inside = itertools.count(), []

    def call(f, x):
        turn = inside[-1] + 1 if inside else next(turns)

        def region(x):
            inside.append(turn)
            try:
                return f(x)
            finally:
                inside.pop()

        return checkpoint(region, x, **kinds[turn % len(kinds)])

    return call


REENTRANT, NOT = {"use_reentrant": True}, {"use_reentrant": False}
SELECTIVE = {
    "context_fn": functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
    )
}
SAVES_THE_LAYER = {
    "context_fn": functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.batchrenorm.forward.default]
    )
}
CONVOLUTIONS = [torch.ops.aten.convolution.default]
KINDS = {
    "not reentrant": (NOT,),
    "reentrant": (REENTRANT,),
    "no early stop": (NOT | {"early_stop": False},),
    "alternating": (NOT, REENTRANT),
    "alternating, reentrant first": (REENTRANT, NOT),
    "selective": (NOT | SELECTIVE,),
    "selective, saves the layer": (NOT | SAVES_THE_LAYER,),
    "selective, by checkpoint_context_fn": (NOT | {"context_fn": checkpoint_context_fn},),
    "selective, by checkpoint_context_fn and a list": (
        NOT | {"context_fn": functools.partial(checkpoint_context_fn, CONVOLUTIONS)},
    ),
}


def run(scenario, call, device):
    model, xs = network(device), batches(device)
    scenario(model, call, xs)
    gradients = {f"x{i}": x.grad for i, x in enumerate(xs)}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    return gradients, dict(model.named_buffers())


@each_device()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@pytest.mark.filterwarnings("error", "ignore:None of the inputs have requires_grad")
def test_checkpointing_changes_nothing(scenario, kind, device):
    if scenario is backward_twice and "selective" in kind:
        pytest.skip("torch refuses it")
    gradients, state = run(scenario, lambda f, x: f(x), device)
    found_gradients, found_state = run(scenario, of_kinds(*KINDS[kind]), device)
    torch.testing.assert_close(found_state, state, rtol=0, atol=0)
    for name, want in gradients.items():
        found = found_gradients[name]
        assert (found is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_gradient_inside_a_region():
    gradients, state = run(backward_inside_a_region, lambda f, x: f(x), "cpu")
    call = of_kinds(NOT | {"early_stop": False})
    found_gradients, found_state = run(backward_inside_a_region, call, "cpu")
    torch.testing.assert_close(found_state, state, rtol=0, atol=0)
    torch.testing.assert_close(found_gradients["x0"], gradients["x0"], rtol=1e-4, atol=1e-4)


@each_device()
@pytest.mark.parametrize("kind", [REENTRANT, NOT], ids=["reentrant", "not reentrant"])
def test_checkpoint_sequential(kind, device):
    model, twin, (x, *_), (y, *_) = (
        network(device),
        network(device),
        batches(device),
        batches(device),
    )
    loss(checkpoint_sequential(model, 2, x, **kind)).backward()
    loss(twin(y)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(
        dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", [REENTRANT, NOT], ids=["reentrant", "not reentrant"])
@pytest.mark.filterwarnings("error")
def test_the_functional_form_repeats_too(kind):
    results = []
    for call in (lambda f, x: f(x), of_kinds(kind)):
        x, mean, std = batches("cpu")[2], torch.zeros(3), torch.ones(3)
        y = call(lambda x, s=(mean, std): batch_renorm(x, *s, training=True, momentum=0.5), x)
        loss(y).backward()
        results.append((x.grad, mean, std))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [REENTRANT, NOT], ids=["reentrant", "not reentrant"])
def test_saved_tensors_on_the_cpu_and_checkpointing(kind):
    """Other saved-tensor hooks, outside and inside a region."""
    gradients, state = run(in_turn, lambda f, x: f(x), "cpu")
    for outside in (True, False):

        def call(f, x, outside=outside):
            offload = torch.autograd.graph.save_on_cpu
            if outside:
                with offload():
                    return checkpoint(f, x, **kind)

            def region(x):
                with offload():
                    return f(x)

            return checkpoint(region, x, **kind)

        found_gradients, found_state = run(in_turn, call, "cpu")
        torch.testing.assert_close(found_state, state, rtol=0, atol=0)
        torch.testing.assert_close(found_gradients, gradients)


class RecomputedBlock(torch.autograd.Function):
    """Checkpointing of another make: two branches, run again in the other order, as a reversible
    network does, from an input that is restored only to rounding."""

    @staticmethod
    def forward(ctx, x, first, second):
        ctx.branches = first, second
        y = first(x) + second(x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        x = ((x + 1) - 1).detach().requires_grad_()
        with torch.enable_grad():
            for branch in reversed(ctx.branches):
                branch(x).backward(dy)
        return x.grad, None, None


@pytest.mark.filterwarnings("error")
def test_other_functions_that_recompute_are_recognised():
    model, twin = network("cpu"), network("cpu")
    other, twin_other = copy.deepcopy(model[FRONT]), copy.deepcopy(twin[FRONT])
    (x, *_), (z, *_) = batches("cpu"), batches("cpu")
    loss(RecomputedBlock.apply(x, model[FRONT], other)).backward()
    loss(twin[FRONT](z) + twin_other(z)).backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((model, twin), (other, twin_other)):
        found, want = dict(ours.named_buffers()), dict(theirs.named_buffers())
        torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("with_grad", [True, False])
def test_a_new_forward_inside_a_backward_counts_and_warns(with_grad):
    model = network("cpu")
    layer, twin = model[1], copy.deepcopy(model[1])
    x = torch.randn(4, 4, 2, 2)

    def forward_in_hook(gradient):
        with torch.set_grad_enabled(with_grad):
            layer(x)
        return gradient

    leaf = torch.ones(2, requires_grad=True)
    y = leaf * 2
    y.register_hook(forward_in_hook)
    with pytest.warns(UserWarning, match="inside a backward pass counts as a new batch"):
        y.sum().backward()
    twin(x)
    torch.testing.assert_close(
        dict(layer.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0
    )


def test_an_unknown_repetition_warns():
    """The forward leaves no trace, as checkpointing in C++ would."""
    layer = network("cpu")[1]
    x = torch.randn(4, 4, 2, 2)
    layer(x)
    leaf = torch.ones(2, requires_grad=True)
    y = leaf * 2
    y.register_hook(lambda g: torch.enable_grad()(layer)(x).sum() * 0 + g)
    with pytest.warns(UserWarning, match="If it is there to repeat an earlier forward"):
        y.sum().backward()


@pytest.mark.filterwarnings("error")
def test_inference_inside_a_backward_is_silent():
    layer = network("cpu")[1].eval()
    leaf = torch.ones(2, requires_grad=True)
    y = leaf * 2
    y.register_hook(lambda g: layer(torch.randn(4, 4, 2, 2)).sum() * 0 + g)
    y.sum().backward()


def test_a_region_that_calls_the_layer_more_often_the_second_time_fails():
    model, (x, *_) = network("cpu"), batches("cpu")
    calls = itertools.count(1)

    def region(x):
        y = model[:2](x)
        for _ in range(next(calls)):
            y = y + model[:2](x)
        return y

    y = checkpoint(region, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="more often than the 2 times of the forward"):
        loss(y).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept(kind):
    model, (x, *_) = network("cpu"), batches("cpu")
    call = of_kinds(*KINDS[kind])

    def tensors():
        return sum(issubclass(type(t), torch.Tensor) for t in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            loss(call(model, x)).backward()
        before = tensors()
        for _ in range(10):
            loss(call(model, x)).backward()
        for _ in range(10):
            with torch.no_grad():
                model(x)
        assert tensors() == before  # without the help of the garbage collector
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [REENTRANT, NOT], ids=["reentrant", "not reentrant"])
def test_a_graph_that_is_dropped_takes_everything_with_it(kind):
    model, (x, *_) = network("cpu"), batches("cpu")
    buffer = weakref.ref(model[1].running_mean)
    y = checkpoint(model, x, **kind)
    assert b"tape" not in pickle.dumps(model)
    copy.deepcopy(model)
    del model, y
    gc.collect()
    assert buffer() is None


def test_a_policy_that_saves_the_layer_may_be_a_function():
    def policy(context, op, *args, **kwargs):
        ours = op is torch.ops.batchrenorm.forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    gradients, state = run(outstanding, lambda f, x: f(x), "cpu")
    found_gradients, found_state = run(outstanding, of_kinds(NOT | {"context_fn": contexts}), "cpu")
    torch.testing.assert_close(found_state, state, rtol=0, atol=0)
    torch.testing.assert_close(found_gradients, gradients)


class Count(TorchDispatchMode):
    """How often an operator is computed."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "calls"),
    [(None, 4), (CONVOLUTIONS, 2), (lambda context, op, *_, **__: op in CONVOLUTIONS, 2)],
    ids=["none", "list", "function"],
)
def test_a_policy_of_your_own_still_decides(policy, calls):
    model, (x, *_) = network("cpu"), batches("cpu")
    contexts = functools.partial(checkpoint_context_fn, policy)
    with Count(*CONVOLUTIONS) as count:
        loss(checkpoint(model, x, use_reentrant=False, context_fn=contexts)).backward()
    assert count.calls == calls


def test_ordinary_training_does_not_look_for_regions(monkeypatch):
    from batchrenorm_cuda import checkpoint as ours

    monkeypatch.setattr(ours, "repetition", lambda *_: pytest.fail("looked"))
    model, (x, *_) = network("cpu"), batches("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model(x)).backward()


def test_hooks_that_refer_to_what_is_not_there_yet():
    """A checkpoint's frame is looked for in what the hooks hold."""
    layer = BatchRenorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t if t.dim() else later(t), lambda t: t
    ):
        y = layer(x)
    later = torch.clone
    y.backward(torch.randn_like(y))
    assert layer.num_batches_tracked == 1 and x.grad.abs().max() > 0.1
