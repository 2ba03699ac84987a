"""Layers that learn the number of channels from their first input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule
from batchrenorm_cuda.lazy import LazyBatchRenorm1d, LazyBatchRenorm2d, LazyBatchRenorm3d

torch.set_num_threads(1)

SCHEDULE = RenormSchedule(2, 2.0, 9, 3.0, 7)
LAYERS = [
    (LazyBatchRenorm1d, BatchRenorm1d, (6, 3)),
    (LazyBatchRenorm1d, BatchRenorm1d, (6, 3, 5)),
    (LazyBatchRenorm2d, BatchRenorm2d, (6, 3, 4, 4)),
    (LazyBatchRenorm3d, BatchRenorm3d, (6, 3, 2, 4, 4)),
]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("lazy", "full", "shape"), LAYERS)
def test_after_the_first_batch_it_is_a_layer_as_constructed(lazy, full, shape, training):
    options = {"eps": 1e-3, "momentum": 0.2, "schedule": SCHEDULE, "skip_nonfinite": True}
    layer, built = lazy(**options).train(training), full(3, **options).train(training)
    x = torch.randn(shape)
    assert torch.equal(layer(x), built(x))
    assert type(layer) is full and repr(layer) == repr(built)
    assert vars(layer).keys() == vars(built).keys() and not layer._forward_pre_hooks
    assert list(layer.state_dict()) == list(built.state_dict())
    assert same(layer.state_dict(), built.state_dict())
    assert layer.num_batches_tracked == training  # the dry run is the run


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_options(options):
    layer, built = LazyBatchRenorm1d(**options), BatchRenorm1d(3, **options)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in built.named_parameters()]
    for name, t in layer.named_buffers():
        assert t.dtype == getattr(built, name).dtype
    x = torch.randn(6, 3, dtype=options.get("dtype"))
    assert torch.equal(layer(x), built(x)) and same(layer.state_dict(), built.state_dict())
    assert repr(layer) == repr(built)


def test_before_the_first_batch():
    layer = LazyBatchRenorm2d(schedule=SCHEDULE)
    assert isinstance(layer.weight, UninitializedParameter)
    assert isinstance(layer.running_std, UninitializedBuffer)
    assert isinstance(layer.running_var, UninitializedBuffer)
    assert LazyBatchRenorm2d(track_running_stats=False).running_var is None
    assert "LazyBatchRenorm2d(0, " in repr(layer)
    layer.reset_parameters(), layer.reset_running_stats()
    layer.set_schedule(RenormSchedule.constant(2.0, 1.0))
    layer(torch.randn(2, 3, 4, 4))
    assert layer.running_var.shape == (3,)
    assert RenormSchedule.from_tensor(layer.schedule) == RenormSchedule.constant(2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_conversions_before_the_first_batch(dtype):
    layer = LazyBatchRenorm1d().to(dtype)
    layer(torch.randn(6, 3).to(dtype))
    assert layer.weight.dtype == dtype and layer.schedule.dtype == torch.float64
    assert layer.running_std.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 3, 2), "x must be 4D, got 3D"), ((6, 0, 2, 2), "x must have at least one channel")],
)
def test_a_bad_first_batch_leaves_it_lazy(shape, message):
    layer = LazyBatchRenorm2d()
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    assert type(layer) is LazyBatchRenorm2d and is_lazy(layer.weight)
    layer(torch.randn(6, 3, 2, 2))
    assert type(layer) is BatchRenorm2d


def test_bad_arguments():
    for options, message in (
        ({"momentum": 3}, "momentum must be"),
        ({"eps": -1}, "eps must be"),
        ({"schedule": 1}, "schedule must be"),
        ({"dtype": torch.int64}, "dtype must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            LazyBatchRenorm1d(**options)


def trained():
    torch.manual_seed(0)
    layer = BatchRenorm1d(3, momentum=0.2, schedule=SCHEDULE)
    nn.init.normal_(layer.weight)
    for _ in range(3):
        layer(torch.randn(6, 3) * 2 + 1)
    return layer


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_gives_it_a_size(assign):
    layer, other = LazyBatchRenorm1d(momentum=0.2), trained()
    state = copy.deepcopy(other.state_dict())
    assert str(layer.load_state_dict(state, assign=assign)).startswith("<All keys")
    x = torch.randn(6, 3)
    assert torch.equal(layer(x), other(x)) and type(layer) is BatchRenorm1d
    assert repr(layer) == repr(trained()) and same(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_a_batch_norm_gives_it_a_size(assign):
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(6, 3) * 2)
    layer = LazyBatchRenorm1d(schedule=SCHEDULE)
    layer.load_state_dict(norm.state_dict(), assign=assign)
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), rtol=1e-5, atol=1e-5)
    assert layer.num_features == 3 and RenormSchedule.from_tensor(layer.schedule) == SCHEDULE


def test_what_a_part_of_a_state_dict_gave_stays():
    layer = LazyBatchRenorm1d()
    layer.load_state_dict({"weight": torch.tensor([1.0, 2.0, 3.0])}, strict=False)
    layer.eval()(torch.randn(6, 3))
    assert layer.weight.tolist() == [1, 2, 3] and layer.running_std.tolist() == [1, 1, 1]


@pytest.mark.parametrize("source", [LazyBatchRenorm1d, nn.LazyBatchNorm1d])
def test_the_state_of_a_lazy_layer_loads_into_one(source):
    layer = LazyBatchRenorm1d()
    assert str(layer.load_state_dict(source().state_dict())) == "<All keys matched successfully>"
    assert is_lazy(layer.running_std) and is_lazy(layer.weight)
    layer(torch.randn(6, 3))
    assert layer.num_features == 3


def test_a_poisoned_state_dict_leaves_it_lazy():
    state = trained().state_dict()
    state["running_std"] = torch.tensor([1.0, 0.0, 1.0])
    layer = LazyBatchRenorm1d()
    with pytest.raises(RuntimeError, match="running_std must be finite and > 0, got 0.0"):
        layer.load_state_dict(state)
    assert is_lazy(layer.running_std) and is_lazy(layer.weight)


def test_pickle_before_the_first_batch():
    layer = pickle.loads(pickle.dumps(LazyBatchRenorm1d(schedule=SCHEDULE)))
    layer(torch.randn(6, 3))
    assert layer.num_features == 3 and RenormSchedule.from_tensor(layer.schedule) == SCHEDULE


def test_in_a_lazy_network_that_is_then_compiled():
    model = nn.Sequential(nn.LazyConv2d(4, 3), LazyBatchRenorm2d(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    assert model[1].weight.grad is not None and model[1].num_batches_tracked == 2


@pytest.mark.gpu
def test_it_is_made_on_its_device():
    layer = LazyBatchRenorm1d(device="cuda")
    layer(torch.randn(6, 3, device="cuda"))
    assert all(t.is_cuda for t in layer.state_dict().values())


@pytest.mark.parametrize(
    "given", [{}, {"weight": torch.tensor([1.0, 2.0, 3.0])}], ids=["all", "a part"]
)
def test_a_first_batch_of_other_channels_than_what_was_loaded_changes_nothing(given):
    layer = LazyBatchRenorm1d()
    layer.load_state_dict(given or nn.BatchNorm1d(3).state_dict(), strict=False)
    name = "weight" if given else "weight|running_mean"
    with pytest.raises(ValueError, match=rf"x must have the 3 channels of the ({name}) that was"):
        layer(torch.randn(4, 5))
    assert type(layer) is LazyBatchRenorm1d and layer.num_features == 0
    assert is_lazy(layer.running_std) == bool(given)
    layer(torch.randn(4, 3))
    assert type(layer) is BatchRenorm1d and layer.num_features == 3
    assert layer.running_mean.shape == layer.weight.shape == (3,)


def test_clipping_is_monitored_from_what_was_loaded_on():
    layer = LazyBatchRenorm1d()
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    layer.monitor_clipping()
    layer(torch.randn(4, 3))
    assert layer.read_clipping().steps == 1


def test_x_by_name():
    """As torch's layers call it, lazy or not."""
    layer, x = LazyBatchRenorm1d(), torch.randn(4, 3)
    torch.testing.assert_close(layer(input=x), BatchRenorm1d(3)(input=x), rtol=0, atol=0)
