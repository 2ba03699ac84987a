"""The parity harness: it passes on this build, and it would notice."""

from __future__ import annotations

import math

import pytest
import torch
from cases import by_name, each_case
from torch import Tensor

from batchrenorm_cuda import functional, parity
from batchrenorm_cuda.parity import compute, report, situations, tensors
from batchrenorm_cuda.parity.cases import CASES, FLOATS
from batchrenorm_cuda.parity.check import check

CPU = torch.device("cpu")


@each_case()
def test_every_case_passes_on_the_cpu(case, dtype):
    verdict = check(case, dtype, CPU)
    assert verdict.ok, report.line(verdict)
    assert all(math.isfinite(result.peer) for result in verdict.results.values())


@pytest.mark.parametrize("situation", situations.SITUATIONS, ids=lambda s: s.name)
def test_every_situation_passes_on_the_cpu(situation):
    try:
        assert situation.check(CPU) == []
    except situations.Skip as reason:
        assert situation.name in ("no synchronisation", "other device"), reason


@pytest.mark.gpu
def test_everything_passes_on_cuda(capsys):
    status = parity.main(["--device", "cuda"])
    out = capsys.readouterr().out
    assert status == 0, "\n".join(line for line in out.splitlines() if not line.endswith(" ok"))


def test_cases_are_told_apart():
    names = [item.name for item in [*CASES, *situations.SITUATIONS]]
    assert len(names) == len(set(names))
    assert all(item.why for item in [*CASES, *situations.SITUATIONS])


@each_case(dtypes=(torch.float32,))
def test_tensors_are_what_the_case_says(case, dtype):
    t = tensors.make(case, dtype, CPU)
    assert t.x.shape == t.dy.shape == torch.Size(case.shape)
    again = tensors.make(case, dtype, CPU)
    assert torch.equal(t.x.nan_to_num(), again.x.nan_to_num()) and torch.equal(t.dy, again.dy)
    kept = tensors.has_strides(t.x, tensors.expected_strides(t.x))
    assert kept == (
        not case.form.startswith("sliced") and case.form not in {"strided", "expanded", "permuted"}
    )
    assert not kept or (t.x.data_ptr() % 16 == 0) == ("misaligned" not in case.form)


def test_far_moving_statistics_are_clipped_on_every_side():
    case = by_name("r and d clipped")
    _, _, r, d = compute.corrections(case, tensors.make(case, torch.float32, CPU))
    pairs = set(zip(r.mul(3).round().tolist(), d.round().tolist(), strict=True))
    assert pairs == {(9.0, 5.0), (9.0, -5.0), (1.0, 5.0), (1.0, -5.0)}


# Mistakes that an implementation might make, each in an otherwise right one.


def _sqrt(variance: Tensor, eps: float, mistake: str) -> Tensor:
    return (
        variance.clamp_min(0).sqrt() + eps
        if mistake == "eps outside the root"
        else (variance + eps).sqrt()
    )


def with_mistake(mistake: str):
    """Batch Renorm in torch ops around a pivot, right but for the one mistake; "" is the
    control."""

    def batch_renorm(
        x, running_mean, running_std, weight, bias, training, momentum, eps, r_max, d_max
    ):
        real = (
            x.dtype
            if mistake == "statistics in the dtype of x"
            else tensors.statistic_dtype(x.dtype)
        )
        dims, wide = [0, *range(2, x.dim())], x.to(real)

        def column(t):
            return tensors.column(t, x)

        weight = torch.ones(x.size(1)) if weight is None else weight
        bias = torch.zeros(x.size(1)) if bias is None else bias
        if not training and running_mean is not None:
            std = (
                (running_std**2 + eps).sqrt()
                if mistake == "eps again in inference"
                else running_std
            )
            return ((wide - column(running_mean)) * column(weight / std) + column(bias)).to(x.dtype)

        pivot = wide.detach().mean(dims)
        if mistake == "a pivot far from the mean":
            pivot = pivot + wide.detach().std(dims)
        around = wide - column(pivot)
        seen = around[:-1] if mistake == "last example not reduced" else around
        offset = seen.mean(dims)
        variance = (seen - column(offset)).square().mean(dims)
        m = seen.numel() / seen.size(1)
        if mistake == "E[x^2] - E[x]^2":
            variance = (wide * wide).mean(dims) - wide.mean(dims).square()
        if mistake == "unbiased variance":
            variance = variance * m / (m - 1)
        std = _sqrt(variance, eps, mistake)
        if mistake == "no projection":
            offset, std = offset.detach(), std.detach()
        r, d = torch.ones_like(std), torch.zeros_like(std)
        if running_mean is not None:
            mean, old_mean, old_std = (
                (pivot + offset).detach(),
                running_mean.clone(),
                running_std.clone(),
            )
            weight_of_batch = (
                1 - momentum if mistake == "momentum the other way round" else momentum
            )
            if mistake != "statistics not moved":
                running_mean += weight_of_batch * (mean - running_mean)
                running_std += weight_of_batch * (std.detach() - running_std)
            if mistake == "moving average of the variance":
                running_std.copy_((old_std**2 + momentum * (std.detach() ** 2 - old_std**2)).sqrt())
            if mistake == "r and d from moved statistics":
                old_mean, old_std = running_mean.clone(), running_std.clone()
            r = (std if mistake == "r differentiated" else std.detach()) / old_std
            d = ((pivot - old_mean) + offset.detach()) / old_std
            r = r if mistake == "r not clipped" else r.clamp(1 / r_max, r_max)
            r = r.clamp(max=r_max) if mistake == "r not clipped from below" else r
            d = (
                d.clamp(max=d_max)
                if mistake == "d not clipped from below"
                else d.clamp(-d_max, d_max)
            )
        x_norm = (around - column(offset)) / column(std)
        if mistake == "a NaN spreads":
            x_norm = x_norm + 0 * x_norm.detach().sum()
        constant = weight.detach() if mistake == "dweight without d" else weight
        y = x_norm * column(weight * r) + column(constant * d + bias)
        if mistake == "last channel forgotten":
            y = torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], 1)
        if mistake == "differs from run to run":
            y = y + 1e-7 * torch.rand(())
        return torch.empty_like(x).copy_(y)

    return batch_renorm


MISTAKES = [
    "eps outside the root",
    "statistics in the dtype of x",
    "eps again in inference",
    "last example not reduced",
    "E[x^2] - E[x]^2",
    "a pivot far from the mean",
    "unbiased variance",
    "no projection",
    "momentum the other way round",
    "statistics not moved",
    "moving average of the variance",
    "r and d from moved statistics",
    "r differentiated",
    "r not clipped",
    "d not clipped from below",
    "a NaN spreads",
    "dweight without d",
    "last channel forgotten",
    "differs from run to run",
]
NOTICING = [case for case in CASES if case.quick and not case.through_module] + [
    by_name("NaN in a channel")
]


def failing(monkeypatch, mistake: str) -> list[str]:
    monkeypatch.setattr(functional, "batch_renorm", with_mistake(mistake))
    dtype = torch.float16 if mistake == "statistics in the dtype of x" else torch.float32
    return [case.name for case in NOTICING if not check(case, dtype, CPU).ok]


def test_a_right_implementation_of_another_kind_passes(monkeypatch):
    assert failing(monkeypatch, "") == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, monkeypatch):
    assert failing(monkeypatch, mistake)


# From a wrong result to the exit status.


def _wrong_dweight(results):
    results["dweight"][3] *= 1.0 + 1e-4


def _stale_statistics(results):
    results["running_mean"].zero_()


def _nan(results):
    results["dx"].view(-1)[7] = float("nan")


def _wrong_format(results):
    results["y"] = results["y"].contiguous(memory_format=torch.channels_last)


def _wrong_dtype(results):
    results["dbias"] = results["dbias"].double()


def _missing(results):
    del results["running_std"]


@pytest.mark.parametrize(
    "spoil", [_wrong_dweight, _stale_statistics, _nan, _wrong_format, _wrong_dtype, _missing]
)
def test_the_exit_status_says_that_a_result_is_wrong(spoil, monkeypatch, capsys):
    right = compute.by_op

    def spoiled(case, t):
        results, steps = right(case, t)
        results = {name: result.clone() for name, result in results.items()}
        spoil(results)
        return results, steps

    command = ["--device", "cpu", "--dtype", "float32", "--only", "4-D"]
    assert parity.main(command) == 0
    monkeypatch.setattr(compute, "by_op", spoiled)
    assert parity.main(command) == 1
    assert "1 of 1 FAILED" in capsys.readouterr().out


def test_a_wrong_counter_is_a_fault(monkeypatch, capsys):
    right = compute.by_op
    monkeypatch.setattr(compute, "by_op", lambda case, t: (right(case, t)[0], case.step))
    assert parity.main(["--device", "cpu", "--dtype", "float32", "--only", "in mid-ramp"]) == 1
    assert "num_batches_tracked is 15000, not 15001" in capsys.readouterr().out


def test_an_exception_fails_its_case_and_the_others_run(monkeypatch, capsys):
    right = compute.by_op

    def raises(case, t):
        if case.name == "momentum = 1":
            raise RuntimeError("an error of the launch")
        return right(case, t)

    monkeypatch.setattr(compute, "by_op", raises)
    assert parity.main(["--device", "cpu", "--dtype", "float32", "--only", "momentum = "]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: an error of the launch" in out and "1 of 4 FAILED" in out


def test_a_situation_that_raises_fails(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("illegal address")

    situation = situations.Situation("graph replay", "", broken)
    monkeypatch.setattr(parity, "SITUATIONS", [situation])
    assert parity.main(["--device", "cpu", "--only", "graph replay"]) == 1
    assert "illegal address" in capsys.readouterr().out


def test_quick_is_a_part_that_meets_every_dtype_layout_and_way():
    quick = [case for case in CASES if case.quick]
    assert len(quick) < len(CASES) / 3
    assert {case.shape_on(CPU).__len__() for case in quick} >= {2, 4}
    assert {case.form for case in quick} >= {"contiguous", "channels_last", "misaligned"}
    assert {case.training for case in quick} == {True, False}
    assert any(case.schedule for case in quick) and any(case.momentum is None for case in quick)
    assert {dtype for case in quick for dtype in case.dtypes} == set(FLOATS)


def test_the_list_gives_reasons(capsys):
    assert parity.main(["--list"]) == 0
    assert by_name("65 channels").why in capsys.readouterr().out


def test_an_empty_selection_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parity.main(["--only", "no such case"])
    assert "no such case" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "nonsense", "meta"])
def test_a_device_that_cannot_be_used_is_one_clear_error(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        parity.main(["--device", name])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("python -m batchrenorm_cuda parity: ")
    )


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ([[], []], "skipped"),
        ([["a kernel"], []], "0 launches"),
        ([["a"], ["b", "c"]], "2 launches"),
    ],
)
def test_a_profiler_that_may_not_look_is_no_fault(seen, verdict, monkeypatch):
    """Where CUPTI is not allowed it records nothing at all; of one pass alone it is a fault."""
    monkeypatch.setattr(situations, "launches", lambda case, device: tuple(seen))
    try:
        faults = situations.one_launch(CPU)
    except situations.Skip as reason:
        faults = [f"skipped: {reason}"]
    assert verdict in faults[0]
