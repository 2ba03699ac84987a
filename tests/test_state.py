"""What a layer keeps: state_dict, checkpoints of BatchNorm, copies, dtypes and devices."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from devices import each_device
from torch import nn
from torch.nn.parameter import is_lazy

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
    convert,
    fold,
    update_stats,
)

SCHEDULE = RenormSchedule(2, 2.0, 9, 3.0, 7)
KEYS = ["weight", "bias", "running_mean", "running_std", "num_batches_tracked", "schedule"]


def trained(layer=BatchRenorm1d, steps=4, **options):
    torch.manual_seed(0)
    module = layer(3, momentum=0.2, schedule=SCHEDULE, **options)
    nn.init.normal_(module.weight)
    shape = {BatchRenorm1d: (6, 3), BatchRenorm2d: (6, 3, 2, 2), BatchRenorm3d: (6, 3, 2, 2, 2)}
    for step in range(steps):
        module((torch.randn(shape[layer]) + step).to(module.weight.dtype))
    return module


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_state_dict():
    module = trained()
    assert list(module.state_dict()) == KEYS
    other = BatchRenorm1d(3)
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert equal_state(module, other)
    assert f"schedule={SCHEDULE}" in repr(other)
    other.reset_parameters()  # the schedule is settings, not progress
    assert RenormSchedule.from_tensor(other.schedule) == SCHEDULE


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_separate(copied):
    module = trained()
    other = copied(module)
    assert equal_state(module, other) and repr(module) == repr(other)
    x = torch.randn(6, 3)
    assert torch.equal(module(x), other(x)) and equal_state(module, other)
    other(x)
    assert not equal_state(module, other)


EVERY_LAYER = [
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    SyncBatchRenorm,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
]
CONFIGURATIONS = [
    {"momentum": momentum, "affine": affine, "bias": bias, "track_running_stats": tracks}
    | {"schedule": schedule}
    for momentum in (0.2, None)
    for affine, bias in ((True, True), (True, False), (False, True))
    for tracks in (True, False)
    for schedule in (RenormSchedule(), RenormSchedule(1, math.inf, 2, 0.5, 3, steps_per_update=2))
]


def seen(*_):
    """A hook. At the top of a file, or nothing could pickle it."""


SITUATIONS = {
    "as constructed": lambda m: None,
    "half": lambda m: m.half(),
    "frozen": lambda m: setattr(m, "statistics_frozen", m.track_running_stats),
    "monitored": lambda m: m.monitor_clipping(m.track_running_stats and not is_lazy(m.running_std)),
    "hooks": lambda m: (m.register_forward_hook(seen), m.register_load_state_dict_post_hook(seen)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("layer", EVERY_LAYER)
def test_every_configuration_is_copied_whole(layer, situation):
    """Lazy layers, too, but by deepcopy, which torch's tensors without a size refuse."""
    lazy = "Lazy" in layer.__name__
    shape = (6, 3) + (2,) * ({"2": 2, "3": 3}.get(layer.__name__[-2], 0))
    for options in CONFIGURATIONS:
        module = layer(**options) if lazy else layer(3, **options)
        SITUATIONS[situation](module)
        x = torch.randn(shape).to(torch.half if situation == "half" else torch.float)
        copies = [pickle.loads(pickle.dumps(module)), torch.load(saved(module), weights_only=False)]
        if not lazy:
            copies.append(copy.deepcopy(module))
        for other in copies:
            assert type(other) is layer and repr(other) == repr(module)
            assert other.monitors_clipping == module.monitors_clipping
            other.load_state_dict(copies[0].state_dict())
        y, *others = [other(x) for other in copies]
        assert all(torch.equal(y, other) for other in others)
        assert all(equal_state(copies[0], other) for other in copies)


def saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def test_state_dict_saves_with_weights_only():
    module = trained()
    other = BatchRenorm1d(3)
    other.load_state_dict(torch.load(saved(module.state_dict()), weights_only=True))
    assert equal_state(module, other)


@each_device()
def test_training_resumes_in_mid_schedule_with_the_same_bits(device):
    def network():
        torch.manual_seed(1)
        layer = BatchRenorm2d(4, momentum=0.1, schedule=SCHEDULE)
        return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 36, 2)).to(
            device
        )

    def train(model, optimizer, steps):
        losses = []
        for step in steps:
            torch.manual_seed(100 + step)
            x = torch.randn(4, 3, 8, 8).to(device) * (1 + step)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        train(model, optimizer, range(5))
        file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        straight_on = train(model, optimizer, range(5, 12))

        resumed = network()
        optimizer = torch.optim.SGD(resumed.parameters(), 1e-3, momentum=0.9)
        states = torch.load(file, weights_only=True)
        resumed.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
        assert train(resumed, optimizer, range(5, 12)) == straight_on
        assert equal_state(model, resumed)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (BatchRenorm1d, nn.BatchNorm1d, (6, 3)),
        (BatchRenorm2d, nn.BatchNorm2d, (6, 3, 4, 4)),
        (BatchRenorm3d, nn.BatchNorm3d, (6, 3, 2, 4, 4)),
    ],
)
def test_a_batch_norm_loads_and_infers_the_same(layer, norm, shape, assign):
    torch.manual_seed(0)
    peer = norm(3, eps=1e-3)
    nn.init.normal_(peer.weight), nn.init.normal_(peer.bias)
    for _ in range(3):
        peer(torch.randn(shape) * 3 + 2)
    given = nn.Sequential(peer).state_dict()
    before = {name: t.clone() for name, t in given.items()}
    module = nn.Sequential(layer(3, eps=1e-3, schedule=SCHEDULE))
    assert str(module.load_state_dict(given, assign=assign)) == "<All keys matched successfully>"
    assert given.keys() == before.keys()
    assert all(torch.equal(given[name], before[name]) for name in given)

    layer = module[0]
    torch.testing.assert_close(layer.running_std, (peer.running_var + 1e-3).sqrt())
    assert layer.num_batches_tracked == 3 and layer.running_std.dtype == torch.float32
    assert RenormSchedule.from_tensor(layer.schedule) == SCHEDULE
    x = torch.randn(shape)
    torch.testing.assert_close(module.eval()(x), peer.eval()(x), rtol=1e-5, atol=1e-5)


def test_an_old_batch_norm_without_a_counter_loads():
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    module = BatchRenorm1d(3)
    module.load_state_dict(state)
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("assign", [False, True])
def test_half_precision_checkpoints_load_into_float32_statistics(assign):
    state = {
        name: t.half() if t.is_floating_point() else t for name, t in trained().state_dict().items()
    }
    module = BatchRenorm1d(3)
    module.load_state_dict(state, assign=assign)
    assert module.running_mean.dtype == module.running_std.dtype == torch.float32
    assert module.schedule.dtype == torch.float64
    module(torch.randn(6, 3))


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        (
            "running_std",
            0.0,
            r"norm.running_std must be finite and > 0, got 0.0 in 1 of 3 channels",
        ),
        ("running_std", -1.0, "norm.running_std must be .* got -1.0 in 1 of 3"),
        ("running_std", math.nan, "norm.running_std must be .* got nan in 1 of 3"),
        ("running_std", math.inf, "norm.running_std must be .* got inf in 1 of 3"),
        ("running_mean", math.nan, "norm.running_mean must be finite, got nan in 1 of 3"),
        ("schedule", 0.5, "norm.schedule: r_max must be >= 1, got 0.5"),
        ("schedule", math.nan, "norm.schedule: r_max must be >= 1, got nan"),
        # With momentum=None the next average would be one over zero.
        ("num_batches_tracked", -1, "norm.num_batches_tracked must be .* >= 0, got -1"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_poisoned_checkpoint_is_refused_whole(name, bad, message, strict):
    model = nn.Sequential()
    model.add_module("norm", trained())
    before = copy.deepcopy(model)
    state = copy.deepcopy(trained(steps=7).state_dict(prefix="norm."))
    state[f"norm.{name}"].view(-1)[-4:][0] = bad
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert equal_state(model, before) and repr(model) == repr(before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bad", [3.0, [1.0, 1.0, 1.0], "x", None], ids=repr)
@pytest.mark.parametrize("name", [*KEYS, "running_var"])
def test_what_is_not_a_tensor_is_reported_with_all_else_that_does_not_load(name, bad, strict):
    """A checkpoint that went through JSON, say. Weight and bias are torch's to refuse."""
    model = nn.Sequential(trained(), nn.Linear(2, 2))
    before = copy.deepcopy(model[0])
    given = nn.BatchNorm1d(3) if name == "running_var" else trained(steps=7)
    state = nn.Sequential(given, nn.Linear(3, 3)).state_dict()
    state[f"0.{name}"] = bad
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state, strict=strict)
    assert "size mismatch for 1.weight" in str(raised.value)
    if name in ("weight", "bias"):
        assert f'"0.{name}", expected torch.Tensor' in str(raised.value)
    else:
        assert f"0.{name} must be a Tensor, got {type(bad).__name__}" in str(raised.value)
        assert equal_state(model[0], before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_counter_that_went_through_half_precision_loads_if_it_did_fit(assign):
    module = BatchRenorm1d(3)
    state = {name: t.half() for name, t in trained().state_dict().items()}
    module.load_state_dict(state, assign=assign)
    assert module.num_batches_tracked == 4 and module.num_batches_tracked.dtype == torch.int64
    state["num_batches_tracked"] = torch.tensor(1e30)
    with pytest.raises(
        RuntimeError, match="num_batches_tracked must be .* in torch.int64, got 1.0"
    ):
        module.load_state_dict(state)
    state["num_batches_tracked"] = torch.tensor(100_000).half()
    with pytest.raises(RuntimeError, match="num_batches_tracked must be finite and .* got inf"):
        module.load_state_dict(state, assign=assign)


def test_a_mean_without_its_standard_deviation_is_loaded_aloud():
    """What loaders leave of a BatchNorm's state that take only the names that the model has."""
    peer = nn.Sequential(nn.BatchNorm1d(3))
    peer(torch.randn(8, 3))
    model = nn.Sequential(BatchRenorm1d(3))
    picked = {name: t for name, t in peer.state_dict().items() if name in model.state_dict()}
    with pytest.warns(UserWarning, match="0.running_mean is loaded without a running_std or"):
        model.load_state_dict(picked, strict=False)
    assert torch.equal(model[0].running_mean, peer[0].running_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(peer.state_dict(), strict=False)
        model.load_state_dict({"0.weight": torch.ones(3)}, strict=False)


@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, lambda t: t + 0j], ids=["sparse", "0j"])
@pytest.mark.parametrize("name", ["running_mean", "running_std", "running_var", "schedule"])
def test_a_tensor_of_another_kind_is_reported_too(name, form):
    module = trained()
    before = copy.deepcopy(module)
    state = (nn.BatchNorm1d(3) if name == "running_var" else trained(steps=7)).state_dict()
    state[name] = form(state[name])
    with pytest.raises(RuntimeError, match=f"{name} must be a dense tensor of real numbers, got"):
        module.load_state_dict(state)
    assert equal_state(module, before)


def test_statistics_assigned_from_a_slice_can_be_trained():
    state = trained().state_dict()
    for name in ("running_mean", "running_std"):
        state[name] = torch.stack([state[name], state[name]], 1)[:, 0]
    module = BatchRenorm1d(3)
    module.load_state_dict(state, assign=True)
    assert equal_state(module, trained())
    module(torch.randn(6, 3))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_poisoned_batch_norm_is_refused_whole(bad):
    module, peer = trained(), nn.BatchNorm1d(3)
    before = copy.deepcopy(module)
    peer.running_var[2] = bad
    with pytest.raises(RuntimeError, match="running_var must be finite and >= 0, got"):
        module.load_state_dict(peer.state_dict())
    assert equal_state(module, before)


def test_a_batch_norm_variance_of_zero_needs_eps():
    peer = nn.BatchNorm1d(3)
    peer.running_var[2] = 0
    module = BatchRenorm1d(3)
    module.load_state_dict(peer.state_dict())
    torch.testing.assert_close(module.running_std[2].item(), 1e-5**0.5)
    with pytest.raises(RuntimeError, match="running_std must be finite and > 0, got 0.0"):
        BatchRenorm1d(3, eps=0.0).load_state_dict(peer.state_dict())


@pytest.mark.parametrize(
    ("name", "value"), [("running_std", 1e-50), ("running_std", 1e300), ("running_mean", 1e300)]
)
def test_statistics_that_float32_cannot_hold_are_refused(name, value):
    """They would have been 0 or inf in the layer."""
    module, wide = trained(), trained().double()
    before = copy.deepcopy(module)
    getattr(wide, name)[1] = value
    with pytest.raises(RuntimeError, match=rf"{name} must be .* in torch.float32, got 1e[-+]"):
        module.load_state_dict(wide.state_dict())
    assert equal_state(module, before)


@pytest.mark.parametrize("peer", [nn.BatchNorm1d, BatchRenorm1d])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("had", "given"), [("float32", "float64"), ("float64", "float32")])
def test_assigned_statistics_go_with_the_assigned_weight(peer, device, had, given):
    had, given = getattr(torch, had), getattr(torch, given)
    module = BatchRenorm1d(3, device=device, dtype=had)
    module.load_state_dict(peer(3, dtype=given).state_dict(), assign=True)
    assert {module.weight.dtype, module.running_mean.dtype, module.running_std.dtype} == {given}
    module(torch.randn(4, 3, dtype=given))


def test_missing_and_unexpected_keys_are_reported_as_ever():
    state = trained().state_dict()
    del state["schedule"]
    state["running_var"] = torch.ones(3)
    with pytest.raises(RuntimeError) as raised:
        BatchRenorm1d(3).load_state_dict(state)
    assert 'Missing key(s) in state_dict: "schedule"' in str(raised.value)
    assert 'Unexpected key(s) in state_dict: "running_var"' in str(raised.value)
    with pytest.raises(RuntimeError, match="size mismatch for running_std"):
        BatchRenorm1d(4).load_state_dict(trained().state_dict())


CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16, torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, torch.float32),
    "type(half)": (lambda m: m.type(torch.half), torch.float16, torch.float32),
    "to(half)": (lambda m: m.to(torch.half), torch.float16, torch.float32),
    "to(cpu, half)": (lambda m: m.to("cpu", torch.half), torch.float16, torch.float32),
    "to(like)": (lambda m: m.to(torch.ones(1).bfloat16()), torch.bfloat16, torch.float32),
    "double": (lambda m: m.double(), torch.float64, torch.float64),
    "half, double": (lambda m: m.half().double(), torch.float64, torch.float64),
    "float": (lambda m: m.double().float(), torch.float32, torch.float32),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_statistics_stay_wide_and_whole_under_conversions(name):
    convert, weight, statistics = CONVERSIONS[name]
    module = trained()
    # Not representable in less: a conversion there and back would show.
    module.running_mean.fill_(1 / 3), module.running_std.fill_(1e6 / 3)
    module.set_schedule(RenormSchedule(100_001, 3.0, 300_007, 5.0, 200_003))
    before = {name: t.clone() for name, t in module.named_buffers()}
    module = nn.Sequential(convert(module))[0]
    assert module.weight.dtype == module.bias.dtype == weight
    assert module.running_mean.dtype == module.running_std.dtype == statistics
    assert module.schedule.dtype == torch.float64
    assert module.num_batches_tracked.dtype == torch.int64
    for name, t in module.named_buffers():
        assert torch.equal(t, before[name].to(t.dtype))
    y = module(torch.randn(6, 3).to(weight))
    assert y.dtype == weight and module.num_batches_tracked == 5


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_the_constructor_and_the_default(dtype, statistics):
    torch.set_default_dtype(dtype)
    try:
        default = BatchRenorm2d(3)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (default, BatchRenorm2d(3, dtype=dtype)):
        assert module.weight.dtype == module.bias.dtype == dtype
        assert module.running_mean.dtype == module.running_std.dtype == statistics
        assert module.schedule.dtype == torch.float64
        assert module(torch.randn(4, 3, 2, 2).to(dtype)).dtype == dtype


def test_a_meta_module_becomes_real():
    module = BatchRenorm1d(3, device="meta", schedule=SCHEDULE)
    assert all(t.is_meta for t in module.state_dict().values())
    module(torch.empty(6, 3, device="meta"))
    module = module.to_empty(device="cpu")
    module.schedule.fill_(math.nan)  # whatever to_empty left there
    module.reset_parameters()
    assert equal_state(module, BatchRenorm1d(3, schedule=SCHEDULE))

    module = BatchRenorm1d(3, device="meta")
    module.load_state_dict(trained().state_dict(), assign=True)
    assert equal_state(module, trained()) and f"schedule={SCHEDULE}" in repr(module)


@pytest.mark.parametrize("name", ["running_mean", "num_batches_tracked"])
def test_a_meta_module_takes_a_batch_norm_for_its_own(name):
    """By assignment, with what a BatchNorm does not have made on the device of what it has."""
    peer, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    peer(x)
    state = {key: t for key, t in peer.state_dict().items() if key != "num_batches_tracked"}
    module = BatchRenorm1d(3, device="meta", schedule=SCHEDULE)
    module.load_state_dict(peer.state_dict() if name == "running_mean" else state, assign=True)
    assert not any(t.is_meta for t in module.state_dict().values())
    assert RenormSchedule.from_tensor(module.schedule) == SCHEDULE
    assert module.num_batches_tracked == (name == "running_mean")
    torch.testing.assert_close(copy.deepcopy(module).eval()(x), peer.eval()(x))
    module(x)


@pytest.mark.parametrize("layer", [BatchRenorm1d, LazyBatchRenorm1d])
def test_memory_of_to_empty_is_no_schedule(layer):
    """A BatchNorm has none to load, and the buffer may hold anything."""
    options = {} if layer is LazyBatchRenorm1d else {"num_features": 3}
    module = layer(schedule=SCHEDULE, **options)
    module.schedule.fill_(math.nan)
    module.load_state_dict(nn.BatchNorm1d(3).state_dict(), strict=True)
    assert torch.equal(module.schedule, SCHEDULE.as_tensor("cpu"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_norm_loads_by_distributed_checkpoint(strict):
    """Which first puts the layer's own running_std where a BatchNorm has none."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    peer = nn.Sequential(nn.BatchNorm1d(3))
    peer(torch.randn(8, 3) * 5 + 3)
    model = nn.Sequential(BatchRenorm1d(3, schedule=SCHEDULE))
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, peer.state_dict(), options=options)
    wanted = BatchRenorm1d(3, schedule=SCHEDULE)
    wanted.load_state_dict(peer[0].state_dict())
    assert equal_state(model[0], wanted)


def test_the_default_device_is_for_what_is_new():
    """A model is often made or filled in the scope of a device, and here of the meta device."""
    module, source, x = BatchRenorm1d(3), trained(), torch.randn(6, 3)
    empty = BatchRenorm1d(3, device="meta")
    with torch.device("meta"):
        module.set_schedule(RenormSchedule())
        module.set_limits(1.5, 0.5)
        module.set_steps_per_update(2)
        module.reset_parameters()
        module.load_state_dict(source.state_dict())
        empty.load_state_dict(source.state_dict(), assign=True)
        update_stats(module, [x])
        module.monitor_clipping()
        module(x)
        assert module.read_clipping().steps == 1
        fold(module), convert(module)
        assert BatchRenorm1d(3).schedule.is_meta
    assert equal_state(empty, source) and f"schedule={SCHEDULE}" in repr(empty)
    module(x), empty(x)


def test_share_memory():
    module = trained().share_memory()
    assert all(t.is_shared() for t in module.state_dict().values())


@pytest.mark.gpu
def test_a_layer_moves_to_the_gpu_and_back():
    module = trained()
    there = copy.deepcopy(module).cuda()
    assert all(t.is_cuda for t in there.state_dict().values())
    assert equal_state(module, there.cpu())
    half = copy.deepcopy(module).to("cuda", torch.half)
    assert half.running_std.is_cuda and half.running_std.dtype == torch.float32
    assert torch.equal(half.running_std.cpu(), module.running_std)


@pytest.mark.gpu
def test_setting_the_schedule_does_not_wait_for_the_gpu():
    module = BatchRenorm1d(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.set_schedule(SCHEDULE)
        module(torch.randn(6, 3, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert RenormSchedule.from_tensor(module.schedule) == SCHEDULE


def test_hooks_of_the_user_run_before_the_state_of_a_batch_norm_is_taken():
    """On one that has been converted, as on the BatchNorm that it was."""
    names = {"moving_var": "running_var", "moving_mean": "running_mean"}

    def rename(module, state, prefix, *_):
        for old, new in names.items():
            if prefix + old in state:
                state[prefix + new] = state.pop(prefix + old)

    norm = nn.BatchNorm1d(3)
    norm(torch.randn(5, 3))
    norm.register_load_state_dict_pre_hook(rename)
    old = {new: old for old, new in names.items()}
    state = {old.get(name, name): t.clone() for name, t in norm.state_dict().items()}
    want = (norm.running_var + norm.eps).sqrt()
    norm.load_state_dict(dict(state))
    layer = convert(norm)
    layer.running_std.fill_(7)
    layer.load_state_dict(dict(state))
    torch.testing.assert_close(layer.running_std, want)
    layer.load_state_dict(layer.state_dict())
    assert len(layer._load_state_dict_pre_hooks) == 1


def test_what_a_hook_of_the_user_makes_of_a_state_is_checked():
    layer, repaired = BatchRenorm1d(3), []

    def repair(module, state, prefix, *_):
        repaired.append(prefix)
        state[prefix + "running_std"] = state[prefix + "running_std"].clamp_min(floor)
        state[prefix + "schedule"] = RenormSchedule.constant(2.0, 1.0).as_tensor()

    layer.register_load_state_dict_pre_hook(repair)
    state = BatchRenorm1d(3).state_dict()
    state["running_std"][1] = floor = 0.0
    with pytest.raises(RuntimeError, match="running_std must be finite and > 0"):
        layer.load_state_dict(state)
    assert layer.running_std.tolist() == [1, 1, 1]
    floor = 0.5
    layer.load_state_dict(state)
    assert layer.running_std.tolist() == [1, 0.5, 1] and len(repaired) == 2
    assert layer._schedule == RenormSchedule.constant(2.0, 1.0)
    assert layer.schedule.tolist() == layer._schedule.as_tensor().tolist()


def test_a_monitored_layer_whose_statistics_were_taken_away_loads():
    layer = BatchRenorm1d(3)
    layer.monitor_clipping()
    layer.running_mean = layer.running_std = None
    layer.load_state_dict(layer.state_dict())
