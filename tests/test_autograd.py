"""Derivatives of every kind that torch can ask for, and torch.func."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from devices import each_device
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from batchrenorm_cuda import BatchRenorm1d, RenormSchedule, autograd, reference
from batchrenorm_cuda.functional import batch_renorm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])

# r and d that do not depend on x, so that a numerical derivative exists: off, or at their limits.
CONSTANT = {"off": (1.0, 0.0), "at their limits": (1.5, 0.5)}


def tensors(shape=(3, 2, 4), dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    c = shape[1]
    x, weight, bias, dy = normal(*shape), normal(c), normal(c), normal(*shape)
    return x, weight, bias, dy, normal(c) - 50, normal(c).square() * 0.01 + 0.05


def layer_of(training, limits=(1.5, 0.5), layer=batch_renorm, dtype=torch.float64, device="cpu"):
    """The layer as a function of x, weight and bias that leaves its statistics alone."""
    *_, mean, std = tensors(dtype=dtype, device=device)

    def call(x, weight, bias):
        return layer(x, mean.clone(), std.clone(), weight, bias, training, 0.1, 1e-3, *limits)

    return call


def inputs(**kwargs):
    return [t.requires_grad_() for t in tensors(**kwargs)[:3]]


@each_device()
@MODES
@pytest.mark.parametrize("limits", CONSTANT.values(), ids=CONSTANT)
def test_gradcheck(limits, training, device):
    layer = layer_of(training, limits, device=device)
    # The kernels are deterministic, so none of the differences that gradcheck allows for.
    options = {"check_forward_ad": True, "check_batched_grad": True, "nondet_tol": 0.0}
    assert gradcheck(layer, inputs(device=device), check_batched_forward_grad=True, **options)


@each_device()
@MODES
@pytest.mark.parametrize("limits", CONSTANT.values(), ids=CONSTANT)
def test_gradgradcheck(limits, training, device):
    layer = layer_of(training, limits, device=device)
    options = {"check_fwd_over_rev": True, "check_batched_grad": True, "nondet_tol": 0.0}
    assert gradgradcheck(layer, inputs(device=device), **options)


@MODES
@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
def test_gradgradcheck_without_weight_or_bias(absent, training):
    layer = layer_of(training)
    x, weight, bias = inputs()
    given = [x] + [
        t for name, t in (("weight", weight), ("bias", bias)) if absent not in (name, "both")
    ]

    def call(x, *rest):
        weight = rest[0] if absent == "bias" else None
        return layer(x, weight, rest[0] if absent == "weight" else None)

    assert gradgradcheck(call, given, check_fwd_over_rev=True)


@each_device()
def test_third_derivatives(device):
    found = []
    for layer in (batch_renorm, reference.batch_renorm):
        x, weight, bias = inputs(device=device)
        dy = tensors(device=device)[3]
        y = layer_of(True, layer=layer, device=device)(x, weight, bias)
        options = {"create_graph": True}
        first = torch.autograd.grad(y, (x, weight), dy, **options)
        cotangents = dy.cos(), weight.detach().cos()
        second = torch.autograd.grad(first, (x, weight), cotangents, **options)
        third = torch.autograd.grad(second[1], x, weight.detach().sin(), **options)
        found.append((*first, *second, *third))
    torch.testing.assert_close(*found)


@each_device()
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_penalty_in_every_dtype(dtype, training, device):
    """Gradients of gradients keep dtypes, and create_graph does not change the gradients."""
    x, weight, _, dy, mean, std = tensors((8, 3, 5), dtype, device)
    mean, std = mean.float(), std.float()
    x.requires_grad_()
    weight = weight.detach().float().requires_grad_()
    call = {"training": training, "weight": weight}
    y = batch_renorm(x, mean.clone(), std.clone(), **call)
    (plain,) = torch.autograd.grad(y, x, dy)
    y = batch_renorm(x, mean.clone(), std.clone(), **call)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.equal(plain, dx.detach())
    dx.float().square().sum().backward()
    truth_x, truth_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = reference.batch_renorm(truth_x, mean.double(), std.double(), truth_weight, None, training)
    (dx,) = torch.autograd.grad(y, truth_x, dy.double(), create_graph=True)
    dx.square().sum().backward()
    if not training:  # dx does not depend on x
        assert truth_x.grad is None
        truth_x.grad = torch.zeros_like(truth_x)
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == dtype
    for found, want in ((weight.grad, truth_weight.grad), (x.grad, truth_x.grad)):
        error = (found.double() - want).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * want.abs().max()


@each_device()
@MODES
def test_transforms_agree_with_the_reference(training, device):
    x, weight, bias, dy, *_ = tensors((3, 2, 2), device=device)
    found = []
    for layer in (batch_renorm, reference.batch_renorm):
        call = layer_of(training, layer=layer, device=device)

        def loss(x, weight, bias, call=call):
            return (call(x, weight, bias) * dy).sum()

        def of_x(x, call=call):
            return (call(x, weight, bias).pow(3) * dy).sum()

        tangents = (dy.cos(), weight.cos(), bias.cos())
        results = {
            "grad": func.grad(loss, (0, 1, 2))(x, weight, bias),
            "vjp": func.vjp(call, x, weight, bias)[1](dy),
            "jvp": func.jvp(call, (x, weight, bias), tangents),
            "jacrev": func.jacrev(call, (0, 1, 2))(x, weight, bias),
            "jacfwd": func.jacfwd(call, (0, 1, 2))(x, weight, bias),
            "hessian": func.hessian(of_x)(x),
            "jacrev jacrev": func.jacrev(func.jacrev(of_x))(x),
            "jacrev jacfwd": func.jacrev(func.jacfwd(of_x))(x),
            "hvp": func.jvp(func.grad(of_x), (x,), (dy.sin(),)),
        }
        found.append(results)
    for name in found[0]:
        torch.testing.assert_close(
            found[0][name], found[1][name], msg=lambda m, n=name: f"{n}: {m}"
        )


@MODES
def test_dual_tensors(training):
    x, weight, bias, dy, *_ = tensors()
    call, truth = layer_of(training), layer_of(training, layer=reference.batch_renorm)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in (x, weight, bias)]
        found, want = (forward_ad.unpack_dual(f(*duals)) for f in (call, truth))
        torch.testing.assert_close(found.tangent, want.tangent)
        torch.testing.assert_close(found.primal, want.primal)


@each_device()
@MODES
@pytest.mark.parametrize("what", ["jacobian", "hessian"])
def test_vectorized_derivatives_are_differentiable(what, training, device):
    """As gradient penalties take them. The vmap under vectorize=True loses the graph of any
    autograd.Function in a backward pass, and gradients would silently be too few."""
    layer = layer_of(training, device=device)
    derivative = getattr(torch.autograd.functional, what)

    def gradients(vectorize):
        x, weight, bias = inputs(device=device)

        def call(x):
            y = layer(x, weight, bias).sin()
            return y.pow(3).sum() if what == "hessian" else y

        found = derivative(call, x, create_graph=True, vectorize=vectorize)
        return torch.autograd.grad(found.square().sum(), (x, weight, bias))

    torch.testing.assert_close(gradients(True), gradients(False))


@each_device()
@MODES
@pytest.mark.parametrize("monitored", [False, True])
def test_forward_mode_goes_through_a_backward_pass(monitored, training, device):
    """dx is linear in dy: its tangent in the direction of dy is dx itself."""
    layer = BatchRenorm1d(2, device=device, schedule=RenormSchedule.constant(3.0, 5.0))
    if monitored:
        layer.monitor_clipping()
    layer.train(training)
    x, _, _, dy, *_ = tensors(dtype=torch.float32, device=device)
    x.requires_grad_()
    y = layer(x)

    def dx(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    expected = dx(dy)
    assert expected.abs().max() > 0
    torch.testing.assert_close(func.jvp(dx, (dy,), (dy,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, dy)
        torch.testing.assert_close(forward_ad.unpack_dual(dx(dual)).tangent, expected)


@MODES
def test_forward_mode_twice_is_refused_rather_than_wrong(training):
    x, weight, bias, dy, *_ = tensors()
    call = layer_of(training)
    with pytest.raises(NotImplementedError, match="forward mode inside forward mode"):
        func.jacfwd(func.jacfwd(lambda x: (call(x, weight, bias) * dy).sum()))(x)


@each_device()
def test_transforms_move_the_statistics_as_a_plain_call_does(device):
    x, weight, bias, dy, *_ = tensors((6, 3), torch.float32, device)
    states = []
    for transformed in (False, True):
        state = [torch.zeros(3, device=device), torch.ones(3, device=device)]
        counter = torch.zeros((), dtype=torch.int64, device=device)
        schedule = RenormSchedule().as_tensor(device)

        def loss(x, state=state, counter=counter, schedule=schedule):
            options = {"num_batches_tracked": counter, "schedule": schedule}
            return (batch_renorm(x, *state, weight, bias, True, **options) * dy).sum()

        func.grad(loss)(x) if transformed else loss(x)
        states.append((*state, counter))
    assert states[0][2].item() == 1
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_an_ensemble_is_its_members(training, device):
    torch.manual_seed(0)
    members = [
        BatchRenorm1d(3, momentum=0.2, schedule=RenormSchedule(0, 3, 9, 5, 9)) for _ in range(4)
    ]
    for i, member in enumerate(members):
        member.to(device)(torch.randn(6, 3, device=device) + i)  # each with its own statistics
        member.num_batches_tracked.fill_(2 * i)  # and its own place in the schedule
        member.train(training)
    alone = copy.deepcopy(members)
    parameters, buffers = func.stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")
    x, dy = torch.randn(2, 4, 6, 3, device=device).unbind()

    def loss(parameters, buffers, x, dy):
        y = func.functional_call(skeleton, (parameters, buffers), (x,))
        return (y * dy).sum(), y

    gradients, y = func.vmap(func.grad(loss, has_aux=True))(parameters, buffers, x, dy)
    for i, member in enumerate(alone):
        wanted = member(x[i])
        wanted.backward(dy[i])
        assert torch.equal(y[i], wanted)
        assert torch.equal(gradients["weight"][i], member.weight.grad)
        for name, t in member.named_buffers():
            assert torch.equal(buffers[name][i], t), name


@each_device()
@MODES
@pytest.mark.parametrize("dims", [0, 1, 2, 3, -1])
def test_vmap_over_any_dimension_and_under_autograd(dims, training, device):
    x, dy = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64, device=device).unbind()
    x = x.movedim(0, dims).clone().requires_grad_()
    mean = torch.randn(4, 3, dtype=torch.float64, device=device)
    std = torch.rand(4, 3, dtype=torch.float64, device=device) + 0.5
    weight = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for layer in (batch_renorm, reference.batch_renorm):
        state = mean.clone(), std.clone()

        def call(x, mean, std, layer=layer):
            return layer(x, mean, std, weight, None, training, 0.1, 1e-3, 2.0, 1.0)

        y = func.vmap(call, in_dims=(dims, 0, 0))(x, *state)
        found.append((y, *state, *torch.autograd.grad(y, (x, weight), dy)))
    torch.testing.assert_close(*found)


def test_nested_vmap():
    x = torch.randn(2, 3, 6, 4)
    mean, std = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)

    def call(x, mean, std):
        return batch_renorm(x, mean, std, training=True)

    y = func.vmap(func.vmap(call))(x, mean, std)
    for i in range(2):
        for j in range(3):
            state = torch.zeros(4), torch.ones(4)
            assert torch.equal(y[i, j], call(x[i, j], *state))
            assert torch.equal(mean[i, j], state[0])


@pytest.mark.parametrize("shared", ["running_mean", "running_std", "num_batches_tracked"])
def test_vmap_refuses_statistics_shared_by_an_ensemble(shared):
    x = torch.randn(2, 6, 3)
    state = {"running_mean": torch.zeros(2, 3), "running_std": torch.ones(2, 3)}
    state["num_batches_tracked"] = torch.zeros(2, dtype=torch.int64)
    state[shared] = state[shared][0]
    dims = {name: None if name == shared else 0 for name in state}
    before = {name: t.clone() for name, t in state.items()}
    with pytest.raises(ValueError, match=f"{shared} must be vmapped like the inputs"):
        func.vmap(lambda x, s: batch_renorm(x, **s, training=True), in_dims=(0, dims))(x, state)
    assert all(torch.equal(state[name], before[name]) for name in state)


@MODES
def test_bad_arguments_are_named_under_transforms_too(training):
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\)"):
        func.grad(
            lambda x: batch_renorm(
                x, torch.zeros(3), torch.ones(3), torch.ones(2), None, training
            ).sum()
        )(torch.ones(6, 3))
    if training:
        with pytest.raises(ValueError, match="more than one value per channel"):
            func.grad(lambda x: batch_renorm(x, None, None, training=True).sum())(torch.ones(1, 3))


@each_device()
def test_backward_twice_and_in_place_changes_are_noticed(device):
    x = torch.randn(6, 3, device=device, requires_grad=True)
    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = batch_renorm(x * 1, mean, std, training=True)
    first = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x, torch.ones_like(y))[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))
    z = x * 1
    y = batch_renorm(z, mean, std, training=True)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_device()
def test_statistics_that_move_later_do_not_change_the_gradient(device):
    x, weight, bias, dy, mean, std = tensors((6, 3), device=device)
    x.requires_grad_()
    y = batch_renorm(x, mean, std, weight, bias, True)
    (want,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    batch_renorm(x.detach() * 7, mean, std, weight, bias, True)
    mean.zero_(), std.fill_(1)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], want)


@pytest.mark.parametrize(
    "function",
    [autograd.Training, autograd.RecordedTraining, autograd.RepeatedTraining, autograd.Inference],
)
def test_the_engine_enters_backward_without_a_wrapper(function):
    """What a torch without the attribute would silently be slower without."""
    assert function._backward_cls.apply is function.backward


@MODES
def test_what_has_outlived_its_transform_is_differentiated(training):
    """An activation that a hook has kept, say: the gradient is that of the tensor inside."""
    layer = BatchRenorm1d(3).train(training)
    x, kept = torch.randn(4, 3, requires_grad=True), []
    func.grad(lambda t: (kept.append(t), t.sum())[1])(x)
    gradients = []
    for t in (x, kept[0]):
        layer.reset_running_stats()
        gradients += torch.autograd.grad(layer(t).pow(3).sum(), x)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_no_warnings_from_the_operators():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (True, False):
            x = torch.randn(6, 3, requires_grad=True)
            y = BatchRenorm1d(3).train(training)(x)
            y.backward(torch.randn(6, 3))
