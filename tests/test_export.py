"""What leaves the process: torch.jit.trace, torch.export, AOTInductor, ONNX.

In eval mode all of them record torch's own batch_norm, so that what was saved loads where there is
no batchrenorm_cuda, and tools find the BatchNorm that they fuse, quantise or fold. A training step
is recorded by torch.export alone, with its gradient; the others refuse it.
"""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.fx.proxy import TraceError
from torch.utils.checkpoint import checkpoint

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    LazyBatchRenorm2d,
    RenormSchedule,
    SyncBatchRenorm,
    batch_renorm,
    convert,
    fold,
)

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

LAYERS = {
    "1-D, 2-D input": lambda: (BatchRenorm1d(3), torch.randn(6, 3)),
    "1-D, 3-D input": lambda: (BatchRenorm1d(3), torch.randn(6, 3, 5)),
    "2-D": lambda: (BatchRenorm2d(3), torch.randn(4, 3, 5, 4)),
    "channels_last": lambda: (
        BatchRenorm2d(3),
        torch.randn(4, 3, 5, 4).to(memory_format=torch.channels_last),
    ),
    "3-D": lambda: (BatchRenorm3d(3), torch.randn(4, 3, 2, 5, 4)),
    "no weight, no bias": lambda: (BatchRenorm2d(3, affine=False), torch.randn(4, 3, 5, 4)),
    "no bias": lambda: (BatchRenorm2d(3, bias=False), torch.randn(4, 3, 5, 4)),
    # r and d are 1 and 0 there, in training as well: it has no step that could not be recorded.
    "no statistics": lambda: (
        BatchRenorm2d(3, track_running_stats=False),
        torch.randn(4, 3, 5, 4),
    ),
    "eps 0": lambda: (BatchRenorm2d(3, eps=0.0), torch.randn(4, 3, 5, 4)),
    "eps 0, no statistics": lambda: (
        BatchRenorm2d(3, eps=0.0, track_running_stats=False),
        torch.randn(4, 3, 5, 4),
    ),
    "double": lambda: (BatchRenorm1d(3).double(), torch.randn(6, 3).double()),
    "half": lambda: (BatchRenorm1d(3).half(), torch.randn(6, 3).half()),
    "bfloat16": lambda: (BatchRenorm1d(3, dtype=torch.bfloat16), torch.randn(6, 3).bfloat16()),
    "float32 weight, half input": lambda: (BatchRenorm1d(3), torch.randn(6, 3).half()),
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)


def trained(name):
    """A layer in eval mode with statistics, weight and bias that are not where they started."""
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    for p in layer.parameters():
        nn.init.normal_(p)
    for step in range(3):
        layer(x * (1 + step) + step)
    return layer.eval(), x


def network(training=False):
    torch.manual_seed(0)
    schedule = RenormSchedule.constant(2.0, 1.0)
    layer = BatchRenorm2d(4, momentum=0.3, schedule=schedule)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), layer, nn.ReLU())
    for step in range(3):
        model(images(4) * (1 + step) + step)
    return model.train(training)


def images(n, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tolerance(y):
    eps = torch.finfo(y.dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps}


@EACH_LAYER
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_in_eval_mode_infers_the_same(name):
    layer, x = trained(name)
    y = layer(x)  # gradients enabled: an autograd.Function would be recorded as a call to Python
    traced = torch.jit.trace(layer, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "batchrenorm::" not in str(traced.inlined_graph)
    for call in (traced, loaded):
        torch.testing.assert_close(call(x), y, **tolerance(y))
        torch.testing.assert_close(call(2 * x + 1), layer(2 * x + 1), **tolerance(y))
    if name in ("2-D", "channels_last"):
        assert loaded(x).stride() == y.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_and_a_program_load_without_this_package(tmp_path):
    model, x = network(), images(4)
    torch.jit.save(torch.jit.trace(model, (x,)), tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.save((x, model(x)), tmp_path / "tensors.pt")
    code = """
import sys, torch
x, y = torch.load("tensors.pt")
for call in (torch.jit.load("traced.pt"), torch.export.load("program.pt2").module()):
    torch.testing.assert_close(call(x), y, rtol=1e-5, atol=1e-5)
assert "batchrenorm_cuda" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_has_gradients():
    model, x = network(), images(4)
    dy = torch.randn_like(model(x))
    traced = torch.jit.trace(model, (x,))
    found = torch.autograd.grad(traced(x), list(traced.parameters()), dy)
    want = torch.autograd.grad(model(x), list(model.parameters()), dy)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_of_a_training_step_is_refused_and_changes_nothing():
    model = network(training=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace: call model.eval\(\) first"):
        torch.jit.trace(model, (images(4),))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folded_model_scripts():
    """torch.jit.script compiles Python, and so takes BatchNorm, not BatchRenorm."""
    model, x = network(), images(4)
    for layer in (model, model[2], SyncBatchRenorm(4), LazyBatchRenorm2d()):
        with pytest.raises(RuntimeError, match=r"torch.jit.script: .* batchrenorm_cuda.fold\("):
            torch.jit.script(layer)
    scripted = torch.jit.script(fold(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(x), model(x), **CLOSE)


def export(model, x, strict):
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},))


@STRICT
@EACH_LAYER
def test_an_exported_layer_in_eval_mode_infers_the_same(name, strict):
    layer, x = trained(name)
    program = export(layer, x, strict)
    assert "torch.ops.aten.batch_norm." in program.graph_module.code
    assert "batchrenorm" not in program.graph_module.code
    y = layer(x)
    torch.testing.assert_close(program.module()(x), y, **tolerance(y))


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def steps_of(model, call):
    """Outputs and gradients over a few steps, and the state after them."""
    results = []
    for n in (4, 7, 2):
        x = (images(n, n) * n + 1).requires_grad_()
        y = call(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(n))
        model.zero_grad()
        y.backward(dy)
        results.append((y.detach(), x.grad, *(p.grad for p in model.parameters())))
    return results


@STRICT
@MODES
@pytest.mark.parametrize(
    ("form", "backend"),
    [
        (lambda p: p, None),
        (lambda p: p, "aot_eager"),
        (reloaded, None),
        (lambda p: p.run_decompositions(), None),
        (lambda p: p.run_decompositions(), "aot_eager"),
        (lambda p: reloaded(p.run_decompositions({})), "inductor"),
    ],
    ids=[
        "as exported",
        "compiled",
        "saved and loaded",
        "decomposed",
        "decomposed, compiled",
        "decomposed, saved, loaded, compiled",
    ],
)
def test_an_exported_model_goes_on_as_the_model_does(form, backend, strict, training):
    """With its gradients: an operator without them would cut off all layers before it."""
    torch._dynamo.reset()
    model = network(training)
    twin = copy.deepcopy(model)
    exported = form(export(model, images(4), strict)).module()
    call = torch.compile(exported, backend=backend, fullgraph=True) if backend else exported
    found, want = steps_of(exported, call), steps_of(twin, twin)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    found, want = exported.state_dict(), twin.state_dict()
    if training or not strict:  # strict export drops what eval mode does not read
        assert found.keys() == want.keys()
    torch.testing.assert_close(dict(found), {name: want[name] for name in found}, **CLOSE)
    assert want["2.num_batches_tracked"] == (6 if training else 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_an_exported_model_moves_its_statistics_once(reentrant):
    model = network(training=True)
    twin = copy.deepcopy(model)
    exported = export(model, images(4), strict=False).module()
    found = steps_of(exported, lambda x: checkpoint(exported, x, use_reentrant=reentrant))
    torch.testing.assert_close(found, steps_of(twin, twin), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(exported.state_dict()), dict(twin.state_dict()), **CLOSE)


@MODES
def test_torch_fx_takes_the_layer_for_a_leaf(training):
    """As it does BatchNorm: graph passes and feature extractors see a module with its state."""
    model = network(training)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 4
    assert type(traced.get_submodule("2")) is BatchRenorm2d
    torch.testing.assert_close(steps_of(traced, traced), steps_of(twin, twin))
    assert traced.state_dict().keys() == twin.state_dict().keys()
    assert traced.get_submodule("2").num_batches_tracked == (6 if training else 3)


class Activated(BatchRenorm2d):
    def forward(self, x):
        return 1 + super().forward(2 * x)


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_what_a_subclass_adds(training):
    """Once: with the whole layer for a leaf, what is around it came a second time."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4), nn.SiLU(), BatchRenorm2d(4))
    model[3].forward = lambda x, own=model[3].forward: own(x) - 3
    model.train(training)
    twin = copy.deepcopy(model)
    twin[3].forward = lambda x, own=BatchRenorm2d.forward: own(twin[3], x) - 3
    x = torch.randn(6, 3, 5, 5)
    traced = torch.fx.symbolic_trace(model)
    again = torch.fx.symbolic_trace(traced)
    assert {"add", "sub", "mul"} <= {getattr(n.target, "__name__", 0) for n in again.graph.nodes}
    torch.testing.assert_close(again(x), twin(x), rtol=0, atol=0)
    torch.testing.assert_close(again(x), twin(x), rtol=0, atol=0)
    assert model[1].num_batches_tracked == (2 if training else 0)


def test_torch_fx_traces_hooks_once():
    """They are traced around the layer, which must not run them again."""
    model = nn.Sequential(BatchRenorm2d(3), BatchRenorm2d(3)).eval()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model[1].register_forward_hook(lambda module, args, y: y + 1)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


def test_a_traced_subclass_may_be_folded():
    """The node in the graph then finds a BatchNorm in the layer's place."""

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return 1 + super().forward(2 * x)

    model = nn.Sequential(Activated(3)).eval()
    nn.init.uniform_(model[0].running_std, 0.5, 2)
    traced, x = torch.fx.symbolic_trace(model), torch.randn(2, 3, 4, 4)
    y = model(x)
    assert type(fold(traced, counterparts={Activated: Norm}).get_submodule("0")) is Norm
    torch.testing.assert_close(traced(x), y)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return batch_renorm(x * 2, self.mean, self.std, self.weight, training=True, r_max=2.0)


def test_torch_fx_records_the_function():
    """As it does F.batch_norm, with what the call was given."""
    model = Functional()
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert batch_renorm in [node.target for node in traced.graph.nodes]
    x = torch.randn(5, 3)
    torch.testing.assert_close(traced(x), twin(x), rtol=0, atol=0)
    assert torch.equal(traced.std, twin.std) and not torch.equal(traced.std, torch.ones(3))


def test_torch_fx_does_not_trace_a_leaf_by_itself():
    with pytest.raises(TraceError, match=r"a BatchRenorm1d cannot be traced by itself.*Sequential"):
        torch.fx.symbolic_trace(BatchRenorm1d(3))


def test_bad_arguments_do_not_export():
    with pytest.raises(Exception, match=r"running_mean must have shape \(5,\)"):
        torch.export.export(BatchRenorm1d(4).eval(), (torch.ones(6, 5),))
    with pytest.raises(Exception, match="more than one value per channel"):
        torch.export.export(BatchRenorm1d(4), (torch.ones(1, 4),))


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="AOTInductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_aot_inductor_in_eval_mode(tmp_path):
    model = network()
    program = export(model, images(4), strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    call = torch._inductor.aoti_load_package(path)
    for n in (4, 7):
        torch.testing.assert_close(call(images(n, n)), model(images(n, n)), **CLOSE)


def onnx_export(model, x, **options):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        return torch.onnx.export(model, (x,), dynamo=True, verbose=False, **options)


def run_onnx(program, x):
    runtime = pytest.importorskip("onnxruntime")
    file = program if isinstance(program, bytes) else program.model_proto.SerializeToString()
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def nodes(program):
    return [node.op_type for node in program.model_proto.graph.node]


DYNAMIC = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}


@EACH_LAYER
def test_onnx_of_a_layer_is_a_batch_normalization(name):
    layer, x = trained(name)
    program = onnx_export(layer, x, **DYNAMIC)
    if layer.track_running_stats:
        assert nodes(program) == ["BatchNormalization"]
    if x.dtype == torch.bfloat16:  # onnxruntime has no kernel for it
        return
    y = layer(x)
    torch.testing.assert_close(run_onnx(program, x), y, **tolerance(y))


@pytest.mark.parametrize("how", ["as it is", "folded"])
def test_onnx_of_a_model(how):
    model = network()
    program = onnx_export(fold(copy.deepcopy(model)) if how == "folded" else model, images(4))
    assert nodes(program).count("BatchNormalization") == 1
    torch.testing.assert_close(run_onnx(program, images(4)), model(images(4)), **CLOSE)


@pytest.mark.parametrize("how", ["as it is", "folded"])
def test_onnx_folds_the_layer_into_a_convolution_before_it(how):
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for step in range(3):
        model(images(4) * (1 + step) + step)
    model.eval()
    program = onnx_export(
        fold(copy.deepcopy(model)) if how == "folded" else model, images(4), **DYNAMIC
    )
    assert nodes(program) == ["Conv", "Relu"]
    for n in (4, 7):
        torch.testing.assert_close(run_onnx(program, images(n)), model(images(n)), **CLOSE)


def traced_onnx(model, x, **options):
    """By the exporter that torch.onnx had before, which goes by torch.jit.trace."""
    pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, **options)
    return file.getvalue()


@EACH_LAYER
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ONNX export mode:UserWarning")
def test_onnx_by_the_older_exporter(name):
    layer, x = trained(name)
    dynamic = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    if not layer.track_running_stats:  # torch writes the number of values a channel down
        dynamic = {}
    program = traced_onnx(layer, x, **dynamic)
    assert b"BatchNormalization" in program
    if x.dtype == torch.bfloat16:  # onnxruntime has no kernel for it
        return
    for t in (x, torch.cat([x, 2 * x + 1])) if dynamic else (x,):
        y = layer(t)
        torch.testing.assert_close(run_onnx(program, t), y, **tolerance(y))


@pytest.mark.parametrize("mode", ["PRESERVE", "TRAINING"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_of_a_training_step_is_refused_by_the_older_exporter(mode):
    model = network(training=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.onnx.export: call model.eval\(\) first"):
        traced_onnx(model, images(4), training=getattr(torch.onnx.TrainingMode, mode))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training


def test_onnx_of_a_training_step_is_refused():
    model = network(training=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=r"torch.onnx.export: call model.eval\(\) first"):
        onnx_export(model, images(4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
