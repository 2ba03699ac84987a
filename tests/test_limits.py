"""Limits set by hand, in a layer and in a model, and schedules that count the optimiser's steps."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from devices import each_device
from torch import nn

from batchrenorm_cuda import (
    BatchRenorm1d,
    LazyBatchRenorm1d,
    RenormSchedule,
    convert,
    set_limits,
    set_schedule,
    set_steps_per_update,
)

# In steps of the optimiser; all numbers differ, and the limits are exact in floating point.
UPDATES = RenormSchedule(2, 3.0, 10, 4.0, 6, steps_per_update=4)


def per(steps_per_update):
    return RenormSchedule(2, 3.0, 10, 4.0, 6, steps_per_update=steps_per_update)


def limits(layer):
    """r_max and d_max that the next batch finds, by way of the kernels: statistics are so far off
    that both corrections reach their limits, and y is d - r and d + r."""
    probe = BatchRenorm1d(1, affine=False, eps=0.0).to(layer.schedule.device)
    probe.schedule.copy_(layer.schedule)
    probe.num_batches_tracked.copy_(layer.num_batches_tracked)
    x = torch.tensor([[-1.0], [1.0]], device=layer.schedule.device) * 1e6 + 1e7
    low, high = probe(x).flatten().tolist()
    return (high - low) / 2, (high + low) / 2


@each_device()
def test_limits_are_read_as_the_next_batch_finds_them(device):
    layer = BatchRenorm1d(3, schedule=per(2), device=device)
    for _ in range(24):
        assert layer.read_limits() == pytest.approx(limits(layer), rel=1e-6)
        layer(torch.randn(4, 3, device=device))
    assert layer.read_limits() == (3.0, 4.0)
    layer.set_limits(math.inf, 0.5)
    assert layer.read_limits() == (math.inf, 0.5)
    assert BatchRenorm1d(3, track_running_stats=False).read_limits() == (1.0, 0.0)


def update(layer, steps_per_update):
    """One step of the optimiser; the limits that each of its microbatches found."""
    found = []
    for _ in range(steps_per_update):
        found.append(limits(layer))
        layer(torch.randn(4, 3, device=layer.schedule.device))
    return found


def model_of(**options):
    shared = BatchRenorm1d(3, **options)
    untracked = BatchRenorm1d(3, track_running_stats=False)
    return nn.Sequential(shared, nn.Sequential(BatchRenorm1d(3, **options), shared), untracked)


@each_device()
def test_limits_set_by_hand_hold_from_the_next_batch_on(device):
    layer = BatchRenorm1d(3, schedule=RenormSchedule()).to(device)
    buffer = layer.schedule
    update(layer, 2)
    for wanted in ((2.5, 0.5), (1.0, 0.0), (3.0, 4.0)):
        layer.set_limits(*wanted)
        assert update(layer, 3) == [pytest.approx(wanted)] * 3
    assert layer.schedule is buffer and layer.num_batches_tracked.item() == 11
    assert "schedule=RenormSchedule(warmup_steps=0, r_max=3.0, r_max_step=0" in repr(layer)


def test_no_limits_are_limits_too():
    layer = BatchRenorm1d(1, affine=False, eps=0.0)
    layer.set_limits(math.inf, math.inf)
    x = torch.tensor([[-1.0], [1.0]]) * 1e6 + 1e7
    torch.testing.assert_close(layer(x), x)  # r and d undo the normalisation


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.5, 1.0), ValueError, "r_max must be >= 1, got 0.5"),
        ((2.0, -1.0), ValueError, "d_max must be >= 0, got -1.0"),
        ((torch.tensor(2.0), 1.0), TypeError, "r_max must be a number"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_bad_limits_change_nothing(whole, arguments, error, message):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        set_limits(model, *arguments) if whole else model[0].set_limits(*arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert repr(model) == repr(model_of())
    with pytest.raises(error, match=message):  # also where there is no layer to set them in
        set_limits(nn.Linear(2, 2), *arguments)


def test_a_whole_model_at_once():
    """Shared layers once, and layers without statistics passed over."""
    model = model_of()
    layers = model[0], model[1][0]
    set_schedule(model, UPDATES)
    assert all(torch.equal(layer.schedule, UPDATES.as_tensor()) for layer in layers)
    set_limits(model, 2.0, 1.5)
    assert [limits(layer) for layer in layers] == [(2.0, 1.5)] * 2
    model(torch.randn(4, 3))
    set_steps_per_update(model, 8)  # from 4
    assert [layer.num_batches_tracked.item() for layer in layers] == [4, 2]
    for each in (model, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="schedule must be a RenormSchedule, got tuple"):
            set_schedule(each, (2.0, 1.5))
        with pytest.raises(ValueError, match="steps_per_update must be >= 1, got 0"):
            set_steps_per_update(each, 0)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        set_limits([model], 2.0, 1.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: set_schedule(m, UPDATES),
        lambda m: set_limits(m, 2.0, 1.0),
        lambda m: set_steps_per_update(m, 2),
    ],
)
def test_a_model_without_moving_statistics_warns(call):
    with pytest.warns(UserWarning, match="Sequential has no Batch Renorm with moving statistics"):
        call(nn.Sequential(nn.BatchNorm1d(3), BatchRenorm1d(3, track_running_stats=False)))


def test_a_layer_without_statistics_refuses():
    layer = BatchRenorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="schedule cannot be set on a layer"):
        layer.set_limits(2.0, 1.0)
    with pytest.raises(ValueError, match="steps_per_update cannot be set on a layer"):
        layer.set_steps_per_update(2)


@each_device()
def test_the_schedule_counts_steps_of_the_optimiser(device):
    layer = BatchRenorm1d(3, schedule=UPDATES).to(device)
    for step in range(12):
        found = update(layer, 4)
        assert found[0] == pytest.approx(RenormSchedule(2, 3.0, 10, 4.0, 6).limits_at(step))
        assert found == sorted(found)  # and move on a line in between
    assert layer.num_batches_tracked.item() == 48


@each_device()
@pytest.mark.parametrize("new", [1, 2, 6, 8])
def test_the_accumulation_may_change_in_mid_training(new, device):
    straight_on, layer = (BatchRenorm1d(3, schedule=UPDATES).to(device) for _ in range(2))
    buffer, counter = layer.schedule, layer.num_batches_tracked
    for _ in range(5):
        update(straight_on, 4), update(layer, 4)
    layer.set_steps_per_update(new)
    assert layer.schedule is buffer and layer.num_batches_tracked is counter
    assert counter.item() == 5 * new and counter.dtype == torch.int64
    for _ in range(7):
        assert update(layer, new)[0] == pytest.approx(update(straight_on, 4)[0])
    layer.set_steps_per_update(4)
    assert torch.equal(layer.schedule, straight_on.schedule) and counter.item() == 48


def test_limits_set_by_hand_do_not_forget_the_accumulation():
    layer = BatchRenorm1d(3, schedule=UPDATES)
    update(layer, 4)
    layer.set_limits(2.0, 1.0)
    layer.set_steps_per_update(2)
    layer.set_schedule(per(2))
    assert layer.num_batches_tracked == 2


def test_a_job_resumes_with_another_accumulation():
    """The checkpoint holds batches; that they are those of the same schedule can be seen."""
    saved, resumed = BatchRenorm1d(3, schedule=UPDATES), BatchRenorm1d(3, schedule=per(6))
    for _ in range(5):
        update(saved, 4)
    resumed.load_state_dict(saved.state_dict())
    assert repr(resumed) == repr(saved)
    set_steps_per_update(resumed, 6)
    assert "steps_per_update=6" in repr(resumed) and resumed.num_batches_tracked == 30
    for _ in range(6):
        assert update(resumed, 6)[0] == pytest.approx(update(saved, 4)[0])


def test_a_job_resumes_with_another_schedule_in_its_code():
    """The checkpoint's is taken for one in batches, and so the job has to say what it was in."""
    saved, resumed = BatchRenorm1d(3, schedule=UPDATES), BatchRenorm1d(3)
    for _ in range(5):
        update(saved, 4)
    resumed.load_state_dict(saved.state_dict())
    assert "warmup_steps=8, r_max=3.0, r_max_step=40" in repr(resumed)
    set_steps_per_update(resumed, 8, before=4)
    for _ in range(6):
        assert update(resumed, 8)[0] == pytest.approx(update(saved, 4)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "steps_per_update must be >= 1, got 0"),
        ((2.0,), TypeError, "steps_per_update must be a whole number, got 2.0"),
        ((2, 0), ValueError, "before must be >= 1, got 0"),
        ((2, "4"), TypeError, "before must be a whole number, got '4'"),
        ((10**30,), OverflowError, "too big"),  # torch refuses it for the counter
    ],
)
def test_a_bad_accumulation_changes_nothing(arguments, error, message):
    layer = BatchRenorm1d(3, schedule=UPDATES)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.set_steps_per_update(*arguments)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer._schedule == UPDATES


def test_convert_from_now_counts_microbatches_of_the_past():
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked.fill_(30)
    layer = convert(norm, schedule=UPDATES, from_now=True)
    assert torch.equal(layer.schedule - torch.tensor([30, 0, 30, 0, 30]), UPDATES.as_tensor())


def norms(*counts):
    """BatchNorms that have seen so many batches."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in counts))
    for norm, count in zip(model, counts, strict=True):
        norm.num_batches_tracked.fill_(count)
    return model


def test_a_schedule_that_is_set_from_now_starts_as_if_convert_had_been_given_it():
    """Set without from_now it undoes convert's: trained for 1000 batches, the layer would begin
    with the last limits."""
    wanted = convert(norms(0, 30, 1000), schedule=UPDATES, from_now=True)
    model = convert(norms(0, 30, 1000), from_now=True)
    set_schedule(model, UPDATES, from_now=True)
    assert repr(model) == repr(wanted)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    layer = convert(norms(30))[0]
    layer.set_schedule(UPDATES, from_now=True)
    assert torch.equal(layer.schedule, wanted[1].schedule)
    assert limits(layer) == (1.0, 0.0)
    layer.set_schedule(UPDATES)
    assert layer.schedule.tolist() == UPDATES.as_tensor().tolist()


def test_layers_that_share_a_counter_start_at_the_same_step():
    one, other = model = norms(30, 0)
    other._buffers.update(one._buffers)
    convert(model)
    set_schedule(model, UPDATES, from_now=True)
    assert one.num_batches_tracked == 30
    assert one.schedule.tolist() == other.schedule.tolist() == [38, 3, 70, 4, 54]


def test_a_schedule_from_now_where_there_is_no_count():
    """A lazy layer has one from the start; one on meta has no value, and counts from its start."""
    lazy, meta, without = LazyBatchRenorm1d(), BatchRenorm1d(3, device="meta"), BatchRenorm1d(3)
    lazy.num_batches_tracked.fill_(8)
    without.num_batches_tracked = None
    set_schedule(nn.Sequential(lazy, meta, without), UPDATES, from_now=True)
    assert lazy.schedule.tolist() == [16, 3, 48, 4, 32]
    assert meta._schedule == UPDATES
    assert without.schedule.tolist() == UPDATES.as_tensor().tolist()


@pytest.mark.parametrize(
    ("count", "schedule", "from_now", "error", "message"),
    [
        (-1, UPDATES, True, ValueError, "1.num_batches_tracked must be finite and >= 0, got -1"),
        (-1, UPDATES, 1, TypeError, "from_now must be a bool, got 1"),
        (8, (2.0, 1.0), True, TypeError, "schedule must be a RenormSchedule, got tuple"),
    ],
)
def test_a_schedule_that_cannot_start_now_changes_nothing(
    count, schedule, from_now, error, message
):
    model = convert(norms(4, 8))
    model[1].num_batches_tracked.fill_(count)
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(error, match=message):
        set_schedule(model, schedule, from_now=from_now)
    with pytest.raises(error, match=message.removeprefix("1.")):
        model[1].set_schedule(schedule, from_now=from_now)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert repr(model) == text


def test_a_lazy_layer_can_be_told_before_it_has_a_size():
    layer = LazyBatchRenorm1d(schedule=UPDATES)
    layer.set_limits(2.0, 1.0)
    layer.set_steps_per_update(8)
    layer(torch.randn(4, 3))
    assert type(layer) is BatchRenorm1d and limits(layer) == (2.0, 1.0)


def test_a_compiled_step_sees_new_limits_without_recompiling():
    torch._dynamo.reset()
    layer = BatchRenorm1d(3, schedule=UPDATES)
    twin = copy.deepcopy(layer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(6, 3) * 5 + 9
    for change in (
        lambda m: None,
        lambda m: m.set_limits(2.0, 1.0),
        lambda m: m.set_limits(math.inf, 3.0),
        lambda m: m.set_schedule(UPDATES),
        lambda m: m.set_steps_per_update(2),
    ):
        change(layer), change(twin)
        torch.testing.assert_close(compiled(x), twin(x))
    assert counter.frame_count == 1
    assert layer.num_batches_tracked == twin.num_batches_tracked


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    layer = BatchRenorm1d(3, schedule=UPDATES, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.set_schedule(UPDATES)
        layer.set_limits(2.0, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert limits(layer) == (2.0, 1.0)


def test_limits_are_not_set_while_a_graph_is_captured(monkeypatch):
    """tests/test_cuda_graphs.py does so in earnest; here a stand-in for the buffer is on a GPU."""
    layer = BatchRenorm1d(3, schedule=UPDATES)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer.set_limits(2.0, 1.0)  # which is nothing to a layer on the CPU
    kept = layer._schedule
    monkeypatch.setitem(layer._buffers, "schedule", SimpleNamespace(is_cuda=True))
    with pytest.raises(RuntimeError, match="schedule cannot be set while a CUDA graph is captured"):
        layer.set_schedule(UPDATES)
    with pytest.raises(RuntimeError, match="steps_per_update cannot be set while a CUDA graph is"):
        layer.set_steps_per_update(2)
    assert layer._schedule is kept and kept.r_max == 2
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("now", [1, 4])
def test_a_schedule_that_came_another_way_is_the_one_that_goes_on(now):
    """Written into the buffer: DDP does on every rank but the first, and so do loaders that take
    tensors by their names. What the layer was made with must not come back."""
    layer = BatchRenorm1d(3, schedule=UPDATES)
    others = replace(UPDATES, r_max=7.0, steps_per_update=now)
    layer.schedule.copy_(others.as_tensor())
    layer.num_batches_tracked.fill_(12)
    layer.set_steps_per_update(8, before=now)
    assert layer.schedule.tolist() == replace(others, steps_per_update=8).as_tensor().tolist()
    assert layer.num_batches_tracked == 12 * 8 // now


@pytest.mark.parametrize(
    ("buffer", "k"),
    [
        (replace(UPDATES, r_max=7.0), 4),  # other limits, the same steps
        (replace(UPDATES, r_max=7.0, steps_per_update=16), 16),
        (replace(UPDATES, warmup_steps=3), 4),  # nothing of another k in it
    ],
    ids=["limits", "limits and accumulation", "steps"],
)
def test_what_counts_a_step_is_the_layers_own_unless_the_buffer_says_otherwise(buffer, k):
    layer = BatchRenorm1d(3, schedule=UPDATES)
    layer.schedule.copy_(buffer.as_tensor())
    layer.num_batches_tracked.fill_(32)
    layer.set_steps_per_update(8)
    assert layer.schedule.tolist() == replace(buffer, steps_per_update=8).as_tensor().tolist()
    assert layer.num_batches_tracked == 32 * 8 // k


def test_a_layer_whose_buffers_have_no_values_yet_can_be_told():
    """to_empty() leaves anything there; reset_parameters() comes after."""
    meta, empty = (BatchRenorm1d(3, schedule=UPDATES, device="meta") for _ in range(2))
    empty.to_empty(device="cpu").schedule.fill_(math.nan)
    for layer in (meta, empty):
        layer.set_steps_per_update(8)
        assert layer._schedule == per(8)
    assert meta.read_limits() == (1.0, 0.0)
    empty.num_batches_tracked = None
    empty.set_steps_per_update(4)
    empty.set_steps_per_update(8)
    assert empty.schedule.tolist() == per(8).as_tensor().tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: set_schedule(m, per(1)),
        lambda m: set_limits(m, 2.0, 1.0),
        lambda m: set_steps_per_update(m, 8),
    ],
    ids=["schedule", "limits", "steps_per_update"],
)
def test_a_layer_that_cannot_change_leaves_the_others_as_they_are(change):
    with torch.inference_mode():
        fixed = BatchRenorm1d(3, schedule=UPDATES)
    model = nn.Sequential(BatchRenorm1d(3, schedule=UPDATES), fixed)
    model[0].num_batches_tracked.fill_(8)
    before, text = copy.deepcopy(model[0].state_dict()), repr(model)
    with pytest.raises(ValueError, match="schedule must not be an inference tensor"):
        change(model)
    torch.testing.assert_close(model[0].state_dict(), before, rtol=0, atol=0)
    assert repr(model) == text


def test_the_same_schedule_of_another_accumulation_is_recognised_where_it_lies():
    layer = BatchRenorm1d(3, schedule=UPDATES)
    layer.schedule.copy_(per(16).as_tensor())
    layer.num_batches_tracked.fill_(32)
    layer.set_steps_per_update(2)
    assert layer.schedule.tolist() == per(2).as_tensor().tolist()
    assert layer.num_batches_tracked == 4


def test_layers_that_share_a_counter_scale_it_once():
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other._buffers.update(one._buffers)
    model = convert(nn.Sequential(one, other), schedule=per(1))
    model(torch.randn(4, 3))
    assert one.num_batches_tracked is other.num_batches_tracked
    set_steps_per_update(model, 3)
    assert one.num_batches_tracked == 2 * 3
    assert one.schedule.tolist() == other.schedule.tolist() == per(3).as_tensor().tolist()


def test_another_accumulation_that_a_layer_cannot_have_changes_none():
    model = nn.Sequential(
        BatchRenorm1d(3), BatchRenorm1d(3, schedule=RenormSchedule(0, 2.0, 1e300, 1.0, 1e300))
    )
    model(torch.randn(5, 3))
    with pytest.raises(ValueError, match="r_max_step"):
        set_steps_per_update(model, 10**10)
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 1]
    assert model[0].schedule.tolist() == RenormSchedule().as_tensor().tolist()


def test_what_a_checkpoint_says_of_accumulation_is_what_the_docstring_says():
    saved = BatchRenorm1d(3, schedule=RenormSchedule(4, 3.0, 20, 4.0, 12))
    saved.num_batches_tracked.fill_(8)
    for own, before in ((per(1), 2), (RenormSchedule(3, 3.0, 7, 4.0, 5), 1)):
        layer = BatchRenorm1d(3, schedule=own)
        layer.load_state_dict(saved.state_dict())
        layer.set_steps_per_update(2)
        assert layer.num_batches_tracked == 8 * 2 // before
