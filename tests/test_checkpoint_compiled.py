"""Activation checkpointing that torch.compile does not see: around what is compiled. The operators
find out for themselves that they run again.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchrenorm_cuda import (
    _C,
    BatchRenorm2d,
    RenormSchedule,
    checkpoint_context_fn,
    freeze_statistics,
    monitor_clipping,
    unfreeze_statistics,
)

OURS = ".*(backward pass counts|activation checkpointing).*"
silent = pytest.mark.filterwarnings(f"error:{OURS}:UserWarning")

KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "no early stop": {"use_reentrant": False, "early_stop": False},
    "selective": {"use_reentrant": False, "context_fn": checkpoint_context_fn},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
without_policy = pytest.mark.parametrize("kind", list(KINDS)[:2])


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    schedule = RenormSchedule.constant(2.0, 1.0)
    layers = [BatchRenorm2d(4, momentum=0.3, schedule=schedule) for _ in range(3)]
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), layers[0], nn.Tanh()),
        *(nn.Conv2d(4, 4, 3, padding=1), layers[1], nn.Tanh()),
        *(nn.Conv2d(4, 4, 3, padding=1), layers[2], nn.Tanh()),
    )


def batches() -> list[torch.Tensor]:
    x = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return [(t * (i + 1) + i).requires_grad_() for i, t in enumerate(x)]


def backward(y: torch.Tensor, seed: int = 0) -> None:
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)))


class Pair:
    """A model and its compiled form, in the state that it was made in."""

    def __init__(self, **options):
        torch._dynamo.reset()
        self.model = blocks()
        self.compiled = torch.compile(self.model, fullgraph=True, **options)
        self.fresh = copy.deepcopy(self.model.state_dict())

    def reset(self):
        self.model.load_state_dict(self.fresh)
        self.model.zero_grad()
        self.model.train()
        return self


@pytest.fixture(scope="module")
def inductor():
    """Compiled once: that takes most of the time here."""
    return Pair()


@pytest.fixture
def pair(inductor):
    return inductor.reset()


def results(model, xs):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"x{i}": x.grad for i, x in enumerate(xs)}
    return gradients, {name: t.clone() for name, t in model.named_buffers()}


def assert_right(scenario, pair, call):
    """As the same scenario in eager mode without checkpointing."""
    xs, twin, zs = batches(), blocks(), batches()
    scenario(lambda x: call(pair.compiled, x), xs)
    scenario(twin, zs)
    found, want = results(pair.model, xs), results(twin, zs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def in_turn(f, xs):
    for i, x in enumerate(xs):
        backward(f(x), i)


def outstanding(f, xs):
    ys = [f(x) for x in xs]
    for i in (1, 2, 0):
        backward(ys[i], i)


def with_steps_in_between(f, xs):
    y = f(xs[0])
    f(xs[1])
    with torch.no_grad():
        f(xs[2])
    backward(y)


@every_kind
@pytest.mark.parametrize("scenario", [in_turn, outstanding, with_steps_in_between])
@silent
def test_compiled_code_is_repeated(pair, scenario, kind):
    assert_right(scenario, pair, lambda f, x: checkpoint(f, x, **KINDS[kind]))


@without_policy
@silent
def test_compiled_code_that_runs_several_times_in_a_region(pair, kind):
    def several(f):
        return lambda x: f(x) + 2 * f(x) - f(x + 1).cos()  # twice with the very same input

    def scenario(f, xs):
        outstanding(f, xs)

    def call(f, x):
        return checkpoint(several(f), x, **KINDS[kind])

    xs, twin, zs = batches(), blocks(), batches()
    scenario(lambda x: call(pair.compiled, x), xs)
    scenario(several(twin), zs)
    torch.testing.assert_close(results(pair.model, xs), results(twin, zs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outer", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("inner", ["reentrant", "not reentrant"])
@silent
def test_nested_regions(pair, outer, inner):
    def call(f, x):
        return checkpoint(lambda x: checkpoint(f, x, **KINDS[inner]) * 1, x, **KINDS[outer])

    assert_right(outstanding, pair, call)


@without_policy
@silent
def test_code_that_is_compiled_inside_the_region(kind):
    """The first run is the one that compiles; blocks of one kind share their code."""
    model, twin = blocks(), blocks()
    for part in (1, 4, 7):
        model[part].compile(fullgraph=True)
    torch._dynamo.reset()
    xs, zs = batches()[:2], batches()[:2]
    for x, z in zip(xs, zs, strict=True):
        backward(checkpoint(model, x, **KINDS[kind]))
        backward(twin(z))
    torch.testing.assert_close(results(model, xs), results(twin, zs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["force_eager", "default"])
@silent
def test_compiled_code_and_eager_mode_repeat_one_another(pair, first):
    """As where torch.compile gives up on recompiling. They save other tensors, which other
    checkpointing than this refuses."""
    second = "default" if first == "force_eager" else "force_eager"

    def scenario(f, xs):
        with torch.compiler.set_stance(first):
            y = f(xs[0])
        with torch.compiler.set_stance(second):
            f(xs[1])
            backward(y)

    assert_right(scenario, pair, lambda f, x: checkpoint(f, x, use_reentrant=True))


class Recomputed(torch.autograd.Function):
    """Checkpointing of another make, as of reversible networks."""

    @staticmethod
    def forward(ctx, x, f):
        ctx.f = f
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.f(x).backward(dy)
        return x.grad, None


@silent
def test_functions_that_recompute_compiled_code(pair):
    assert_right(outstanding, pair, lambda f, x: Recomputed.apply(x, f))


@every_kind
@silent
def test_compiled_inference_is_repeated(pair, kind):
    pair.model.eval()
    x, z, twin = batches()[2], batches()[2], blocks().eval()
    backward(checkpoint(pair.compiled, x, **KINDS[kind]))
    backward(twin(z))
    torch.testing.assert_close(results(pair.model, [x]), results(twin, [z]), rtol=1e-4, atol=1e-4)


@silent
def test_clipping_is_counted_once():
    model = blocks()[:2]
    compiled = torch.compile(model, fullgraph=True)
    with monitor_clipping(model) as monitor:
        for _ in range(2):
            backward(checkpoint(compiled, batches()[0], use_reentrant=False))
        assert monitor.read()["1"].steps == 2


@silent
def test_compiled_code_outside_of_regions_is_silent(pair):
    """Also under other saved-tensor hooks."""
    assert_right(in_turn, pair, lambda f, x: f(x))
    pair.reset()

    def offloading(f, x):
        with torch.autograd.graph.save_on_cpu():
            return f(x)

    assert_right(outstanding, pair, offloading)


@silent
def test_derivatives_of_eager_layers_are_silent():
    """Second derivatives, functions' gradients and forward mode, none of them in a region."""
    layer, x = BatchRenorm2d(4), torch.randn(4, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()

    def f(x):
        return layer(x).square().sum()

    torch.func.grad(f)(x.detach())
    torch.func.jvp(f, (x.detach(),), (x.detach(),))


def test_a_new_compiled_forward_inside_a_backward_counts_and_warns(pair):
    twin, x = blocks(), batches()[0]
    leaf = torch.ones(2, requires_grad=True)
    y = leaf * 2

    def forward(gradient):
        with torch.enable_grad():
            pair.compiled(x)
        return gradient

    y.register_hook(forward)
    with pytest.warns(UserWarning, match="inside a backward pass counts as a new batch"):
        y.sum().backward()
    twin(x)
    torch.testing.assert_close(
        dict(pair.model.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-4
    )


@without_policy
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (nn.Module.train, nn.Module.eval),
        (nn.Module.train, freeze_statistics),
        (nn.Module.eval, nn.Module.train),
    ],
    ids=["eval", "freeze", "train"],
)
def test_a_mode_that_changes_under_compiled_code_is_an_error(pair, before, after, kind):
    before(pair.model)
    y = checkpoint(pair.compiled, batches()[0], **KINDS[kind])
    state = copy.deepcopy(pair.model.state_dict())
    after(pair.model)
    try:
        with pytest.raises(RuntimeError, match="mode has changed|came in between"):
            backward(y)
    finally:
        unfreeze_statistics(pair.model)
    torch.testing.assert_close(pair.model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("step", ["compiled", "eager"])
def test_inference_by_statistics_that_move_under_compiled_code_is_an_error(pair, step, grad):
    """As it is without checkpointing, from autograd."""
    pair.model.eval()
    y = checkpoint(pair.compiled, batches()[0], use_reentrant=False)
    pair.model.train()
    with torch.set_grad_enabled(grad):
        (pair.compiled if step == "compiled" else pair.model)(batches()[1])
    pair.model.eval()
    with pytest.raises(RuntimeError, match="moving statistics have changed in between"):
        backward(y)


@without_policy
@silent
def test_a_part_without_gradients_is_repeated_too(pair, kind):
    """It moves statistics by another operator, which gives compiled code copies of them."""

    def part(f):
        def region(x):
            with torch.no_grad():
                t = f(x)
            return x.mean() * t.sin()

        return region

    xs, twin, zs = batches(), blocks(), batches()
    outstanding(lambda x: checkpoint(part(pair.compiled), x, **KINDS[kind]), xs)
    outstanding(part(twin), zs)
    torch.testing.assert_close(results(pair.model, xs), results(twin, zs), rtol=1e-4, atol=1e-4)


@without_policy
def test_what_cannot_be_recognised_is_an_error(kind):
    """aot_eager gives the operator copies of moving statistics."""
    pair = Pair(backend="aot_eager")
    backward(pair.compiled(batches()[0]))
    pair.reset()
    y = checkpoint(pair.compiled, batches()[0], **KINDS[kind])
    with pytest.raises(RuntimeError, match="context_fn=batchrenorm_cuda.checkpoint_context_fn"):
        backward(y)
    assert pair.model[1].num_batches_tracked == 1


def test_a_torch_whose_hooks_are_not_found_is_an_error_too(pair):
    """No wrong gradient, should torch keep its saved-tensor hooks in another way."""
    _C.trust_saved_tensor_hooks(False)
    try:
        y = checkpoint(pair.compiled, batches()[0], use_reentrant=False)
        with pytest.raises(RuntimeError, match="no record of what it did the first time"):
            backward(y)
    finally:
        _C.trust_saved_tensor_hooks(True)
    assert pair.model[1].num_batches_tracked == 1


def test_the_operators_see_backwards_and_hooks():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(_C.may_repeat()))
    assert not _C.may_repeat()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert _C.may_repeat() and _C.under_saved_tensor_hooks()
    y.sum().backward()
    assert seen == [True] and not _C.may_repeat()


def test_a_cuda_graph_captured_inside_a_region_is_refused():
    """Its replays would repeat nothing. Only the name of the module is that of torch here."""
    layer, x = blocks()[1], torch.randn(4, 4, 3, 3)
    arguments = (x, None, None, layer.running_mean, layer.running_std, layer.num_batches_tracked)
    call = "lambda op, *args: op(*args)"
    capture = eval(call, {"__name__": "torch._inductor.cudagraph_trees"})

    def region(x):
        y, _ = capture(
            torch.ops.batchrenorm.forward.default, *arguments, None, 0.1, 1e-5, 3.0, 5.0, False
        )
        return x * y

    with pytest.raises(RuntimeError, match="captures a CUDA graph of a BatchRenorm layer"):
        checkpoint(region, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert layer.num_batches_tracked == 0
