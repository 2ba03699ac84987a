"""`doctor`, `explain` and the command line."""

import itertools
import subprocess
import sys

import pytest
import torch

from batchrenorm_cuda import _C, introspect
from batchrenorm_cuda.__main__ import main


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [[32, 64, 56, 56], [256, 256], [1, 1], [8, 3, 7], [2, 65, 5, 4, 3], [4, 1, 9, 9]],
    ids=str,
)
def test_explain_has_a_line_for_each_pass(shape, channels_last):
    for chip, dtype in itertools.product(introspect.CHIPS, introspect.DTYPES.values()):
        text = introspect.explain(shape, dtype, channels_last=channels_last, device_like=chip)
        lines = {line.split()[0]: line for line in text.splitlines() if "%" in line}
        assert list(lines) == ["forward", "backward", "inference"]
        for line in lines.values():
            assert 0 <= float(line.rstrip("%").split()[-1]) <= 100


def test_explain_says_what_the_kernel_will_do():
    plan = _C.plan("backward", 32, 64, 56 * 56, layout="channels_last", dtype="bfloat16")
    text = introspect.explain([32, 64, 56, 56], torch.bfloat16, channels_last=True)
    line = next(line for line in text.splitlines() if line.startswith("backward"))
    words = line.split()
    assert words[1:4] == [str(plan.teams), "x", str(plan.team)]
    assert int(words[4]) == plan.threads
    assert words[5:8] == [str(plan.slots), "x", str(plan.slot_bytes)]
    assert f"{3 * 32 * 64 * 56 * 56 * 2 / 1e6:.1f} MB" in line  # x and dy read, dx written
    assert "NOT a measurement" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(shape=[4]), "shape must be"),
        (dict(shape=[4, 0, 2]), "shape must be"),
        (dict(shape=[4, 4], dtype=torch.int32), "dtype must be"),
        (dict(shape=[4, 4], device_like="v100"), "device_like must be"),
    ],
)
def test_explain_refuses(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        introspect.explain(**arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("sideways", 1, 1, 1, {}),
            "pass must be one of forward, backward, inference, got sideways",
        ),
        (("forward", 0, 1, 1, {}), "batch, channels and spatial"),
        (("forward", 1, 1, 1, {"layout": "nhwc"}), "layout must be one of"),
        (("forward", 1, 1, 1, {"dtype": "int8"}), "dtype must be one of"),
        (("forward", 1, 1, 1, {"sm_count": 0}), "sm_count must be"),
        (("forward", 1, 1, 1, {"alignment": 2}), "alignment must be"),
        (("forward", 1, 1, 1, {"alignment": 12}), "alignment must be"),
    ],
)
def test_plan_refuses(arguments, complaint):
    *sizes, options = arguments
    with pytest.raises(ValueError, match=complaint):
        _C.plan(*sizes, **options)


def test_plans_compare_and_print():
    sizes = ("forward", 8, 65, 196)
    assert _C.plan(*sizes) == _C.plan(*sizes)
    assert _C.plan(*sizes) != _C.plan(*sizes, sm_count=1)
    plan = _C.plan(*sizes)
    assert repr(plan).startswith(f"Plan{{.slot_bytes = {plan.slot_bytes}, ")


@pytest.mark.parametrize(
    ("architectures", "capability", "how"),
    [
        (["8.0", "9.0"], (9, 0), "native"),
        (["8.0"], (8, 6), "native"),  # a later chip of the same generation
        (["8.6"], (8, 0), None),  # an earlier one
        (["8.9", "9.0"], (12, 0), None),
        (["9.0+PTX"], (12, 0), "through PTX"),
        (["12.0+PTX"], (9, 0), None),
        (["9.0a"], (9, 0), "native"),
        (["10.0a"], (10, 3), None),
        (["10.0f"], (10, 3), "native"),
        ([], (9, 0), None),
    ],
)
def test_covers(architectures, capability, how):
    assert introspect.covers(architectures, capability) == how


def test_doctor_finds_nothing_wrong_here():
    text, problems = introspect.doctor()
    assert problems == []
    assert torch.__version__ in text
    assert "CPU         a training step is right" in text


def test_doctor_sees_a_stale_build(monkeypatch):
    info = {**_C.build_info(), "version": "0.0.1"}
    monkeypatch.setattr(introspect._C, "build_info", lambda: info)
    (problem,) = introspect.doctor()[1]
    assert "0.0.1" in problem
    assert introspect.REBUILD in problem


class _Properties:
    name, major, minor, multi_processor_count = "NVIDIA Fake", 9, 0, 132


@pytest.mark.parametrize(
    ("built", "complaint"),
    [
        (dict(cuda=False, nvcc="", architectures=[]), "the build has no CUDA kernels"),
        (dict(cuda=True, nvcc="13.0", architectures=["8.0"]), "TORCH_CUDA_ARCH_LIST=9.0"),
    ],
    ids=["CPU build", "another architecture"],
)
def test_doctor_says_why_a_gpu_cannot_be_used(monkeypatch, capsys, built, complaint):
    info = {**_C.build_info(), **built}
    monkeypatch.setattr(introspect._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "GPU 0       NVIDIA Fake, 9.0, 132 SMs" in printed
    assert "PROBLEM: GPU 0" in printed
    assert complaint in printed


def test_doctor_sees_a_wrong_result(monkeypatch):
    right = torch.ops.batchrenorm.forward
    monkeypatch.setattr(
        torch.ops.batchrenorm, "forward", lambda *a: (right(*a)[0] * 1.001, right(*a)[1])
    )
    (problem,) = introspect.doctor()[1]
    assert "is off by" in problem


def test_the_command_line():
    python = [sys.executable, "-m", "batchrenorm_cuda"]
    shape = ["--shape", "32,64,56,56", "--dtype", "bfloat16", "--channels-last"]
    done = subprocess.run([*python, "explain", *shape], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == introspect.explain(
        [32, 64, 56, 56], torch.bfloat16, channels_last=True
    )
    wrong = subprocess.run(
        [*python, "explain", "--shape", "32,0"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode != 0
    assert wrong.stderr.startswith("error: shape must be")


def test_parity_has_its_own_options(capsys):
    with pytest.raises(SystemExit):
        main(["parity", "--help"])
    assert "--quick" in capsys.readouterr().out
