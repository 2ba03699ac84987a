"""The recipes in examples/: each runs on a small scale, and what it says about itself is so."""

import importlib
import inspect
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from batchrenorm_cuda import BatchRenorm1d, RenormSchedule

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.stem for path in EXAMPLES.glob("*.py") if not path.stem.startswith("digits"))


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """The folder on the path, and torch's generator and threads as they were."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are quicker so
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def recipe(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it(name, capsys):
    module = recipe(name)
    assert f"examples/{name}.py" in module.__doc__
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0 and "--help" in capsys.readouterr().out


def test_every_recipe_is_tested():
    tested = re.findall(r'recipe\("(\w+)"\)', Path(__file__).read_text())
    assert set(RECIPES) == set(tested)


def test_resnet_learns_from_two_images_that_are_alike():
    """Where BatchNorm falls behind, and nothing is lost on the way in or out."""
    found = recipe("resnet").main(["--steps", "500"])
    assert found["changed by convert"] == 0
    assert found["changed by fold"] < 1e-5
    assert found["BatchNorms again"] == 9
    assert found["accuracy of Batch Renorm"] > max(0.8, found["accuracy of BatchNorm"] + 0.1)


def test_resnet_is_torchvisions():
    """Names and shapes of ResNet-18, so that its checkpoints load: number of parameters, and keys
    of each kind."""
    model = recipe("resnet").ResNet((2, 2, 2, 2), 64, 1000)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    state = model.state_dict()
    assert len(state) == 122
    assert state["layer4.1.bn2.running_var"].shape == (512,)
    assert state["layer3.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert state["layer3.0.downsample.1.running_mean"].shape == (256,)
    assert "layer1.0.downsample.0.weight" not in state
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("dims", ["2", "3"])
def test_unet_infers_what_it_trains(dims):
    sizes = {"2": ["--steps", "150"], "3": ["--steps", "120", "--side", "8"]}[dims]
    found = recipe("unet").main(["--dims", dims, *sizes])
    assert found["Batch Renorm"][0] > {"2": 0.8, "3": 0.5}[dims]  # Dice
    assert found["Batch Renorm"][1] < 0.7 * found["BatchNorm"][1]  # the gap


@pytest.mark.parametrize("accumulate", [1, 4])
def test_micro_batches_count_steps_of_the_optimiser(accumulate):
    course = recipe("micro_batches").main(["--steps", "50", "--accumulate", str(accumulate)])
    assert [step.microbatches for step in course] == [accumulate * n for n in range(1, 51)]
    # After 5, 15 and 25 steps of the optimiser: a tenth, three tenths, half of the run.
    assert [course[n - 1].limits for n in (5, 15, 25)] == [(1.0, 0.0), (2.0, 5.0), (3.0, 5.0)]
    # The batch after the warm-up has the limits of its end still.
    none = 5 + (accumulate == 1)
    corrected = [step.corrected > 1e-6 for step in course]
    assert corrected == [False] * none + [True] * (50 - none)
    assert course[-1].loss < 0.8 * course[0].loss


def test_ddp_trains_the_network_of_one_process(tmp_path):
    code = """
import sys, torch, ddp
result = ddp.main(["--steps", "20", "--rendezvous", f"file://{sys.argv[1]}/rendezvous"])
torch.save(tuple(result), f"{sys.argv[1]}/{sys.argv[2]}.pt")
"""
    paths = (str(EXAMPLES), str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 240
    try:
        said = [rank.communicate(timeout=max(deadline - time.monotonic(), 1)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 processes on cpu" in said[0][0] and said[1][0] == ""

    (losses, state, alone), (losses1, state1, _) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert losses == losses1 and losses[-1] < losses[0]
    assert state["1.num_batches_tracked"] == 20
    torch.testing.assert_close(state, state1, rtol=0, atol=0)
    torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)


def test_ddp_alone_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2 examples/ddp.py"):
        recipe("ddp").main([])


def test_crossq_learns_without_a_target_network():
    result = recipe("crossq").main(["--updates", "500", "--warmup", "200"])
    assert all(map(math.isfinite, result.losses))
    assert all(map(math.isfinite, result.returns))
    assert result.returns[-1] > -8 > -30 > result.returns[0]
    for critic in result.critics:
        layers = [layer for layer in critic if isinstance(layer, BatchRenorm1d)]
        assert len(layers) == 3
        for layer in layers:
            # One joint forward an update moves the statistics; those for the actor move nothing.
            assert layer.num_batches_tracked == 500
            schedule = RenormSchedule.from_tensor(layer.schedule)
            assert schedule.limits_at(199) == (1, 0) and schedule.limits_at(200) == (3, 5)


def test_resume_goes_on_to_the_bit():
    result = recipe("resume").main(["--steps", "60"])
    assert result.whole == result.resumed and len(set(result.whole)) == 60
    r_max, d_max = result.limits  # in mid-schedule: neither is at an end
    assert 1 < r_max < 3 and 0 < d_max < 5


def test_export_onnx_infers_the_same(tmp_path):
    for package in recipe("export_onnx").PACKAGES:
        pytest.importorskip(package)
    path = tmp_path / "kept.onnx"
    result = recipe("export_onnx").main(["--steps", "80", "--out", str(path)])
    assert path.exists()
    assert result.nodes.count("BatchNormalization") == 3  # of 4: one is in its convolution
    assert result.nodes.count("Conv") == 3
    assert result.apart < 1e-4 and result.agree == 1
    assert result.accuracy > 0.8


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_export_onnx_says_what_is_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"{package} is missing: pip install onnx onnxscript"):
        recipe("export_onnx").main([])


def test_clip_rates_finds_limits_that_clip_little():
    arguments = ["--windows", "10", "--window", "25", "--aim", "0.05"]
    windows, schedule = recipe("clip_rates").main(arguments)
    assert windows[0] == windows[1] == (1.0, 0.0, 1.0, 1.0)  # the warm-up clips everything
    last = windows[-1]
    assert last.r_clipped < 0.1 and last.d_clipped < 0.1 and last.r_max < 6 and last.d_max < 6
    for before, after in zip(windows[1:], windows[2:], strict=False):
        assert (after.r_max > before.r_max) == (before.r_clipped > 0.05)
        assert (after.d_max > before.d_max) == (before.d_clipped > 0.05)
    assert schedule.warmup_steps == 50 and schedule.limits_at(250) == (
        schedule.r_max,
        schedule.d_max,
    )


def test_examples_depend_on_nothing_but_torch():
    """What else one takes is imported in its main, where it says what to install."""
    for name in RECIPES:
        source = inspect.getsource(recipe(name))
        imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
        assert imported <= {*sys.stdlib_module_names, "torch", "batchrenorm_cuda"}
