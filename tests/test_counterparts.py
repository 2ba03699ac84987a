"""What subclasses of a BatchNorm become: a caller's own, and timm's, which act after the norm."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    LazyBatchRenorm1d,
    RenormSchedule,
    SyncBatchRenorm,
    convert,
    convert_sync,
    fold,
)
from batchrenorm_cuda.norm_act import BatchRenormAct2d, SyncBatchRenormAct
from batchrenorm_cuda.sync import LazySyncBatchRenorm

torch.set_num_threads(1)


class Shifted:
    """What both classes of a pair have: a method, and state that the norm knows nothing of."""

    def prepare(self, by):
        self.by = by
        self.gate = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))
        return self

    def forward(self, x):
        self.seen += 1
        return super().forward(self.gate(x)) + self.by


class Norm(Shifted, nn.BatchNorm1d):
    pass


class Renorm(Shifted, BatchRenorm1d):
    pass


class SyncRenorm(Shifted, SyncBatchRenorm):
    pass


class LazyRenorm(LazyBatchRenorm1d):
    def prepare(self):
        pass


class LazySyncRenorm(LazySyncBatchRenorm):
    pass


class Named(Norm):
    """Nothing of its own but a constructor, so what Norm becomes it becomes."""

    def __init__(self, n):
        super().__init__(n, eps=1e-3)


def trained(model, x):
    for _ in range(3):
        model(x)
    return model


@pytest.mark.parametrize("cls", [Norm, Named])
def test_a_pair_of_ones_own_there_and_back(cls):
    x = torch.randn(6, 2)
    model = trained(nn.Sequential(cls(2).prepare(3.0)), x)
    layer, gate, weight = model[0], model[0].gate, model[0].weight
    was = copy.deepcopy(model).eval()
    convert(model, counterparts={Norm: Renorm}, schedule=RenormSchedule.constant(2, 1))
    assert type(layer) is Renorm and layer.gate is gate and layer.weight is weight
    assert layer.eps == was[0].eps and layer.by == 3.0 and layer.seen == 3
    torch.testing.assert_close(model.eval()(x), was(x))

    plain = BatchRenorm1d(2, layer.eps, schedule=RenormSchedule.constant(2, 1))
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    dy, inputs = torch.randn(6, 2), (layer.gate.weight, layer.weight)
    found = torch.autograd.grad(model.train()(x), inputs, dy)
    want = torch.autograd.grad(plain(gate(x)) + 3, (gate.weight, plain.weight), dy)
    torch.testing.assert_close(found, want)
    assert layer.num_batches_tracked == 4 and found[0].abs().max() > 0.01

    stepped = copy.deepcopy(model).eval()
    fold(model.eval(), counterparts={Renorm: Norm})
    assert type(layer) is Norm
    torch.testing.assert_close(model(x), stepped(x))


def test_a_synchronised_pair():
    model = nn.Sequential(Renorm(2).prepare(1.0))
    with pytest.warns(UserWarning, match="not in counterparts"):
        assert type(convert_sync(model)[0]) is Renorm
    convert_sync(model, counterparts={Renorm: SyncRenorm})
    assert type(model[0]) is SyncRenorm and model[0].process_group is None
    assert model(torch.randn(5, 2)).shape == (5, 2) and model[0].seen == 1

    lazy = convert_sync(LazyRenorm(), counterparts={LazyRenorm: LazySyncRenorm})
    assert type(lazy) is LazySyncRenorm


class BatchNormXd(nn.modules.batchnorm._BatchNorm):
    """What Lightning and mmengine make of a SyncBatchNorm for one process: of any dimension."""

    def _check_input_dim(self, x):
        pass


def test_a_norm_of_any_dimension():
    layer = convert(BatchNormXd(3), counterparts={BatchNormXd: SyncBatchRenorm})
    assert type(layer) is SyncBatchRenorm
    assert layer(torch.randn(2, 3, 4)).shape == layer(torch.randn(2, 3, 4, 1))[..., 0].shape
    assert layer.process_group is None and copy.deepcopy(layer).process_group is None
    assert type(fold(layer, counterparts={SyncBatchRenorm: BatchNormXd})) is BatchNormXd


def test_a_standard_layer_may_be_given_another_counterpart():
    layer = convert(nn.BatchNorm2d(3), counterparts={nn.BatchNorm2d: BatchRenormAct2d})
    assert type(layer) is BatchRenormAct2d
    assert layer(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)


def test_a_parametrized_layer_of_a_pair():
    layer = Norm(2).prepare(0.0)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    convert(layer, counterparts={Norm: Renorm})
    assert isinstance(layer, Renorm) and parametrize.is_parametrized(layer, "weight")
    assert layer(torch.randn(4, 2)).isfinite().all()


class Louder:
    """Another base, which a pair of only one of the bases would lose."""

    def forward(self, x):
        return 100 * super().forward(x)


class Loud(Norm, Louder):
    pass


class LoudStandard(nn.BatchNorm1d, Louder):
    pass


class LoudRenorm(Renorm, Louder):
    pass


def test_what_another_base_does_is_not_lost():
    for cls, pairs in ((Loud, {Norm: Renorm}), (LoudStandard, {})):
        with pytest.warns(UserWarning, match="not in counterparts"):
            assert type(convert(cls(2), counterparts=pairs)) is cls
    layer = convert(Loud(2).prepare(1.0), counterparts={Norm: Renorm, Loud: LoudRenorm})
    assert type(layer) is LoudRenorm


@pytest.mark.parametrize(
    "change, pairs, message",
    [
        (convert, [Norm, Renorm], "must be a dict of classes, got list"),
        (convert, {nn.Linear: Renorm}, "a subclass of a BatchNorm for key, got .*Linear"),
        (convert, {Norm: Norm}, "a subclass of a BatchRenorm for value, got .*Norm"),
        (convert, {"Norm": Renorm}, "a subclass of a BatchNorm for key, got 'Norm'"),
        (convert, {Norm: Renorm(2)}, "a subclass of a BatchRenorm for value, got Renorm"),
        (fold, {Norm: Renorm}, "a subclass of a BatchRenorm for key"),
        (fold, {Renorm: Renorm}, "a subclass of a BatchNorm for value"),
        (convert_sync, {Renorm: Renorm}, "a subclass of a SyncBatchRenorm for value"),
        (convert, {Norm: LazyBatchRenorm1d}, "must pair lazy classes with lazy ones, got .*Norm"),
        (convert, {nn.LazyBatchNorm1d: Renorm}, "must pair lazy classes with lazy ones"),
    ],
)
def test_bad_pairs_change_nothing(change, pairs, message):
    model = nn.Sequential(nn.BatchNorm1d(2), BatchRenorm1d(2))
    with pytest.raises(TypeError, match="counterparts .*" + message):
        change(model, counterparts=pairs)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, BatchRenorm1d]


@pytest.fixture(params=["in its place", "itself"])
def timm_layers(request, monkeypatch):
    """timm's two classes, as far as the norm goes; and those of timm, where it is installed."""
    if request.param == "itself":
        return pytest.importorskip("timm.layers.norm_act")
    module = types.ModuleType("timm.layers.norm_act")

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, num_features, act_layer=nn.ReLU, drop_layer=nn.Identity):
            super().__init__(num_features)
            self.drop, self.act = drop_layer(), act_layer()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    class SyncBatchNormAct(nn.SyncBatchNorm):
        def forward(self, x):
            x = super().forward(x)
            return self.act(x) if hasattr(self, "act") else x

    for cls in (BatchNormAct2d, SyncBatchNormAct):
        cls.__module__ = module.__name__
        setattr(module, cls.__name__, cls)
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_norm_of_timm_goes_on_acting(timm_layers):
    x = torch.randn(4, 3, 5, 5)
    norm = timm_layers.BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.5))
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), norm), x)
    was = copy.deepcopy(model).eval()
    convert(model, schedule=RenormSchedule.constant(2, 1))
    assert type(norm) is BatchRenormAct2d
    torch.testing.assert_close(model.eval()(x), was(x))

    plain = BatchRenorm2d(3, schedule=RenormSchedule.constant(2, 1))
    plain.load_state_dict(norm.state_dict())
    torch.manual_seed(0)
    y = model.train()(x)
    torch.manual_seed(0)
    wanted = nn.functional.silu(nn.functional.dropout(plain(model[0](x)), 0.5))
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)

    model.eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(norm))
    torch.testing.assert_close(again(x), norm(x), rtol=0, atol=0)
    stepped = model(x)
    fold(model)
    assert type(norm) is timm_layers.BatchNormAct2d
    torch.testing.assert_close(model(x), stepped)


def test_a_synchronised_norm_of_timm_goes_on_acting(timm_layers):
    norm = timm_layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    x = torch.randn(4, 3, 5, 5)
    convert_sync(convert(norm))
    assert type(norm) is SyncBatchRenormAct and type(convert_sync(norm)) is SyncBatchRenormAct
    y = norm.eval()(x)
    plain = SyncBatchRenorm(3).eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(y, nn.functional.silu(plain(x)))
    assert type(fold(norm)) is timm_layers.SyncBatchNormAct
    assert type(convert(norm)) is SyncBatchRenormAct
    torch.testing.assert_close(norm(x), y)

    bare = convert(timm_layers.SyncBatchNormAct(3))  # its own conversion gives it drop and act
    assert bare(x).shape == x.shape


def test_without_timm_its_norm_stays_a_batch_renorm(timm_layers, monkeypatch):
    norm = convert(timm_layers.BatchNormAct2d(3))
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", None)  # as if not installed
    with pytest.warns(UserWarning, match="the model, a BatchRenormAct2d, was left alone: "):
        assert type(fold(norm)) is BatchRenormAct2d
