"""functional.batch_renorm: what it computes, in what form it hands it back, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from devices import each_device

from batchrenorm_cuda import RenormSchedule, reference
from batchrenorm_cuda.functional import batch_renorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF, NAN = math.inf, math.nan


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def misaligned(x):
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def permuted(x):
    """Dense, but in no order that the kernels read."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x):
    order = [0, *range(2, x.dim()), 1]
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


FORMS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": channels_last,
    "permuted": permuted,
    "sliced": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "misaligned": misaligned,
}
SHAPES = [(9, 5), (4, 6, 7), (3, 5, 4, 4), (2, 65, 3, 3), (2, 3, 2, 3, 5), (7, 1, 3), (3, 4, 1, 1)]


def results(layer, x, weight, bias, mean, std, dy, training):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    state = [mean.clone(), std.clone()]
    y = layer(inputs[0], *state, *inputs[1:], training, 0.1, 1e-3, 2.0, 1.0)
    gradients = torch.autograd.grad(y, inputs, dy)
    names = ("y", "dx", "dweight", "dbias", "running_mean", "running_std")
    return dict(zip(names, (y.detach(), *gradients, *state), strict=True))


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape, form, dtype, training, device):
    c = shape[1]
    x = FORMS[form]((normal(*shape) * 3 + 2).to(device, dtype))
    weight, bias, mean = (normal(c, seed=i).to(device, real(dtype)) for i in (1, 2, 3))
    std = normal(c, seed=4).exp().to(device, real(dtype))
    dy = channels_last(normal(*shape, seed=5).to(device, dtype))  # not x's format, as a rule
    given = (x, weight, bias, mean, std, dy)
    found = results(batch_renorm, *given, training)
    truth = results(reference.batch_renorm, *(t.double() for t in given), training)
    for name, t in found.items():
        assert t.dtype == (dtype if name in ("y", "dx") else real(dtype))
        # How accurate they are is for the parity harness to say. Sums are judged by their terms.
        terms = dy.double().abs().sum() / c if name in ("dweight", "dbias") else 0.0
        bound = 16 * torch.finfo(t.dtype).eps * (truth[name].abs().max() + terms)
        assert (t.double() - truth[name]).abs().max() <= bound, name


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_memory_formats_are_kept(shape, training, device):
    c = shape[1]
    mean, std = torch.zeros(c, device=device), torch.ones(c, device=device)
    for form in ("contiguous", "channels last"):
        x = FORMS[form](normal(*shape).to(device, torch.float32)).requires_grad_()
        y = batch_renorm(x, mean, std, training=training)
        assert y.stride() == x.stride()
        y.backward(torch.ones(shape, device=device))
        assert x.grad.stride() == x.stride()
    x = FORMS["sliced"](normal(*shape).to(device, torch.float32))
    assert batch_renorm(x, mean, std, training=training).is_contiguous()
    if len(shape) > 2:
        x = channels_last(normal(*shape).to(device, torch.float32))[:, :, :1]
        y = batch_renorm(x, mean, std, training=training)
        assert x.stride(1) == y.stride(1) == 1


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_x_and_dy_may_be_expanded(training, device):
    x = normal(1, 4, 1).to(device, torch.float32).expand(6, 4, 5).requires_grad_()
    dy = torch.tensor(0.5, device=device).expand(6, 4, 5)
    mean, std = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = batch_renorm(x, mean.clone(), std.clone(), training=training)
    (dx,) = torch.autograd.grad(y, x, dy)
    whole = x.detach().contiguous().requires_grad_()
    y2 = batch_renorm(whole, mean.clone(), std.clone(), training=training)
    (dx2,) = torch.autograd.grad(y2, whole, dy.contiguous())
    assert torch.equal(y, y2) and torch.equal(dx, dx2)


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("wanted", range(8))
def test_every_subset_of_inputs_gets_its_gradient(wanted, training, device):
    x, weight, bias = (
        t.to(device) for t in (normal(5, 3, 2), normal(3, seed=1), normal(3, seed=2))
    )
    mean, std, dy = (
        normal(3, seed=3).to(device),
        normal(3, seed=4).exp().to(device),
        normal(5, 3, 2, seed=5),
    )
    inputs = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, weight, bias))]
    y = batch_renorm(x, mean.clone(), std.clone(), weight, bias, training)
    truth = reference.batch_renorm(x, mean.clone(), std.clone(), weight, bias, training)
    torch.testing.assert_close(y, truth)
    assert y.requires_grad == truth.requires_grad == bool(wanted)
    if wanted:
        asked = [t for t in inputs if t.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad(y, asked, dy.to(device)),
            torch.autograd.grad(truth, asked, dy.to(device)),
        )


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_nothing_is_recorded_when_nothing_needs_it(training):
    x, weight = normal(5, 3).requires_grad_(), normal(3).requires_grad_()
    mean, std = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        y = batch_renorm(x, mean, std, weight, None, training)
    assert not y.requires_grad and y.grad_fn is None
    with torch.inference_mode():
        assert batch_renorm(x, mean.clone(), std.clone(), weight, None, training).is_inference()


@each_device()
@pytest.mark.parametrize("which", ["neither", "weight", "bias", "both"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_weight_and_bias_may_each_be_absent(which, training, device):
    x, dy = normal(5, 3, 2).to(device).requires_grad_(), normal(5, 3, 2, seed=5).to(device)
    weight = normal(3, seed=1).to(device) if which in ("weight", "both") else None
    bias = normal(3, seed=2).to(device) if which in ("bias", "both") else None
    mean, std = normal(3, seed=3).to(device), normal(3, seed=4).exp().to(device)
    y = batch_renorm(x, mean.clone(), std.clone(), weight, bias, training)
    truth = reference.batch_renorm(x, mean.clone(), std.clone(), weight, bias, training)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(truth, x, dy))


@each_device()
def test_without_moving_statistics_it_is_batch_norm(device):
    x, weight, bias = (
        t.to(device) for t in (normal(5, 3, 2), normal(3, seed=1), normal(3, seed=2))
    )
    y = batch_renorm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, weight, bias, True))


@each_device()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_half_precision_weights_are_widened_and_get_their_gradients(
    dtype, x_dtype, training, device
):
    x, dy = normal(8, 3, 2).to(device, x_dtype), normal(8, 3, 2, seed=5).to(device, x_dtype)
    weight, bias = (normal(3, seed=i).to(device, dtype).requires_grad_() for i in (1, 2))
    mean, std = torch.zeros(3, device=device), torch.full((3,), 0.5, device=device)
    y = batch_renorm(x, mean.clone(), std.clone(), weight, bias, training)
    wide = [t.detach().float().requires_grad_() for t in (weight, bias)]
    y2 = batch_renorm(x, mean.clone(), std.clone(), *wide, training)
    assert y.dtype == x_dtype and torch.equal(y, y2)
    gradients = torch.autograd.grad(y, (weight, bias), dy)
    for found, want in zip(gradients, torch.autograd.grad(y2, wide, dy), strict=True):
        assert found.dtype == dtype and torch.equal(found, want.to(dtype))


@each_device()
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_autocast_leaves_dtypes_alone(dtype, training, device):
    x = normal(8, 3, 2).to(device, dtype).requires_grad_()
    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = batch_renorm(x, mean, std, torch.ones(3, device=device), None, training)
    assert y.dtype == dtype and mean.dtype == std.dtype == torch.float32
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == dtype


@each_device()
def test_the_cumulative_average_is_the_mean_over_batches(device):
    counter = torch.zeros((), dtype=torch.int64, device=device)
    mean, std = torch.full((3,), 7.0, device=device), torch.full((3,), 7.0, device=device)
    batches = [(normal(6, 3, seed=i) * (i + 1) + i).to(device, torch.float32) for i in range(5)]
    for x in batches:
        batch_renorm(x, mean, std, training=True, momentum=None, num_batches_tracked=counter)
    torch.testing.assert_close(mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    stds = torch.stack([(x.var(0, correction=0) + 1e-5).sqrt() for x in batches])
    torch.testing.assert_close(std, stds.mean(0))
    assert counter.item() == 5


@each_device()
def test_a_nonfinite_batch_can_be_skipped(device):
    counter = torch.zeros((), dtype=torch.int64, device=device)
    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    state = {"num_batches_tracked": counter, "training": True, "skip_nonfinite": True}
    for poison in (NAN, INF, -INF):
        x = normal(6, 3).to(device, torch.float32)
        x[2, 1] = poison
        y = batch_renorm(x, mean, std, **state)
        assert y[:, 1].isnan().all() and y[:, ::2].isfinite().all()
    assert counter.item() == 0 and mean.tolist() == [0, 0, 0] and std.tolist() == [1, 1, 1]
    batch_renorm(normal(6, 3).to(device, torch.float32), mean, std, **state)
    assert counter.item() == 1 and (mean != 0).all()


@each_device()
def test_runs_are_bitwise_equal(device):
    x, dy = normal(64, 33, 14, 14).to(device, torch.float32), normal(64, 33, 14, 14, seed=1)
    first = None
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        mean, std = torch.zeros(33, device=device), torch.ones(33, device=device)
        weight = torch.ones(33, device=device, requires_grad=True)
        y = batch_renorm(leaf, mean, std, weight, None, True)
        results = (
            y,
            mean,
            std,
            *torch.autograd.grad(y, (leaf, weight), dy.to(device, torch.float32)),
        )
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_meta_tensors_have_shapes_only(training):
    x = torch.empty(4, 3, 5, 5, device="meta", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    y = batch_renorm(x, *torch.empty(2, 3, device="meta").unbind(), training=training)
    assert y.is_meta and y.dtype == x.dtype and y.stride() == x.stride()


def plain_step(x, call):
    call(x)


def step_without_gradients(x, call):
    with torch.no_grad():
        call(x)


def step_under_grad(x, call):
    torch.func.grad(lambda x: call(x).square().sum())(x)


def step_in_forward_mode(x, call):
    torch.func.jvp(call, (x,), (x,))


def step_at_a_dual_level(x, call):
    with torch.autograd.forward_ad.dual_level():
        call(x)


def step_that_cannot_be_saved(x, call):
    """Autograd saves after the operator has run: statistics have moved by then."""

    def refuse(t):
        raise RuntimeError("no room")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
        with pytest.raises(RuntimeError, match="no room"):
            call(x)


@pytest.mark.parametrize(
    "step",
    [
        plain_step,
        step_without_gradients,
        step_under_grad,
        step_in_forward_mode,
        step_at_a_dual_level,
        step_that_cannot_be_saved,
    ],
)
def test_inference_notices_statistics_that_a_training_step_has_moved(step):
    """As torch's batch_norm: its saved statistics are no copies."""
    x = normal(6, 3).requires_grad_()
    mean, std = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = batch_renorm(x, mean, std)
    step(x, lambda x: batch_renorm(x, mean, std, training=True))
    assert (mean != 0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def arguments(**changed):
    """Of a good call, with some changed."""
    good = {
        "x": normal(6, 3, 2).float(),
        "running_mean": torch.zeros(3),
        "running_std": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "num_batches_tracked": torch.tensor(4),
        "schedule": RenormSchedule().as_tensor(),
    }
    return good | changed


BAD = [
    ({"x": [[1.0], [2.0]]}, TypeError, "x must be a Tensor, got list"),
    ({"x": torch.ones(6, 3, dtype=torch.int64)}, TypeError, "x must be .* got torch.int64"),
    ({"x": torch.ones(6, 3, dtype=torch.complex64)}, TypeError, "x must be .* got torch.complex64"),
    ({"x": torch.ones(6, 3, dtype=torch.bool)}, TypeError, "x must be .* got torch.bool"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[N, C, ...\], got \(\)"),
    ({"x": torch.ones(3)}, ValueError, r"x must have shape \[N, C, ...\], got \(3,\)"),
    ({"x": torch.ones(6, 3).to_sparse()}, TypeError, "x must be a dense .* got torch.sparse_coo"),
    ({"x": torch.ones(6, 3).to_mkldnn()}, TypeError, "x must be a dense tensor, got torch._mkldnn"),
    ({"weight": torch.ones(3).to_sparse()}, TypeError, "weight must be a dense tensor, got"),
    ({"x": torch.ones(6, 0)}, ValueError, r"x must have at least one channel, got shape \(6, 0\)"),
    ({"x": torch.ones(6, 4)}, ValueError, r"running_mean must have shape \(4,\) .* got \(3,\)"),
    ({"x": torch.ones(1, 3)}, ValueError, r"more than one value per channel .* \(1, 3\)"),
    ({"x": torch.ones(1, 3, 1, 1)}, ValueError, "more than one value per channel"),
    ({"x": torch.ones(6, 3).double()}, TypeError, "running_mean must be torch.float64 .*, got"),
    ({"running_mean": None}, ValueError, "given together, got None for running_mean only"),
    ({"running_std": None}, ValueError, "given together, got None for running_std only"),
    ({"running_mean": torch.zeros(4)}, ValueError, r"running_mean must have shape .* got \(4,\)"),
    ({"running_std": torch.ones(1, 3)}, ValueError, r"running_std must have shape .* got \(1, 3\)"),
    ({"running_std": torch.ones(3).half()}, TypeError, "running_std must be .* got torch.float16"),
    ({"running_mean": torch.zeros(3).double()}, TypeError, "running_mean .* got torch.float64"),
    ({"running_std": torch.ones(3, device="meta")}, ValueError, "running_std .* x, cpu, got meta"),
    ({"running_std": [1.0] * 3}, TypeError, "running_std must be a Tensor, got list"),
    ({"running_mean": torch.zeros(6)[::2]}, ValueError, "running_mean must be contiguous"),
    ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3,\) .* got \(2,\)"),
    ({"weight": torch.ones(3).double()}, TypeError, "weight must be .* got torch.float64"),
    ({"weight": torch.ones(3, dtype=torch.int32)}, TypeError, "weight must be .* got torch.int32"),
    ({"weight": 1.0}, TypeError, "weight must be a Tensor, got float"),
    ({"bias": torch.ones(3, 1)}, ValueError, r"bias must have shape \(3,\) .* got \(3, 1\)"),
    ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on the device of x"),
    ({"schedule": torch.zeros(4).double()}, ValueError, r"schedule must have shape .* got \(4,\)"),
    ({"schedule": torch.zeros(5)}, TypeError, "schedule must be torch.float64 .*, got"),
    ({"schedule": RenormSchedule()}, TypeError, "schedule must be a Tensor, got RenormSchedule"),
    ({"num_batches_tracked": torch.zeros(2).long()}, ValueError, r"one number, got shape \(2,\)"),
    (
        {"num_batches_tracked": torch.tensor(4.0)},
        TypeError,
        "num_batches_tracked must be torch.int64",
    ),
    (
        {"num_batches_tracked": None},
        ValueError,
        "num_batches_tracked must be given with a schedule",
    ),
    (
        {"num_batches_tracked": None, "schedule": None, "momentum": None},
        ValueError,
        "momentum=None",
    ),
    ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\].* got -0.1"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\].* got 1.5"),
    ({"momentum": NAN}, ValueError, r"momentum must be in \[0, 1\].* got nan"),
    ({"momentum": "0.1"}, TypeError, "momentum must be a number, got str"),
    ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
    ({"eps": 10**400}, ValueError, "eps must fit in a float, got an int of 1329 bits"),
    ({"r_max": 10**400}, ValueError, "r_max must fit in a float, got an int of"),
    ({"eps": NAN}, ValueError, "eps must be >= 0, got nan"),
    ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    ({"r_max": 0.9}, ValueError, "r_max must be >= 1, got 0.9"),
    ({"r_max": NAN}, ValueError, "r_max must be >= 1, got nan"),
    ({"d_max": -0.1}, ValueError, "d_max must be >= 0, got -0.1"),
    ({"d_max": NAN}, ValueError, "d_max must be >= 0, got nan"),
    ({"r_max": torch.tensor([1.0, 2.0])}, TypeError, "r_max must be a number, got Tensor"),
    ({"training": False, "running_mean": None, "running_std": None}, ValueError, "training=False"),
    ({"training": False, "r_max": 0.9}, ValueError, "r_max must be >= 1, got 0.9"),
    ({"training": False, "momentum": 2}, ValueError, "momentum must be .* got 2"),
    ({"training": False, "eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ({"training": False, "running_std": torch.ones(2)}, ValueError, "running_std must have shape"),
    ({"training": False, "weight": torch.ones(2)}, ValueError, "weight must have shape"),
    ({"training": False, "x": torch.ones(3)}, ValueError, "x must have shape"),
    ({"training": "no"}, TypeError, "training must be a bool, got 'no'"),
    ({"training": 1}, TypeError, "training must be a bool, got 1"),
    ({"training": torch.tensor(True)}, TypeError, "training must be a bool, got tensor"),
    ({"training": False, "x": None}, TypeError, "x must be a Tensor, got NoneType"),
]


@pytest.mark.parametrize("differentiable", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=lambda v: str(v)[:60])
def test_bad_arguments_are_named_and_change_nothing(changed, error, message, differentiable):
    given = arguments(**changed)
    tensors = [t for t in given.values() if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if not t.is_meta and t.layout == torch.strided]
    before = [t.clone() for t in tensors]
    with torch.set_grad_enabled(differentiable), pytest.raises(error, match=message) as raised:
        if differentiable and isinstance(given["bias"], torch.Tensor):
            given["bias"] = given["bias"].requires_grad_()
        batch_renorm(**given)
    assert type(raised.value) is error
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_std"])
def test_statistics_that_want_a_gradient_are_refused(name, training):
    """There is none of them; without this it would be silently missing, or 0 in torch.func.grad."""
    given = arguments(training=training)
    given[name] = given[name].requires_grad_()
    message = f"{name} must not require a gradient"
    with pytest.raises(ValueError, match=message):
        batch_renorm(**given)
    with torch.no_grad():
        batch_renorm(**given)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda t: batch_renorm(**arguments(**{name: t})).sum())(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["running_mean", "running_std", "weight", "bias", "schedule"])
def test_tensors_of_another_device_are_named(name):
    given = arguments()
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, cuda:0, got cpu"):
        batch_renorm(**moved | {name: given[name]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="running_mean must be on the device of x, meta, got cpu"):
        batch_renorm(**arguments(x=torch.ones(6, 3, device="meta")))
