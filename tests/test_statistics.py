"""Moving statistics taken anew from data, and frozen ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from devices import each_device
from torch import nn
from torch.optim.swa_utils import update_bn

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    LazyBatchRenorm1d,
    RenormSchedule,
    convert,
    fold,
    freeze_statistics,
    unfreeze_statistics,
    update_stats,
)

SCHEDULE = RenormSchedule(2, 2.0, 9, 3.0, 7)


class Network(nn.Module):
    """A layer that is used twice, one without moving statistics and one that no batch comes to."""

    def __init__(self):
        super().__init__()
        self.front, self.back = nn.Linear(5, 4), nn.Linear(4, 4)
        self.first = BatchRenorm1d(4, momentum=0.3, schedule=SCHEDULE)
        self.shared = BatchRenorm1d(4, momentum=0.2, schedule=SCHEDULE)
        self.untracked = BatchRenorm1d(4, track_running_stats=False)
        self.unused = BatchRenorm1d(4)

    def forward(self, x):
        y = self.shared(self.back(self.first(self.front(x)).relu()))
        return self.untracked(self.shared(y + 1))


def trained(device="cpu"):
    torch.manual_seed(0)
    model = Network().to(device)
    for step in range(4):
        model(torch.randn(8, 5, device=device) * (step + 1) + step).sum().backward()
    model.unused.running_mean.fill_(3)
    model.zero_grad()
    return model


def batches(count=5, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 5, generator=generator).to(device) * 2 + 1 for _ in range(count)]


def everything(model):
    """State, momenta and training modes."""
    modes = {name: m.training for name, m in model.named_modules()}
    momenta = {n: m.momentum for n, m in model.named_modules() if hasattr(m, "momentum")}
    return {name: t.clone() for name, t in model.state_dict().items()}, momenta, modes


def assert_equal(found, want):
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=0)
    assert found[1:] == want[1:]


@each_device()
@pytest.mark.parametrize("form", ["tensors", "tuples", "lists", "a function"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_update_stats_is_update_bn(form, training, device):
    """Of the BatchNorm that the model folds to, whose torch function is the truth. The variance of
    the averages differs: we average standard deviations."""
    model = trained(device).train(training)
    model.first.eval()  # one mode of its own
    norms = fold(copy.deepcopy(model))
    data = batches(device=device)
    update_bn(data, norms)
    before = everything(model)
    given = {
        "tensors": data,
        "tuples": [(x, "label") for x in data],
        "lists": [[x] for x in data],
        "a function": [{"image": x} for x in data],
    }[form]
    if form == "a function":
        update_stats(model, given, forward=lambda batch: model(batch["image"]))
    else:
        update_stats(model, iter(given))

    found = everything(model)
    for name in ("first", "shared"):
        layer, norm = getattr(model, name), getattr(norms, name)
        torch.testing.assert_close(layer.running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        for entry in ("running_mean", "running_std"):
            before[0][f"{name}.{entry}"] = found[0][f"{name}.{entry}"]
    assert_equal(found, before)


def test_update_stats_averages_means_and_standard_deviations():
    model = nn.Sequential(BatchRenorm1d(5, eps=0.0, momentum=0.3))
    data = batches()
    update_stats(model, data)
    means = torch.stack([x.mean(0) for x in data])
    stds = torch.stack([x.std(0, correction=0) for x in data])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    torch.testing.assert_close(model[0].running_std, stds.mean(0))


def test_limits_that_are_open_from_the_start_do_not_disturb_an_update():
    """Corrected towards the statistics (0, 1) of the reset, the second layer would see other
    inputs."""
    model = nn.Sequential(BatchRenorm1d(5), nn.Linear(5, 4), nn.ReLU(), BatchRenorm1d(4))
    model[0].set_limits(3.0, 5.0)
    norms = fold(copy.deepcopy(model))
    update_bn(batches(), norms)
    update_stats(model, batches())
    torch.testing.assert_close(model[3].running_mean, norms[3].running_mean)


def test_training_goes_on_in_mid_schedule():
    straight_on, model = trained(), trained()
    update_stats(model, batches())
    for layer, twin in ((model.first, straight_on.first), (model.shared, straight_on.shared)):
        layer.running_mean.copy_(twin.running_mean), layer.running_std.copy_(twin.running_std)
    for x in batches():
        assert torch.equal(model(x), straight_on(x))
    assert_equal(everything(model), everything(straight_on))


def test_other_layers_are_in_eval_mode():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(5), BatchRenorm1d(5))
    state = torch.get_rng_state()
    update_stats(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 0 and model[1].running_mean.eq(0).all()
    mean = torch.cat(batches()).mean(0) / (1 + model[1].eps) ** 0.5
    torch.testing.assert_close(model[2].running_mean, mean)
    assert all(m.training for m in model.modules())


def test_the_recipe_for_models_with_both_kinds():
    """update_bn alone would count its batches in our layers."""
    model = nn.Sequential(nn.BatchNorm1d(5), BatchRenorm1d(5))
    freeze_statistics(model)
    update_bn(batches(), model)
    unfreeze_statistics(model)
    assert model[1].num_batches_tracked == 0 and model[1].running_mean.eq(0).all()
    update_stats(model, batches())
    assert model[0].num_batches_tracked == 5
    assert model[1].running_mean.abs().max() < 1  # of normalised data


def test_a_model_that_overrides_train():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].training = False
            return self

    model = Stubborn(BatchRenorm1d(5)).train()
    before = everything(model)
    update_stats(model, batches())
    assert everything(model)[1:] == before[1:]
    assert model[0].running_mean.ne(0).all()


def test_no_graph_is_kept():
    seen = []
    model = nn.Sequential(BatchRenorm1d(5))
    model.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    update_stats(model, batches(2))
    assert seen == [False] * 2


@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_exception_leaves_the_model_as_it_was(where):
    model = trained()
    model.first.eval()
    before = everything(model)

    def loader():
        yield from batches(2)
        if where == "loader":
            raise KeyboardInterrupt
        yield torch.ones(8, 6)  # too wide

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        update_stats(model, loader())
    assert_equal(everything(model), before)


def test_an_empty_loader_leaves_the_model_as_it_was():
    model = trained()
    before = everything(model)
    with pytest.warns(UserWarning, match="loader has no batches"):
        update_stats(model, [])
    assert_equal(everything(model), before)


def test_batches_that_are_skipped_are_not_averaged():
    model = nn.Sequential(BatchRenorm1d(5, skip_nonfinite=True))
    good = batches()
    update_stats(model, [good[0], good[1] / 0, good[2]])
    torch.testing.assert_close(model[0].running_mean, (good[0] + good[2]).mean(0) / 2)


def test_arguments_of_update_stats():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        update_stats(batches(), Network())
    with pytest.raises(ValueError, match="device must be None with forward"):
        update_stats(Network(), batches(), "cpu", forward=print)
    with pytest.raises(TypeError, match="forward must be callable, got int"):
        update_stats(Network(), batches(), forward=3)
    with pytest.raises(TypeError, match="loader must be iterable, got NoneType"):
        update_stats(Network(), None)
    with pytest.raises(TypeError, match="loader must give what can be moved .* got dict"):
        update_stats(Network(), [{"x": batches()[0]}], "cpu")
    with pytest.raises(ValueError, match="loader must give batches with a first element"):
        update_stats(Network(), [()])
    model = nn.Sequential(nn.Linear(5, 4), LazyBatchRenorm1d())
    with pytest.raises(ValueError, match="1 must have seen a batch, got a LazyBatchRenorm1d"):
        update_stats(model, batches())
    model(batches()[0])
    update_stats(model, batches())
    with pytest.warns(UserWarning, match="Sequential has no moving statistics to update"):
        update_stats(nn.Sequential(nn.BatchNorm1d(5)), batches())


@pytest.mark.gpu
def test_batches_are_moved_to_the_device():
    model, twin = trained("cuda"), trained()
    update_stats(model, batches(), "cuda")
    update_stats(twin, batches())
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), check_device=False)


def test_a_compiled_model_is_updated():
    torch._dynamo.reset()
    model, twin = trained(), trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(batches()[0]), twin(batches()[0])
    update_stats(compiled, batches())
    update_stats(twin, batches())
    assert_equal(everything(model), everything(twin))


# Frozen statistics.


@each_device()
def test_frozen_it_trains_the_affine_map_of_inference(device):
    torch.manual_seed(0)
    layer = BatchRenorm2d(4, momentum=0.3, schedule=SCHEDULE).to(device)
    for step in range(4):
        layer(torch.randn(3, 4, 5, 5, device=device) * 2 + step)
    nn.init.normal_(layer.weight)
    norm = fold(copy.deepcopy(layer)).eval()
    freeze_statistics(layer)
    before = {name: t.clone() for name, t in layer.named_buffers()}

    for m in (layer.train(), norm):
        torch.manual_seed(1)
        x, dy = (torch.randn(1, 4, 1, 1, device=device).requires_grad_() for _ in range(2))
        y = m(x)  # one value per channel is enough
        m.zero_grad()
        y.backward(dy)
        m.found = (y, x.grad, m.weight.grad.clone(), m.bias.grad.clone())
    torch.testing.assert_close(layer.found, norm.found)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)

    unfreeze_statistics(layer)
    layer(torch.randn(3, 4, 5, 5, device=device))
    assert layer.num_batches_tracked.item() == 5


def test_frozen_is_a_way_of_running_and_not_state():
    layer = trained().first
    keys = layer.state_dict().keys()
    freeze_statistics(layer)
    assert layer.state_dict().keys() == keys and "statistics_frozen=True" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.train().statistics_frozen
    fresh = BatchRenorm1d(4)
    fresh.load_state_dict(layer.state_dict())
    assert not fresh.statistics_frozen and "frozen" not in repr(fresh)
    fresh.statistics_frozen = True
    fresh.load_state_dict(trained().shared.state_dict())
    assert fresh.statistics_frozen
    assert not hasattr(fold(layer), "statistics_frozen")
    assert not convert(layer).statistics_frozen


def test_freezing_a_model_and_a_part_of_it():
    model = trained()
    freeze_statistics(model)
    before = everything(model)
    for x in batches():
        model.train()(x)
    assert_equal(everything(model), before)
    unfreeze_statistics(model.shared)
    update_stats(model, batches())
    assert torch.equal(model.first.running_mean, before[0]["first.running_mean"])
    assert not torch.equal(model.shared.running_mean, before[0]["shared.running_mean"])
    assert not model.untracked.statistics_frozen
    with pytest.warns(UserWarning, match="no Batch Renorm with moving statistics"):
        freeze_statistics(nn.Sequential(nn.BatchNorm1d(4)))


def test_an_update_behind_a_frozen_layer_sees_what_inference_gives():
    model = nn.Sequential(BatchRenorm1d(5), BatchRenorm1d(5))
    model[0].running_mean.fill_(3), model[0].running_std.fill_(2)
    freeze_statistics(model[0])
    update_stats(model, batches())
    mean = (torch.cat(batches()).mean(0) - 3) / 2
    torch.testing.assert_close(model[1].running_mean, mean)


def test_a_frozen_lazy_layer_stays_frozen():
    layer = LazyBatchRenorm1d()
    freeze_statistics(layer)
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer(x), x)
    assert type(layer) is BatchRenorm1d and layer.num_batches_tracked == 0


def test_compiled_code_notices_freezing():
    torch._dynamo.reset()
    model, twin = trained(), trained()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for change in (freeze_statistics, unfreeze_statistics, freeze_statistics):
        change(model), change(twin)
        for x in batches(2):
            results = []
            for call, m in ((compiled, model), (twin, twin)):
                m.zero_grad()
                call(x).square().sum().backward()
                results.append([p.grad for p in m.parameters() if p.grad is not None])
            torch.testing.assert_close(*results)
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert counter.frame_count == 2
