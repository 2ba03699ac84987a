"""A model with BatchNorm becomes one with Batch Renorm, and back: what changes, what must not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
)
from batchrenorm_cuda.convert import Report, convert, fold
from batchrenorm_cuda.lazy import LazyBatchRenorm2d
from batchrenorm_cuda.sync import LazySyncBatchRenorm

torch.set_num_threads(1)

SCHEDULE = RenormSchedule(2, 2.0, 9, 3.0, 7)
DIMS = {1: (6, 3), 2: (6, 3, 4, 4), 3: (6, 3, 2, 4, 4)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
RENORMS = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}


def filled(norm):
    """With parameters and statistics that are nobody's default."""
    with torch.no_grad():
        for name, t in (*norm.named_parameters(), *norm.named_buffers()):
            if t.is_floating_point() and not name.endswith("schedule"):
                t.copy_(torch.rand_like(t) + 0.5)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(7)
    return norm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = filled(nn.BatchNorm2d(3, eps=1e-3))

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.ModuleDict({"head": Block()})["head"], nn.BatchNorm2d(3))


def everything(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_layer_keeps_everything_but_its_class(dim):
    norm = filled(NORMS[dim](3, eps=1e-3))
    norm.bias.requires_grad_(False)
    norm.eval().my_own = "kept"
    x = torch.randn(DIMS[dim])
    y, weight, mean = norm(x), norm.weight, norm.running_mean
    std = (norm.running_var.double() + 1e-3).sqrt().float()

    layer = convert(norm, schedule=SCHEDULE)
    assert layer is norm and type(layer) is RENORMS[dim]
    assert layer.weight is weight and layer.running_mean is mean
    assert torch.equal(layer.running_std, std) and "running_var" not in layer.state_dict()
    assert (layer.eps, layer.momentum, layer.num_batches_tracked) == (1e-3, 0.01, 7)
    assert not layer.training and not layer.bias.requires_grad and layer.my_own == "kept"
    assert RenormSchedule.from_tensor(layer.schedule) == SCHEDULE
    assert f"schedule={SCHEDULE}" in repr(layer)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)

    # Nothing that a constructed layer has is missing, and nothing is too much.
    built = RENORMS[dim](3, eps=1e-3, schedule=SCHEDULE)
    assert vars(layer).keys() - {"my_own"} == vars(built).keys()
    assert list(layer.state_dict()) == list(built.state_dict())
    built.load_state_dict(layer.state_dict())
    x = torch.randn(DIMS[dim])
    assert torch.equal(layer.train()(x), built(x)) and same(layer.state_dict(), built.state_dict())

    norm, built = fold(layer), NORMS[dim](3)
    assert type(norm) is NORMS[dim] and vars(norm).keys() - {"my_own"} == vars(built).keys()
    assert list(norm.state_dict()) == list(built.state_dict()) and norm.weight is weight


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_options_and_dtypes(options, dtype):
    torch.manual_seed(0)
    made = {name: value for name, value in options.items() if name != "bias"}
    norm = filled(nn.BatchNorm2d(3, dtype=dtype, **made))
    if "bias" in options:
        norm.bias = None
    x = torch.randn(DIMS[2]).to(dtype)
    y = norm.eval()(x)
    names = [n.replace("running_var", "running_std") for n in norm.state_dict()]
    layer = convert(norm)
    assert [n for n in layer.state_dict() if n != "schedule"] == names
    for name, value in options.items():
        assert name == "bias" or getattr(layer, name) == value
    assert layer.momentum == options.get("momentum", 0.01)
    if layer.track_running_stats:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.running_mean.dtype == layer.running_std.dtype == kept
    if layer.affine:
        assert layer.weight.dtype == dtype
    tolerance = {torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
    layer.train()(x)

    z = layer.eval()(x)
    norm = fold(layer)
    assert type(norm) is nn.BatchNorm2d
    torch.testing.assert_close(norm(x), z, rtol=tolerance, atol=tolerance)
    assert norm(x).dtype == dtype
    norm.train()(x)


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [(0.05, [0.05, None, 0]), ("keep", [0.3, None, 0]), (None, [None, None, 0])],
)
def test_momentum(momentum, expected):
    """None is the cumulative average, and 0 what some freeze statistics by."""
    model = nn.Sequential(*(nn.BatchNorm1d(3, momentum=own) for own in (0.3, None, 0.0)))
    assert [layer.momentum for layer in convert(model, momentum=momentum)] == expected


def test_a_whole_model_infers_the_same_and_optimisers_go_on():
    model = network()
    x = torch.randn(4, 3, 5, 5)
    y = model.eval()(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = list(model.parameters())
    assert convert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)

    before = model[0].norm.weight.clone()
    model.train()(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].norm.weight, before)


def test_state_dicts_load_both_ways():
    before = network()
    for block in before[:2]:
        block(torch.randn(4, 3, 5, 5))
    model = convert(network())
    assert str(model.load_state_dict(before.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model.eval()(x), before.eval()(x), rtol=1e-5, atol=1e-5)

    model.train()(x), model.eval()
    after = network().eval()
    folded = fold(copy.deepcopy(model))
    assert str(after.load_state_dict(folded.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)
    assert model[0].norm.running_std is not None  # the copy alone was folded


def test_hooks_of_all_kinds_stay():
    norm, seen = nn.BatchNorm1d(3), []
    norm.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    norm.register_forward_hook(lambda m, args, y: seen.append("forward"))
    norm.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    norm.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("saving"))
    norm._register_state_dict_hook(lambda m, state, prefix, local: seen.append("saved"))
    norm.register_load_state_dict_pre_hook(lambda m, *args: seen.append("loading"))
    norm.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded"))
    handle = norm.register_forward_hook(lambda m, args, y: seen.append("removed"))
    convert(norm)
    handle.remove()
    norm(torch.randn(6, 3, requires_grad=True)).sum().backward()
    norm.load_state_dict(norm.state_dict())
    assert seen == ["pre", "forward", "backward", "saving", "saved", "loading", "loaded"]


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def test_parametrizations_stay():
    norm = filled(nn.BatchNorm1d(3)).eval()
    parametrize.register_parametrization(norm, "weight", Double())
    x = torch.randn(6, 3)
    y = norm(x)
    layer = convert(norm)
    assert isinstance(layer, BatchRenorm1d) and parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.train()(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    z = copy.deepcopy(layer).eval()(x)
    norm = fold(layer).eval()
    torch.testing.assert_close(norm(x), z, rtol=1e-5, atol=1e-5)
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.BatchNorm1d


def test_a_shared_layer_is_changed_once_and_stays_shared():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Sequential(nn.Linear(3, 3), norm))
    reports = []
    convert(model, report=reports.append)
    assert model[0] is model[1][1] is norm and type(norm) is BatchRenorm1d
    (outcome,) = reports[0].changed
    assert outcome.names == ("0", "1.1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_that_share_parameters_and_statistics_go_on_sharing(dtype):
    """Two views of one layer: what one learns the other infers by."""
    one, other = filled(nn.BatchNorm1d(3, dtype=dtype)), nn.BatchNorm1d(3, dtype=dtype)
    other.weight, other.bias = one.weight, one.bias
    other._buffers.update(one._buffers)
    weight, bias = one.weight, one.bias
    weight.grad = torch.ones_like(weight)
    bias.requires_grad_(False)
    model = nn.Sequential(one, other)
    x = torch.randn(6, 3).to(dtype)
    for change in (convert, fold, convert):
        change(model)
        assert one.weight is other.weight is weight and one.bias is other.bias is bias
        assert weight.requires_grad and not bias.requires_grad
        assert weight.grad.dtype == weight.dtype
        for name, t in one.named_buffers():
            assert (other.get_buffer(name) is t) == (name != "schedule")
        model.train()(x).sum().backward()
        assert torch.equal(one.eval()(x), other.eval()(x))


def test_statistics_that_layers_share_are_separate_where_eps_makes_them_differ():
    one, other = nn.BatchNorm1d(3, eps=0.5), nn.BatchNorm1d(3)
    other._buffers.update(one._buffers)
    convert(nn.Sequential(one, other))
    assert one.running_mean is other.running_mean
    torch.testing.assert_close(one.running_std, torch.full((3,), 1.5).sqrt())
    torch.testing.assert_close(other.running_std, torch.full((3,), 1 + 1e-5).sqrt())
    other.running_std = one.running_std
    other.eps = 1e-5
    x = torch.randn(6, 3)
    y = one.eval()(x), other.eval()(x)
    fold(nn.Sequential(one, other))
    torch.testing.assert_close((one(x), other(x)), y, rtol=1e-6, atol=1e-6)


def test_what_inference_mode_changes_training_goes_on_with():
    for change, layer in ((convert, nn.BatchNorm1d(3)), (fold, BatchRenorm1d(3))):
        with torch.inference_mode():
            change(layer)
        assert not any(t.is_inference() for t in layer.state_dict().values())
        layer.train()(torch.randn(6, 3)).sum().backward()
        layer.load_state_dict(layer.state_dict())


def test_a_layer_pickled_before_there_was_a_counter():
    norm = filled(nn.BatchNorm1d(3)).eval()
    del norm.num_batches_tracked
    x = torch.randn(6, 3)
    y = norm(x)
    torch.testing.assert_close(convert(norm, from_now=True)(x), y)
    assert norm.num_batches_tracked == 0


def test_a_cycle_of_modules_ends():
    child, parent = nn.Sequential(nn.BatchNorm1d(3)), nn.Module()
    parent.child = child
    child.add_module("parent", parent)
    convert(parent)
    assert type(child[0]) is BatchRenorm1d


def test_sync_batch_norm_keeps_its_group_and_takes_any_dimension():
    norm = filled(nn.SyncBatchNorm(3, process_group="group")).eval()
    expected = [norm(torch.ones(shape)) for shape in DIMS.values()]
    layer = convert(norm)
    assert type(layer) is SyncBatchRenorm and layer.process_group == "group"
    for shape, y in zip(DIMS.values(), expected, strict=True):
        torch.testing.assert_close(layer(torch.ones(shape)), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got 1D"):
        layer(torch.ones(3))
    assert type(fold(layer)) is nn.SyncBatchNorm and layer.process_group == "group"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lazy_layers_stay_lazy(dtype):
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(eps=1e-3)).to(dtype)
    convert(model)
    assert type(model[1]) is LazyBatchRenorm2d
    model(torch.randn(4, 2, 3, 3).to(dtype))
    assert type(model[1]) is BatchRenorm2d and model[1].eps == 1e-3
    assert model[1].running_std.dtype == torch.float32 and model[1].num_batches_tracked == 1

    norm = fold(convert(nn.LazyBatchNorm2d(dtype=dtype)))
    assert type(norm) is nn.LazyBatchNorm2d
    norm(torch.randn(4, 2, 3, 3).to(dtype))
    assert type(norm) is nn.BatchNorm2d and norm.weight.shape == (2,)


def test_the_schedule_can_start_now():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].num_batches_tracked.fill_(1000)
    convert(model, schedule=SCHEDULE, from_now=True)
    for layer, count in zip(model, (0, 1000), strict=True):
        limits = RenormSchedule.from_tensor(layer.schedule)
        assert layer.num_batches_tracked == count
        assert limits == RenormSchedule(2 + count, 2.0, 9 + count, 3.0, 7 + count)


class Plain(nn.BatchNorm1d):
    """Many models have one of these."""

    def __init__(self, n):
        super().__init__(n, eps=1e-3)


class Own(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_subclass_with_methods_is_left_alone_aloud():
    model = nn.Sequential(Plain(3), Own(3))
    reports = []
    with pytest.warns(UserWarning, match="1, a Own, was left alone: a subclass with methods"):
        convert(model, report=reports.append)
    assert type(model[0]) is BatchRenorm1d and type(model[1]) is Own
    assert [o.before for o in reports[0].changed] == ["Plain"]
    assert str(reports[0]) == (
        "1 of 2 layers changed\n"
        "  0  Plain -> BatchRenorm1d\n"
        "  1  Own left alone: a subclass with methods of its own, and not in counterparts"
    )


class Split(nn.BatchNorm1d):
    """As timm's SplitBatchNorm2d: norms for the other parts of a batch are in the first one's."""

    def __init__(self, n):
        super().__init__(n)
        self.others = nn.ModuleList([nn.BatchNorm1d(n)])

    def forward(self, x):
        one, other = x.chunk(2)
        return torch.cat([super().forward(one), self.others[0](other)])


def test_what_is_inside_a_layer_left_alone_is_left_alone_too():
    """Half a layer that renormalizes would be neither."""
    model = nn.Sequential(Split(3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="0.others.0, a BatchNorm1d, .* it is part of 0"):
        convert(model)
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.BatchNorm1d, BatchRenorm1d))]
    assert kinds == [Split, nn.BatchNorm1d, BatchRenorm1d]

    split = Split(3)
    with pytest.warns(UserWarning, match="0, a BatchNorm1d, .* it is part of 1"):
        convert(nn.Sequential(split.others[0], split))
    assert type(split.others[0]) is nn.BatchNorm1d


class OwnRenorm(BatchRenorm1d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("change", [convert, fold])
def test_other_layers_without_a_counterpart_are_left_alone_aloud(change):
    norm = (nn.BatchNorm1d if change is convert else BatchRenorm1d)(3)
    norm.forward = lambda x: x
    with pytest.warns(UserWarning, match="the model, a .* its forward has been replaced"):
        change(norm)
    if change is fold:
        with pytest.warns(UserWarning, match="a subclass with methods"):
            assert type(fold(OwnRenorm(3))) is OwnRenorm
        return
    frozen = nn.BatchNorm1d(3)
    frozen.track_running_stats = False
    with pytest.warns(UserWarning, match="track_running_stats does not say"):
        assert type(convert(frozen)) is nn.BatchNorm1d
    for give in (
        lambda m: setattr(m, "schedule", "of its own"),
        lambda m: m.register_buffer("schedule", torch.ones(2)),
        lambda m: m.add_module("schedule", nn.ReLU()),
    ):
        give(other := nn.BatchNorm1d(3))
        with pytest.warns(UserWarning, match="it has a schedule of its own"):
            assert type(convert(other)) is nn.BatchNorm1d


class DetrFrozenBatchNorm2d(nn.Module):
    """As torchvision, detectron2 and transformers have it: no BatchNorm, and all of it buffers."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(n))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean) * scale + self.bias


class NotFrozenBatchNorm(nn.Linear):
    """Has the name alone."""


def test_frozen_layers_are_left_alone_aloud():
    """Detection backbones come with dozens of them: one warning, and a line of the report each."""
    model = nn.Sequential(
        DetrFrozenBatchNorm2d(3),
        nn.BatchNorm1d(3),
        nn.Sequential(DetrFrozenBatchNorm2d(3), NotFrozenBatchNorm(3, 3)),
    )
    reports = []
    with pytest.warns(UserWarning) as warned:
        convert(model, report=reports.append)
    assert [str(warning.message) for warning in warned] == [
        "0, and 1 more, each a DetrFrozenBatchNorm2d, were left alone: its statistics are fixed, "
        "and it goes on inferring by them. Name them in skip if that is right"
    ]
    assert [(o.names, o.after) for o in reports[0].outcomes] == [
        (("0",), None), (("1",), "BatchRenorm1d"), (("2.0",), None)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, skip=DetrFrozenBatchNorm2d)
        fold(model)
    with pytest.warns(UserWarning, match="the model, a DetrFrozenBatchNorm2d, was left alone"):
        convert(DetrFrozenBatchNorm2d(3))  # and not that there is nothing to change


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:Please use quant:UserWarning")
def test_what_is_prepared_for_quantisation_is_left_alone_aloud():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.fuse_modules_qat(model, [["0", "1"]], inplace=True)
    quantization.prepare_qat(model, inplace=True)
    with pytest.warns(UserWarning, match="0.bn, .*: ConvBn2d around it reads its running_var"):
        convert(model)
    assert type(model[0].bn) is nn.BatchNorm2d and type(model[2]) is BatchRenorm2d
    model(torch.randn(2, 3, 5, 5))


def test_what_is_torchscript_is_passed_over():
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    model = convert(nn.Sequential(nn.BatchNorm2d(4), script))
    assert type(model[0]) is BatchRenorm2d and model[1] is script
    assert type(fold(model)[0]) is nn.BatchNorm2d


def test_doing_it_twice_or_where_there_is_nothing():
    model = convert(network())
    state = everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
        convert(model, momentum="keep", from_now=True)
        convert(convert(network(), schedule=SCHEDULE), schedule=SCHEDULE)
    assert same(state, model.state_dict())
    for change in (convert, fold):
        with pytest.warns(UserWarning, match="Linear has no Batch"):
            change(nn.Linear(2, 2))


def test_another_librarys_batch_renorm_is_told_from_nothing():
    class BatchRenorm1d(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="no BatchNorm to change, and 2 BatchRenorm1d of .*adopt"):
        convert(nn.Sequential(BatchRenorm1d(2, 2), BatchRenorm1d(2, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": RenormSchedule(warmup_steps=5)},
        {"momentum": None},
        {"skip_nonfinite": True},
    ],
)
def test_settings_that_come_too_late_are_not_lost_in_silence(options):
    """A second call changes no layer, and whoever gives it a schedule should not train by another
    for thousands of batches."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    convert(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="no BatchNorm to convert, and 2 Batch Renorms with other"):
        convert(model, **options)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("0.norm", ["0.norm"]),
        ("0", ["0.norm"]),
        ("*.norm", ["0.norm", "1.norm"]),
        (["0.*", "2"], ["0.norm", "2"]),
        (Block, ["0.norm", "1.norm"]),
        (nn.BatchNorm2d, ["0.norm", "1.norm", "2"]),
        (lambda name, module: getattr(module, "eps", 0) == 1e-3, ["0.norm", "1.norm"]),
        ([lambda name, module: name == "2", Block], ["0.norm", "1.norm", "2"]),
        ([], []),
    ],
)
def test_skip(skip, left):
    model, reports = network(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, skip=skip, report=reports.append)
    assert isinstance(reports[0], Report)
    assert [name for outcome in reports[0].left for name in outcome.names] == left
    assert [n for n, m in model.named_modules() if type(m) is nn.BatchNorm2d] == left


def test_skip_takes_a_module_and_wins_for_shared_layers():
    model = network()
    convert(model, skip=model[1])
    assert type(model[0].norm) is BatchRenorm2d and type(model[1].norm) is nn.BatchNorm2d
    norm = nn.BatchNorm1d(3)
    model = convert(nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm1d(3)}), skip="b")
    assert type(model["a"]) is nn.BatchNorm1d and type(model["c"]) is BatchRenorm1d


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 2}, ValueError, r"momentum must be in \[0, 1\].* got 2"),
        ({"momentum": "own"}, TypeError, "momentum must be a number, got str"),
        ({"schedule": 3}, TypeError, "schedule must be a RenormSchedule, got int"),
        ({"skip": "hed"}, ValueError, "skip must name modules of the model, got 'hed'"),
        ({"skip": [3]}, TypeError, "skip must be a name, .* got int"),
        ({"skip": 3}, TypeError, "skip must be a name, .* got int"),
        ({"skip": nn.Linear(1, 1)}, ValueError, "skip must have modules .* got a Linear that is"),
        ({"report": True}, TypeError, "report must be callable, such as print, got True"),
        ({"from_now": 1}, TypeError, "from_now must be a bool, got 1"),
        ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be a bool, got None"),
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(options, error, message):
    model = network()
    before, text = everything(model), repr(model)
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert same(before, model.state_dict()) and repr(model) == text


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("running_var", -1.0, "1.norm.running_var must be finite and >= 0, got -1.0 in 1 of 3"),
        ("running_var", torch.nan, "1.norm.running_var must be finite and >= 0, got nan in 1 of 3"),
        ("running_mean", torch.inf, "1.norm.running_mean must be finite, got inf in 1 of 3"),
        ("num_batches_tracked", -2, "1.norm.num_batches_tracked must be finite and >= 0, got -2"),
    ],
)
def test_bad_statistics_change_nothing(name, bad, message):
    model = network()
    getattr(model[1].norm, name).view(-1)[-2:][0] = bad
    before, text = {n: t.nan_to_num() for n, t in everything(model).items()}, repr(model)
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert same(before, {n: t.nan_to_num() for n, t in model.state_dict().items()})
    assert repr(model) == text and type(model[0].norm) is nn.BatchNorm2d


@pytest.mark.parametrize("bad", [1e-25, 1e25])
def test_a_std_that_no_variance_has_is_not_folded(bad):
    model = convert(network())
    model[1].norm.running_std[1] = bad
    text = repr(model)
    with pytest.raises(ValueError, match="1.norm.running_std must be > 0 and have a square"):
        fold(model)
    assert repr(model) == text


def test_layers_that_cannot_be_made_are_named():
    with pytest.raises(ValueError, match="1: momentum must be in .* got 3"):
        convert(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(3, momentum=3)), momentum="keep")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        convert({})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        fold("model")


def test_a_wrapped_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", None, 1, 0)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        with pytest.raises(ValueError, match="model must not be wrapped yet, got a Distributed"):
            convert(model)
    finally:
        torch.distributed.destroy_process_group()


def scales(norm):
    """What a layer multiplies each channel with."""
    with torch.no_grad():
        ones = torch.ones(1, norm.num_features, dtype=norm.running_mean.dtype)
        return norm.eval()(ones)[0]


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folded_scale_is_the_same_to_the_last_bit(size, eps, dtype):
    torch.manual_seed(0)
    layer = BatchRenorm1d(20_000, eps=eps, affine=False, dtype=dtype)
    std = (torch.rand_like(layer.running_std) + 1e-2) * size
    layer.running_std.copy_((std.square() + eps).sqrt())
    expected = scales(layer)
    norm = fold(layer)
    assert norm.eps == (eps or torch.finfo(torch.float32).tiny) and (norm.running_var >= 0).all()
    total = norm.running_var + torch.tensor(norm.eps, dtype=dtype)
    ulp = torch.finfo(dtype).eps
    for scale in (1 / total.sqrt(), total.rsqrt(), scales(norm)):  # the ways of torch's kernels
        torch.testing.assert_close(scale, expected, rtol=ulp, atol=0)
        assert (scale != expected).sum() <= 10  # of 20,000


def test_eps_is_lowered_where_a_variance_would_be_negative():
    layer = BatchRenorm1d(4, eps=1e-2)
    layer.running_std.copy_(torch.tensor([1.0, 0.1, 0.05, 3.0]))  # 0.05 ** 2 < eps
    expected = scales(layer)
    norm = fold(layer)
    assert 0 < norm.eps < 1e-2 and norm.running_var.min() == 0
    assert torch.equal(scales(norm), expected)
    norm.train()(torch.randn(3, 4))  # torch wants eps > 0


def test_there_and_back_moves_the_scale_by_no_more_than_a_rounding():
    norm = filled(nn.BatchNorm1d(1000))
    state, before = everything(norm), scales(norm)
    fold(convert(norm))
    assert norm.eps == 1e-5 and norm.num_batches_tracked == 7
    assert same({**state, "running_var": norm.running_var}, norm.state_dict())
    torch.testing.assert_close(norm.running_var, state["running_var"], rtol=3e-7, atol=0)
    torch.testing.assert_close(scales(norm), before, rtol=5e-7, atol=0)


def test_torch_fuses_and_exports_a_folded_model():
    model = convert(network()).eval()
    x = torch.randn(2, 3, 5, 5)
    y = model(x)
    fold(model)
    block = model[0]
    fused = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.norm)
    torch.testing.assert_close(fused(x), block.norm(block.conv(x)), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), y, rtol=1e-4, atol=1e-5)
    assert "aten.batch_norm" in str(exported.graph) and "batchrenorm" not in str(exported.graph)


def test_copies_of_a_converted_model():
    model = convert(network(), schedule=SCHEDULE)
    x = torch.randn(4, 3, 5, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model.state_dict(), other.state_dict()) and repr(model) == repr(other)
        other(x)
        assert not same(model.state_dict(), other.state_dict())


def test_buffers_stay_out_of_the_state_dict_if_they_were():
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("running_var", norm.running_var, persistent=False)
    norm.register_buffer("other", torch.ones(1), persistent=False)
    convert(norm)
    assert not {"running_std", "other"} & norm.state_dict().keys() and norm.other == 1
    fold(norm)
    assert not {"running_var", "other"} & norm.state_dict().keys()
    assert norm._non_persistent_buffers_set == {"running_var", "other"}


def test_a_meta_model_is_converted_and_folded():
    with torch.device("meta"):
        model = convert(network())
    assert model[0].norm.running_std.is_meta and model[0].norm.schedule.is_meta
    model.load_state_dict(convert(network()).state_dict(), assign=True)
    model(torch.randn(4, 3, 5, 5))
    with torch.device("meta"):
        model = fold(convert(network()))
    assert model[0].norm.running_var.is_meta


def test_a_converted_model_compiles():
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), schedule=SCHEDULE)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        x = torch.randn(6, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    assert model[1].num_batches_tracked == 4
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


def test_a_compiled_model_may_be_converted_and_is_compiled_anew():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 3)
    y = compiled(x)
    convert(compiled)
    torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
    compiled.train()(x)
    assert model[1].num_batches_tracked == 1


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_converted_there():
    model = network().cuda().eval()
    x = torch.randn(4, 3, 5, 5, device="cuda")
    y = model(x)
    convert(model)
    assert all(t.is_cuda for t in model.state_dict().values())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    fold(model)
    assert all(t.is_cuda for t in model.state_dict().values())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.half()(x.half()).float(), y, rtol=2e-2, atol=2e-2)


def test_statistics_that_are_not_saved_stay_so():
    """And neither is the schedule, which is of no use without the counter."""
    norm = nn.BatchNorm1d(3)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, getattr(norm, name), persistent=False)
    state = norm.state_dict()
    layer = convert(norm)
    assert layer.state_dict().keys() == state.keys()
    layer.load_state_dict(state)
    assert fold(layer).state_dict().keys() == state.keys()
    assert layer._non_persistent_buffers_set == {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip


@pytest.mark.parametrize("from_now", [False, True])
@pytest.mark.parametrize(
    ("counter", "message"),
    [
        (torch.tensor(-6000), "0.num_batches_tracked must be .*>= 0, got -6000"),
        (torch.tensor(float("nan")), "0.num_batches_tracked must be .*finite and >= 0, got nan"),
        (torch.tensor([1, 2]), "0.num_batches_tracked must be one number"),
    ],
    ids=["negative", "NaN", "two"],
)
def test_a_bad_counter_names_its_layer(counter, message, from_now):
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].num_batches_tracked = counter
    with pytest.raises(ValueError, match=message):
        convert(model, from_now=from_now)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_lazy_synchronised_layer_folds_once_it_has_seen_a_batch():
    model = nn.Sequential(LazySyncBatchRenorm())
    with pytest.warns(UserWarning, match="torch has no lazy SyncBatchNorm"):
        fold(model)
    assert type(model[0]) is LazySyncBatchRenorm
