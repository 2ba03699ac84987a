"""What docs/libraries.md says of other libraries. A test runs if its library is installed; none of
them is needed here.

Where a library passes Batch Renorm by, that is asserted, too: once it no longer does, the row can
go.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from batchrenorm_cuda import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
    adopt,
    convert,
    convert_sync,
    fold,
    freeze_statistics,
    update_stats,
)

torch.set_num_threads(1)

PAGE = (Path(__file__).resolve().parent.parent / "docs/libraries.md").read_text()
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm)
SCHEDULE = RenormSchedule(1, 2.0, 3, 1.0, 3)


def recipe(library):
    """The names that a block of the page defines."""
    names = {"__name__": __name__}
    (block,) = re.findall(rf"```python\n# {library}\n(.*?)```", PAGE, re.S)
    exec(compile(block, f"docs/libraries.md, {library}", "exec"), names)
    return names


def layers(model, kinds=RENORMS):
    return [m for m in model.modules() if isinstance(m, kinds)]


def lived_in(model):
    """With statistics and affine maps that are nobody's default. In eval mode."""
    torch.manual_seed(0)
    for norm in layers(model, NORMS):
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    return model.eval()


def images(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_near(found, wanted):
    """To a thousandth of the largest value: networks are deep."""
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def moves(model, x):
    """Whether a training forward moves the first layer's statistics."""
    before = layers(model)[0].running_mean.clone()
    model.train()(x)
    return not torch.equal(before, layers(model)[0].running_mean)


def check_conversion(model, x):
    """Every layer is converted, inference is what it was, it folds back, and it trains."""
    reports = []
    kinds = [type(m) for m in layers(lived_in(model), NORMS)]
    with torch.no_grad():
        y = model(x)
    convert(model, schedule=SCHEDULE, report=reports.append)
    assert not reports[0].left and len(reports[0].changed) == len(kinds) > 0
    with torch.no_grad():
        assert_near(model(x), y)
        fold(model)
        assert [type(m) for m in layers(model, NORMS)] == kinds
        assert_near(model(x), y)
    # In the schedule's warm-up it trains as BatchNorm does. In float64, as deep networks and small
    # batches make much of roundings.
    twin = convert(copy.deepcopy(model), schedule=SCHEDULE)
    for found, want in zip(step(twin.double(), x), step(model.double(), x), strict=True):
        assert_near(found, want)
    assert {m.num_batches_tracked.item() for m in layers(twin)} == {1}


def step(model, x):
    """Output and gradients of a training step, for a random cotangent. The gradients in one: that
    of a bias in front of a norm is nothing but rounding."""
    torch.manual_seed(1)  # of dropout
    y = model.train()(x.double())
    y = y if isinstance(y, torch.Tensor) else y[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, parameters, torch.randn_like(y), allow_unused=True)
    return y, torch.cat([g.flatten() for g in found if g is not None])


# --- timm


TIMM = [
    "resnet18",
    "resnetv2_50",
    "regnetx_002",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "densenet121",
    "repvgg_a0",
    "ghostnet_050",
    "levit_128s",
    "efficientvit_b0",
    "fastvit_t8",
    "hardcorenas_a",
    "dla34",
    "ese_vovnet19b_slim",
]


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5)
    check_conversion(model, images(224 if name == "levit_128s" else 64))


def test_every_model_of_timm_converts_and_folds_back():
    """Which costs four minutes, though nothing is computed: all are on the meta device."""
    timm = pytest.importorskip("timm")
    models = converted = 0
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        kinds = [type(m) for m in model.modules()]
        if not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds):
            continue
        names, reports = list(model.state_dict()), []
        convert(model, report=reports.append)
        assert not reports[0].left, name
        fold(model)
        assert [type(m) for m in model.modules()] == kinds, name
        assert list(model.state_dict()) == names, name
        models, converted = models + 1, converted + len(reports[0].changed)
    print(f"{converted} layers of {models} models")
    assert models > 500


@pytest.mark.parametrize("name", ["repvgg_a0", "efficientvim_m1", "levit_128s"])
def test_timm_reparameterizes_folded_models(name):
    timm = pytest.importorskip("timm")
    model = lived_in(timm.create_model(name, num_classes=5))
    x = images(224)
    with torch.no_grad():
        y = convert(model)(x)
        if name == "efficientvim_m1":
            wrong = timm.models.reparameterize_model(model)(x)
            assert (wrong - y).abs().max() > 0.01 * y.abs().max()
        assert_near(timm.models.reparameterize_model(fold(model))(x), y)


def test_timm_freezes_parameters_only():
    timm = pytest.importorskip("timm")
    model = convert(timm.create_model("resnet18", num_classes=5))
    timm.utils.freeze(model)
    assert not model.bn1.weight.requires_grad and moves(model, images())
    assert type(timm.layers.freeze_batch_norm_2d(model).bn1) is BatchRenorm2d
    freeze_statistics(model)
    assert not moves(model, images())


def test_timm_synchronises_before_conversion():
    timm = pytest.importorskip("timm")
    model = convert(timm.create_model("mobilenetv3_small_050"))
    kinds = [type(m) for m in layers(model)]
    model = timm.layers.convert_sync_batchnorm(model)
    assert [type(m) for m in layers(model)] == kinds
    for sync in (
        convert_sync(model),
        convert(timm.layers.convert_sync_batchnorm(timm.create_model("mobilenetv3_small_050"))),
    ):
        assert len(layers(sync, SyncBatchRenorm)) == len(kinds)


def test_timm_distributes_the_mean_alone(monkeypatch):
    timm = pytest.importorskip("timm")
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda t, rank: sent.append(id(t)))
    model = convert(timm.create_model("resnet18"))
    timm.utils.distribute_bn(model, world_size=2, reduce=False)
    assert id(model.bn1.running_mean) in sent and id(model.bn1.running_std) not in sent


def test_timm_averages_a_model():
    timm = pytest.importorskip("timm")
    model = convert(timm.create_model("resnet18", num_classes=5), schedule=SCHEDULE)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    for _ in range(3):
        model.train()(images())
        average.update(model)
    assert torch.equal(average.module.bn1.schedule, model.bn1.schedule)
    lone = average.module.bn1.running_std / model.bn1.running_std
    assert lone.isfinite().all() and not torch.equal(lone, torch.ones_like(lone))


# --- torchvision


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "regnet_y_400mf"]
)
def test_torchvision_models(name):
    models = pytest.importorskip("torchvision.models")
    check_conversion(models.get_model(name, weights=None, num_classes=5), images())


def test_torchvision_sorts_parameters_by_type():
    pytest.importorskip("torchvision")
    from torchvision.models import resnet18
    from torchvision.ops._utils import split_normalization_params

    kinds = [len(group) for group in split_normalization_params(resnet18())]
    model = convert(resnet18())
    assert [len(group) for group in split_normalization_params(model)] == [0, sum(kinds)]
    named = split_normalization_params(model, norm_classes=[BatchRenorm2d])
    assert [len(group) for group in named] == kinds


def test_torchvision_fuses_folded_models():
    quantization = pytest.importorskip("torchvision.models.quantization")
    model = convert(lived_in(quantization.resnet18(weights=None, quantize=False)))
    y = model(images())
    with pytest.raises(AssertionError):
        copy.deepcopy(model).fuse_model(is_qat=False)
    fold(model).fuse_model(is_qat=False)
    assert not layers(model, NORMS)
    assert_near(model(images()), y)


# --- segmentation-models-pytorch


def test_smp_freezes_an_encoder():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = convert(smp.Unet("resnet18", encoder_weights=None))
    model.freeze_encoder()
    assert moves(model, images())
    freeze_statistics(model.encoder)
    assert not moves(model, images())


def test_smp_saves_a_folded_model(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = convert(lived_in(smp.Unet("resnet18", encoder_weights=None)))
    fold(copy.deepcopy(model)).save_pretrained(tmp_path)
    with torch.no_grad():
        assert_near(smp.from_pretrained(tmp_path).eval()(images()), model(images()))


# --- ultralytics


@pytest.fixture
def yolo(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    return pytest.importorskip("ultralytics").YOLO


def test_ultralytics_fuses(yolo):
    model = convert(lived_in(yolo("yolo11n.yaml").model))
    with torch.no_grad():
        y = model(images())[0]
        fused = copy.deepcopy(model).fuse(verbose=False)
        assert not layers(fused)
        assert_near(fused(images())[0], y)


@pytest.fixture
def boxes(tmp_path):
    """Four images of a square each, as YOLO reads them."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for i in range(4):
        image = random.integers(0, 90, (64, 64, 3), dtype=np.uint8)
        x, y = random.integers(8, 30, 2)
        image[y : y + 24, x : x + 24] = 255
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), image)
        box = f"0 {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n"
        (tmp_path / f"labels/{i}.txt").write_text(box)
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return data


def test_ultralytics_trains(yolo, boxes, tmp_path):
    """From a BatchNorm model, broken off, resumed; then what follows a training."""
    Trainer = recipe("ultralytics")["RenormTrainer"]
    Trainer.schedule = SCHEDULE
    options = dict(data=str(boxes), epochs=3, imgsz=64, batch=2, device="cpu", workers=0)
    options |= dict(freeze=10, project=str(tmp_path), name="run", plots=False, verbose=False)

    plain = yolo("yolo11n.yaml")
    convert(plain.model)
    seen = []

    def look(trainer):
        norms = layers(trainer.model)
        seen.append((norms[0].num_batches_tracked.item(), norms[-1].num_batches_tracked.item()))

    def sort(trainer):
        owners = {id(p): m for m in trainer.model.modules() for p in m.parameters(recurse=False)}
        groups = {g["param_group"]: g for g in trainer.optimizer.param_groups}
        assert groups["bn"]["weight_decay"] == 0 and len(groups["bn"]["params"]) == len(
            layers(trainer.model)
        )
        assert all(torch.equal(m.schedule, SCHEDULE.as_tensor()) for m in layers(trainer.model))
        assert not any(isinstance(owners[id(p)], RENORMS) for p in groups["weight"]["params"])

    def stop(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    started = yolo("yolo11n.yaml")
    for event, call in (
        ("on_train_start", sort),
        ("on_train_epoch_end", look),
        ("on_model_save", stop),
    ):
        started.add_callback(event, call)
    with pytest.raises(KeyboardInterrupt):
        started.train(trainer=Trainer, **options)
    resumed = yolo(tmp_path / "run/weights/last.pt")
    assert layers(resumed.model)
    resumed.add_callback("on_train_start", sort)
    resumed.add_callback("on_train_epoch_end", look)
    resumed.train(trainer=Trainer, resume=True)
    assert seen == [(0, 2), (0, 4), (0, 6)]  # the first is frozen

    best = yolo(tmp_path / "run/weights/best.pt")
    assert layers(best.model)
    best.predict(str(tmp_path / "images/0.png"), verbose=False)
    plain.train(**options | dict(name="plain", epochs=1))
    assert not layers(plain.trainer.model)


# --- transformers


def resnet_of(transformers):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


def test_transformers_convert_what_is_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = transformers.ResNetForImageClassification
    model = lived_in(resnet_of(transformers))
    model.save_pretrained(tmp_path)
    loaded = convert(kind.from_pretrained(tmp_path)).eval()
    assert_near(loaded(images()).logits, model(images()).logits)

    class Within(kind):
        def __init__(self, config):
            super().__init__(config)
            convert(self)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = zip(layers(Within.from_pretrained(tmp_path)), layers(loaded), strict=True)
    assert not all(torch.allclose(a.running_std, b.running_std) for a, b in norms)


def test_transformers_save_a_folded_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    kind = transformers.ResNetForImageClassification
    model = convert(lived_in(resnet_of(transformers)), schedule=SCHEDULE)
    y = model(images()).logits
    model.save_pretrained(tmp_path / "renorm")
    logging.disable()
    half = kind.from_pretrained(tmp_path / "renorm").eval()
    logging.disable(logging.NOTSET)
    assert (half(images()).logits - y).abs().max() > 0.1 * y.abs().max()

    fold(copy.deepcopy(model)).save_pretrained(tmp_path / "folded")
    assert_near(kind.from_pretrained(tmp_path / "folded").eval()(images()).logits, y)
    again = convert(kind(model.config))
    again.load_state_dict(load_file(tmp_path / "renorm/model.safetensors"))
    assert torch.equal(again.eval()(images()).logits, y)


# --- Lightning


@pytest.fixture
def trained(tmp_path):
    """What fits a small converted model; its loader; the model."""
    lightning = pytest.importorskip("lightning")
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8) * 3 + 1), batch_size=4)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

        def training_step(self, batch, _):
            return self.backbone(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(module, **options):
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet,
            **options,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader)
        return module

    return fit, loader, Module()


def test_lightning_averages_weights(trained):
    fit, loader, module = trained
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    fit(module, max_epochs=4, callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=1)])
    norm = module.backbone[1]
    assert norm.num_batches_tracked == 4 * 4  # a pass for statistics alone would leave more
    before = norm.running_mean.clone()
    update_stats(module.backbone, loader)
    assert not torch.allclose(norm.running_mean, before)


@pytest.mark.parametrize("train_bn", [False, True])
def test_lightning_freezes_a_part(trained, train_bn):
    _, loader, module = trained
    from lightning.pytorch.callbacks import BaseFinetuning

    BaseFinetuning.freeze(module.backbone, train_bn=train_bn)
    (x,) = next(iter(loader))
    assert not module.backbone[1].weight.requires_grad and moves(module.backbone, x)
    freeze_statistics(module.backbone)
    assert not moves(module.backbone, x)


def test_lightning_synchronises_batch_norm_only(trained):
    _, _, module = trained
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    assert type(TorchSyncBatchNorm().apply(module).backbone[1]) is BatchRenorm2d
    assert type(convert_sync(module).backbone[1]) is SyncBatchRenorm


# --- MONAI


def monai_unet():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.UNet(3, 3, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch")


def test_monai_networks():
    check_conversion(monai_unet(), torch.randn(2, 3, 8, 8, 8))


def test_monai_copies_before_conversion():
    from_scratch, source = monai_unet(), lived_in(monai_unet())
    from monai.networks.utils import copy_model_state

    x = torch.randn(2, 3, 8, 8, 8)
    target = convert(monai_unet()).eval()
    copy_model_state(target, source)
    assert (target(x) - source(x)).abs().max() > 0.01
    copy_model_state(from_scratch, source)
    assert_near(convert(from_scratch).eval()(x), source(x))


# --- mmengine


def test_mmengine_decays_by_name():
    optim = pytest.importorskip("mmengine.optim")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))

    def undecayed(**how):
        build = optim.DefaultOptimWrapperConstructor(
            dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=0.01)), paramwise_cfg=how
        )
        groups = build(model).param_groups
        return {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    norm = {id(p) for p in model[1].parameters()}
    assert undecayed(norm_decay_mult=0.0) == norm
    convert(model)
    assert undecayed(norm_decay_mult=0.0) == set()
    assert undecayed(custom_keys={"1.": dict(decay_mult=0.0)}) == norm


def test_mmengine_reverts_to_a_norm_of_any_dimension():
    pytest.importorskip("mmengine")
    from mmengine.model import revert_sync_batchnorm
    from mmengine.model.utils import _BatchNormXd

    def reverted():
        return revert_sync_batchnorm(nn.Sequential(lived_in(nn.SyncBatchNorm(3)))).eval()

    x = images(4)
    with pytest.warns(UserWarning, match="not in counterparts"):
        convert(reverted())
    model = convert(reverted(), counterparts={_BatchNormXd: SyncBatchRenorm})
    assert type(model[0]) is SyncBatchRenorm
    assert_near(model(x), reverted()(x))


# --- pytorch-metric-learning


def test_metric_learning_freezes_by_name():
    functions = pytest.importorskip("pytorch_metric_learning.utils.common_functions")
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    convert(trunk).train()
    trunk.apply(functions.set_layers_to_eval("BatchNorm"))
    assert trunk[1].training
    freeze_statistics(trunk)
    assert not moves(trunk, images(8))


# --- reinforcement and continual learning


def test_crossq(tmp_path):
    """Learns, saves, loads; and goes on where a model of sb3's own layers was."""
    pytest.importorskip("sb3_contrib")
    gymnasium = pytest.importorskip("gymnasium")
    import sb3_contrib.crossq.policies as policies
    from sb3_contrib import CrossQ

    peer_class = policies.BatchRenorm1d
    settings = dict(net_arch=dict(pi=[8], qf=[8]), renorm_warmup_steps=5)
    start = dict(learning_starts=20, policy_kwargs=settings, device="cpu", seed=0)
    observation = torch.tensor([[1.0, 0.0, 0.5]]).numpy()

    def action(model):
        return model.predict(observation, deterministic=True)[0]

    try:
        peer = CrossQ("MlpPolicy", gymnasium.make("Pendulum-v1"), **start)
        peer.learn(40)
        ours = recipe("sb3_contrib")["CrossQRenorm"]
        model = CrossQ("MlpPolicy", gymnasium.make("Pendulum-v1"), **start)
        model.learn(40)
        norms = layers(model.policy, ours)
        modes = [m.training for m in layers(peer.policy, peer_class)]
        steps = [m.steps.item() for m in layers(peer.policy, peer_class)]
        assert [m.training for m in norms] == modes
        assert [m.num_batches_tracked.item() for m in norms] == steps and max(steps) > 6

        model.save(tmp_path / "model")
        loaded = CrossQ.load(tmp_path / "model", env=gymnasium.make("Pendulum-v1"))
        assert (action(loaded) == action(model)).all()
        loaded.learn(25)

        eps = layers(peer.policy, peer_class)[0].eps
        loaded.policy.load_state_dict(adopt.from_sb3(peer.policy.state_dict(), eps=eps))
        torch.testing.assert_close(action(loaded), action(peer))
    finally:
        policies.BatchRenorm1d = peer_class


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_crossq_layer_steps_as_its_peer(warmup_steps):
    """Where its limits set in, and what they are. Batches are big, as it takes unbiased variances,
    and much wider than eps, which it adds elsewhere."""
    peers = pytest.importorskip("sb3_contrib.common.torch_layers")
    import sb3_contrib.crossq.policies as policies

    given = dict(momentum=0.02, eps=1e-4, warmup_steps=warmup_steps)
    peer = peers.BatchRenorm1d(5, **given)
    try:
        layer = recipe("sb3_contrib")["CrossQRenorm"](5, **given)
    finally:
        policies.BatchRenorm1d = peers.BatchRenorm1d
    assert layer.eps == 1e-4
    torch.manual_seed(0)
    shifts = [0.1] * warmup_steps + [2.0, 2.0, 1000.0]
    for step, shift in enumerate(shifts):
        x = torch.randn(8192, 5) * (30 if shift == 1000 else 1) + shift
        y, norm = layer(x), (x - x.mean(0)) / x.std(0)
        torch.testing.assert_close(y, peer(x), rtol=1e-2, atol=1e-2)
        if step <= warmup_steps:
            torch.testing.assert_close(y, norm, rtol=1e-3, atol=1e-3)
        elif shift == 2:
            assert (y - norm).mean() > 1
        else:
            torch.testing.assert_close(y, 3 * norm + 5, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.running_mean, peer.ra_mean)


def test_torchrl_mlp():
    modules = pytest.importorskip("torchrl.modules")
    shape = dict(in_features=3, out_features=2, num_cells=[8, 8])
    x = torch.randn(6, 3)
    own = modules.MLP(norm_class=BatchRenorm1d, norm_kwargs=[{"num_features": 8}] * 2, **shape)
    assert len(layers(own)) == 2 and own(x).shape == (6, 2)
    norm = modules.MLP(norm_class=nn.BatchNorm1d, norm_kwargs=[{"num_features": 8}] * 2, **shape)
    check_conversion(norm, x)


def test_avalanche_models():
    models = pytest.importorskip("avalanche.models")
    check_conversion(models.SlimResNet18(5), images(32))
