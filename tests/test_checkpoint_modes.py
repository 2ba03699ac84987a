"""Activation checkpointing where something about the layer changes between forward and backward: a
repetition does what the forward did. All is compared with the same calls without checkpointing.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from batchrenorm_cuda import (
    BatchRenorm2d,
    RenormSchedule,
    batch_renorm,
    checkpoint_context_fn,
    freeze_statistics,
    set_limits,
    unfreeze_statistics,
)

LAYER = [torch.ops.batchrenorm.forward.default]
KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "no early stop": {"use_reentrant": False, "early_stop": False},
    "selective": {"use_reentrant": False, "context_fn": checkpoint_context_fn},
    "selective, copies": {  # copies of ours would be counted among those of the model
        "use_reentrant": False,
        "context_fn": partial(
            create_selective_checkpoint_contexts, [*LAYER, torch.ops.aten.clone.default]
        ),
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Copy(nn.Module):
    def forward(self, x):
        return x.clone()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        BatchRenorm2d(4, momentum=0.3, schedule=RenormSchedule.constant(2.0, 1.0)) for _ in range(2)
    ]
    for layer in layers:
        nn.init.normal_(layer.weight)
        layer.running_mean.normal_()
        layer.running_std.uniform_(0.5, 2)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), layers[0], nn.Tanh()),
        *(nn.Conv2d(4, 4, 3), layers[1], Copy(), nn.Tanh()),
    )


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 8, 8, generator=generator) * 2 + 1).requires_grad_()


def backward(y: torch.Tensor) -> None:
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)))


def momentum(model):
    for layer in (model[1], model[4]):
        layer.momentum = 0.9


def eps(model):
    for layer in (model[1], model[4]):
        layer.eps = 0.5


def one_frozen(model):
    freeze_statistics(model[4])


def limits(model):
    set_limits(model, 1.0, 0.0)


def tracking(on, model):
    """As virtual adversarial training switches it off and on."""
    for layer in (model[1], model[4]):
        layer.track_running_stats = on


def another_step(model):
    model(batch(1))


def evaluation(model):
    with torch.no_grad():
        model.eval()(batch(1))


CHANGES = {
    "eval": nn.Module.eval,
    "train": nn.Module.train,
    "freeze": freeze_statistics,
    "unfreeze": unfreeze_statistics,
    "one of two frozen": one_frozen,
    "momentum": momentum,
    "eps": eps,
    "limits": limits,
    "tracking": partial(tracking, True),
    "no tracking": partial(tracking, False),
    "another step": another_step,
    "evaluation": evaluation,
}
AFTER = {
    "train": (
        "eval",
        "freeze",
        "one of two frozen",
        "momentum",
        "eps",
        "limits",
        "no tracking",
        "another step",
    ),
    "eval": ("train", "freeze", "eps", "evaluation"),
    "freeze": ("unfreeze", "eval"),
    "no tracking": ("no tracking", "tracking", "eval"),
}


def run(call, start, *changes):
    """Gradients and state, also of an ordinary step after."""
    model, x = network(), batch(0)
    CHANGES[start](model)
    y = call(model, x)
    for change in changes:
        CHANGES[change](model)
    backward(y)
    unfreeze_statistics(model.train())
    backward(model(batch(2)))
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    return gradients, dict(model.named_buffers())


@every_kind
@pytest.mark.parametrize(
    "changes",
    [(start, change) for start, changes in AFTER.items() for change in changes]
    + [("train", "another step", "evaluation")],
    ids="-".join,
)
@pytest.mark.filterwarnings("error")
def test_a_repetition_does_what_the_forward_did(changes, kind):
    found = run(lambda f, x: checkpoint(f, x, **KINDS[kind]), *changes)
    want = run(lambda f, x: f(x), *changes)
    torch.testing.assert_close(found[1], want[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.filterwarnings("error")
def test_inference_is_repeated_by_the_statistics_of_its_time(kind):
    """Without checkpointing autograd refuses this backward."""
    found = run(lambda f, x: checkpoint(f, x, **KINDS[kind]), "eval", "train", "another step")
    want = run(lambda f, x: f(x), "eval")
    torch.testing.assert_close(found[0]["x"], want[0]["x"])
    assert found[1]["1.num_batches_tracked"] == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(lambda f, x: f(x), "eval", "train", "another step")


def without_the_layer(layer, x):
    """Inference in plain operations, on copies: a step after it then disturbs no gradient."""
    mean, std = (t.clone()[:, None, None] for t in (layer.running_mean, layer.running_std))
    return (x - mean) / std * layer.weight[:, None, None] + layer.bias[:, None, None]


@every_kind
@pytest.mark.parametrize("order", [(True, False), (False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("later", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_region_that_changes_the_mode_itself(later, order, kind):
    """Its calls are repeated in order, whatever the mode was at the end or is now."""
    results = []
    for checkpointed in (True, False):
        layer = network()[1]
        x = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()

        def region(x, layer=layer, checkpointed=checkpointed):
            total = 0
            for i, training in enumerate(order):
                layer.train(training)
                f = layer if training or checkpointed else partial(without_the_layer, layer)
                total = total + f(x + i) * (i + 1)
            return total

        y = checkpoint(region, x, **KINDS[kind]) if checkpointed else region(x)
        layer.train(later)
        backward(y)
        results.append((x.grad, layer.weight.grad, layer.bias.grad, dict(layer.named_buffers())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.filterwarnings("error")
def test_statistics_that_are_views(kind):
    """Each call of the function then has other tensors."""
    results = []
    for call in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, **KINDS[kind])):
        statistics, x = torch.ones(2, 3), batch(0)
        y = call(lambda x, s=statistics: batch_renorm(x, s[0], s[1], training=True).tanh(), x)
        backward(y)
        results.append((x.grad, statistics))
    torch.testing.assert_close(*results)


def test_ordinary_inference_does_not_look_for_regions(monkeypatch):
    from batchrenorm_cuda import checkpoint as ours

    monkeypatch.setattr(ours, "repetition", lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(ours, "regions", lambda *_: pytest.fail("looked"))
    model, x = network().eval(), batch(0)
    backward(model(x))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(x)
    with torch.no_grad():
        model.train()(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: layer.load_state_dict(
            {name: t.clone() for name, t in layer.state_dict().items()}, assign=True
        ),
        lambda layer: layer.double().float(),
    ],
    ids=["assign", "dtypes"],
)
def test_a_layer_with_other_buffers_by_then_is_an_error(replace, reentrant):
    """What it did is written down for the buffers that it had. A new step would give another
    gradient and count the batch twice."""
    layer = BatchRenorm2d(3, momentum=0.3, schedule=RenormSchedule.constant(2.0, 1.0))
    y = checkpoint(layer, batch(0).requires_grad_(), use_reentrant=reentrant)
    replace(layer)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    with pytest.raises(RuntimeError, match="no record of what it did the first time"):
        y.pow(3).sum().backward()
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
