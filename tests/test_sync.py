"""SyncBatchRenorm and convert_sync where there is no other process; test_distributed.py has them
where there is."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    LazyBatchRenorm2d,
    RenormSchedule,
    SyncBatchRenorm,
    convert,
    convert_sync,
    fold,
)
from batchrenorm_cuda.sync import LazySyncBatchRenorm

GROUP = dist.ProcessGroup(0, 1)  # of this process alone; nothing can copy or pickle it
SHAPES = {BatchRenorm1d: (6, 3), BatchRenorm2d: (6, 3, 4, 4), BatchRenorm3d: (6, 3, 2, 4, 4)}


@pytest.mark.parametrize("cls", SHAPES)
def test_alone_it_is_the_ordinary_layer_to_the_last_bit(cls):
    options = {"schedule": RenormSchedule(1, 2.0, 4, 1.0, 3), "momentum": 0.2}
    layers = [SyncBatchRenorm(3, **options), cls(3, **options)]
    for _ in range(5):
        x, dy = torch.randn(2, *SHAPES[cls])
        found = []
        for layer in layers:
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            found.append((y, leaf.grad, layer.weight.grad, layer.running_mean, layer.running_std))
        assert all(map(torch.equal, *found))
    assert torch.equal(layers[0].eval()(x), layers[1].eval()(x))


def test_it_is_constructed_as_sync_batch_norm_is():
    """Positions and names of torch's arguments; the keys of the state of an ordinary layer."""
    arguments = (3, 1e-3, 0.2, False, True, GROUP, "cpu", torch.float64)
    layer, torchs = SyncBatchRenorm(*arguments), nn.SyncBatchNorm(*arguments)
    for name in ("eps", "momentum", "affine", "track_running_stats", "process_group"):
        assert getattr(layer, name) == getattr(torchs, name)
    assert layer.running_mean.dtype == torchs.running_mean.dtype
    ordinary = BatchRenorm2d(3, affine=False, dtype=torch.float64)
    assert layer.state_dict().keys() == ordinary.state_dict().keys()
    ordinary.load_state_dict(layer.state_dict())
    layer = SyncBatchRenorm(3)
    layer.load_state_dict(nn.SyncBatchNorm(3).state_dict())


def test_the_number_of_dimensions_is_2_to_5():
    layer = SyncBatchRenorm(3)
    for shape in ((4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="x must be 2D or 3D or 4D or 5D, got 1D"):
        layer(torch.randn(3))
    with pytest.raises(ValueError, match="more than one value per channel"):  # nobody else has any
        layer(torch.randn(1, 3))


def test_it_can_be_pickled_and_copied():
    layer = SyncBatchRenorm(3, momentum=0.5)
    layer(torch.randn(4, 3))
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is SyncBatchRenorm and again.process_group is None
        assert torch.equal(again.running_mean, layer.running_mean)
        assert again.running_mean is not layer.running_mean
    shared = nn.ModuleList([layer, layer])
    copied = copy.deepcopy(shared)
    assert copied[0] is copied[1] is not layer


def test_with_a_group_it_can_be_copied_but_not_pickled():
    """SyncBatchNorm can be neither; a group is of no other process, nor of this one tomorrow."""
    layer = SyncBatchRenorm(3, process_group=GROUP)
    assert copy.deepcopy(layer).process_group is GROUP
    for cannot in (layer, nn.SyncBatchNorm(3, process_group=GROUP)):
        with pytest.raises(TypeError, match="cannot pickle '.*ProcessGroup'"):
            pickle.dumps(cannot)
    layer.process_group = None
    assert pickle.loads(pickle.dumps(layer)).process_group is None


@pytest.mark.parametrize("bad", [3, "gloo", [0, 1]], ids=repr)
def test_what_is_no_process_group_is_refused_before_anything_has_changed(bad):
    message = f"process_group must be a ProcessGroup or None, got {re.escape(repr(bad))}"
    with pytest.raises(TypeError, match=message):
        SyncBatchRenorm(3, process_group=bad)
    layer = BatchRenorm1d(3)
    with pytest.raises(TypeError, match=message):
        convert_sync(layer, bad)
    assert type(layer) is BatchRenorm1d
    # What new_group gives to a process that it leaves out; it says so in the first forward.
    SyncBatchRenorm(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)


class Constructed(BatchRenorm2d):
    def __init__(self):
        super().__init__(3)


class Louder(BatchRenorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_convert_sync_changes_the_class_and_nothing_else():
    shared = BatchRenorm2d(3, momentum=0.3, skip_nonfinite=True)
    model = nn.Sequential(shared, nn.Sequential(shared, BatchRenorm1d(3)), BatchRenorm3d(3))
    model.add_module("4", Constructed())
    model[2].eval()
    shared.register_buffer("note", torch.ones(1))
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    before = dict(model.state_dict(keep_vars=True))
    reports = []
    assert convert_sync(model, GROUP, report=reports.append) is model

    layers = [m for m in model.modules() if isinstance(m, SyncBatchRenorm)]
    assert len(layers) == 4 and all(layer.process_group is GROUP for layer in layers)
    assert model[0] is model[1][0] is shared and shared.momentum == 0.3 and shared.skip_nonfinite
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert [m.training for m in (model[0], model[2])] == [True, False]
    shared(torch.randn(2, 3, 4, 4))
    assert calls == [1]
    assert len(reports[0].changed) == 4 and reports[0].changed[0].names == ("0", "1.0")

    convert_sync(model)  # again: another group
    assert all(layer.process_group is None for layer in layers)


def test_convert_sync_leaves_alone_what_it_is_told_to_and_what_it_does_not_know():
    model = nn.Sequential(BatchRenorm2d(3), Louder(3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="1, a Louder, was left alone"):
        convert_sync(model, skip="0")
    assert [type(m) for m in model] == [BatchRenorm2d, Louder, nn.BatchNorm2d]
    with pytest.warns(UserWarning, match="has no Batch Renorm to change"):
        convert_sync(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        convert_sync("model")


def test_parametrized_layers_stay_so():
    layer = BatchRenorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    x = torch.randn(5, 3)
    expected = layer.eval()(x)
    convert_sync(layer)
    assert isinstance(layer, SyncBatchRenorm) and parametrize.is_parametrized(layer, "weight")
    assert torch.equal(layer(x), expected)


def test_parametrized_layers_are_copied_whatever_they_become():
    """Torch gives a parametrized class a __deepcopy__ if it has none; without one, or with one that
    copies the group, copying fails."""

    layer = BatchRenorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    for change in (lambda m: convert_sync(m, GROUP), fold, convert):
        change(layer)
        copied = copy.deepcopy(layer)
        assert type(copied) is type(layer) and copied.process_group is GROUP
        assert copied.weight is not layer.weight and torch.equal(copied.weight, layer.weight)


def test_torch_fx_takes_it_for_a_leaf_where_there_are_others(monkeypatch):
    monkeypatch.setattr(SyncBatchRenorm, "_world", lambda _: 2)
    traced = torch.fx.symbolic_trace(nn.Sequential(SyncBatchRenorm(3)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def test_lazy_layers_become_synchronised_with_their_first_input():
    model = convert_sync(nn.Sequential(LazyBatchRenorm2d(momentum=0.3)), GROUP)
    assert type(model[0]) is LazySyncBatchRenorm
    model(torch.randn(4, 3, 2, 2))
    assert type(model[0]) is SyncBatchRenorm and model[0].process_group is GROUP
    assert model[0].momentum == 0.3 and model[0].num_features == 3


def test_there_and_back():
    """convert of a SyncBatchNorm, and fold of what convert_sync made of a BatchNorm."""
    norm = nn.SyncBatchNorm(3, process_group=GROUP)
    assert type(convert(norm)) is SyncBatchRenorm and norm.process_group is GROUP
    assert type(fold(norm)) is nn.SyncBatchNorm and norm.process_group is GROUP
    model = convert_sync(convert(nn.Sequential(nn.BatchNorm2d(3))), GROUP)
    fold(model)
    assert type(model[0]) is nn.SyncBatchNorm and model[0].process_group is GROUP
    assert not hasattr(model[0], "schedule")
