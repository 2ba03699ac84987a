"""The checks that torch runs over its own modules, on the inputs that it keeps for its BatchNorms
(torch.testing._internal.common_modules), and what is accepted and refused beside them.

torch's test_modules.py is not in its wheel; the checks here are its checks, by the same names.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from devices import each_device
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import make_tensor

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import noncontiguous_like  # noqa: E402

PEERS = {
    BatchRenorm1d: nn.BatchNorm1d,
    BatchRenorm2d: nn.BatchNorm2d,
    BatchRenorm3d: nn.BatchNorm3d,
}
RENAMED = {"running_var": "running_std"}  # in the state_dict
ADDED = {"schedule"}


def infos():
    """torch's ModuleInfo of each BatchNorm, with our class in it."""
    for layer, peer in PEERS.items():
        (theirs,) = [info for info in module_db if info.module_cls is peer]
        ours = copy.copy(theirs)
        ours.module_cls = layer
        yield ours


EACH_INFO = pytest.mark.parametrize(
    "info", list(infos()), ids=lambda info: info.module_cls.__name__
)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def samples(info, training, device="cpu", dtype=torch.float32, requires_grad=False):
    """(constructor's arguments, x) of every sample that torch has. None may go missing."""
    found = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    )
    assert len(found) >= 6
    for sample in found:
        made, (x,) = sample.constructor_input, sample.forward_input.args
        assert not sample.forward_input.kwargs
        yield made, x


def build(cls, made, training=True, **options):
    return cls(*made.args, **made.kwargs, **options).train(training)


def like_torch(info, made, training, device, dtype):
    """Our layer and torch's with the same weight, bias and statistics, none of them at its
    start."""
    peer = build(PEERS[info.module_cls], made, training, device=device, dtype=dtype)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn(p.shape))
        if peer.running_mean is not None:
            peer.running_mean.copy_(torch.randn(peer.num_features))
            peer.running_var.copy_(torch.rand(peer.num_features) + 0.5)
            peer.num_batches_tracked.fill_(7)
    layer = build(info.module_cls, made, training, device=device, dtype=dtype)
    layer.load_state_dict(peer.state_dict())
    return layer, peer


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"rtol": 32 * eps, "atol": 64 * eps}


@each_device()
@EACH_DTYPE
@MODES
@EACH_INFO
def test_forward(info, training, dtype, device):
    """In the warm-up, where r is 1 and d is 0, y is torch's; and always in eval mode."""
    for made, x in samples(info, training, device, dtype):
        layer, peer = like_torch(info, made, training, device, dtype)
        y, want = layer(x), peer(x)
        assert y.dtype == want.dtype and y.stride() == want.stride()
        torch.testing.assert_close(y, want, **tolerance(dtype))
        if peer.running_mean is not None:
            moved = training and x.numel() > 0
            assert layer.num_batches_tracked == 7 + moved


@each_device()
@EACH_DTYPE
@EACH_INFO
def test_factory_kwargs(info, dtype, device):
    for made, _ in samples(info, True):
        layer = build(info.module_cls, made, device=device, dtype=dtype)
        by_position = info.module_cls(
            *(4, 1e-5, 0.1, True, True),
            *(device, dtype),
        )
        for built in (layer, by_position):
            assert all(p.dtype == dtype for p in built.parameters())
            assert all(t.device.type == device for t in built.state_dict().values())
        on_meta = build(info.module_cls, made, device="meta", dtype=dtype)
        with torch.device("meta"):
            in_context = build(info.module_cls, made, dtype=dtype)
        for built in (on_meta, in_context):
            assert all(t.is_meta for t in built.state_dict().values())
            assert {n: (t.shape, t.dtype) for n, t in built.state_dict().items()} == {
                n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
            }


@pytest.mark.gpu
@EACH_INFO
def test_multiple_device_transfer(info):
    for made, x in samples(info, True):
        layer = build(info.module_cls, made)
        for device in ("cuda", "cpu", "cuda"):
            layer.to(device)
            assert all(t.device.type == device for t in layer.state_dict().values())
            assert layer(x.to(device)).device.type == device


@pytest.mark.gpu
@MODES
@EACH_INFO
def test_cpu_gpu_parity(info, training):
    for made, x in samples(info, training):
        results = []
        for device in ("cpu", "cuda"):
            layer = build(info.module_cls, made, training).to(device)
            z = x.to(device).detach().requires_grad_()
            y = layer(z)
            y.backward(x.cos().to(device))
            found = (y, z.grad, *(p.grad for p in layer.parameters()), *layer.buffers())
            results.append([t.detach().cpu() for t in found])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@MODES
@EACH_INFO
def test_repr(info, training):
    for made, _ in samples(info, training):
        assert repr(build(info.module_cls, made, training)).startswith(info.module_cls.__name__)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_file_with_weights_only(layer):
    """With what a user has to declare safe."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(layer), RenormSchedule, set]):
        return torch.load(file, weights_only=True)


@MODES
@EACH_INFO
@pytest.mark.parametrize(
    "copied",
    [through_pickle, through_a_file, through_a_file_with_weights_only, copy.deepcopy],
    ids=lambda f: f.__name__,
)
def test_pickle(info, training, copied):
    for made, x in samples(info, training):
        layer = build(info.module_cls, made, training)
        layer(x)
        other = copied(layer)
        assert torch.equal(other(x), layer(x))
        torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


@each_device()
@EACH_INFO
def test_state_dict(info, device):
    for made, x in samples(info, True, device):
        layer = build(info.module_cls, made, device=device)
        peer = build(PEERS[info.module_cls], made, device=device)
        theirs = [RENAMED.get(name, name) for name in peer.state_dict()]
        ours = list(layer.state_dict())
        assert ours[: len(theirs)] == theirs and set(ours[len(theirs) :]) <= ADDED
        layer(x)
        other = build(info.module_cls, made, device=device)
        other.load_state_dict(layer.state_dict(), strict=True)
        other.eval(), layer.eval()
        assert torch.equal(other(x), layer(x))


@MODES
@EACH_INFO
def test_to_empty(info, training):
    for made, x in samples(info, training):
        layer = build(info.module_cls, made, training, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for t in layer.state_dict().values():
                t.fill_(77)
        layer.reset_parameters()
        assert torch.equal(layer(x), build(info.module_cls, made, training)(x))


@MODES
@EACH_INFO
def test_device_ctx_init(info, training):
    for made, x in samples(info, training):
        with torch.device("meta"):
            layer = build(info.module_cls, made, training)
        assert layer(x.to("meta")).is_meta and layer(x.to("meta")).shape == x.shape


def results_of(layer, x, dy):
    x = x.detach().requires_grad_()  # keeps the strides
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)


@each_device()
@MODES
@EACH_INFO
def test_non_contiguous_tensors(info, training, device):
    for made, x in samples(info, training, device):
        layer = build(info.module_cls, made, training, device=device)
        dy = torch.randn_like(x)
        want = results_of(copy.deepcopy(layer), x, dy)
        forms = [(noncontiguous_like(x), dy), (x, noncontiguous_like(dy))]
        if x.numel():
            assert not any(x.is_contiguous() and dy.is_contiguous() for x, dy in forms)
        for form in forms:
            found = results_of(copy.deepcopy(layer), *form)
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@each_device()
@MODES
@EACH_INFO
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=lambda f: f.__name__)
def test_grad(info, training, check, device):
    for made, x in samples(info, training, device, torch.float64, requires_grad=True):
        layer = build(info.module_cls, made, training, device=device, dtype=torch.float64)
        names = [name for name, _ in layer.named_parameters()]

        def call(x, *parameters, layer=layer, names=names):
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(layer, given, (x,))

        fast = x.numel() > 200  # every element by itself otherwise
        assert check(call, (x, *layer.parameters()), nondet_tol=0.0, fast_mode=fast)


@each_device()
@MODES
@EACH_INFO
def test_memory_format(info, training, device):
    formats = {
        4: [torch.contiguous_format, torch.channels_last],
        5: [torch.contiguous_format, torch.channels_last_3d],
    }
    for made, x in samples(info, training, device):
        for of_layer, of_x in itertools.product(formats.get(x.dim(), []), repeat=2):
            layer = build(info.module_cls, made, training, device=device)
            want = copy.deepcopy(layer)(x)
            layer.to(memory_format=of_layer)
            y = layer(x.contiguous(memory_format=of_x))
            if x.numel():
                assert y.is_contiguous(memory_format=of_x)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@EACH_INFO
def test_if_train_and_eval_modes_differ(info):
    """Whether forward reads `training` is something that torch's ModuleInfo states."""
    assert info.train_and_eval_differ
    for made, x in samples(info, True):
        layer = build(info.module_cls, made)
        del layer.__dict__["training"]
        with pytest.raises(AttributeError, match="training"):
            layer(x)


# Accepted and refused beside torch ------------------------------------------------------------


def vector(n=4, c=3, **options):
    return lambda: make_tensor((n, c), device="cpu", **{"dtype": torch.float32} | options)


def call(x=None, mode="train", change=None, **options):
    """A layer, made with these options, on one x."""
    x = x or vector()

    def run(cls):
        layer = cls(3, **options)
        if change is not None:
            layer = change(layer)
        return getattr(layer, mode)()(x())

    return run


CALLS = {
    "momentum None": call(momentum=None),
    "momentum 0": call(momentum=0.0),
    "momentum 1": call(momentum=1.0),
    "momentum 1.1": call(momentum=1.1),
    "momentum -0.1": call(momentum=-0.1),
    "momentum 'x'": call(momentum="x"),
    "eps 0, training": call(eps=0.0),
    "eps -1, training": call(eps=-1.0),
    "eps -1, eval": call(eps=-1.0, mode="eval"),
    "affine=False, bias=True": call(affine=False, bias=True),
    "no statistics, eval": call(track_running_stats=False, mode="eval"),
    "no channels": lambda cls: cls(0),
    "-1 channels": lambda cls: cls(-1),
    "3.0 channels": lambda cls: cls(3.0),
    "an integer dtype": lambda cls: cls(3, dtype=torch.int64),
    "a complex dtype": lambda cls: cls(3, dtype=torch.complex64),
    "device and dtype by position": lambda cls: cls(3, 0.1, 0.1, True, True, "cpu", torch.half),
    "bias by position": lambda cls: cls(3, 0.1, 0.1, True, True, "cpu", torch.half, False),
    "x by name": lambda cls: cls(3)(input=vector()()),
    "no x": lambda cls: cls(3)(),
    "two x": lambda cls: cls(3)(vector()(), vector()()),
    "x is a list": call(lambda: [1.0]),
    "one value a channel, training": call(vector(1)),
    "one value a channel, eval": call(vector(1), "eval"),
    "one value a channel, no statistics, eval": call(vector(1), "eval", track_running_stats=False),
    "an empty batch, training": call(vector(0)),
    "an empty batch, eval": call(vector(0), "eval"),
    "an empty length": call(lambda: torch.ones(4, 3, 0)),
    "x without channels": call(vector(4, 0)),
    "x with other channels, training": call(vector(4, 5)),
    "x with other channels, eval": call(vector(4, 5), "eval"),
    "1-D x": call(lambda: torch.ones(3)),
    "4-D x": call(lambda: torch.ones(4, 3, 2, 2)),
    "int64 x": call(vector(dtype=torch.int64)),
    "bool x": call(vector(dtype=torch.bool)),
    "complex x": call(vector(dtype=torch.complex64)),
    "float64 x": call(vector(dtype=torch.float64)),
    "float16 x": call(vector(dtype=torch.float16)),
    "bfloat16 x": call(vector(dtype=torch.bfloat16)),
    "float32 x, float64 layer": call(change=nn.Module.double),
    "float32 x, float16 layer": call(change=nn.Module.half),
    "float16 x, float16 layer": call(vector(dtype=torch.float16), change=nn.Module.half),
    "float16 x, bfloat16 layer": call(vector(dtype=torch.float16), change=nn.Module.bfloat16),
    "sparse x": call(lambda: torch.ones(4, 3).to_sparse()),
    "x on meta": call(lambda: torch.ones(4, 3, device="meta")),
    "inf in x": call(lambda: torch.full((4, 3), torch.inf)),
}

# Every place where the layer and torch's disagree: (torch accepts, ours accepts, why).
DIFFERENCES = {
    "momentum 1.1": (True, False, "an average with a negative weight diverges in silence"),
    "momentum -0.1": (True, False, "an average with a weight over 1 diverges in silence"),
    "eps 0, training": (False, True, "the paper allows it; a constant channel stays finite here"),
    "no channels": (True, False, "nothing could be computed"),
    "x without channels": (True, False, "a wrong x, not an empty one: the layer has channels"),
    "a complex dtype": (True, False, "no x can be complex, in torch either"),
    "float32 x, float16 layer": (False, True, "statistics are float32, a weight is widened"),
    "float16 x, bfloat16 layer": (False, True, "statistics are float32, a weight is widened"),
}
if "bias" not in inspect.signature(nn.BatchNorm1d).parameters:
    DIFFERENCES["affine=False, bias=True"] = (False, True, "torch 2.11 does not have it yet")


def accepts(run, cls):
    try:
        run(cls)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_accepted_or_refused_as_torch_does(name):
    theirs, ours = (accepts(CALLS[name], cls) for cls in (nn.BatchNorm1d, BatchRenorm1d))
    expected = DIFFERENCES[name][:2] if name in DIFFERENCES else (theirs, theirs)
    assert (theirs, ours) == expected


def test_every_difference_is_a_call():
    assert DIFFERENCES.keys() <= CALLS.keys()
    assert all(theirs != ours and why for theirs, ours, why in DIFFERENCES.values())


# What torch refuses in forward and this layer does not refuse there. torch 2.11 to 2.15 have no
# other error inputs of BatchNorm than these two values of eps.
ERRORS = {
    -1.0: (ModuleErrorEnum.CONSTRUCTION_ERROR, "refused as early as it is known"),
    0.0: (None, "as in the table above"),
}


@MODES
@EACH_INFO
def test_errors(info, training):
    (theirs,) = [i for i in module_db if i.module_cls is PEERS[info.module_cls]]
    found = theirs.module_error_inputs_func(
        theirs, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    seen = []
    for error in found:
        made, (x,) = (
            error.module_error_input.constructor_input,
            (error.module_error_input.forward_input.args),
        )
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR and error.error_type is ValueError
        seen.append(made.kwargs["eps"])
        where, _ = ERRORS[made.kwargs["eps"]]
        if where is None:
            assert build(info.module_cls, made, training)(x).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"eps must be >= 0, got -1.0"):
                build(info.module_cls, made, training)
    assert set(seen) == ERRORS.keys()


@EACH_INFO
def test_defaults_are_those_of_torch_but_for_momentum(info):
    peer = PEERS[info.module_cls]
    layer, norm = info.module_cls(3), peer(3)
    for name in ("eps", "affine", "track_running_stats", "training"):
        assert getattr(layer, name) == getattr(norm, name)
    assert (layer.momentum, norm.momentum) == (0.01, 0.1)  # the paper's


@EACH_INFO
def test_half_precision_layers_keep_their_statistics_in_float32(info):
    """torch rounds them: a moving average with a weight of 0.01 then stands still."""
    layer, norm = info.module_cls(3).half(), PEERS[info.module_cls](3).half()
    assert (layer.running_mean.dtype, norm.running_mean.dtype) == (torch.float32, torch.float16)
    assert layer.weight.dtype == norm.weight.dtype == torch.float16
