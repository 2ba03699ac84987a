"""The benchmark's arithmetic and its command: what it counts, how it compares, what it promises."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchrenorm_cuda import _C, BatchRenorm2d

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is no part of the installed package

from bench import (  # noqa: E402
    OPS,
    OURS,
    PEER,
    acceptance,
    dram,
    machine,
    memory,
    plot,
    providers,
    roofline,
    run,
    shapes,
    small,
    stopwatch,
    summary,
    table,
    timing,
    variants,
)

CPU = torch.device("cpu")
SMALL = shapes.Problem((4, 6, 5, 7), "float32", "nchw")


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 6), (2, 6, 5), (2, 6, 5, 7), (2, 6, 3, 5, 7)], ids=str)
def test_a_problem_makes_dense_tensors_of_its_layout(shape, layout):
    x = shapes.Problem(shape, "bfloat16", layout).tensor(CPU)
    assert x.shape == torch.Size(shape) and x.dtype == torch.bfloat16
    rows = len(shape) == 2 or layout == "nhwc"
    assert x.stride(1) == (1 if rows else math.prod(shape[2:]))
    assert x.untyped_storage().nbytes() == 2 * x.numel()


def test_suites_are_what_their_names_say():
    assert len(shapes.SUITES["resnet50"]) == 9
    assert {shape[0] for shape in shapes.SUITES["resnet50-large"]} == {256}
    assert {len(shape) for shape in shapes.SUITES["3d"]} == {5}
    assert shapes.QUICK.keys() == shapes.SUITES.keys()
    found = shapes.problems("rl", ["float32"], list(shapes.LAYOUTS))
    assert [(p.name, p.layout) for p in found] == [("256x256", "nhwc"), ("1024x512", "nhwc")]


def test_bytes_are_a_property_of_the_problem():
    x = 4 * 6 * 5 * 7 * 4
    found = {op: roofline.bytes_moved(SMALL, op) for op in OPS}
    assert found == {"forward": 2 * x, "backward": 3 * x, "inference": 2 * x, "train": 5 * x}


@pytest.mark.parametrize("name", [OURS, PEER, "reference"])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_runs_every_operation(name, op):
    layer = providers.PROVIDERS[name].make(SMALL, CPU)
    x, dy = SMALL.tensor(CPU), SMALL.tensor(CPU)
    call = providers.operation(layer, op, x, dy)
    for _ in range(2):  # a graph that backward has gone through once must still be there
        made = call()
    if op in ("backward", "train"):
        dx, dweight, dbias = made
        assert dx.shape == x.shape and dweight.shape == dbias.shape == (6,)
        torch.testing.assert_close(dbias, dy.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    else:
        assert made.shape == x.shape and made.requires_grad == (op == "forward")


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta as any device that is not the CPU
def test_the_layer_is_timed_as_users_run_it(device):
    """With a schedule and a counter: they are what limits come from in the launch that is timed."""
    layer = providers.PROVIDERS[OURS].make(SMALL, torch.device(device))
    for module, training in ((layer.train, True), (layer.infer, False)):
        assert isinstance(module, BatchRenorm2d) and module.training == training
        assert {t.device.type for t in module.state_dict().values()} == {device}
        assert module.num_batches_tracked is not None and module.schedule is not None
    x = SMALL.tensor(torch.device(device))
    y = providers.operation(layer, "forward", x, x)()
    assert y.requires_grad and y.shape == x.shape
    if device == "cpu":
        assert int(layer.train.num_batches_tracked) == 1


def test_compiled_gradients_of_the_reference_are_never_timed():
    provider = providers.PROVIDERS["compiled reference"]
    assert not provider.measures("backward", CPU) and not provider.measures("train", CPU)


def test_inputs_rotate_past_the_cache():
    cache = roofline.cache_bytes(CPU)
    assert cache >= 1 << 18
    problem = shapes.Problem((32, 64, 56, 56), "float32", "nchw")
    sets = timing.sets_needed(problem, CPU, hot=False)
    assert (sets - 1) * problem.tensor_bytes >= 2 * cache
    assert timing.sets_needed(problem, CPU, hot=True) == 1
    assert timing.sets_needed(SMALL, CPU, hot=False) == timing.MOST_SETS["cpu"]
    huge = shapes.Problem((1 << 20, 1 << 10), "float32", "nhwc")
    assert timing.sets_needed(huge, CPU, hot=False) == 2


class FakeGpu:
    """torch.cuda's events on a clock of its own, in microseconds: `now` is the host's, `free` when
    the GPU will have done what is queued."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.free = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.queue(takes=0.0, launch=1.0)
                self.at = gpu.free

            def query(self) -> bool:
                return self.at <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, stop) -> float:
                return (stop.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 2e3, 5.0))

    def queue(self, takes: float, launch: float) -> None:
        self.now += launch
        self.free = max(self.free, self.now) + takes


@pytest.mark.parametrize("launch", [10.0, 90.0, 700.0])
def test_the_host_is_not_in_what_a_gpu_takes(monkeypatch, launch):
    gpu, watch = FakeGpu(monkeypatch), stopwatch.Stopwatch()
    for _ in range(3):
        assert watch.seconds(lambda: gpu.queue(60.0, launch)) == pytest.approx(60e-6)


def test_a_host_that_no_spin_can_cover_is_waited_for_once(monkeypatch):
    gpu, watch, launches = FakeGpu(monkeypatch), stopwatch.Stopwatch(), []

    def launch():
        launches.append(gpu.now)
        gpu.queue(60.0, 5000.0)

    assert watch.seconds(launch) > 3e-3 and len(launches) == 5
    assert watch.seconds(launch) > 3e-3 and len(launches) == 6


def test_no_provider_uses_the_inputs_that_another_has_just_used():
    """Of two that took the same inputs in turn, each would time how fast the cache is."""
    used = []

    def layer(x):
        used.append(x.data_ptr())
        return x

    inputs = [(torch.zeros(1), torch.zeros(1)) for _ in range(4)]
    order = [x.data_ptr() for x, _ in inputs]
    rotation = timing.Rotation(len(inputs))
    fake = providers.Layer(layer, layer, ())
    samplers = [timing.CpuSampler(fake, "inference", inputs, rotation) for _ in "ab"]
    samplers[0].calls, samplers[1].calls = 3, 2
    used.clear()
    for i in (0, 1, 0, 1):
        samplers[i].sample()
    begin = order.index(used[0])
    assert used == [order[(begin + i) % 4] for i in range(10)]


def test_providers_take_turns_and_the_order_alternates():
    order = []

    def sampler(name):
        return lambda: order.append(name) or 1.0

    samples = timing.take_turns({"a": sampler("a"), "b": sampler("b")}, {"a": 3, "b": 2})
    assert order == ["a", "b", "b", "a", "a"]
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 2}


def test_a_timing_is_a_median_with_the_spread_of_the_middle():
    found = timing._timing([1.0, 2.0, 3.0, 4.0, 100.0], "clock")
    assert found.seconds == 3.0 and found.samples == 5
    assert 0.5 < found.spread < 25


def test_a_provider_that_fails_does_not_take_the_others_with_it(monkeypatch):
    def broken(problem, device):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(providers.PROVIDERS, "broken", providers.Provider("broken", broken))
    budget = timing.Budget(0.0, 3, 3)
    found = timing.time_operation(SMALL, "forward", ["broken", OURS], CPU, budget=budget)
    assert isinstance(found["broken"], RuntimeError)
    assert found[OURS].seconds > 0 and found[OURS].samples == 3
    row = run._row(SMALL, "forward", "broken", found["broken"], None, 1e9)
    text = table.line(row | {"hot": False, "threads": 1, "backend": "", "in_cache": False})
    assert "failed: RuntimeError: out of memory" in text


def test_memory_of_a_step():
    rows = memory.measure(CPU)
    by_provider = {row["provider"]: row for row in rows[:2]}
    assert by_provider[OURS]["saved"] == 64 * 4 * (5 + 1)  # stats and weight
    assert 2.0 <= by_provider[OURS]["peak"] / by_provider[OURS]["tensor_bytes"] < 2.01


def test_small_calls_run():
    assert small.run(CPU, teams=False) == 2 * len(small.NAMES) + 1


# The planner moves on, and a sanitizer that no longer meets a way through the kernels says nothing.
@pytest.mark.parametrize(
    "way, is_taken",
    [
        ("a team", lambda p: p.team > 1),
        ("several waves", lambda p: p.slabs > p.teams > 0 and p.team > 1),
        ("prefetch", lambda p: p.prefetch and not p.bundles),
        ("retained", lambda p: p.retained and not p.bundles),
        ("read again", lambda p: p.rounds > p.retained + 1),
        ("a bundle alone", lambda p: p.bundles and p.team == 1),
        ("bundles, prefetch", lambda p: p.bundles and p.prefetch),
        ("bundles, retained", lambda p: p.bundles and p.retained and p.team > 1),
        ("unaligned, prefetch", lambda p: p.unaligned and p.prefetch),
        ("unaligned, retained", lambda p: p.unaligned and p.retained),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_small_calls_take_every_way_of_an_h200(way, is_taken):
    assert any(
        is_taken(
            _C.plan(
                which,
                *case.shape[:2],
                math.prod(case.shape[2:]),
                layout="channels_last" if case.form == "channels_last" else "channels_first",
                dtype=str(dtype).removeprefix("torch."),
            )
        )
        for case in small.TEAMS
        for dtype in small.DTYPES
        for which in ("forward", "backward")
    )


# Acceptance: rows made up so that the verdict is known.


def _row(provider=OURS, **fields):
    row = {
        "suite": "resnet50",
        "shape": "32x64x112x112",
        "dtype": "float32",
        "layout": "nchw",
        "op": "train",
        "provider": provider,
        "tensor_bytes": 103_000_000,
        "us": 100.0,
        "method": "graph",
        "spread": 0.0,
        "of_roof": 0.9,
        "ratio": 2.0,
        "hot": False,
        "threads": None,
    }
    return row | fields


def _results(rows, device="cuda", **fields):
    empty = {"overhead": [], "memory": [], "launches": [], "dram": [], "cache_bytes": 50_000_000}
    return {"header": {"device": device}, "rows": rows} | empty | fields


def verdicts(results):
    return {row["measure"]: (row["verdict"], row["found"]) for row in acceptance.judge(results)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_was_not_measured_is_said_to_be_so(device):
    assert {verdict for verdict, _ in verdicts(_results([], device)).values()} == {"not measured"}


def test_the_mean_ratio_is_geometric_and_of_its_own_suite():
    rows = [
        _row(ratio=1.0),
        _row(ratio=4.0),
        _row(ratio=100.0, suite="rl"),
        _row(ratio=9.0, hot=True),
    ]
    found = verdicts(_results(rows))["NCHW train, float32, resnet50: x F.batch_norm, mean"]
    assert found == ("holds", pytest.approx(2.0))


def test_the_roof_counts_large_tensors_only():
    rows = [
        _row(op="forward", of_roof=0.7, tensor_bytes=24_000_000),
        _row(op="forward", of_roof=0.85),
        _row(op="forward", of_roof=0.75, layout="nhwc"),
    ]
    name = "NCHW forward, float32, 25 MB and more: of the roof"
    assert verdicts(_results(rows))[name] == ("holds", 0.85)
    rows.append(_row(op="forward", of_roof=0.79))
    assert verdicts(_results(rows))[name] == ("does not hold", 0.79)


def test_a_sum_over_shapes_weighs_by_time():
    suite = {"suite": "resnet50-large", "op": "backward"}
    rows = [_row(us=900.0, of_roof=1.0, **suite), _row(us=100.0, of_roof=0.1, **suite)]
    name = "NCHW backward, float32, sum of resnet50-large: of the roof"
    assert verdicts(_results(rows))[name] == ("holds", pytest.approx(0.91))


def test_one_slow_shape_breaks_the_promise_for_every_shape():
    rows = [_row(ratio=3.0), _row(ratio=0.94, shape="32x512x7x7")]
    found = verdicts(_results(rows))
    assert found["any shape, train: x F.batch_norm"] == ("does not hold", 0.94)
    assert found["any shape, forward: x F.batch_norm"] == ("not measured", None)


def test_noise_is_granted_on_the_cpu():
    rows = [_row(ratio=0.95, spread=0.08, threads=1), _row(PEER, ratio=1.0, spread=0.08, threads=1)]
    name = "any shape, train: x F.batch_norm, beyond the noise"
    assert verdicts(_results(rows, "cpu"))[name] == ("holds", pytest.approx(0.95 * 1.08))


def test_failed_rows_are_not_measurements():
    row = _row()
    del row["us"]
    assert verdicts(_results([row]))["any shape, train: x F.batch_norm"][0] == "not measured"


def test_figures_with_the_host_in_them_are_not_judged():
    """A capture that failed: calls one by one, beside a peer's graph."""
    rows = [_row(ratio=0.2, method="events", because="RuntimeError: no"), _row(ratio=3.0)]
    assert verdicts(_results(rows))["any shape, train: x F.batch_norm"] == ("holds", 3.0)
    assert verdicts(_results(rows[:1]))["any shape, train: x F.batch_norm"][0] == "not measured"


def test_a_run_that_was_cut_short_has_held_so_far():
    name, before = "any shape, train: x F.batch_norm", {"stopped_before": "rl: train 256x256"}
    assert verdicts(_results([_row(ratio=3.0)], **before))[name] == ("holds so far", 3.0)
    assert verdicts(_results([_row(ratio=0.9)], **before))[name] == ("does not hold", 0.9)


def test_launches_overhead_memory_and_dram():
    results = _results(
        [],
        launches=[{"case": "4-D", "ran": [["forward_kernel"], ["memset", "backward_kernel"]]}],
        overhead=[{"shape": "4x8", "us": {"BatchRenorm1d": 20.0, "BatchNorm1d": 25.0}}],
        dram=[{"dram_bytes": 95.0, "floor_bytes": 100.0}],
    )
    found = verdicts(results)
    assert found["kernel launches each way"] == ("does not hold", 2)
    assert found["host overhead: of nn.BatchNorm's"] == ("holds", 0.8)
    assert found["DRAM bytes: distance from the floor"] == ("holds", pytest.approx(0.05))


@pytest.mark.parametrize("ran", [[[], []], [["forward_kernel"], []]])
def test_launches_that_the_profiler_did_not_see_are_not_measured(ran):
    results = _results([], launches=[{"case": "4-D", "ran": ran}])
    assert verdicts(results)["kernel launches each way"][0] == "not measured"


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","byte","byte"
"""


def test_ncu_output_is_read_in_the_order_of_the_work():
    lines = [f'"{i}","brn::kernel","1,000,{i:03}","500"' for i in range(6)]
    rows = dram.read((NCU + "\n".join(lines)).splitlines())
    assert [row["op"] for row in rows] == ["forward", "backward"] * 3
    assert rows[3]["dram_bytes"] == 1_000_003 + 500
    assert rows[0]["floor_bytes"] == 2 * dram.PROBLEMS[0].tensor_bytes


def test_ncu_output_with_other_kernels_is_refused():
    with pytest.raises(ValueError, match="expected 6 kernels, found 1"):
        dram.read((NCU + '"0","brn::kernel","1","2"').splitlines())


# The command.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "r.json"
    threads = torch.get_num_threads()
    command = ["--device", "cpu", "--quick", "--suite", "cpu", "--dtype", "float32", "--layout"]
    command += ["nhwc", "--op", "forward,train", "--threads", "1", "--seconds", "2"]
    try:
        assert run.main([*command, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    return path


def test_results_are_written(measured):
    results = json.loads(measured.read_text())
    assert {row["provider"] for row in results["rows"]} == {OURS, PEER}
    for row in results["rows"]:
        assert row["us"] > 0 and row["gb_per_s"] > 0 and row["threads"] == 1
        problem = shapes.Problem(tuple(map(int, row["shape"].split("x"))), "float32", "nhwc")
        moved = roofline.bytes_moved(problem, row["op"])
        assert row["gb_per_s"] == pytest.approx(moved / row["us"] / 1e3)
    assert results["header"]["torch"] == torch.__version__ and results["quick"]
    assert results["roof"]["1"] > 1e8
    assert {row["verdict"] for row in results["acceptance"]} >= {"not measured"}


def test_what_fails_takes_nothing_else_with_it(monkeypatch, tmp_path, capsys):
    """A comparison, as after a capture that has left torch's generator unusable; what follows the
    rows."""
    calls = iter([RuntimeError("no capture\nat all")])

    def backend(*_):
        for error in calls:
            raise error
        return "native"

    def overhead_of(*_):
        raise RuntimeError("nor this")

    monkeypatch.setattr(run.providers, "backend_of_peer", backend)
    monkeypatch.setattr(run.overhead, "measure", overhead_of)
    path, threads = tmp_path / "r.json", torch.get_num_threads()
    command = ["--device", "cpu", "--quick", "--suite", "cpu", "--dtype", "float32", "--layout"]
    command += ["nhwc", "--op", "forward,inference", "--threads", "1", "--seconds", "0.5"]
    try:
        with pytest.raises(RuntimeError, match="nor this"):
            run.main([*command, "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    failed, measured = results["rows"][:2], results["rows"][2:]
    assert [row["error"] for row in failed] == ["RuntimeError: no capture"] * 2
    assert measured and all(row["us"] > 0 for row in measured)
    assert results["stopped_before"].startswith("cpu: ") and results["acceptance"]
    assert "failed: RuntimeError: no capture" in capsys.readouterr().out


def test_a_summary_is_of_our_rows_and_geometric():
    rows = [_row(ratio=1.0), _row(ratio=4.0), _row(op="forward", ratio=3.0), _row(PEER, ratio=9.0)]
    rows += [_row(ratio=7.0, hot=True), {"provider": OURS, "hot": False, "error": "no"}]
    header, rule, line = summary.lines(_results(rows))
    assert header == "| layout, dtype | threads | forward | train |"
    assert rule.count("|") == header.count("|")
    assert line == "| NCHW, float32 |  | 3.00 (3.00 ... 3.00) | 2.00 (1.00 ... 4.00) |"


@pytest.mark.skipif(not (ROOT / "bench/results").exists(), reason="not part of an sdist")
@pytest.mark.parametrize("folder", ["other-avx2", "zen5-avx512", "intel-avx512"])
def test_what_is_published_are_the_results_that_are_committed(folder):
    directory = ROOT / "bench/results/cpu" / folder
    results = json.loads((directory / "cpu.json").read_text())
    published = (ROOT / "docs/cpu.md").read_text()
    assert "\n".join(summary.lines(results)) in published
    if folder == "zen5-avx512":
        assert "\n".join(summary.lines(results)) in (ROOT / "README.md").read_text()
    kept = json.loads((directory / "kept.json").read_text())
    assert kept["header"]["commit"] == results["header"]["commit"]
    assert machine.directory_name(results["header"]) == f"cpu/{folder}"
    for found in (results, kept):
        rows = list(summary.of_large_tensors(found))
        assert len(rows) == 2 and "\n".join(rows) in published
        assert not found["quick"] and "+changes" not in found["header"]["commit"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_results_are_drawn(measured, tmp_path):
    assert plot.main([str(measured), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.png", "ratios.png"}


def test_an_unknown_name_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "resnet51"])
    assert "'resnet51' is not one of resnet50," in capsys.readouterr().err


def test_the_folder_of_a_chip():
    assert machine.directory_name({"device": "cuda", "chip": "NVIDIA H200"}) == "nvidia-h200"
    here = machine.header(CPU)
    assert machine.directory_name(here).startswith(f"cpu/{_C.cpu_info()['settings']}-")
    zen4 = here | {"settings": "other", "capability": "NO AVX"}
    assert machine.directory_name(zen4) == "cpu/other-no-avx"


def test_the_gpu_script_goes_on_when_every_step_fails(tmp_path):
    tree = tmp_path / "tree"
    (tree / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tree / "bench")
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "out"],
        cwd=tree,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false", "SECONDS_IN_ALL": "60"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    summary = (tree / "out" / "summary.txt").read_text()
    for step in ("build", "doctor", "parity, quick", "parity, all", "benchmark"):
        assert f"{step:28} failed, exit status 1" in summary
    assert "s in all" in summary and len(list((tree / "out").iterdir())) <= 8


STUB = """#!/bin/bash
[[ $* == *--help* ]] && echo "--kernel-name worksteal --session-timeout"
[[ $0 == */nvcc ]] && cp "$0" "${@: -1}"
exit 0
"""


@pytest.mark.parametrize(("seconds", "rows"), [(460, range(125, 126)), (90, range(30, 46))])
def test_what_the_gpu_script_calls(tmp_path, seconds, rows):
    tree, stubs = tmp_path / "tree", tmp_path / "stubs"
    (tree / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tree / "bench")
    built = tree / "build/some/csrc/kernels/forward.cu.o"
    built.parent.mkdir(parents=True)
    built.touch()
    stubs.mkdir()
    for name in ("python", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    env = {"PATH": f"{stubs}:/usr/bin:/bin", "PYTHON": "python", "SECONDS_IN_ALL": str(seconds)}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "out"], cwd=tree, env=env, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = tree / "out"
    assert "failed" not in (out / "summary.txt").read_text()
    logs = "".join(path.read_text() for path in out.glob("*.log"))
    calls = [line[2:] for line in logs.splitlines() if line.startswith("$ ")]

    def call(*words: str) -> str:
        (found,) = [line for line in calls if all(word in line for word in words)]
        return found

    # The machine forbids locked clocks; a refused launch that a smaller one follows is no error.
    assert "--clock-control none" in call("ncu", "bench.dram work")
    assert "--report-api-errors no" in call("--tool memcheck", "--kernel-name kns=brn")
    for tool in ("racecheck", "synccheck"):
        assert "--report-api-errors" not in call(f"--tool {tool}")
    tests = call("-m pytest", "--continue-on-collection-errors", "-n 6 --dist worksteal")
    assert "--session-timeout=100" in tests and "-rfE" in tests
    benchmark = call("bench.run").split()
    assert int(benchmark[benchmark.index("--seconds") + 1]) in rows
    assert call("/sweep 55")
    assert " build/some/csrc/kernels/forward.cu.o csrc/kernels/backward.cu " in call(
        "bench/sweep.cu"
    )


@pytest.fixture(scope="module")
def cpu_objects() -> list[Path]:
    """Of the build that is tested, since compiling them anew takes a minute."""
    tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-*"
    builds = sorted(ROOT.glob(f"build/{tag}/csrc/cpu"), key=lambda path: path.stat().st_mtime)
    if not builds or sys.platform != "linux":
        pytest.skip("needs what a build in place has left, and OpenMP")
    return [builds[-1] / f"{source.name}.o" for source in (ROOT / "csrc/cpu").glob("*.cpp")]


@pytest.fixture(scope="module")
def cpu_function(cpu_objects):
    return variants.load(ROOT, cpu_objects, None)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("dtype", list(shapes.DTYPES))
def test_variants_run_the_pass_that_they_are_asked_for(cpu_function, monkeypatch, dtype, layout):
    """On the inputs whose turn it is, with the bits of the operators."""
    problem = shapes.Problem((4, 6, 5, 7), dtype, layout)
    inputs = [(problem.tensor(CPU) * 9 + 1, problem.tensor(CPU)) for _ in range(2)]
    monkeypatch.setattr(timing, "inputs_of", lambda *_: inputs)
    monkeypatch.setattr(timing, "sets_needed", lambda *_: len(inputs))
    real = torch.float64 if dtype == "float64" else torch.float32
    one, zero = torch.ones(6, dtype=real), torch.zeros(6, dtype=real)
    for op in OPS:
        comparison = variants.Comparison(problem, op, threads=2, hot=False, reads=True)
        for x, dy in inputs:
            y, dx = outputs = comparison.outputs()
            assert comparison.sample(cpu_function, outputs) > 0
            averages = (zero.clone(), one.clone())
            step = (*averages, None, None, 0.01, 1e-5, 3.0, 5.0, False)
            trained, stats = torch.ops.batchrenorm.forward(x, one, zero, *step)
            if op == "inference":
                assert torch.equal(y, torch.ops.batchrenorm.inference(x, one, zero, zero, one))
            else:
                assert torch.equal(y, trained)
            if op in ("backward", "train"):
                assert torch.equal(dx, torch.ops.batchrenorm.backward(dy, x, one, stats)[0])


def test_a_variant_finds_its_settings_and_leaves_the_users(cpu_objects, monkeypatch):
    seen = []
    monkeypatch.setattr(
        variants.Comparison,
        "sample",
        lambda *_: seen.append(variants.os.environ["BATCHRENORM_CPU_TRAITS"]),
    )
    monkeypatch.setenv("BATCHRENORM_CPU_TRAITS", "other")
    for settings in ("zen5", None, "intel"):
        variants.load(ROOT, cpu_objects, settings)
    assert seen == ["zen5", "other", "intel"]
    assert variants.os.environ["BATCHRENORM_CPU_TRAITS"] == "other"


def test_variants_compare_states(cpu_objects, monkeypatch, capsys):
    monkeypatch.setattr(variants, "objects_of", lambda tree: cpu_objects)
    names = [str(ROOT), *(f"{ROOT}:{name}" for name in _C.cpu_info()["known_settings"])]
    options = ["--shape", "2x3x4x5,6x7", "--dtype", "float32", "--seconds", "0", "--op", "forward"]
    assert variants.main([*names, *options]) == 0
    head, *rows, _, _, first_mean, second_mean = capsys.readouterr().out.splitlines()
    assert head == f"us of {names[0]}; times as fast: {', '.join(names[1:])}"
    assert [row.split()[:5] for row in rows] == [
        ["forward", "2x3x4x5", "float32", "nchw", "1"],
        ["forward", "2x3x4x5", "float32", "nhwc", "1"],
        ["forward", "6x7", "float32", "nhwc", "1"],
    ]
    assert all(len(row.split()) == 6 + len(names) - 1 for row in rows)
    of_one_shape = [float(ratio) for ratio in rows[0].split()[-3:]]
    assert [float(ratio) for ratio in first_mean.split()[-3:]] == pytest.approx(
        of_one_shape, abs=0.0051
    )
    assert second_mean.startswith("forward float32 nhwc 1 threads")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ("no-such-thing", "a checkout or a revision of git, got 'no-such-thing'"),
        ("docs", "a checkout or a revision of git, got 'docs'"),
        (".:z80", "settings must be one of .*, got 'z80'"),
    ],
)
def test_variants_refuse_what_is_no_state(state, complaint, capsys):
    with pytest.raises(SystemExit):
        variants.main([state])
    assert re.search(complaint, capsys.readouterr().err)
