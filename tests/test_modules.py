"""The layers: construction, forward, and what they share with torch's BatchNorm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.utils.parametrize
from devices import each_device
from torch import nn

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
    batch_renorm,
    fold,
    reference,
    update_stats,
)

LAYERS = [
    (BatchRenorm1d, nn.BatchNorm1d, (6, 4)),
    (BatchRenorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (BatchRenorm2d, nn.BatchNorm2d, (6, 4, 5, 3)),
    (BatchRenorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 5)),
]


@each_device()
@pytest.mark.parametrize(("layer", "_", "shape"), LAYERS, ids=str)
def test_a_layer_trains_and_infers_as_the_reference(layer, _, shape, device):
    torch.manual_seed(0)
    schedule = RenormSchedule(1, 2.0, 4, 3.0, 3)
    module = layer(4, momentum=0.3, schedule=schedule).to(device)
    nn.init.normal_(module.weight)
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    for step in range(6):
        x, dy = torch.randn(2, *shape, device=device).unbind()
        x = (x * (step + 1) + step).requires_grad_()
        y = module(x)
        truth = reference.batch_renorm(
            x,
            state["running_mean"],
            state["running_std"],
            module.weight,
            module.bias,
            True,
            0.3,
            num_batches_tracked=state["num_batches_tracked"],
            schedule=state["schedule"],
        )
        inputs = (x, module.weight, module.bias)
        found, want = (torch.autograd.grad(t, inputs, dy) for t in (y, truth))
        torch.testing.assert_close((y, *found), (truth, *want), rtol=1e-4, atol=1e-4)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffer, state[name])
    assert module.num_batches_tracked.item() == 6
    module.eval()
    before = {name: t.clone() for name, t in module.named_buffers()}
    y = module(x)
    truth = batch_renorm(x, module.running_mean, module.running_std, module.weight, module.bias)
    assert torch.equal(y, truth)
    assert all(torch.equal(before[name], t) for name, t in module.named_buffers())


@pytest.mark.parametrize(("layer", "peer", "shape"), LAYERS, ids=str)
def test_in_the_warm_up_it_is_batch_norm(layer, peer, shape):
    torch.manual_seed(0)
    module, norm = layer(4), peer(4)
    for step in range(3):
        x = torch.randn(shape) * (step + 1) + step
        torch.testing.assert_close(module(x), norm(x))
    torch.testing.assert_close(module.running_mean, norm.running_mean / 10, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("layer", "peer", "shape"), LAYERS, ids=str)
def test_it_has_the_attributes_and_state_of_batch_norm(layer, peer, shape):
    for options in ({}, {"affine": False}, {"track_running_stats": False}):
        module, norm = layer(4, **options), peer(4, **options)
        for name in ("num_features", "eps", "affine", "track_running_stats", "training"):
            assert getattr(module, name) == getattr(norm, name)
        for name in ("weight", "bias", "running_mean", "num_batches_tracked"):
            mine, theirs = getattr(module, name), getattr(norm, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        renamed = {name.replace("running_var", "running_std") for name in norm.state_dict()}
        extra = {"schedule"} if module.track_running_stats else set()
        assert set(module.state_dict()) == renamed | extra
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert layer(4).momentum == 0.01


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_weight_and_bias(affine, bias):
    module = BatchRenorm1d(4, affine=affine, bias=bias)
    assert (module.weight is not None) == affine
    assert (module.bias is not None) == (affine and bias)
    assert len(list(module.parameters())) == affine + (affine and bias)
    assert module(torch.randn(6, 4)).shape == (6, 4)


@each_device()
def test_without_tracking_it_normalises_by_the_batch_always(device):
    module = BatchRenorm1d(4, track_running_stats=False, device=device)
    norm = nn.BatchNorm1d(4, track_running_stats=False, device=device)
    x = torch.randn(6, 4, device=device) * 3 + 2
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), norm.train(training)(x))
    assert list(module.buffers()) == []
    with pytest.raises(ValueError, match="schedule .* track_running_stats=False"):
        module.set_schedule(RenormSchedule())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            BatchRenorm2d(4),
            "BatchRenorm2d(4, eps=1e-05, momentum=0.01, affine=True, track_running_stats=True, "
            "schedule=RenormSchedule(warmup_steps=5000, r_max=3.0, r_max_step=40000, d_max=5.0, "
            "d_max_step=25000))",
        ),
        (
            BatchRenorm1d(
                4, 1e-3, None, bias=False, track_running_stats=False, skip_nonfinite=True
            ),
            "BatchRenorm1d(4, eps=0.001, momentum=None, affine=True, track_running_stats=False, "
            "bias=False, skip_nonfinite=True)",
        ),
        (
            BatchRenorm3d(4, affine=False, schedule=RenormSchedule.constant(2.0, 1.0)),
            "BatchRenorm3d(4, eps=1e-05, momentum=0.01, affine=False, track_running_stats=True, "
            "schedule=RenormSchedule(warmup_steps=0, r_max=2.0, r_max_step=0, d_max=1.0, "
            "d_max_step=0))",
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_repr(module, text):
    assert repr(module) == text
    repr(module.to("meta"))


def test_reset():
    module = BatchRenorm1d(4)
    module(torch.randn(6, 4))
    with torch.no_grad():
        module.weight.fill_(3), module.bias.fill_(3)
    module.set_schedule(RenormSchedule.constant(2.0, 1.0))
    module.reset_running_stats()
    assert module.num_batches_tracked == 0 and module.running_mean.eq(0).all()
    assert module.running_std.eq(1).all() and module.weight.eq(3).all()
    module.reset_parameters()
    assert module.weight.eq(1).all() and module.bias.eq(0).all()
    assert RenormSchedule.from_tensor(module.schedule) == RenormSchedule.constant(2.0, 1.0)


@each_device()
def test_the_schedule_can_be_replaced_in_mid_training(device):
    module = BatchRenorm1d(1, affine=False, eps=0.0, schedule=RenormSchedule.constant(1, 0))
    module.to(device)
    buffer = module.schedule
    x = torch.tensor([[-10.0], [10.0]], device=device)
    torch.testing.assert_close(module(x).max().item(), 1.0)
    module.set_schedule(RenormSchedule.constant(math.inf, 0))
    torch.testing.assert_close(module(x).max().item(), 10 / (1 + 0.01 * 9), rtol=1e-5, atol=0)
    assert module.schedule is buffer and module.num_batches_tracked.item() == 2
    with pytest.raises(TypeError, match="schedule must be a RenormSchedule, got tuple"):
        module.set_schedule((1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be >= 1, got 0"),
        ({"num_features": 4.0}, TypeError, "num_features must be a whole number, got 4.0"),
        ({"num_features": True}, TypeError, "num_features must be a whole number, got True"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
        ({"momentum": 1.1}, ValueError, "momentum must be .* got 1.1"),
        ({"momentum": "x"}, TypeError, "momentum must be a number, got str"),
        ({"schedule": None}, TypeError, "schedule must be a RenormSchedule, got NoneType"),
        ({"dtype": torch.int64}, TypeError, "dtype must be .* got torch.int64"),
        ({"skip_nonfinite": 3}, TypeError, "skip_nonfinite must be a bool, got 3"),
        ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be a bool, got None"),
    ],
)
def test_a_bad_constructor_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchRenorm2d(**{"num_features": 4} | arguments)


@pytest.mark.parametrize(
    ("layer", "shapes", "wanted"),
    [
        (BatchRenorm1d, [(6,), (6, 4, 5, 5)], "2D or 3D"),
        (BatchRenorm2d, [(6, 4), (6, 4, 5), (6, 4, 5, 5, 5)], "4D"),
        (BatchRenorm3d, [(6, 4), (6, 4, 5, 5)], "5D"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_refuses_other_dimensions(layer, shapes, wanted, training):
    module = layer(4).train(training)
    for shape in shapes:
        with pytest.raises(ValueError, match=f"x must be {wanted}, got {len(shape)}D input"):
            module(torch.ones(shape))
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        module([1.0])
    assert module.num_batches_tracked == 0


def test_a_layer_refuses_other_channels():
    with pytest.raises(ValueError, match=r"running_mean must have shape \(5,\) .* got \(4,\)"):
        BatchRenorm1d(4)(torch.ones(6, 5))


@each_device()
def test_the_cumulative_average(device):
    module = BatchRenorm1d(3, momentum=None, device=device)
    batches = torch.randn(5, 6, 3, device=device)
    for x in batches:
        module(x)
    torch.testing.assert_close(module.running_mean, batches.mean((0, 1)))


def test_the_cumulative_average_of_nothing_is_batch_norm():
    """As torch's layer, which has no counter either then, and does not ask for one."""
    options = {"momentum": None, "track_running_stats": False}
    module, norm = BatchRenorm1d(3, **options), nn.BatchNorm1d(3, **options)
    x = torch.randn(6, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        y = norm.train(training)(x)
        torch.testing.assert_close(module.train(training)(x), y)
        torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("layer", [BatchRenorm1d, SyncBatchRenorm])
def test_tracking_may_be_switched_off_for_a_forward(layer):
    """As for virtual adversarial training, which must leave no trace in the statistics: BatchNorm
    then trains by the batch and leaves them alone."""
    torch.manual_seed(0)
    module = layer(3, momentum=0.3, schedule=RenormSchedule.constant(3.0, 5.0))
    x = torch.randn(6, 3) * 2 + 1
    module(x)
    twin, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = twin(x)
    module.track_running_stats = False
    for call in (module, compiled) if layer is BatchRenorm1d else (module,):
        assert torch.equal(call(x), y)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    update_stats(nn.Sequential(module, BatchRenorm1d(3)), [x])  # as update_bn
    module.load_state_dict(before)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module.track_running_stats = True
    module(x)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_statistics_may_be_taken_away():
    """What users do to a BatchNorm that is to infer by the batch."""
    module, norm, x = BatchRenorm1d(3), nn.BatchNorm1d(3), torch.randn(6, 3)
    module.running_mean = module.running_std = norm.running_mean = norm.running_var = None
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), norm.train(training)(x))
    module.load_state_dict(BatchRenorm1d(3).state_dict(), strict=False)
    torch.testing.assert_close(fold(module)(x), norm(x))


@each_device()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_reads_running_var_infers_the_same(dtype, device):
    """Fusions and exporters of many libraries do so for whatever stands where a BatchNorm stood."""
    layer = BatchRenorm2d(4, eps=1e-3, device=device, dtype=dtype).eval()
    with torch.no_grad():
        layer.running_std.copy_(torch.tensor([0.01, 0.0317, 0.5, 300.0]))  # sqrt(eps): 0.0316
        layer.running_mean.uniform_(-1, 1)
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    var = layer.running_var
    assert var.dtype == layer.running_std.dtype and var[0] < 0 < var[1]
    torch.testing.assert_close((var + layer.eps).sqrt(), layer.running_std)
    assert "running_var" not in layer.state_dict() and "running_var" not in dict(
        layer.named_buffers()
    )

    conv = nn.Conv2d(3, 4, 3, device=device, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 6, 6, device=device, dtype=torch.float64)
    fused = nn.utils.fuse_conv_bn_eval(conv, layer.double())
    torch.testing.assert_close(fused(x), layer(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [None, torch.ones(3)])
def test_running_var_is_for_reading(value):
    """A value that the layer does not keep must not seem to be taken."""
    layer = BatchRenorm1d(3)
    with pytest.raises(AttributeError, match="running_var"):
        layer.running_var = value
    assert BatchRenorm1d(3, track_running_stats=False).running_var is None


def test_the_arguments_of_batch_norm_come_first_and_in_order():
    module = BatchRenorm2d(4, 1e-3, 0.1, True, False, "meta", torch.float16)
    found = (module.eps, module.momentum, module.affine, module.track_running_stats)
    assert found == (1e-3, 0.1, True, False)
    assert module.weight.is_meta and module.weight.dtype == torch.float16
    with pytest.raises(TypeError):
        BatchRenorm2d(4, 1e-3, 0.1, False, False, None, None, False)
    x = torch.randn(6, 4, 2, 2)
    assert torch.equal(BatchRenorm2d(4)(input=x), BatchRenorm2d(4)(x))


def test_sync_batch_norm_does_not_swallow_the_layer():
    model = nn.Sequential(BatchRenorm2d(4), nn.BatchNorm2d(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in converted] == [BatchRenorm2d, nn.SyncBatchNorm]


def test_a_parametrized_weight():
    class Exponential(nn.Module):
        def forward(self, weight):
            return weight.exp()

    module, plain = BatchRenorm1d(3), BatchRenorm1d(3)
    nn.utils.parametrize.register_parametrization(module, "weight", Exponential())
    with torch.no_grad():
        plain.weight.copy_(module.weight)
    x = torch.randn(6, 3)
    y = module(x)
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    assert module.parametrizations.weight.original.grad.abs().min() > 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ["running_mean", "running_std"])
def test_statistics_that_want_a_gradient_are_refused(name, training):
    """As BatchNorm refuses them: there is none, and silently none would be zero."""
    layer = BatchRenorm1d(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    given = {name: torch.ones(3, requires_grad=True)}

    def call(x):
        return torch.func.functional_call(layer, given, x)

    for function in (call, torch.compile(call, backend="aot_eager")):
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            function(torch.randn(4, 3))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


def test_an_inference_tensor_is_refused_before_statistics_move():
    """Autograd would refuse to keep it after that."""
    layer = BatchRenorm1d(3)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"an inference tensor cannot be: call x.clone\(\)"):
        layer(x)
    assert layer.num_batches_tracked == 0 and layer.running_mean.tolist() == [0, 0, 0]
    layer(x.clone()).sum().backward()
    with torch.no_grad():
        layer(x)
    assert layer.num_batches_tracked == 2


def test_an_inference_tensor_that_wants_a_gradient_is_refused_too():
    layer = BatchRenorm1d(3, affine=False)
    with torch.inference_mode():
        x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"x must be kept .*: call x.clone\(\)"):
        layer(x)
    assert layer.num_batches_tracked == 0 and layer.running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_an_inference_weight_is_refused_before_statistics_move(training):
    """Weights that were loaded under inference_mode, say."""
    with torch.inference_mode():
        layer = BatchRenorm1d(3).train(training)
    mean, std, steps = torch.zeros(3), torch.ones(3), torch.tensor(0)
    state = {"running_mean": mean, "running_std": std, "num_batches_tracked": steps}
    with pytest.raises(ValueError, match=r"weight must be kept .*: call weight.clone\(\)"):
        torch.func.functional_call(layer, state, torch.randn(4, 3, requires_grad=True))
    assert steps == 0 and mean.eq(0).all() and std.eq(1).all()


def test_functional_call_replaces_parameters_and_buffers():
    module = BatchRenorm1d(3)
    x = torch.randn(6, 3)
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    state["weight"] *= 2
    y = torch.func.functional_call(module, state, (x,))
    assert module.num_batches_tracked == 0 and state["num_batches_tracked"] == 1
    torch.testing.assert_close(y, 2 * module(x))


@each_device()
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_goes_through_a_network(training, device):
    """One layer that fell back to contiguous would make every convolution after it convert."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), BatchRenorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2), BatchRenorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 1), BatchRenorm2d(4)),
    )
    model.to(device, memory_format=torch.channels_last).train(training)
    formats = []
    for layer in model:
        layer.register_forward_hook(
            lambda *call: formats.append(call[2].is_contiguous(memory_format=torch.channels_last))
        )
    x = torch.randn(4, 3, 9, 9, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = model(x)
    y.backward(torch.randn_like(y))
    assert len(formats) == 8 and all(formats)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", ["parametrized", "parameter", "attribute"])
def test_statistics_need_not_be_buffers(how):
    layer, x = BatchRenorm2d(3).eval(), torch.randn(2, 3, 4, 4)
    layer.running_mean.normal_()
    wanted, mean = layer(x), layer.running_mean
    if how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(layer, "running_mean", nn.Identity())
    else:
        del layer.running_mean
        frozen = nn.Parameter(mean, requires_grad=False)
        layer.running_mean = frozen if how == "parameter" else mean
    assert torch.equal(layer(x), wanted)
    assert layer.train()(x).shape == x.shape
