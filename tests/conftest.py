"""GPU tests, the emulator, and how hypothesis looks for examples."""

import os

import pytest
import torch
from hypothesis import settings

from batchrenorm_cuda import _C

# The same examples on every run, and no time limit: a failure is about the code, not the machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# cuDNN's convolutions, in networks around the layers: in all of float32's digits and the same every
# time, so that what differs is ours.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

REQUIRE_GPU = os.environ.get("BATCHRENORM_REQUIRE_GPU") == "1"


@pytest.fixture(scope="module")
def emulator():
    """An Emulator. A launch changes its chip and its schedule, so each file has one of its own."""
    from simt.emulator import load  # builds it

    return load()


def why_no_gpu() -> str | None:
    if not _C.build_info()["cuda"]:
        return "needs CUDA kernels, which this build does not have"
    if not torch.cuda.is_available():
        return "needs a GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason and not REQUIRE_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if REQUIRE_GPU and item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.fail(f"{reason}, and BATCHRENORM_REQUIRE_GPU=1", pytrace=False)


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [
        r for rs in terminalreporter.stats.values() for r in rs if isinstance(r, pytest.TestReport)
    ]
    gpu = {r.nodeid for r in reports if "gpu" in r.keywords}
    skipped = {r.nodeid for r in reports if "gpu" in r.keywords and r.outcome == "skipped"}
    terminalreporter.write_line(
        f"{len(gpu)} tests need a GPU: {len(skipped)} skipped, {len(gpu - skipped)} run"
    )
