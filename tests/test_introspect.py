"""What was built, plans as Python sees them, `doctor` and the command line."""

import pytest
import torch

from batchrenorm_cuda import _C, introspect
from batchrenorm_cuda.__main__ import main


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
    assert f"processor   {_C.cpu_info()['instructions']}, settings for" in text
    assert "CPU         a training step is right" in text


def test_doctor_sees_a_stale_build(monkeypatch):
    info = {**_C.build_info(), "version": "0.0.1"}
    monkeypatch.setattr(introspect._C, "build_info", lambda: info)
    (problem,) = introspect.doctor()[1]
    assert "0.0.1" in problem
    assert introspect.REBUILD in problem


def test_doctor_sees_settings_of_no_processor(monkeypatch):
    monkeypatch.setenv("BATCHRENORM_CPU_TRAITS", "zen9")
    (problem,) = introspect.doctor()[1]
    assert problem == "BATCHRENORM_CPU_TRAITS must be one of other, intel, zen5, got 'zen9'"


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


def test_parity_has_its_own_options(capsys):
    with pytest.raises(SystemExit):
        main(["parity", "--help"])
    assert "--quick" in capsys.readouterr().out
